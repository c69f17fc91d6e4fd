"""`generate` with a cache of ours: the wrapper around it, for each kind of model and call."""
