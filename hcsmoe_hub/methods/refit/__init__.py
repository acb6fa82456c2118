"""Fits the remaining experts to the output of the original layer; pure functions of tensors."""
