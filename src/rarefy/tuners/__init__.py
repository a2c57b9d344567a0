"""Tuners: methods that move numbers by gradient. One file each; they register themselves."""
