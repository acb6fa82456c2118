"""Measures the quality of a checkpoint: perplexity, choices, agreement with its source, loops, published tasks."""
