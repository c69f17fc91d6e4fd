"""The `attnstore` command."""
