"""Blocks: what they are, what names them, and the bytes of their files."""
