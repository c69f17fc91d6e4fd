"""An OpenAI-compatible server on transformers' own: `attnstore serve`. Needs the extra `serve`."""
