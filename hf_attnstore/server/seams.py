"""What of transformers' server this one is built on; nothing of it is patched. A test holds each of them.

Raises at import:
    ServerUnavailableError: transformers is older than its server in this shape, or something is not installed.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version

from ..errors import AttentionStoreError

LEAST = "5.20"
_NEEDED = ("fastapi", "uvicorn", "openai", "pydantic", "prometheus_client")


class ServerUnavailableError(AttentionStoreError):
    """The server can't run with what is installed."""


def _check() -> None:
    if Version(version("transformers")) < Version(LEAST):
        raise ServerUnavailableError(
            f"the server is built on the one of transformers {LEAST} or newer, and {version('transformers')} is "
            "installed: pip install -U transformers"
        )
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ServerUnavailableError(
            f'the server needs what is not installed ({", ".join(missing)}): pip install "hf-attnstore[serve]"'
        )


_check()

from transformers.cli.serving.chat_completion import ChatCompletionHandler  # noqa: E402
from transformers.cli.serving.completion import CompletionHandler  # noqa: E402
from transformers.cli.serving.model_manager import ModelManager  # noqa: E402
from transformers.cli.serving.response import ResponseHandler  # noqa: E402
from transformers.cli.serving.server import build_server  # noqa: E402
from transformers.cli.serving.utils import (  # noqa: E402
    BaseGenerateManager,
    BaseHandler,
    DirectStreamer,
    GenerationState,
    Modality,
    _StreamError,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig as BatchSettings  # noqa: E402
from transformers.generation.continuous_batching.cb_logits_processors import (  # noqa: E402
    ContinuousBatchingLogitsProcessorList as BatchProcessors,
)

StreamError = _StreamError

__all__ = [
    "BaseGenerateManager",
    "BaseHandler",
    "BatchProcessors",
    "BatchSettings",
    "ChatCompletionHandler",
    "CompletionHandler",
    "DirectStreamer",
    "GenerationState",
    "Modality",
    "ModelManager",
    "ResponseHandler",
    "StreamError",
    "build_server",
]
