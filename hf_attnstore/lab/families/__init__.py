"""Every causal language model of transformers, tiny and random, and what this package makes of it."""
