"""Grid rules: how the range of a grid is chosen."""
