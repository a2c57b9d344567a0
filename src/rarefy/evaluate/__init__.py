"""Evaluation: distances to the dense model, footprint, speed."""
