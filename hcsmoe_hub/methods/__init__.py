"""How experts are grouped, merged, pruned and refitted: pure functions of tensors."""
