"""Reads from and writes to the Hugging Face Hub."""
