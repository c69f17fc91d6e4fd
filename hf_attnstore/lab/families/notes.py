"""What is to be said of families beyond what was measured."""

from __future__ import annotations

_DRAFTS = "drafts from the KV of another model, keeps none of its own"
_OWN_STATE = "keeps a state under a name of its own, which is kept by checkpoint"
_CODES = "takes the ids of several audio codebooks, not a text"

NOTES: dict[str, str] = {
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "gemma3n": "its text model is gemma3n_text",
    "musicgen": _CODES,
    "musicgen_melody": _CODES,
    "cpmant": "puts tokens of its own before the text",
    "prophetnet": "predicts several tokens ahead",
    "diffusion_gemma": "refines blocks of tokens, by a generate of its own; its encoder's KV is kept by token",
    "rwkv": _OWN_STATE,
    "xlstm": _OWN_STATE,
    "higgs_audio_v2": "takes a text and makes the codes of a sound, which have no ids",
}
