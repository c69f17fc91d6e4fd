"""Turns from many threads on one model: `TurnQueue`."""
