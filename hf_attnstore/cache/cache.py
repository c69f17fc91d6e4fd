"""AttentionStoreCache: the `Cache` that continues conversations."""

import copy
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ..errors import CacheUseError, ContextWindowError, GradientError, LoadError, StoreClosedError
from ..session.chain import common_prefix
from ..session.window import Cuts
from ..store.store import AttentionStore
from ..timeline import Event
from . import begin, commit, forwards, loads
from .costs.gate import Gate, wanted
from .held import Held
from .hooks import checked_every, checked_tokenizer, ensure_hooks, feed, owner_of
from .inputs.content import TYPES, Content, NotIdentifiedError, read_content
from .inputs.foreign import brings_features, foreign_input
from .layers.kept import KeptLayer
from .layers.kinds import make_layers
from .model.cacheless import check_generator
from .model.compiled import outside_graphs
from .model.ranks import OtherRankError, known_ranks
from .model.structure import device_of, is_encoder_decoder, position_limit
from .parking import Parking
from .positions.spatial import places_in_space, spatial_positions
from .positions.truncation import window_of
from .setup import Setup
from .stats import TurnStats
from .transfer.load import Restore
from .transfer.save import say_if_unmeasured
from .transfer.windows import sliding_layers
from .turn import Phase, Turn


class AttentionStoreCache(Cache):
    """A cache for `generate` that takes up a conversation where it was left, and keeps it afterwards.

    Pass it as `past_key_values` together with the whole conversation so far. What the store knows of it, from
    this session or any other text that begins alike, is loaded instead of computed; the tokens that come out are
    those of plain `generate`.

    Args:
        model: the model; its hooks are attached by this (see `attach`).
        session: the name to keep the conversation under; None keeps its blocks only, found again by content. A list
            of names (or None) is for a batch of left-padded prompts, a conversation in each row: see `BatchCache`.
        store: the store; default is the one given to `attach`, else one at the default path.
        window: tokens that the model is to see at once, those still to be generated included; by default as many
            as it has positions for. A conversation that outgrows it loses its oldest tokens.
        keep_first: leading tokens that are never dropped, such as a system prompt. By default 4: models answer badly
            when the very first tokens are gone.
        drop: the share of the other tokens that goes when there is no room. 0 drops nothing, ever: past the
            window the model then does what it does without this cache.
        checkpoint_every: for models with layers that keep a running state (linear attention, SSM, convolution): keep
            it at every so many tokens too, beside the end of every prompt and of every turn. Prompts are then fed in
            parts of at most so many tokens.
        record: whether `timeline` is to say what happened when; `record_timeline` changes it later.
        save: whether to keep what is computed. False reads only.
        wait: seconds to wait where another turn is running on the session, instead of failing at once.
        gate: whether to compute again what would take longer to load, as measured on this machine; the tokens are the
            same either way. False reuses all that is known. Default: yes, unless the environment variable
            `ATTNSTORE_GATE` is `off`.
        resegment: for `generate` with one prompt: where the text of its beginning is known in other tokens, feed those
            in place of the prompt's. An answer that comes back as text, and that `tokenizer` cuts otherwise than the
            model did, is reused then. The model sees the same text in other ids, so what it says may differ.
        tokenizer: the model's, for `resegment`.

    Raises:
        UnsupportedModelError: the model is of a kind that can't be kept; the message says why.
        SessionNameError: the name can't be used.
        CacheUseError: a window, `keep_first` or `drop` that makes no sense.
        ContextWindowError: `keep_first` fills the window.

    An object may serve one turn or many; between turns it holds the KV, so that nothing is loaded twice. In a
    loop of one's own (`model(input_ids=new, past_key_values=cache)`), `match` or `resume` load, and `save` ends
    the turn. One thread at a time uses an object.
    """

    max_cache_len = -1
    """PEFT asks caches for it when it puts learned KV before a prompt; this is how it says that there is no limit."""
    sees_forwards = True
    """By this the hooks on a model know a cache of ours."""

    _kinds: ClassVar[list[tuple[Callable[[nn.Module, Any], bool], type["AttentionStoreCache"]]]] = []
    """Which class serves which models and sessions, where it is not this one."""

    def __init_subclass__(cls, serves: Callable[[nn.Module, Any], bool] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if serves is not None:
            AttentionStoreCache._kinds.append((serves, cls))

    def __new__(cls, model: Any = None, session: Any = None, *args: Any, **kwargs: Any) -> "AttentionStoreCache":
        """An encoder-decoder model gets the cache that its `generate` needs, a list of sessions that of a batch."""
        if cls is not AttentionStoreCache or model is None:
            return object.__new__(cls)
        owner = owner_of(model)
        kind = next((kind for serves, kind in cls._kinds if serves(owner, session)), cls)
        if kwargs.get("resegment") and kind is not cls:
            raise CacheUseError("resegment=True is for one prompt of a decoder-only model: leave it out")
        return object.__new__(kind)

    layers: list[KeptLayer]  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        session: str | Sequence[str | None] | None = None,
        store: AttentionStore | None = None,
        *,
        window: int | None = None,
        keep_first: int | None = None,
        drop: float = 0.5,
        checkpoint_every: int | None = None,
        record: bool = False,
        save: bool = True,
        wait: float = 0.0,
        gate: bool | None = None,
        resegment: bool = False,
        tokenizer: Any = None,
    ) -> None:
        self.resegments_with = checked_tokenizer(resegment, tokenizer)
        owner = owner_of(model)
        checked_every(checkpoint_every)
        check_generator(owner)
        layers = make_layers(owner)
        attachment = ensure_hooks(model)
        store = store or attachment.store or _default_store()
        config: Any = owner.config
        if store.windows_every is not None and sliding_layers(layers) and not is_encoder_decoder(owner):
            store = store.with_windows_apart()
        # what an encoder takes can't be told by tokens
        learns = not is_encoder_decoder(owner)
        setup = Setup(
            model=owner,
            given_model=model,
            attachment=attachment,
            ranks=known_ranks(owner),
            gate=Gate(enabled=wanted(gate), devices=attachment.devices, learns=learns),
            store=store,
            session=store.check_name(session) if session is not None else None,  # type: ignore[arg-type]
            saves=save,
            wait=wait,
            limit=position_limit(config.get_text_config(decoder=True)),
            window=window_of(config, window, keep_first, drop),
            checkpoint_every=checkpoint_every,
            records=record,
        )
        self._begin_with(setup, layers)
        say_if_unmeasured(config.get_text_config(decoder=True).model_type, store.codec)
        store.register(self)

    def _begin_with(self, setup: Setup, layers: list[KeptLayer]) -> None:
        """Sets up a cache that holds nothing yet."""
        Cache.__init__(self, layers=layers)  # type: ignore[arg-type]
        self._setup = setup
        self._held = Held(setup, layers)
        self._parking = Parking(self._held)
        self._turn = Turn(setup, self._held)
        """The turn that runs, or the last one."""
        self._inputs: dict[str, Any] = {}
        """What `match` was given beside ids, and is still to be fed."""
        self.passed_on = False
        """Whether a turn that runs has called a `generate`, which has not begun yet."""

    # what it serves

    @property
    def store(self) -> AttentionStore | None:
        """Where the KV is kept; None for a copy made by `deepcopy`."""
        return self._setup.store

    @property
    def session(self) -> str | None:
        """The name that the conversation is kept under; None where its blocks only are."""
        return self._setup.session

    @property
    def model(self) -> nn.Module:
        """The model whose KV this is."""
        return self._setup.model

    @property
    def window(self) -> int | None:
        """Tokens that the model is to see at once; None where nothing is ever dropped."""
        return self._setup.window.size if self._setup.window is not None else None

    @property
    def granularity(self) -> str:
        """What can be reused of a text: up to any `token`, up to a `checkpoint`, or nothing (`none`)."""
        return self._held.granularity

    def model_fingerprint(self) -> str:
        """The identity of the model as it is now."""
        return self._setup.attachment.fingerprint.current()

    @property
    def record_timeline(self) -> bool:
        """Whether turns are recorded, from the next one on: see `timeline`."""
        return self._setup.records

    @record_timeline.setter
    def record_timeline(self, wanted: bool) -> None:
        self._setup.records = wanted

    @property
    def begin_load(self) -> Callable[[Restore], None]:
        """How loads are begun."""
        return self._setup.begin_load

    @begin_load.setter
    def begin_load(self, begin_load: Callable[[Restore], None]) -> None:
        self._setup.begin_load = begin_load

    def tell(self, listener: Callable[[TurnStats], None]) -> None:
        """Has `listener` called with the numbers of every turn that ends."""
        self._setup.tell = listener

    def describe_prompt(
        self,
        cuts: Cuts | None = None,
        boundaries: Sequence[int] | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        """Says of what the prompts to come consist, for who knows that.

        Args:
            cuts: where they may be cut when they outgrow the window; None: anywhere after what is kept first.
            boundaries: where messages begin or end, in tokens of the conversation: there running states are kept.
                None goes by the ids with which messages end.
            decode: makes text of ids: `stats.diverged` then speaks in words.
        """
        self._setup.cuts, self._setup.boundaries, self._setup.decode = cuts, boundaries, decode

    # what was done

    @property
    def stats(self) -> TurnStats:
        """The numbers of the last turn, or of the one that runs."""
        return self._turn.stats

    @property
    def timeline(self) -> tuple[Event, ...]:
        """What happened when in the last turn, or in the one that runs, in the order of beginning; empty if that is not
        recorded. Files that are written behind a turn come in until all of them are."""
        return self._turn.recorder.events() if self._turn.recorder is not None else ()

    @property
    def reused_tokens(self) -> int:
        """Tokens of the last prompt that were not computed again."""
        return self.stats.reused_tokens

    @property
    def prefilled_tokens(self) -> int:
        """Tokens of the last prompt that were computed."""
        return self.stats.prefilled_tokens

    # what is held

    @property
    def token_ids(self) -> list[int]:
        """The ids of the tokens held, as far as they are identified. Stand-ins, from 2³¹ up, are in the places of
        pictures, sounds and embeddings."""
        return self._held.chain.ids.tolist()

    @property
    def conversation_ids(self) -> list[int]:
        """The ids of the whole conversation up to the last token held, those dropped from the window included."""
        return self._held.conversation.tolist()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(session={self.session!r}, tokens={self._held.length}, layers={len(self.layers)})"

    # a loop of one's own

    def match(self, input_ids: torch.Tensor, new_tokens: int = 0, *, keep: int | None = None, **inputs: Any) -> int:
        """Loads what is known of a conversation, for a loop of one's own.

        Args:
            input_ids: `[1, tokens]`, the whole conversation so far.
            new_tokens: how many more are to be generated: the window keeps room for them.
            keep: leading tokens that are worth keeping, such as those of a document that others will ask about, too:
                nothing is saved of what comes after them. Running states are saved at the end of a forward only.
            inputs: what goes with the ids, such as `pixel_values`: all of it, as for `generate`.

        Returns:
            The number of leading tokens that are done with, at most `tokens - 1`: they are in the cache, or were
            dropped from the window. Feed the model the rest, with `remaining_inputs()`.

        Raises:
            SessionBusyError: another turn is running on the session.
            ContextWindowError: what is new does not fit into the window.
        """
        ids = one_row(input_ids)
        try:
            content = read_content(self.model.config, input_ids, inputs)
            if content is None and not brings_features(inputs):
                self._held.refuse_places(input_ids)
                content = self._held.going_on(ids, inputs)
            foreign = foreign_input({n: v for n, v in inputs.items() if content is None or n not in content.understood})
            if content is not None and content.positions is None and places_in_space(self.model):
                content.positions = spatial_positions(self.model, input_ids, inputs, content)
            problem = f"{foreign} are not identified by token ids" if foreign else ""
        except NotIdentifiedError as reason:
            problem = f"{reason} are not identified"
        if problem:
            self._inputs = dict(inputs)
            return self._load_now(ids, 0, new_tokens, unreadable=problem)
        self._inputs = {}
        done = self._load_now(content.ids if content else ids, len(ids) - 1, new_tokens, content=content)
        self._turn.keeps = keep
        if content is not None:
            self._inputs = {name: value for name, value in inputs.items() if name not in content.understood}
            self._inputs |= content.inputs(done, len(ids))
            if inputs.get("inputs_embeds") is not None:
                self._inputs["inputs_embeds"] = inputs["inputs_embeds"][:, done:]
            self._inputs |= {name: content.types(name, len(ids)) for name in TYPES if inputs.get(name) is not None}
            self._inputs["position_ids"] = content.positions_at(done, len(ids))
        return done

    def remaining_inputs(self) -> dict[str, Any]:
        """Of the inputs that `match` was given, those that go with what is to be fed: without pictures that are in
        the cache already, and with positions where the model needs to be told."""
        return {name: value for name, value in self._inputs.items() if value is not None}

    def resume(self) -> torch.Tensor:
        """Loads all that the store has of the session, for a loop of one's own.

        Returns:
            The ids `[1, tokens]` of what is now in the cache, without those dropped from the window: feed the
            model what comes after. Stand-ins are among them where there were pictures (see `token_ids`).

        Raises:
            SessionNotFoundError: there is no such session.
        """
        setup = self._setup
        if setup.store is None or setup.session is None:
            raise CacheUseError("resume() needs a cache with a session and a store")
        known = setup.ranks.attempt(partial(setup.store.tokens, setup.kept_as or "", dropped=True))
        ids = np.asarray(known[: setup.ranks.least(len(known))], dtype=np.int64)
        self._load_now(ids, len(ids), 0)
        return torch.from_numpy(self._held.chain.ids.copy())[None]

    def save(self) -> None:
        """Ends a turn of one's own loop: everything complete is handed to the store, the session updated.

        `generate` does this by itself, and so do `store.flush()` and `store.close()`.
        """
        with self._held.guard:
            if self._turn.is_open and not self._turn.checked and not forwards.runs_elsewhere(self._turn):
                self.end_turn()

    def _load_now(
        self,
        ids: np.ndarray,
        limit: int,
        new_tokens: int,
        unreadable: str = "",
        content: Content | None = None,
        *,
        encoder: bytes | None = None,
        own: bool = True,
    ) -> int:
        """Begins a turn on the conversation `ids` and waits for all that is known of its first `limit` tokens.

        Args:
            encoder: the digest of what an encoder is given, of models that have one.
            own: whether it is one of a loop of one's own, which `save` ends; else `end_turn` does.

        Returns:
            How many of the conversation's tokens are done with.
        """
        held = self._held
        # `checked` until everything is there, so that a `flush` in another thread leaves the turn alone
        again = partial(
            self.begin_turn, ids, limit=limit, new_tokens=new_tokens, checked=True, unreadable=unreadable,
            content=content, encoder=encoder,
        )  # fmt: skip
        reused = again()
        try:
            for _ in range(loads.MAX_ATTEMPTS):
                try:
                    loads.finish(self._turn)
                    break
                except LoadError as error:
                    self.abandon(error)
                    reused = again()
            else:
                held.clear()
                reused = self.stats.reused_tokens = 0
            if reused < held.view.settled:  # dropped tokens come after these: only together can they be left out
                missing = held.view.in_view(ids)[None, reused : held.view.settled]
                feed(self.model, self, torch.from_numpy(missing).to(device_of(self.model)))
        except BaseException:
            self.end_turn()
            raise
        self._turn.checked, self._turn.prompt = not own, None
        return held.view.logical(held.length)

    # turns

    @property
    def in_generate(self) -> bool:
        """Whether a `generate` of this thread is running with this cache."""
        turn = self._turn
        return turn.is_open and turn.checked and turn.thread == threading.get_ident()

    @property
    def unidentified(self) -> str:
        """Why token ids do not identify what the turn computes, so that nothing is kept; empty if they do."""
        return self._turn.untracked

    @property
    def continues_in_parts(self) -> bool:
        """Whether the model goes on correctly after what is held when it is fed several tokens at once."""
        return self._turn.continues == "parts"

    @property
    def stops(self) -> Sequence[int]:
        """Positions at which the prefill of this turn's prompt is to pause, by feeding it in parts."""
        return self._turn.stops

    def prompt_in_view(self, ids: np.ndarray) -> np.ndarray:
        """Of the conversation `ids` that a turn was begun on, the tokens that the model is to see."""
        return self._held.view.in_view(ids)

    def going_on(self, ids: np.ndarray, named: Mapping[str, Any], *, alone: bool = False) -> Content | None:
        """What of a prompt `[tokens]`, given without pictures, stands for those that are held: see `Held.going_on`."""
        return self._held.going_on(ids, named, alone=alone)

    def goes_on_unidentified(self, ids: torch.Tensor) -> bool:
        """Whether the prompt `ids` `[rows, tokens]`, given without pictures, goes on after inputs that are held without
        being identified.

        Raises:
            CacheUseError: it has places of such inputs, and does not go on there.
        """
        held = self._held
        if not held.has_unknown_inputs:
            return False
        if held.is_begun_by(ids):
            return True
        held.refuse_places(ids)
        return False

    def begin_turn(
        self,
        ids: np.ndarray,
        *,
        limit: int,
        new_tokens: int = 0,
        checked: bool = False,
        unreadable: str = "",
        content: Content | None = None,
        encoder: bytes | None = None,
    ) -> int:
        """Starts a turn on the conversation `ids` `[tokens]`: finds and begins to load what is known of it.

        Args:
            limit: reuse at most so many of its leading tokens.
            new_tokens: how many tokens are expected on top: for the capacity of the layers, and for the window.
            checked: the caller vouches for masks and positions, so that forwards need not look at them.
            unreadable: why nothing is to be loaded, if so; nothing is saved then.
            content: what of the conversation is not text; `ids` are its ids then.
            encoder: the digest of what an encoder is given, of models that have one.

        Returns:
            The tokens reused; `get_seq_length()` says the same from now on, though the data may still be coming.
            What is to be fed is `prompt_in_view(ids)`, without these.

        Raises:
            ContextWindowError: what is new, or `new_tokens`, does not fit into the window.
        """
        self._acquire_with_others()
        with self._held.guard:
            turn, held = self._turn, self._held
            try:
                self._setup.ranks.attempt(partial(begin.open_turn, turn, encoder))
                turn.checked = checked
                held.content, held.fed_beside = content, None
                if unreadable:
                    turn.untrack(unreadable)
                if content is not None and turn.continues != "parts":
                    turn.untrack("the model takes tokens one by one, and pictures or embeddings can't be fed so")
                return begin.take_up_prompt(turn, self._parking, ids, limit=limit, new_tokens=new_tokens)
            except ContextWindowError:
                self._parking.park(turn)  # nothing has changed
                begin.release(turn)
                raise
            except BaseException:
                held.clear()  # half of what was planned may be in place
                begin.release(turn)
                raise

    def begin_unidentified_turn(
        self,
        reason: str,
        prompt_tokens: int = 0,
        *,
        expected: bool = False,
        with_inputs: bool = False,
        goes_on: bool = False,
    ) -> None:
        """Starts a turn whose content token ids do not identify: nothing is reused and nothing kept.

        Args:
            expected: it is not logged.
            with_inputs: what ids do not identify are inputs beside them, which nobody can compute from the ids again.
            goes_on: it goes on after the tokens held, of another such turn.

        Raises:
            CacheUseError: it is to go on, and what was held is of no use any more.
        """
        self._acquire_with_others()
        with self._held.guard:
            turn, held = self._turn, self._held
            try:
                self._setup.ranks.attempt(partial(begin.open_turn, turn))
                turn.checked = True
                held.content = None
                if not goes_on:
                    held.clear()
                    held.see_through(held.view.as_plain())
                    held.fed_beside = [] if with_inputs else None
                elif not held.length:
                    raise CacheUseError(
                        "what the cache held is gone: pass the whole conversation with all of its inputs"
                    )
                turn.untrack(reason, expected=expected)
            except BaseException:
                begin.release(turn)
                raise
            turn.stats.prompt_tokens = turn.prompt_tokens = prompt_tokens

    def _begin_own_turn(self) -> None:
        """The first forward of a loop of one's own, or since its last `save`."""
        held, before = self._held, self._held.length
        self._acquire()
        turn = self._turn
        try:
            begin.open_turn(turn)
            if held.length < before:
                raise CacheUseError(
                    f"of the {before} tokens before these the cache holds {held.length} now "
                    f"({turn.stats.recomputed}): call match() with the whole conversation, then feed the model what "
                    "is new"
                )
        except BaseException:
            begin.release(turn)
            raise
        if held.content is not None and common_prefix(held.content.ids, held.chain.ids) < min(
            len(held.content), len(held.chain)
        ):
            held.content = None  # of another conversation
        if len(held.chain) < before:
            turn.untrack("what came before is not identified by token ids", expected=True)
        if held.saver is not None:
            held.saver.continue_turn()

    def _acquire(self) -> None:
        """Sets `_turn` to a new turn, which has the session to itself; to the same again where a load failed in it."""
        if self._turn.phase is Phase.FAILED:
            self._turn = self._turn.again()
        else:
            self.save()
            self._turn = begin.acquire(self._setup, self._held, self._parking)

    def _acquire_with_others(self) -> None:
        """As `_acquire`, on all ranks or none."""
        try:
            self._setup.ranks.attempt(self._acquire)
        except OtherRankError:
            begin.release(self._turn)
            raise

    def note_first_token(self) -> None:
        """`generate` has returned, or goes on with a new token: records the time to it, where that is the first."""
        self._turn.note_first_token()

    def end_of_generate(self) -> None:
        """`generate` has returned: notes it if the model computed without the cache that it was given."""
        turn, stats = self._turn, self.stats
        turn.note_first_token()
        if not stats.prefilled_tokens and not stats.generated_tokens:
            if not turn.untracked:
                turn.note("the model let go of its cache and computed all of the prompt", "cache not used")
            stats.reused_tokens, stats.prefilled_tokens = 0, stats.prompt_tokens

    def abandon(self, error: LoadError | None = None) -> None:
        """A load failed in the middle of a turn: lets go of everything held. The turn, which still has the session
        to itself, is to be begun again, or ended.

        Args:
            error: None where no load failed, and the turn has to be begun again all the same.
        """
        with self._held.guard:
            turn = self._turn
            if error is not None:
                turn.note_failed_load(error)
            turn.forward = None
            self._held.clear()
            if self._held.encoder is not None:
                self._held.encoder.clear()
            turn.phase = Phase.FAILED

    def end_turn(self) -> None:
        """Ends the turn: hands over what is complete and commits the session. Also after an exception."""
        with self._held.guard:
            turn = self._turn
            if not turn.is_open:
                return
            try:
                self._finish_turn(turn)
            finally:
                turn.stats.seconds = time.perf_counter() - turn.began
                begin.release(turn)
                if self._setup.tell is not None:
                    self._setup.tell(turn.stats)

    def _finish_turn(self, turn: Turn) -> None:
        commit.end_turn(turn, self._parking)

    def hold_back(self) -> None:
        """Until the turn ends, what it computes is not handed over."""
        self._turn.holds_for_additions = False
        self._held.hold_back()

    def is_of_its_model(self) -> bool:
        """Whether the model is still the one that the turn began with. Where nobody can tell, it is not."""
        return self._turn.is_of_its_model()

    def drop_turn(self, reason: str, *, expected: bool = False) -> None:
        """Ends the turn and lets go of everything held: none of it is to be kept. What is `expected` is not logged."""
        with self._held.guard:
            self._turn.untrack(reason, expected=expected)
            self._held.clear()
            self.end_turn()

    # forwards, through the hooks

    def begin_forward(self, named: Mapping[str, Any]) -> dict[str, Any] | None:
        """A forward of the model begins. Returns inputs to replace, if any."""
        if torch.is_grad_enabled():
            raise GradientError(
                "an AttentionStoreCache can't be part of a backward pass: run the model under torch.no_grad() "
                "or torch.inference_mode(), or train without a cache"
            )
        with self._held.guard:
            return self._begin_forward(named)

    def _begin_forward(self, named: Mapping[str, Any]) -> dict[str, Any] | None:
        if not self._turn.is_open:
            self._begin_own_turn()
        return forwards.begin_forward(self._turn, named)

    def before_layer(self, number: int) -> None:
        """A decoder layer is about to compute."""
        recorder, load, encoder = self._turn.recorder, self._held.load, self._held.encoder
        if recorder is not None:
            recorder.before_layer(number)
        if load is not None:
            load.before_layer(number)
        if encoder is not None:
            encoder.before_layer(number)

    def after_layer(self, number: int) -> None:
        """A decoder layer has computed."""
        recorder, saver = self._turn.recorder, self._held.saver
        if recorder is not None:
            recorder.after_layer(number)
        if saver is not None and saver.due and self._turn.forward is not None:
            try:
                began = recorder.now(number) if recorder is not None else 0.0
                saver.layer_done(number)
                if recorder is not None:
                    recorder.saved(number, began)
            except StoreClosedError:
                commit.stop_saving(self._turn)

    def end_forward(self) -> None:
        """A forward of the model has ended well."""
        with self._held.guard:
            forwards.end_forward(self._turn)

    @outside_graphs
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the KV of new tokens, `[batch, heads, tokens, dim]`, to a layer; returns all that queries may see.

        Raises:
            CacheUseError: not within a forward of the model that this cache was made for.
            LoadError: what was to be loaded can't be (`generate` catches it and recomputes).
        """
        forward = self._turn.forward or forwards.running_forward(self._turn)
        layer: Any = self.layers[layer_idx]
        if layer.by_token and key_states.shape[0] != forward.rows:
            forwards.fit_rows(self._turn, layer_idx, key_states)
        if self._held.load is not None and not self._setup.attachment.sees_layers:
            self._held.load.before_layer(layer_idx)
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        return keys, values

    # what models ask of a cache with running states

    @outside_graphs
    def get_seq_length(self, layer_idx: int = 0) -> int:
        if not any(layer.by_token for layer in self.layers) and self._held.granularity != "none":
            return self._held.length
        length: int = super().get_seq_length(layer_idx)
        return length

    @outside_graphs
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if not any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            return self._held.length + query_length, 0
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    @outside_graphs
    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.layers[layer_idx].settle()
        return super().get_conv_state(layer_idx, *args, **kwargs)

    @outside_graphs
    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.layers[layer_idx].settle()
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    @outside_graphs
    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        forwards.running_forward(self._turn)
        self.layers[layer_idx].settle()
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    @outside_graphs
    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        forwards.running_forward(self._turn)
        self.layers[layer_idx].settle()
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    # going back

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens from every layer.

        Raises:
            ValueError: the number is positive.
            CacheUseError: the window before that is neither in a sliding layer nor in the store.
            LoadError: it was in the store, but can't be read any more; nothing is held then.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        with self._held.guard:
            turn, held = self._turn, self._held
            self._parking.unpark()
            loads.finish(turn)
            length = max(0, held.length + tokens_to_remove)
            if held.uneven:
                super().crop(tokens_to_remove)
                held.length = length
                return
            loads.crop_to(turn, length)
            held.known = 0
            if held.states and held.states_at != held.length:
                loads.reload(turn, held.length)
            turn.computed = True
            turn.confirmed = held.length

    def reset(self) -> None:
        """Lets go of everything held; session and store stay. In a loop of one's own, `save` comes before that."""
        with self._held.guard:
            self.save()
            self._turn.forward = None
            self._held.clear()
            self._held.change_view(self._held.view.as_plain(), np.empty(0, dtype=np.int64))

    def activate_past_recording(self) -> None:
        """From now on the cache can go back by `crop` however far: what comes may be drafts to be checked."""
        self._turn.speculating = self._turn.checked
        super().activate_past_recording()

    def batch_repeat_interleave(self, repeats: int) -> None:
        loads.finish(self._turn)
        super().batch_repeat_interleave(repeats)

    # copies

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheUseError(
            "a cache can't be pickled: what it holds is kept by its store. Make one where it is needed, with "
            "AttentionStoreCache(model, session=..., store=AttentionStore(path)), or copy it with copy.deepcopy"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionStoreCache":
        """An independent copy of what is held, without session and store: nothing of it is saved."""
        loads.finish(self._turn)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        self._copy_into(twin, [copy.deepcopy(layer, memo) for layer in self.layers])
        return twin

    def in_rows(self, rows: int, new_tokens: int = 0) -> "AttentionStoreCache":
        """An independent copy of what is held, so many times in the rows of a batch: nothing of it is saved.

        Args:
            new_tokens: how many are to come, for which there is room at once.
        """
        loads.finish(self._turn)
        layers: list[Any] = make_layers(self.model)
        for number, (layer, own) in enumerate(zip(layers, self.layers, strict=True)):
            if own.fits_batches and own.rows <= 1:
                layer.expected = self._held.length + new_tokens
                layer.put_together([own] * rows, [0] * rows, self._held.length)
            else:
                layers[number] = copy.deepcopy(own)
                layers[number].batch_repeat_interleave(rows)
        twin = type(self).__new__(type(self))
        self._copy_into(twin, layers)
        return twin

    def _copy_into(self, twin: "AttentionStoreCache", layers: list[Any]) -> None:
        for layer in layers:
            layer.keep_until_saved(None)
        twin.resegments_with = None
        twin._begin_with(self._setup.without_store(), layers)
        held, own = twin._held, self._held
        held.fingerprint = own.fingerprint
        held.change_view(own.view, own.chain.ids)
        held.length, held.states_at, held.content = own.length, own.states_at, own.content
        twin._turn.stats = replace(self.stats)


def one_row(input_ids: torch.Tensor) -> np.ndarray:
    """The ids `[tokens]` of one prompt `[1, tokens]`.

    Raises:
        CacheUseError: they are not those of one prompt.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise CacheUseError(f"input_ids must be [1, tokens], not {list(input_ids.shape)}")
    ids: np.ndarray = input_ids[0].detach().cpu().numpy()
    return ids


_default: AttentionStore | None = None
_default_lock = threading.Lock()


def _default_store() -> AttentionStore:
    """The store at the default path, opened once per process."""
    global _default
    with _default_lock:
        if _default is None or _default.closed:
            _default = AttentionStore()
        return _default
