"""Teachers: models that answer, score or are opened up, each at a declared level."""
