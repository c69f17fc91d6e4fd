"""Blocks on their way into place, stage by stage."""
