"""ChatSession: a conversation in messages, over a model, its chat template and a store.

Messages go in, text comes out; between the turns, and between processes, the store keeps the attention state
and this class keeps the messages beside it, under the same session name.
"""

from __future__ import annotations

import logging
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import numpy as np

from ..cache import AttentionStoreCache, TurnStats
from ..cache.hooks import checked_every
from ..cache.model.argument import as_generate_takes
from ..cache.model.structure import is_encoder_decoder
from ..errors import (
    AttentionStoreError,
    CacheUseError,
    ContextWindowError,
    LoadError,
    SessionNotFoundError,
    StoreIOError,
    UnsupportedModelError,
)
from ..session.chain import common_prefix
from ..store import AttentionStore
from ..timeline import Event
from .channels import CHANNEL
from .message_cuts import MessageCuts
from .prefill_ahead import PLACEHOLDERS, BackgroundPrefill, BackgroundWork, certain_beginning, give_way
from .timed import GenerateRun, timed_generate
from .transcript import Message, NewerFormatError, Prompt, Transcript, as_rendered, decode, encode, marked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("hf_attnstore")

METADATA_KEY = "chat"
BEGAN_KEY = "began"
"""When a conversation began, in seconds since 1970, where its template writes the date."""
ANNOTATIONS_KEY = "annotations"
DEFAULT_MAX_NEW_TOKENS = 200
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

Stream = Callable[[str], None] | bool | None
Finish = Literal["eos", "length", "window", "stopped", "interrupted"]


class ChatTemplateError(AttentionStoreError):
    """The tokenizer has no chat template, or its template refuses these messages."""


@dataclass(frozen=True)
class ChatTurn:
    """What one turn was. Times are in seconds, from the call of `generate`.

    `ttft_seconds` is `None` if no token came, or under beam search. `finish` says why the answer ended: at an
    end-of-turn token, at `max_new_tokens` ("length"), at the end of the model's context window, by another
    stopping criterion, or by an interruption.
    """

    prompt_tokens: int
    reused_tokens: int
    prefilled_tokens: int
    generated_tokens: int
    ttft_seconds: float | None
    tokens_per_second: float | None
    seconds: float
    finish: Finish
    cache: TurnStats
    background: BackgroundWork | None = None
    """What was computed after the turn, where that was asked for (`canonicalize`)."""

    def __str__(self) -> str:
        """One line for people: that of the cache, and how fast the rest of the answer came."""
        speed = f", then {self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second is not None else ""
        return f"{self.cache}{speed}"


