"""Surgery: make the edges of a model narrower, or its stack of blocks shorter."""
