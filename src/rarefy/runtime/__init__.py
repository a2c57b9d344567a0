"""Runtime: modules that execute stored matrices, and the transformers plug-in."""
