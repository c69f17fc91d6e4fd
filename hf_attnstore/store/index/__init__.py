"""The index: which blocks and sessions are on disk."""
