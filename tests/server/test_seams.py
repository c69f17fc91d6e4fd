"""transformers' server as this one uses it: each test fails when a seam has moved."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import transformers

from hf_attnstore.server import seams


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    "handler", [seams.ChatCompletionHandler, seams.CompletionHandler, seams.ResponseHandler], ids=lambda h: h.__name__
)
def test_handlers_take_a_body_and_an_id_and_build_the_settings_by_a_method(handler: type[seams.BaseHandler]) -> None:
    assert issubclass(handler, seams.BaseHandler)
    assert parameters(handler.handle_request) == ["self", "body", "request_id"]
    assert inspect.iscoroutinefunction(handler.handle_request)
    assert parameters(handler._validate_request) == ["self", "body"]
    assert parameters(handler._build_generation_config) == ["self", "body", "model_generation_config", "use_cb"]
    source = inspect.getsource(handler.handle_request)
    for called in (
        "self._validate_request(body)",
        "self._build_generation_config(body, model.generation_config",
        "self.generation_state.get_manager(model_id, use_cb=use_cb)",
        "self._resolve_model(body)",
    ):
        assert called in source
    for way in (handler._streaming, handler._non_streaming):
        assert "request_id=request_id" in inspect.getsource(way)
    assert 'body.get("stream"' in source


def test_pieces_of_text_become_chunks_by_a_method() -> None:
    for handler, piece in ((seams.ChatCompletionHandler, "content=item"), (seams.CompletionHandler, "text=text")):
        source = inspect.getsource(handler._streaming)
        assert f"{piece})" in source
        assert source.count("self._build_chunk_sse(") >= 2


def test_the_generation_state_asks_nothing_else_for_a_manager() -> None:
    assert parameters(seams.GenerationState.get_manager) == ["self", "model_id", "use_cb"]
    state = seams.GenerationState()
    assert state.use_continuous_batching(None, seams.Modality.LLM) is False  # type: ignore[arg-type]
    assert state.is_cb_alive()


def test_a_manager_generates_in_two_ways() -> None:
    base = seams.BaseGenerateManager
    assert base.__abstractmethods__ == {"generate_streaming", "generate_non_streaming", "stop"}
    asked = ["self", "model", "processor", "inputs", "gen_config", "request_id"]
    assert parameters(base.generate_streaming) == [*asked, "response_parser"]
    assert parameters(base.generate_non_streaming) == asked
    assert inspect.iscoroutinefunction(base.generate_non_streaming)


def test_the_streamer_hands_on_by_one_method_and_ends_with_none() -> None:
    streamer = seams.DirectStreamer
    assert parameters(streamer.__init__) == ["self", "tokenizer", "loop", "queue", "response_parser"]
    assert parameters(streamer._enqueue) == ["self", "item"]
    assert "self._enqueue(text)" in inspect.getsource(streamer.put)
    assert "self._enqueue(None)" in inspect.getsource(streamer.end)
    assert parameters(streamer.cancel) == ["self"]
    assert seams.StreamError("why").msg == "why"


def test_the_manager_of_models_loads_by_one_method(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = seams.ModelManager
    assert parameters(manager.load_model_and_processor)[:2] == ["self", "model_id_and_revision"]
    assert {"model_timeout", "device", "dtype", "attn_implementation"} <= {*parameters(manager.__init__)}
    assert parameters(manager.process_model_name) == ["model_id"]
    source = inspect.getsource(seams.BaseHandler._resolve_model)
    assert "self.model_manager.force_model" in source
    assert "self.model_manager.load_model_and_processor(model_id" in source


def test_the_application_has_the_routes_that_are_kept() -> None:
    named = parameters(seams.build_server)
    assert {"model_manager", "chat_handler", "completion_handler", "response_handler", "generation_state"} <= {*named}
    app = seams.build_server(**dict.fromkeys(n for n in named if n != "enable_cors"))
    from hf_attnstore.server.app import ANSWERED

    assert {getattr(route, "path", "") for route in app.router.routes} >= ANSWERED


def test_an_older_transformers_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "version", lambda _: "5.19.3")
    with pytest.raises(seams.ServerUnavailableError, match=r"transformers 5\.20 or newer, and 5\.19\.3 is installed"):
        seams._check()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "find_spec", lambda name: None if name == "openai" else sys)
    with pytest.raises(seams.ServerUnavailableError, match=r'\(openai\): pip install "hf-attnstore\[serve\]"'):
        seams._check()
    assert transformers.__version__
