"""Checkpoint files: reading a source, and writing a result, without loading the whole model into memory."""
