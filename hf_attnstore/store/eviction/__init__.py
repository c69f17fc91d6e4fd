"""Who goes when a tier is full."""
