"""Everything that is decided, and refused, before a weight is read."""
