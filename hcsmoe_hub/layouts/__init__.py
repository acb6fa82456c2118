"""Ways to write merged experts down: which tensors a result has, and the modelling file of the mapped layout."""
