"""Calibration: text to packed sequences of token ids."""
