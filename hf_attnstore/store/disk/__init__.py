"""The disk tier: files, their index and records under one cap."""
