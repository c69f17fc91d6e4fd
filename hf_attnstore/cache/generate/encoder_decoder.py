"""The wrapper around `generate` of encoder-decoder models: finds what is known of the encoder's input, runs the model's
own `generate`, without the encoder where that is possible, and keeps the result."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin

from ...errors import CacheUseError, LoadError
from ..cache import AttentionStoreCache
from ..encoder_decoder import Awaited, GenerateRunsAgainError, SequenceToSequenceCache
from ..hooks import Attachment
from ..inputs.encoder import EncoderInput, encoder_input, encoder_inputs, is_for_decoder
from ..inputs.foreign import asks_for_all, foreign_input, mask_problem
from ..loads import MAX_ATTEMPTS
from ..model.argument import generate_cache_name, take_cache
from ..probing.decoder_facts import stand_in
from .attached import say_left_alone, settings_problem
from .settings import setting as _setting
from .streamer import WholePromptStreamer

logger = logging.getLogger("hf_attnstore")


def generate_from_encoder(
    model: nn.Module,
    original: Callable[..., Any],
    attachment: Attachment,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Stands in for `model.generate`, which is `original`, of a model that is attached."""
    cache, name = take_cache(kwargs), generate_cache_name(None)
    if cache is not None:
        kwargs[name] = cache
    plan = _Plan(model, args, kwargs)
    if cache is None:
        if attachment.store is None:
            return original(*args, **kwargs)
        found = settings_problem(model, kwargs) or (("input", plan.problem) if plan.problem else None)
        if found is not None:
            say_left_alone(attachment, *found, kwargs.get("decoder_input_ids"))
            return original(*args, **kwargs)
        cache = AttentionStoreCache(model, store=attachment.store)
        cache.tell(attachment.turn_is_over)
        kwargs[name] = cache
    if not isinstance(cache, SequenceToSequenceCache):
        return original(*args, **kwargs)
    if cache.model is not model:
        raise CacheUseError(f"the cache was made for another model than this {type(model).__name__}")
    if _setting(model, kwargs, "use_cache") is False:
        logger.warning("use_cache=False: this generate runs without its cache, nothing is reused or saved")
        take_cache(kwargs)  # see `generate_around`
        return original(*args, **kwargs)
    if plan.problem:
        cache.begin_unidentified_turn(plan.problem)
        try:
            return original(*args, **kwargs)
        finally:
            cache.end_turn()
    return _run(cache, plan, original, args, kwargs)


