"""How a model is built and called, read from its configuration and its modules."""
