"""Checkpoints on disk: where they come from, one layer at a time in memory, and how the result is written."""
