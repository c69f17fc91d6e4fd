"""The hierarchy of tiers on a virtual clock: the store's own policies and accounts, driven by workloads and traces."""
