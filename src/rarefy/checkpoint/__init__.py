"""Checkpoints: reading lazily, writing as a stream, finding and importing."""
