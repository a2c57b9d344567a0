"""One leaderboard of many recipes: what each costs, and what the model then no longer knows."""
