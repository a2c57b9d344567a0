"""Signals: what a teacher tells a student about a batch. One file for each; they register."""