class ChatSession:
    """A conversation that goes on where it left off, also in another process.

    Let one object at a time go on with a session: of two that were opened on the same history, the last to speak
    decides which messages are kept.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with a chat template.
        store: the `AttentionStore` that keeps keys, values and messages.
        session: the conversation's name in the store. If it exists, `history` continues it.
        system: system message. Given for a session that has another one, it takes its place, and the state, which
            depends on it, is recomputed once.
        window: tokens that the model sees at once, its answer included; by default as many as it has positions for.
            A conversation that outgrows it loses its oldest tokens; `history` keeps all messages.
        keep_first: leading tokens that are never dropped, made up to whole turns; at least the system part, which is
            all that the template writes before the first message, and just that for "system".
        drop: the share of the other tokens that goes when there is no room, in whole turns; 0 drops nothing, and a
            conversation that has filled the window is at its end.
        canonicalize: for models that reason: whether to compute, in the background as soon as a turn has ended, the
            conversation as the chat template will show it from then on, without the reasoning. The next turn then
            computes no more than its message. Until `wait()` or `close()` has returned the model is in use: do not
            change its weights or adapters. Past the window, other tokens may be dropped than without.
        checkpoint_every: for models whose layers keep a running state: keep it at every so many tokens too, beside
            where messages begin and end.
        reuse: False computes the whole conversation anew in each turn and keeps nothing but the messages: to see what
            a conversation costs without the store.
        record: whether `timeline` is to say what happened when.
        messages: what was said before, as `{"role": …, "content": …}`, for a conversation that begins elsewhere. Of a
            session that has messages already, those go on.
        system_from: a namespace of the store where the KV of the system part is kept for conversations of all others,
            in whole blocks: it is computed once for all whose system message is the same. Nothing that a user says
            gets there, but a first answer that comes soon tells that somebody else has this system message.
        freeze_date: where the chat template writes the date, whether it is that of the conversation's beginning from
            then on. Else each new day makes all of the conversation new.
        template_kwargs: passed to the chat template, such as `{"enable_thinking": False}`.
        generate_defaults: arguments for every `generate`, such as `do_sample` or `max_new_tokens` (200 if not said).

    Raises:
        ChatTemplateError: the tokenizer has no chat template.
        SessionNameError: the name can't be used.
        UnsupportedModelError: the model has an encoder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: AttentionStore,
        session: str,
        system: str | None = None,
        *,
        window: int | None = None,
        keep_first: int | Literal["system"] = "system",
        drop: float = 0.5,
        canonicalize: bool = False,
        checkpoint_every: int | None = None,
        reuse: bool = True,
        record: bool = False,
        messages: Sequence[Message] = (),
        system_from: str | None = None,
        freeze_date: bool = True,
        template_kwargs: dict[str, Any] | None = None,
        **generate_defaults: Any,
    ) -> None:
        _check_order(model, tokenizer, store)
        if is_encoder_decoder(model):
            raise UnsupportedModelError(
                f"{type(model).__name__} has an encoder: its conversations are not one text that goes on; use generate "
                "with an AttentionStoreCache"
            )
        if not tokenizer.chat_template:
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise ChatTemplateError(
                f"the tokenizer {name!r} has no chat template, so messages can't become a prompt: use an "
                "instruction-tuned model, "
                "or set tokenizer.chat_template"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.store = store
        self.session = store.check_name(session)
        self.window = window
        self.keep_first = keep_first
        self.drop = drop
        self.canonicalize = canonicalize and reuse
        self.checkpoint_every = checked_every(checkpoint_every)
        self.reuse = reuse
        self._common = store.in_namespace(system_from) if system_from is not None and reuse else None
        self.record = record
        self.template_kwargs = template_kwargs or {}
        self.generate_defaults = generate_defaults
        self._turn: ChatTurn | None = None
        self._cache: AttentionStoreCache | None = None
        self._background: BackgroundPrefill | None = None
        self._warned = False
        self._timeline: list[Event] = []
        self._metadata = self._saved_metadata()
        self._transcript = (self._saved_transcript() or Transcript(_checked(messages))).with_system(system)
        if freeze_date and "strftime_now" in str(tokenizer.chat_template):
            self.template_kwargs = {"chat_template": self._dated(str(tokenizer.chat_template)), **self.template_kwargs}

    @property
    def history(self) -> list[Message]:
        """The messages so far, oldest first, as `{"role": …, "content": …}`. A copy.

        The content of an answer is for people. Where the model wrote special tokens in it, such as `[TOOL_CALLS]`, the
        answer with them is under "written": what its chat template is given.
        """
        return [dict(message) for message in self._transcript.messages]

    @property
    def token_ids(self) -> list[int]:
        """The exact token ids of the conversation so far, as they were fed and generated. A copy."""
        return list(self._transcript.ids)

    @property
    def stats(self) -> ChatTurn | None:
        """What the last turn of this object was; `None` before the first."""
        return self._turn

    @property
    def timeline(self) -> list[Event]:
        """What happened when in the last turn, as `AttentionStoreCache.timeline` has it; empty unless `record`."""
        return list(self._timeline)

    def prompt_ids(self, text: str, role: str = "user") -> list[int]:
        """The token ids that `send(text)` would feed: the exact conversation so far, and what the chat
        template makes of `text`.
        """
        return list(self._prompt(self._transcript, text, role).ids)

    def add(self, text: str, *, role: str = "user") -> None:
        """Adds a message that the next `send` is to be answered together with: the first of several results of tools,
        say. It is kept with the session when that is."""
        self._transcript = self._transcript.added(text, role)

    def send(
        self, text: str, stream: Stream = None, *, role: str = "user", begin: str = "", **generate_kwargs: Any
    ) -> str:
        """Says `text` to the model and returns its answer.

        `role` is who says it: "tool", for instance, for what a tool gave, where the chat template has such a role.
        `begin` is how the answer begins: the model goes on from there, and all of it is returned.
        `stream` gets the answer's text piece by piece while it is generated; `True` writes it to standard
        output. `generate_kwargs` go to `model.generate`, over the session's defaults. Message and answer never
        outgrow the context window: where no older tokens can make room, the answer is cut, and `stats.finish` is
        "window".

        If generating is interrupted (KeyboardInterrupt, an exception in `stream` or anywhere else), what was
        produced so far becomes the answer and stays in `history`; if nothing was, the message is dropped, as
        if it had not been sent. Either way the exception goes on to the caller and the session can be used.

        Raises:
            ContextWindowError: no room for an answer in the context window. The session is as it was.
            ChatTemplateError: the chat template refuses the messages, such as a system message that it has no
                place for.
        """
        begun = encode(self.tokenizer, begin)
        return self._answer(self._transcript, text, role, stream, generate_kwargs, begun)

    def go_on(self, stream: Stream = None, **generate_kwargs: Any) -> str:
        """Goes on with the last answer where it was cut, by `max_new_tokens` or an interruption, and returns all of it.
        `stream` gets what is new.

        Raises `ValueError` when there is no answer, or the model has ended it itself.
        """
        earlier, text = self._transcript.undone()
        role = self._transcript.messages[len(earlier.messages)]["role"]
        prompt, ids = self._prompt(earlier, text, role), self._transcript.ids
        begun = ids[len(prompt.ids) :]
        if not begun or ids[: len(prompt.ids)] != prompt.ids:
            raise ValueError("the last answer can't be gone on with: its tokens are not known any more")
        if begun[-1] in _end_ids(self.model, self.tokenizer):
            raise ValueError("the last answer is complete: send a message instead")
        return self._answer(earlier, text, role, stream, generate_kwargs, begun)

    def retry(self, stream: Stream = None, **generate_kwargs: Any) -> str:
        """Takes the last answer back and generates another one for the same message.

        Greedy decoding would only repeat it: pass `do_sample=True` or the like. If nothing could be
        generated, the old answer stays. Raises `ValueError` when there is no answer yet.
        """
        earlier, text = self._transcript.undone()
        role = self._transcript.messages[len(earlier.messages)]["role"]
        return self._answer(earlier, text, role, stream, generate_kwargs)

    def edit(self, turn: int, text: str, stream: Stream = None, **generate_kwargs: Any) -> str:
        """Says `text` in place of the message of turn `turn`, counted from 0, and returns the answer to that. What
        was said after it is taken back; what came before it is reused.

        If nothing could be generated, the conversation stays as it was. Raises `ValueError` when there is no such turn.
        """
        earlier = self._transcript
        for _ in range(self._transcript.turns - turn if turn >= 0 else 0):
            earlier, _ = earlier.undone()
        if earlier is self._transcript:
            raise ValueError(f"there is no turn {turn} to edit: the conversation has {earlier.turns}")
        role = self._transcript.messages[len(earlier.messages)]["role"]
        return self._answer(earlier, text, role, stream, generate_kwargs)

    def undo(self) -> str:
        """Takes the last turn back, messages and answer, or what was added since, and returns the (last) message.

        Raises `ValueError` when there is none.
        """
        added = self._transcript.open_messages
        earlier, text = (self._transcript, added[-1]["content"]) if added else self._transcript.undone()
        self.close()
        self._remember(earlier.closed())
        return text

    def annotation(self, key: str) -> Any:
        """What `annotate` kept under `key`; None if nothing."""
        return annotation_in(self._metadata, key)

    def annotate(self, key: str, value: Any) -> None:
        """Keeps something JSON-able of the caller's own with the conversation; forks have it, `delete` removes it."""
        self._metadata = {
            **self._metadata,
            ANNOTATIONS_KEY: {**self._metadata.get(ANNOTATIONS_KEY, {}), key: value},
        }
        self._keep_metadata()

    def wait(self) -> None:
        """Returns when nothing of this session is computed in the background any more; see `canonicalize`."""
        if self._background is not None:
            self._background.wait()

    def close(self) -> None:
        """Ends what is computed in the background, after a few hundred tokens at most, and keeps what was. There
        is nothing else to close: the session can go on.
        """
        if self._background is not None:
            self._background.stop()

    def _answer(
        self,
        before: Transcript,
        text: str,
        role: str,
        stream: Stream,
        generate_kwargs: dict[str, Any],
        begun: tuple[int, ...] = (),
    ) -> str:
        """Has the model answer the message `text`, after the tokens `begun` of its answer, and keeps both."""
        prompt = self._prompt(before, text, role)
        fed = replace(prompt, ids=prompt.ids + begun)
        kwargs: dict[str, Any] = {
            "pad_token_id": self._pad_token_id(),
            **self.generate_defaults,
            **generate_kwargs,
        }
        wanted = _wanted_tokens(kwargs, len(fed.ids))
        give_way(self.store, self.session)
        if self._background is not None and not self._background.cache_is_whole:
            self._cache = None
        cache = self._cache or self._new_cache()
        cuts = self._cuts(before, prompt, text, role)
        boundaries = self._boundaries(before, prompt, text, role) if cache.granularity == "checkpoint" else None
        cache.describe_prompt(cuts, boundaries, lambda ids: decode(self.tokenizer, tuple(ids)))
        common = self._common_ids(before, prompt, role)
        self._share(common, cache, self._common, self.store)
        # a template that cuts the reasoning out of earlier answers makes all that follows new
        known = common_prefix(np.asarray(before.ids), np.asarray(fed.ids))
        kwargs["max_new_tokens"] = self._fitting_tokens(wanted, cache, fed, known, cuts)
        self._cache = None  # an interrupted turn's cache is not used again
        run = GenerateRun()
        finished = False
        with self.store.one_step(self.session):
            try:
                timed_generate(
                    self.model,
                    self.tokenizer,
                    fed.ids,
                    run,
                    on_text=_stream_callback(stream),
                    **as_generate_takes(self.model, cache),
                    **kwargs,
                )
                finished = True
                # who asked for a device tier has it decide whose KV stays on the device
                tier = self.store.device_tier
                self._cache = cache if self.reuse and (tier.host_only or not tier.capacity) else None
            finally:
                self._timeline = list(cache.timeline)
                if run.ids:
                    finish = self._finish(run, wanted, kwargs["max_new_tokens"]) if finished else "interrupted"
                    self._turn = _turn(
                        run, cache, len(fed.ids), finish, BackgroundWork() if self.canonicalize else None
                    )
                    self._remember(self._answered(before, text, prompt, (*begun, *run.ids), role))
        self._share(common, cache, self.store, self._common)
        if stream is True:
            sys.stdout.write("\n")
        if run.ids and self._turn is not None and self._turn.background is not None:
            self._prefill_next(cache, self._turn.background)
        return self._transcript.messages[-1]["content"]

    def _common_ids(self, before: Transcript, prompt: Prompt, role: str) -> list[int]:
        """The ids of the system part, whatever the message says; of a conversation that has others already, none."""
        if self._common is None or any(message["role"] != "system" for message in before.messages):
            return []
        return certain_beginning([prompt.ids, *(self._prompt(before, text, role).ids for text in PLACEHOLDERS)])

    def _share(
        self, ids: list[int], cache: AttentionStoreCache, source: AttentionStore | None, target: AttentionStore | None
    ) -> None:
        """Copies the system part from one namespace to another."""
        if not ids or source is None or target is None:
            return
        if cache.store is not None and cache.store.keeps_windows_apart:
            source, target = source.with_windows_apart(), target.with_windows_apart()
        try:
            target.copy_beginning(ids, cache.model_fingerprint(), source)
        except LoadError as error:  # it is computed, then
            logger.warning("session %r: the system part that others have can't be read: %s", self.session, error)

    def _new_cache(self) -> AttentionStoreCache:
        options: dict[str, Any] = {"window": self.window, "drop": self.drop, "record": self.record}
        options["checkpoint_every"] = self.checkpoint_every
        if self.reuse:
            return AttentionStoreCache(self.model, session=self.session, store=self.store, **options)
        # a namespace that is new has nothing to reuse, and all else is as with the store
        nothing = self.store.in_namespace(secrets.token_hex())
        return AttentionStoreCache(self.model, session=None, store=nothing, save=False, **options)

    def _answered(self, before: Transcript, text: str, prompt: Prompt, ids: tuple[int, ...], role: str) -> Transcript:
        """The conversation with its answer; what of that are special tokens is kept where the template takes it."""
        plain = before.answered(text, prompt, ids, self.tokenizer, role)
        written = marked(self.tokenizer, ids)
        if written is None or CHANNEL in written:  # channels are told apart already
            return plain
        with_marks = before.answered(text, prompt, ids, self.tokenizer, role, written)
        try:
            self._render(with_marks.messages)
        except ChatTemplateError:
            return plain
        return with_marks

    def _prompt(self, transcript: Transcript, text: str, role: str = "user") -> Prompt:
        rendered = self._render([*transcript.messages, {"role": role, "content": text}])
        return transcript.prompt(rendered, self.tokenizer)

    def _render(self, messages: Iterable[Message]) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                as_rendered(messages), tokenize=False, add_generation_prompt=True, **self.template_kwargs
            )
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refuses the conversation: {error}") from error
        return str(rendered)

    def _boundaries(self, before: Transcript, prompt: Prompt, text: str, role: str) -> list[int]:
        """Where in `prompt` the message begins, whatever it says, and where the next prompt will part from it: of some
        templates, before what they write where an answer is to begin. In tokens."""
        found = []
        try:
            found.append([self._prompt(before, other, role) for other in PLACEHOLDERS])
            ids = encode(self.tokenizer, PLACEHOLDERS[0])
            after = before.answered(text, prompt, ids, self.tokenizer, role)
            found.append([self._prompt(after, other) for other in PLACEHOLDERS])
        except ChatTemplateError:  # a template that has no place for such a conversation
            logger.debug("where messages begin and end is not known", exc_info=True)
        return [len(certain_beginning([prompt.ids, *(other.ids for other in others)])) for others in found]

    def _prefill_next(self, cache: AttentionStoreCache, work: BackgroundWork) -> None:
        """Has what the next prompt will certainly begin with computed in the background, if it is not held already."""
        try:
            # here and not in the background: a tokenizer is not for two threads at once
            ids = self._next_beginning()
            window = cache.window or context_window(self.model)
            if ids and (window is None or len(ids) < window):
                self._background = BackgroundPrefill(cache, ids, work, self._background_failed)
                self._background.start()
        except Exception as error:
            work.outcome = "failed"
            self._background_failed(error)

    def _next_beginning(self) -> list[int]:
        """The ids with which the next prompt will begin, whatever its message; empty if it goes on where the last
        answer ended.
        """
        prompts = [self._prompt(self._transcript, text) for text in PLACEHOLDERS]
        if all(prompt.text.startswith(self._transcript.text) for prompt in prompts):
            return []
        ids = certain_beginning([prompt.ids for prompt in prompts])
        return ids if ids != self.token_ids[: len(ids)] else []

    def _background_failed(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "session %r: what the next prompt will begin with could not be computed in the background (%s: %s); "
                "the next turns compute it themselves",
                self.session,
                type(error).__name__,
                error,
            )

    def _cuts(self, before: Transcript, prompt: Prompt, text: str, role: str) -> MessageCuts:
        """Where `prompt` may be cut, if it has to be."""
        messages = [*before.messages, {"role": role, "content": text}]
        return MessageCuts(messages, prompt, self._render, self.tokenizer, self.keep_first)

    def _fitting_tokens(
        self, wanted: int, cache: AttentionStoreCache, prompt: Prompt, known: int, cuts: MessageCuts
    ) -> int:
        """How long the answer may be: as long as it fits into the window beside what can't be dropped."""
        count = len(prompt.ids)
        window = cache.window or context_window(self.model)
        if window is None or count + wanted <= window:
            return wanted
        fixed = count
        if cache.window is not None and known:  # older tokens can make room, all but those kept first
            fixed = min(count, cuts.first + max(count - known, 1) + 1)
            if fixed + wanted > window:
                fixed = min(fixed, cuts.first + max(count - cuts.last, 1) + 1)
        if fixed >= window:
            said = f", {count - known:,} of them new" if known else ""
            raise ContextWindowError(
                f"session {self.session!r}: with this message the conversation has {count:,} tokens{said}, which "
                f"leaves no room for an answer in the context window of {window:,}. The session is unchanged: send a "
                "shorter message, take turns back with undo(), or begin another session"
            )
        return min(wanted, window - fixed)

    def _finish(self, run: GenerateRun, wanted: int, allowed: int) -> Finish:
        if run.ids[-1] in _end_ids(self.model, self.tokenizer):
            return "eos"
        if len(run.ids) < allowed:
            return "stopped"
        return "length" if allowed == wanted else "window"

    def _pad_token_id(self) -> int | None:
        if self.tokenizer.pad_token_id is not None:
            return int(self.tokenizer.pad_token_id)
        ends = _end_ids(self.model, self.tokenizer)
        return min(ends) if ends else None

    def _saved_metadata(self) -> dict[str, Any]:
        try:
            return self.store.metadata(self.session)
        except SessionNotFoundError:
            return {}

    def _dated(self, template: str) -> str:
        """The template with the date of the conversation's beginning wherever it asks for that of now."""
        began = self._metadata.get(BEGAN_KEY)
        if began is None:
            began = time.time()
            self._metadata = {**self._metadata, BEGAN_KEY: began}  # kept with the first turn
        then = datetime.fromtimestamp(began)
        return _NOW.sub(lambda found: repr(then.strftime(found.group(2))), template)

    def _saved_transcript(self) -> Transcript | None:
        saved = self._metadata.get(METADATA_KEY)
        if saved is None:
            return None
        try:
            return Transcript.from_json(saved, self.tokenizer)
        except NewerFormatError as error:
            raise AttentionStoreError(
                f"session {self.session!r}: {error}; pip install --upgrade hf-attnstore, or use another session name"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise AttentionStoreError(
                f"session {self.session!r}: its messages can't be read ({error}); use another session name "
                "or delete the session"
            ) from error

    def _remember(self, transcript: Transcript) -> None:
        self._transcript = transcript
        self._metadata = {**self._metadata, METADATA_KEY: transcript.to_json(self.tokenizer)}
        self._keep_metadata()

    def _keep_metadata(self) -> None:
        try:
            self.store.set_metadata(self.session, self._metadata)
        except StoreIOError as error:  # the next turn tries again, with all messages
            logger.warning("the messages of session %r are not kept for now: %s", self.session, error)


def _check_order(model: Any, tokenizer: Any, store: Any) -> None:
    """Raises `CacheUseError` for arguments in another order, which would fail somewhere else."""
    right = (hasattr(model, "generate"), hasattr(tokenizer, "decode"), isinstance(store, AttentionStore))
    for name, given, fits in zip(("model", "tokenizer", "store"), (model, tokenizer, store), right, strict=True):
        if not fits:
            order = "ChatSession(model, tokenizer, store, session)"
            raise CacheUseError(f"{order} takes them in this order: the {name} given is {_kind(given)}")


def _kind(given: Any) -> str:
    return f"the text {given[:40]!r}" if isinstance(given, str) else f"a {type(given).__name__}"


def _checked(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Messages to begin with.

    Raises:
        CacheUseError: they are none.
    """
    for message in messages:
        known = isinstance(message, Mapping) and all(isinstance(message.get(n), str) for n in ("role", "content"))
        if not known:
            raise CacheUseError(f'a message is {{"role": …, "content": …}}, two texts, not {message!r}')
    return tuple(dict(message) for message in messages)


def annotation_in(metadata: dict[str, Any], key: str) -> Any:
    """What `ChatSession.annotate` kept under `key`, in a session's metadata; None if nothing."""
    return metadata.get(ANNOTATIONS_KEY, {}).get(key)


def context_window(model: PreTrainedModel) -> int | None:
    """The number of positions the model was made for, in tokens; `None` if it states none."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(window) if window else None


def _wanted_tokens(kwargs: dict[str, Any], prompt_tokens: int) -> int:
    """How long an answer the caller asks for; takes `max_length` out of `kwargs`, which `max_new_tokens`
    replaces.
    """
    max_length = kwargs.pop("max_length", None)
    config = kwargs.get("generation_config")
    if kwargs.get("max_new_tokens") is not None:
        return int(kwargs["max_new_tokens"])
    if max_length is not None:
        return max(1, int(max_length) - prompt_tokens)
    if config is not None and config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    return DEFAULT_MAX_NEW_TOKENS


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends: set[int] = set()
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    for end in (configured, tokenizer.eos_token_id):
        if isinstance(end, int):
            ends.add(end)
        elif end is not None:
            ends.update(int(i) for i in end)
    return ends


def _turn(
    run: GenerateRun,
    cache: AttentionStoreCache,
    prompt_tokens: int,
    finish: Finish,
    background: BackgroundWork | None,
) -> ChatTurn:
    return ChatTurn(
        prompt_tokens=prompt_tokens,
        reused_tokens=cache.reused_tokens,
        prefilled_tokens=cache.prefilled_tokens,
        generated_tokens=len(run.ids),
        ttft_seconds=run.ttft_seconds,
        tokens_per_second=run.tokens_per_second,
        seconds=run.seconds,
        finish=finish,
        cache=replace(cache.stats),
        background=background,
    )


def _stream_callback(stream: Stream) -> Callable[[str], None] | None:
    if stream is True:
        return _write_now
    return stream if callable(stream) else None


def _write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
