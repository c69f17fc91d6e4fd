"""Whether loading or computing is faster on this machine."""