def _run(
    cache: SequenceToSequenceCache,
    plan: "_Plan",
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    known = cache.begin_generation(plan.given, plan.awaited)
    may_leave_out = plan.may_leave_out_encoder
    try:
        for attempt in range(MAX_ATTEMPTS + 2):
            changed = dict(kwargs)
            if attempt and changed.get("streamer") is not None:
                changed["streamer"] = WholePromptStreamer(changed["streamer"], None)
            if known and may_leave_out:
                outputs = stand_in(cache.facts, known, cache.encoder_sample)
                if outputs is not None:
                    cache.leave_out_encoder()
                    changed["encoder_outputs"] = outputs
            unreadable = ""
            try:
                output = original(*args, **changed)
                cache.note_first_token()
                return output
            except LoadError as error:
                # the load belongs to the first forward: no token has been made yet, only the prompt was streamed
                cache.abandon(error)
                if attempt + 1 >= MAX_ATTEMPTS:
                    unreadable = f"{MAX_ATTEMPTS} loads failed one after the other"
            except GenerateRunsAgainError:
                cache.abandon()
                may_leave_out = False
            known = cache.begin_generation(plan.given, plan.awaited, unreadable)
        raise AssertionError("a turn without loading can't fail to load")
    finally:
        cache.end_turn()


class _Plan:
    """What a `generate` is about: the encoder's input, how much may be reused, or why nothing can be."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._model = model
        self._kwargs = kwargs
        inputs = encoder_inputs(model, args, kwargs)
        self.given: EncoderInput = encoder_input(inputs, str(getattr(model, "main_input_name", "input_ids")))
        self._has_outputs = "encoder_outputs" in inputs
        self.problem = self.given.problem or _decoder_problem(kwargs) or _own_generate_problem(model, inputs, kwargs)
        ids = kwargs.get("decoder_input_ids")
        given = ids.shape[1] if isinstance(ids, torch.Tensor) and ids.ndim == 2 else 1
        self.asks_for_all = asks_for_all(partial(_setting, model, kwargs), model)
        """Whether the result has what only the encoder can give, and something of every token of the prompt."""
        new_tokens = _setting(model, kwargs, "max_new_tokens") or _setting(model, kwargs, "max_length") or 0
        self.awaited = Awaited(given if self._drafts else None, int(new_tokens), whole=self.asks_for_all)

    @property
    def _drafts(self) -> bool:
        """Whether the first forward may have more than the prompt, whose last token has to be computed."""
        return bool(
            self._kwargs.get("assistant_model") is not None
            or self._kwargs.get("custom_generate") is not None
            or _setting(self._model, self._kwargs, "prompt_lookup_num_tokens")
            or _setting(self._model, self._kwargs, "assistant_early_exit")
        )

    @property
    def may_leave_out_encoder(self) -> bool:
        """Whether nobody but the decoder's cross attention asks for what the encoder gives."""
        kwargs = self._kwargs
        if self._has_outputs or self._drafts or self.asks_for_all or not _takes_outputs(self._model):
            return False
        if _own_generate(self._model) is None:
            return True
        # a second decoding with another part of the input is noticed when it begins: then all is done again, which
        # nobody must have seen
        names = ("language", "do_sample", "temperature")
        language, samples, temperature = (_setting(self._model, kwargs, name) for name in names)
        detects = language is None and _setting(self._model, kwargs, "lang_to_id") is not None
        return not (detects or samples or temperature not in (None, 0, 1.0) or kwargs.get("streamer") is not None)


def _takes_outputs(model: Any) -> bool:
    """Whether `generate` lets an encoder's output through to a model: it goes by the names of arguments."""
    return any(
        "encoder_outputs" in signature(f).parameters for f in (model.forward, model.prepare_inputs_for_generation)
    )


def _decoder_problem(kwargs: Mapping[str, Any]) -> str:
    """Why token ids do not identify what the decoder is given; empty if they do."""
    ids, mask = kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
    if ids is not None and (not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point()):
        return "decoder_input_ids are not ids [1, tokens]"
    if ids is not None and (ids.shape[0] != 1 or not ids.shape[1]):
        return f"decoder_input_ids of {ids.shape[0]} rows and {ids.shape[1]} tokens"
    others = {
        name: value
        for name, value in kwargs.items()
        if is_for_decoder(name) and name not in ("decoder_input_ids", "decoder_attention_mask")
    }
    foreign = foreign_input(others)
    if foreign is not None:
        return f"{foreign} are not identified by token ids"
    if mask is not None and ids is not None and mask.ndim == 2 and mask.shape[1] > ids.shape[1]:
        raise CacheUseError(
            f"decoder_attention_mask has {mask.shape[1]} tokens, decoder_input_ids {ids.shape[1]}: pass all of the "
            "decoder's ids, the cache finds out what is new"
        )
    return mask_problem(mask, ids.shape[1] if ids is not None else 1) or ""


def _own_generate(model: nn.Module) -> str | None:
    """The class whose `generate` a model has, if it is not that of all models."""
    own: Any = getattr(type(model), "generate", None)
    return None if own is GenerationMixin.generate else str(own.__qualname__).rpartition(".")[0]


def _own_generate_problem(model: nn.Module, inputs: Mapping[str, Any], kwargs: Mapping[str, Any]) -> str:
    """Why a model's own `generate` is not one decoding of one input; empty if it is."""
    own = _own_generate(model)
    if own is None:
        return ""
    if own != "WhisperGenerationMixin":
        return f"{type(model).__name__} has a generate of its own"
    config: Any = model.config
    features = inputs.get("input_features")
    if features is not None and features.shape[-1] > 2 * config.max_source_positions:
        return "audio of more than one segment"
    temperature = kwargs.get("temperature")
    if isinstance(temperature, (list, tuple)) and len(temperature) > 1:
        return "several temperatures"
    for name in (
        "return_timestamps",
        "return_token_timestamps",
        "no_speech_threshold",
        "logprob_threshold",
        "compression_ratio_threshold",
    ):
        if _setting(model, kwargs, name):
            return f"{name} may need several decodings"
    if (_setting(model, kwargs, "num_return_sequences") or 1) > 1:
        return "Whisper encodes its input once for each of several return sequences"
    return ""
