"""What identifies the model that computes keys and values, and what tells that it has changed."""
