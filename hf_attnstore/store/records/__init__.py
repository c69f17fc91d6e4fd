"""Sessions as they are kept on disk."""
