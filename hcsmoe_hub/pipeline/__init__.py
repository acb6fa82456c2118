"""Drives a checkpoint through memory, layer by layer."""
