"""Objectives: what the training of a whole model lowers. One file for each; they register."""
