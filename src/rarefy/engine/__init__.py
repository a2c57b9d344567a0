"""The engine: capture, statistics, the walk, and the verb that drives them."""
