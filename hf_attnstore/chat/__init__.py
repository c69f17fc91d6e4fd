"""Conversations in messages, over a chat template: `ChatSession`."""
