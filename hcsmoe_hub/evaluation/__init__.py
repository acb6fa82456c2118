"""Measures what a checkpoint is worth: perplexity, choices, agreement with its source, loops, published tasks."""
