"""Formats: sets of matrices and how their members are stored."""
