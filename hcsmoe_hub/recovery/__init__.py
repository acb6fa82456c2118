"""Recovery: a result is trained on the logits of its source, and written again where that helped."""
