"""What is found out about a model by asking it."""
