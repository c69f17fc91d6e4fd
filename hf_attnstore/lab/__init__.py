"""What measures and shows the product and serves no user's turn: benches, simulator, model families, demo.

Nothing outside of it imports it, except for the commands by which it is started.
"""
