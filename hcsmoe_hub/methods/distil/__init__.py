"""Training a reduced model towards the logits of its source, judged on text that it has not seen."""
