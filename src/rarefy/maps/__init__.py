"""Model maps: decoder blocks as small graphs, one data file per architecture family."""
