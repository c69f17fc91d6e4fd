"""The chat in a browser: `attnstore ui`. Needs the extra `ui` (Gradio 6)."""
