"""What measures and shows the product and serves no user's turn: benches, simulator, model families, demo.

Nothing outside of it imports it: its commands are known to the command line by name.
"""
