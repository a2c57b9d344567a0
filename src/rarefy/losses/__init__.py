"""Losses: how far a student's reading of a token is from its target. One file for each idea."""
