"""What `attnstore bench` runs: what the store gives a user's model, on their machine, side by side."""
