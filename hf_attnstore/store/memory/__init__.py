"""The memory and device tiers."""
