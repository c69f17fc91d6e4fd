"""Cache layers: what they keep of tokens or states, and how they grow."""
