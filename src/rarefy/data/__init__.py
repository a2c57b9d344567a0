"""Text in, token rows out: packages, corpora, calibration and held-out windows."""
