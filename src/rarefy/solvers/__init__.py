"""Solvers: find a member of a format close to a matrix."""
