"""transformers' generation managers, on a queue of turns: where its handlers have an answer generated."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from .answer import Answer, AnswerStreamer, cut_at
from .errors import as_api_error
from .seams import BaseGenerateManager, GenerationState, ModelManager, StreamError

if TYPE_CHECKING:
    from .service import Service


class LoadedModel(ModelManager):
    """transformers' manager of models with a single one, which is loaded at once and stays.

    Args:
        source: name on the hub, or folder.
        name: the one that clients know.
    """

    def __init__(self, source: str, name: str, **options: Any) -> None:
        super().__init__(model_timeout=-1, **options)
        self.model, self.processor = super().load_model_and_processor(super().process_model_name(source))
        self.force_model = self.name = name

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *_: Any, **__: Any) -> Any:
        return self.model, self.processor


class TurnState(GenerationState):
    """transformers' generation state, whose manager is the queue's."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self._manager = TurnManager(service)

    def get_manager(self, model_id: str, use_cb: bool = False) -> TurnManager:
        return self._manager


class TurnManager(BaseGenerateManager):
    """Generates as turns of a queue, each in its caller's namespace."""

    def __init__(self, service: Service) -> None:
        self._answers = service.answers

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], AnswerStreamer]:
        answer = self._answers[request_id]
        queue: asyncio.Queue[Any] = asyncio.Queue()
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        streamer = AnswerStreamer(answer, tokenizer, asyncio.get_running_loop(), queue, response_parser)
        answer.start(model, processor, dict(inputs), gen_config, streamer)
        assert answer.turn is not None
        loop = asyncio.get_running_loop()
        answer.turn.add_done_callback(lambda _: loop.call_soon_threadsafe(queue.put_nowait, _end_of(answer)))
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        answer = self._answers[request_id]
        answer.start(model, processor, dict(inputs), gen_config, None)
        await answer.over()
        text = processor.decode(answer.ids, skip_special_tokens=True)
        return cut_at(text, answer.stops), inputs["input_ids"].shape[-1], answer.ids

    def stop(self) -> None:
        """The queue is closed by who made it."""


def _end_of(answer: Answer) -> StreamError | None:
    """What a stream ends with, after what its streamer put."""
    try:
        answer.raise_if_failed()
    except BaseException as error:
        return StreamError(json.dumps(str(as_api_error(error)))[1:-1])  # put into JSON as it is
    return None
