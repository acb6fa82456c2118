"""Mixture-of-experts blocks of transformers models: where they are, what they hold, how their experts compute."""
