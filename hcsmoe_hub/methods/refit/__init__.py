"""Fits the experts that are left to the output of the original layer: pure functions of tensors."""
