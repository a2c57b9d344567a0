"""Synthesizers: training text made by a teacher, with the provenance of every row."""
