"""The store behind transformers' continuous batching."""
