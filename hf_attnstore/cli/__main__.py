"""`python -m hf_attnstore.cli` is the `attnstore` command."""

from .app import app

app()
