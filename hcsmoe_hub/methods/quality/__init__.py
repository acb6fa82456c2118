"""How good the predictions of a model are, and how close to those of another one."""
