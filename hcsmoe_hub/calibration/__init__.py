"""Calibration: text to packed tokens, and what is accumulated while they pass through a layer."""
