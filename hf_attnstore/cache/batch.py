"""Batches: several conversations at once, each with its own history, in the rows of one left-padded batch.

Every row has a cache of its own, which finds, loads and saves its conversation; the batch's layers are put together of
them before the model computes, and give back what is new afterwards. All rows are fed the same columns, as in any
batch: reuse ends at the column up to which every row has its KV. Rows that have more would be fed padding instead.
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import CacheUseError, LoadError
from ..session.matching import match_prefix
from ..session.spans import total_tokens
from ..store.store import AttentionStore
from ..timeline import Event, in_order
from . import begin, commit, loads
from .cache import AttentionStoreCache
from .hooks import feed
from .layers.kept import KeptLayer
from .model.structure import device_of, is_encoder_decoder
from .stats import TurnStats, added_up
from .turn import Turn

logger = logging.getLogger("hf_attnstore")


class Row:
    """One conversation of a batch: a cache with a turn of its own, whose tokens are computed in a row of the batch."""

    def __init__(self, cache: AttentionStoreCache) -> None:
        self.cache = cache
        self.held = cache._held
        self.held.setup.parks = False  # it holds but the tail of its conversation
        self.pad = 0
        """Columns of padding before its first token."""

    @property
    def stats(self) -> TurnStats:
        return self.cache.stats

    def load(self, ids: np.ndarray, limit: int, new_tokens: int) -> int:
        """Begins a turn on the conversation `ids` and loads what is known of its first `limit` tokens. Returns how many
        tokens are held."""
        self.cache._load_now(ids, limit, new_tokens, own=False)
        return self.held.length

    def compute(self, ids: np.ndarray, model: nn.Module) -> None:
        """Has the model compute all up to the last token but one, with pauses where running states are kept."""
        last, turn = len(ids) - 1, self.cache._turn
        first = self.held.length
        bounds = sorted({first, *begin.stops_of(turn, first, last, ids), last})
        for start, stop in pairwise(bounds):
            feed(model, self.cache, torch.from_numpy(ids[None, start:stop]).to(device_of(model)))
        with self.held.guard:
            commit.take_checkpoint(turn, wait=False)

    def go_back(self, length: int) -> int:
        """Lets go of what is held beyond `length` tokens, and of more where the windows before it are gone. Returns how
        many are held then."""
        with self.held.guard:
            turn = self.cache._turn
            try:
                loads.crop_to(turn, loads.last_place(turn, min(length, self.held.length)))
            except LoadError as error:  # nothing is held any more
                turn.note_failed_load(error)
            return self.held.length

    def keep_tail(self) -> None:
        """Lets go of all KV but that of the last block, which is needed to save what comes; of nothing that is still to
        be saved when the turn ends."""
        held = self.held
        if held.saver is not None and held.saver.holds_back:
            return
        first = held.chain.bounds(held.chain.block_at(held.length))[0]
        for layer in held.layers:
            layer.keep_from(first)

    def absorb(
        self, ids: np.ndarray, layers: Sequence[KeptLayer], place: int, start: int, stop: int, *, states: bool
    ) -> None:
        """Adds the tokens `ids`, computed in the row `place` of a batch's `layers`, in columns `[start, stop)`.

        Args:
            states: whether the running states of the batch's layers are those after the last of them.
        """
        held, turn = self.held, self.cache._turn
        with held.guard:
            for own, theirs in zip(held.layers, layers, strict=True):
                own.take_row(theirs, place, start, stop, states=states)
            held.length += len(ids)
            held.states_at = held.length if states or not held.states else None
            if not turn.untracked:
                held.chain.append(ids)
            turn.computed = True


def _is_batch(model: nn.Module, session: Any) -> bool:
    return isinstance(session, (list, tuple)) and not is_encoder_decoder(model)


class BatchCache(AttentionStoreCache, serves=_is_batch):
    """The cache of a batch of conversations: what `AttentionStoreCache` makes for a list of sessions.

    `stats` adds up those of the rows, which are in `row_stats`. Nothing is dropped when a window overflows, and all
    that the rows have in common is reused, whatever `gate` says.
    """

    def __init__(
        self,
        model: nn.Module,
        session: Sequence[str | None],
        store: AttentionStore | None = None,
        *,
        window: int | None = None,
        keep_first: Any = None,
        record: bool = False,
        save: bool = True,
        wait: float = 0.0,
        checkpoint_every: int | None = None,
        drop: float = 0.0,
        gate: bool | None = None,
    ) -> None:
        names = list(session)
        named = [name for name in names if name is not None]
        if not names:
            raise CacheUseError("a batch has at least one row: session=[…] is empty")
        if len(set(named)) < len(named):
            raise CacheUseError("two rows of a batch can't be the same session")
        if drop or window is not None or keep_first:
            raise CacheUseError(
                "a batch of conversations drops nothing: leave out `window`, `keep_first` and `drop`, or make a cache "
                "for each session"
            )
        super().__init__(model, None, store, drop=0, save=False, record=record, gate=False)
        self.sessions = names
        """The session of every row; None for a row that is kept by content only."""
        self._setup.conversations, self._setup.parks = len(names), False
        settings: dict[str, Any] = {"save": save, "wait": wait, "checkpoint_every": checkpoint_every}
        settings |= {"drop": 0, "gate": False}
        self._rows = [Row(AttentionStoreCache(self.model, name, self.store, **settings)) for name in names]
        self._forget_batch()

    def _forget_batch(self) -> None:
        """Nothing is known of the rows of what is held."""
        self._kept = False
        """Whether the rows take over what is computed."""
        self._begin = self._width = 0
        """The column up to which everything was loaded, and how many columns the prompts have."""
        self._fed: list[torch.Tensor] = []
        self._feeding: torch.Tensor | None = None
        self._ends: frozenset[int] = frozenset()

    @property
    def row_stats(self) -> list[TurnStats]:
        """The numbers of the last turn, row by row."""
        return [row.stats for row in self._rows]

    @property
    def timeline(self) -> tuple[Event, ...]:
        """The events of all rows, in the order of beginning; what is loaded is loaded row by row."""
        found = {*super().timeline}  # what the store does in the background, all of them have recorded
        return in_order(found.union(*(row.cache.timeline for row in self._rows)))

    def match(self, input_ids: torch.Tensor, new_tokens: int = 0, **inputs: Any) -> int:
        """Loads what is known of the conversations, for a loop of one's own.

        Args:
            input_ids: `[rows, tokens]`, left-padded.
            new_tokens: how many more are to be generated.
            inputs: `attention_mask` `[rows, tokens]`, zeros on the padding, and nothing else.

        Returns:
            The number of columns that are done with: feed the model the rest, with the whole mask and with
            `position_ids` that count every row's own tokens. `save` ends the turn.
        """
        attention_mask = inputs.pop("attention_mask", None)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if inputs:
            raise CacheUseError(f"a batch is matched by ids alone, not by {', '.join(inputs)}")
        problem = batch_problem(input_ids, attention_mask, len(self.sessions))
        if problem is not None:
            raise CacheUseError(problem)
        done = self.begin_batch(input_ids, attention_mask, new_tokens)
        self._turn.checked = False
        return done

    def resume(self) -> torch.Tensor:
        raise CacheUseError("resume() is for one conversation; use match() with the left-padded prompts")

    def __deepcopy__(self, memo: dict[int, Any]) -> "BatchCache":
        """An independent copy of what is held, without sessions and store: nothing of it is saved."""
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, BatchCache)
        twin.sessions, twin._rows = [None] * len(self.sessions), []
        twin._forget_batch()
        return twin

    # turns

    def begin_batch(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, new_tokens: int, ends: frozenset[int] = frozenset()
    ) -> int:
        """Starts a turn on left-padded conversations, each `[rows, tokens]`.

        Args:
            new_tokens: how many more are to be generated.
            ends: ids after which a row has ended: what is fed to it from then on is padding.

        Returns:
            The columns that are done with.
        """
        width = input_ids.shape[1]
        self.begin_unidentified_turn("the rows of a batch are kept one by one", width, expected=True)
        self._width, self._ends = width, ends
        pads = (attention_mask == 0).sum(dim=1).tolist()
        for row, pad in zip(self._rows, pads, strict=False):  # a copy has none
            row.pad = pad
            row.cache.record_timeline = self.record_timeline
        try:
            self._kept = self._can_be_kept()
            if not self._kept:
                return 0
            prompts = [ids[pad:] for ids, pad in zip(input_ids.detach().cpu().numpy(), pads, strict=True)]
            bring = self._compute_rows if self._held.states else self._load_rows
            return bring(prompts, new_tokens)
        except BaseException:
            self.end_turn()
            raise

    def begin_unidentified_turn(self, reason: str, prompt_tokens: int = 0, **settings: bool) -> None:
        super().begin_unidentified_turn(reason, prompt_tokens, **settings)
        self._forget_batch()

    def _can_be_kept(self) -> bool:
        """Whether rows of a batch are the same as conversations of their own."""
        setup, held = self._setup, self._held
        padded = any(row.pad for row in self._rows)
        if held.granularity == "none" or setup.store is None:
            return False
        if not setup.ranks.alone:
            self._give_up("the model is tensor-parallel, and ranks would have to agree on every row")
        elif padded and not held.states and "position_ids" not in setup.attachment.parameter_names:
            self._give_up("the model takes no position_ids, so padding may move its positions")
        elif not all(layer.fits_batches for layer in held.layers):
            self._give_up("its running states are of different sizes in different rows")
        else:
            return True
        return False

    def _give_up(self, reason: str) -> None:
        """The rows are computed, but neither loaded nor kept."""
        self._kept = False
        told = self._setup.attachment.told
        said = f"a batch is neither loaded nor kept: {reason}"
        self.stats.recomputed, self.stats.missed = said, "batch"
        logger.log(logging.DEBUG if said in told else logging.WARNING, said)
        told.add(said)

    def _load_rows(self, prompts: list[np.ndarray], new_tokens: int) -> int:
        store, rows = self.store, self._rows
        assert store is not None
        root = self._held.view.root
        known = [total_tokens(match_prefix(ids[:-1], root, store.block_size, store)) for ids in prompts]
        end = min(row.pad + count for row, count in zip(rows, known, strict=True))
        lengths = [row.load(ids, max(end - row.pad, 0), new_tokens) for row, ids in zip(rows, prompts, strict=True)]
        # a block may have been lost since: no row is used beyond what the others have
        reached = min(end, *(row.pad + length for row, length in zip(rows, lengths, strict=True)))
        while True:
            # padding alone: nothing was loaded that could stand for it
            end = reached if reached > min(row.pad for row in rows) else 0
            reached = min(row.pad + row.go_back(max(end - row.pad, 0)) for row in rows)
            if reached >= end:
                return self._put_together(end, new_tokens)

    def _compute_rows(self, prompts: list[np.ndarray], new_tokens: int) -> int:
        """Layers with a running state must not see padding: every row is brought to its last token on its own."""
        if max(len(ids) for ids in prompts) == 1:  # nobody has a state before that
            if any(row.pad for row in self._rows):
                self._give_up("rows of one token leave the padding before it to the model")
            return 0
        for row, ids in zip(self._rows, prompts, strict=True):
            row.load(ids, len(ids) - 1, new_tokens)
            if row.cache.unidentified:  # it may not even be known that the model goes on after what a cache holds
                self._give_up(row.cache.unidentified)
                return 0
            row.compute(ids, self.model)
        return self._put_together(self._width - 1, new_tokens)

    def _put_together(self, end: int, new_tokens: int) -> int:
        """Puts the first `end` columns of the batch's layers together of the rows'."""
        self._begin = end
        held, rows = self._held, self._rows
        for row in rows:
            row.stats.prompt_tokens = self._width - row.pad
            row.stats.reused_tokens = min(row.stats.reused_tokens, max(end - row.pad, 0))
        if end:
            pads = [row.pad for row in rows]
            for number, layer in enumerate(held.layers):
                layer.expected = self._width + new_tokens
                layer.put_together([row.held.layers[number] for row in rows], pads, end)
            held.length = held.states_at = end
            for row in rows:
                row.keep_tail()
        for layer in held.layers:
            layer.keep_until_saved(end)  # everything new stays until the rows have it
        return end

    # forwards

    def _begin_forward(self, named: Mapping[str, Any]) -> dict[str, Any] | None:
        if not self._turn.is_open:
            self._forget_batch()
        replaced = super()._begin_forward(named)
        given = {**named, **(replaced or {})}
        ids = given.get("input_ids")
        if ids is None:
            self._give_up("inputs_embeds are not identified by token ids")
        elif self._kept:
            self._feeding = ids.detach().cpu()
            self._check_positions(given, *ids.shape)
        return replaced

    def end_forward(self) -> None:
        super().end_forward()
        feeding, self._feeding = self._feeding, None
        if feeding is not None:
            self._fed.append(feeding)

    def _check_positions(self, named: Mapping[str, Any], rows: int, count: int) -> None:
        if "position_ids" not in self._setup.attachment.parameter_names:
            return
        given: Any = named.get("position_ids")
        if given is None and not any(row.pad for row in self._rows):
            return
        pads = torch.tensor([row.pad for row in self._rows]).repeat_interleave(rows // len(self._rows))
        held = self._held.length
        expected = torch.arange(held, held + count) - pads[:, None]
        fits = given is not None and given.ndim == 2 and given.shape[-1] == count
        if fits and bool(((given.cpu() == expected) | (expected < 0)).all()):
            return
        if self._begin:
            raise CacheUseError("rows of a batch need position_ids that count every row's own tokens, from 0")
        self._give_up("position_ids do not count every row's own tokens")

    # the end

    def _finish_turn(self, turn: Turn) -> None:
        """Gives every row what is new of it, to be saved as that of any conversation."""
        try:
            commit.settle_turn(turn)
            self._hand_over()
        finally:
            for row in self._rows:
                row.cache.end_turn()
        if self._rows:  # a copy has none
            turn.stats = added_up(self.row_stats, turn.stats)

    def _hand_over(self) -> None:
        if not self._kept or not self._fed:
            return
        fed = torch.cat(self._fed, dim=1).numpy()
        copies = len(fed) // len(self._rows)
        for number, row in enumerate(self._rows):
            self._give(row, number * copies, fed[number * copies], alone=copies == 1)

    def _give(self, row: Row, place: int, fed: np.ndarray, *, alone: bool) -> None:
        """Gives a row what was computed in `place`.

        Args:
            fed: the tokens `[columns]` that were fed from column `_begin` on.
            alone: whether this is the only row of its conversation: of beams and samples only the prompt is one.
        """
        prompt = self._width - self._begin
        generated = fed[prompt:] if alone else fed[:0]
        ended = np.isin(generated, list(self._ends))
        real = prompt + (int(ended.argmax()) + 1 if ended.any() else len(generated))
        stop = min(self._begin + min(real, len(fed)), self._held.length)
        start = row.pad + row.held.length
        if stop <= start:
            return
        ids = fed[start - self._begin : stop - self._begin]
        whole = stop == self._held.length and alone
        row.absorb(ids, self._held.layers, place, start, stop, states=whole)
        row.stats.prefilled_tokens += max(0, min(stop, self._width) - start)
        row.stats.generated_tokens += max(0, stop - max(start, self._width))


def batch_problem(input_ids: torch.Tensor, attention_mask: torch.Tensor, rows: int) -> str | None:
    """Why these are not prompts `[rows, tokens]` of a batch; None if they are."""
    if input_ids.ndim != 2 or input_ids.shape[0] != rows:
        return f"the batch has {rows} sessions, so input_ids must be [{rows}, tokens], not {list(input_ids.shape)}"
    if attention_mask.shape != input_ids.shape:
        return f"attention_mask must be {list(input_ids.shape)}, not {list(attention_mask.shape)}"
    mask = attention_mask.cpu()
    if not bool(((mask == 0) | (mask == 1)).all()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
        return "a batch must be padded on the left (tokenizer.padding_side = 'left')"
    return None if bool(mask[:, -1].all()) else "a row of the batch has no tokens"
