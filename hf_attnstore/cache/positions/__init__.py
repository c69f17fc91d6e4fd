"""How keys and values depend on positions, and what is shown of a conversation that outgrows the window."""
