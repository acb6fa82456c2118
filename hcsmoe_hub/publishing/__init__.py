"""Puts a result on the Hub: file by file while it is made, and visible all at once."""
