"""Allocators: share a budget out among the matrices of a model."""
