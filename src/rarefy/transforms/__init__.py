"""Transforms: change the basis of an edge and leave the function as it is."""
