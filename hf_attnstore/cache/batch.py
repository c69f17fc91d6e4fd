"""Batches: several conversations at once, each with its own history, in the rows of one left-padded batch.

Every row has a cache of its own, which finds, loads and saves its conversation; the batch's layers are put together of
them before the model computes, and give back what is new afterwards. All rows are fed the same columns, as in any
batch: reuse ends at the column up to which every row has its KV. Rows that have more would be fed padding instead.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import CacheUseError
from ..session.matching import match_prefix
from ..session.spans import total_tokens
from ..store.store import AttentionStore
from ..timeline import Event, in_order
from .cache import AttentionStoreCache
from .hooks import feed
from .layers.by_token import SlidingLayer, StoreLayer
from .layers.states import ConvolutionState
from .stats import TurnStats, added_up

logger = logging.getLogger("hf_attnstore")


class BatchCache(AttentionStoreCache):
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
        assert self._store is not None
        self.sessions = names
        """The session of every row; None for a row that is kept by content only."""
        self._conversations = len(names)
        self.parks = False
        settings: dict[str, Any] = {
            "save": save,
            "wait": wait,
            "checkpoint_every": checkpoint_every,
            "drop": 0,
            "gate": False,
        }
        self._row_caches = [AttentionStoreCache(self._model, name, self._store, **settings) for name in names]
        for row in self._row_caches:
            row.parks = False  # they hold but the tail of their conversations
        self._pads: list[int] = []
        self._begin = self._width = 0
        self._fed: list[torch.Tensor] = []
        self._feeding: torch.Tensor | None = None
        self._ends: frozenset[int] = frozenset()

    @property
    def row_stats(self) -> list[TurnStats]:
        """The numbers of the last turn, row by row."""
        return [row.stats for row in self._row_caches]

    @property
    def timeline(self) -> tuple[Event, ...]:
        """The events of all rows, in the order of beginning; what is loaded is loaded row by row."""
        found = {*super().timeline}  # what the store does in the background, all of them have recorded
        return in_order(found.union(*(row.timeline for row in self._row_caches)))

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
        problem = batch_problem(input_ids, attention_mask, self._conversations)
        if problem is not None:
            raise CacheUseError(problem)
        done = self.begin_batch(input_ids, attention_mask, new_tokens)
        self._checked = False
        return done

    def resume(self) -> torch.Tensor:
        raise CacheUseError("resume() is for one conversation; use match() with the left-padded prompts")

    def __deepcopy__(self, memo: dict[int, Any]) -> "BatchCache":
        """An independent copy of what is held, without sessions and store: nothing of it is saved."""
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, BatchCache)
        twin.sessions = [None] * len(self.sessions)
        twin._conversations = self._conversations
        twin.parks = False
        twin._row_caches, twin._pads, twin._fed = [], [], []
        twin._begin = twin._width = 0
        twin._feeding, twin._ends, twin._given_up = None, frozenset(), True
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
        self._width = input_ids.shape[1]
        self.begin_unidentified_turn("the rows of a batch are kept one by one", self._width, expected=True)
        self._given_up = False
        self._pads = (attention_mask == 0).sum(dim=1).tolist()
        self._ends, self._fed, self._begin = ends, [], 0
        prompts = [row[pad:] for row, pad in zip(input_ids.detach().cpu().numpy(), self._pads, strict=True)]
        try:
            if not self._can_be_kept():
                return 0
            if self._states:
                return self._compute_rows(prompts, new_tokens)
            return self._load_rows(prompts, new_tokens)
        except BaseException:
            self.end_turn()
            raise

    def _can_be_kept(self) -> bool:
        """Whether rows of a batch are the same as conversations of their own."""
        if self.granularity == "none" or self._store is None:
            self._given_up = True
        elif not self._ranks.alone:
            self._give_up("the model is tensor-parallel, and ranks would have to agree on every row")
        elif any(self._pads) and not self._states and "position_ids" not in self._attachment.parameter_names:
            self._give_up("the model takes no position_ids, so padding may move its positions")
        elif not all(isinstance(layer, ConvolutionState) for layer in self._states):
            self._give_up("its running states are of different sizes in different rows")
        return not self._given_up

    def _give_up(self, reason: str) -> None:
        """The rows are computed, but neither loaded nor kept."""
        self._given_up = True
        said = f"a batch is neither loaded nor kept: {reason}"
        self._stats.recomputed, self._stats.missed = said, "batch"
        logger.log(logging.DEBUG if said in self._attachment.told else logging.WARNING, said)
        self._attachment.told.add(said)

    def _load_rows(self, prompts: list[np.ndarray], new_tokens: int) -> int:
        assert self._store is not None
        size = self._store.block_size
        known = [total_tokens(match_prefix(ids[:-1], self._view.root, size, self._store)) for ids in prompts]
        end = min(pad + count for pad, count in zip(self._pads, known, strict=True))
        rows = list(zip(self._row_caches, self._pads, strict=True))
        lengths = [row.load(ids, max(end - pad, 0), new_tokens) for (row, pad), ids in zip(rows, prompts, strict=True)]
        # a block may have been lost since: no row is used beyond what the others have
        end = min(end, *(pad + length for pad, length in zip(self._pads, lengths, strict=True)))
        if end <= min(self._pads):
            end = 0  # padding alone: nothing was loaded that could stand for it
        for row, pad in rows:
            row.go_back(max(end - pad, 0))
        return self._assemble(end, new_tokens)

    def _compute_rows(self, prompts: list[np.ndarray], new_tokens: int) -> int:
        """Layers with a running state must not see padding: every row is brought to its last token on its own."""
        if max(len(ids) for ids in prompts) == 1:  # nobody has a state before that
            if any(self._pads):
                self._give_up("rows of one token leave the padding before it to the model")
            return 0
        device = next(self._model.parameters()).device
        for row, ids in zip(self._row_caches, prompts, strict=True):
            reused = row.load(ids, len(ids) - 1, new_tokens)
            if row.unidentified:  # it may not even be known that the model goes on after what a cache holds
                self._give_up(row.unidentified)
                return 0
            for part in row.parts(ids, reused):
                feed(self._model, row, torch.from_numpy(part[None]).to(device))
            row.keep_states()
        return self._assemble(self._width - 1, new_tokens)

    def _assemble(self, end: int, new_tokens: int) -> int:
        """Puts the first `end` columns of the batch's layers together of the rows'."""
        self._begin = end
        rows = self._row_caches
        for row, pad in zip(rows, self._pads, strict=True):
            row.stats.prompt_tokens = self._width - pad
            row.stats.reused_tokens = min(row.stats.reused_tokens, max(end - pad, 0))
        if end:
            for number, layer in enumerate(self.layers):
                parts = [row.layers[number] for row in rows]
                if isinstance(layer, StoreLayer):
                    layer.expected = self._width + new_tokens
                    layer.assemble(parts, self._pads, end)  # type: ignore[arg-type]
                if isinstance(layer, ConvolutionState):
                    layer.assemble_states(parts)  # type: ignore[arg-type]
                layer.length = end
            self._held = self._states_at = end
            for row in rows:
                row.keep_tail()
        for layer in self.layers:
            if isinstance(layer, SlidingLayer):
                layer.saved_to = end  # everything new stays until the rows have it
        return end

    # forwards

    def _begin_forward(self, named: Mapping[str, Any]) -> dict[str, Any] | None:
        replaced = super()._begin_forward(named)
        ids = {**named, **(replaced or {})}.get("input_ids")
        if ids is None:
            self._give_up("inputs_embeds are not identified by token ids")
        else:
            self._feeding = ids.detach().cpu()
            self._check_positions({**named, **(replaced or {})}, *ids.shape)
        return replaced

    def _check_positions(self, named: Mapping[str, Any], rows: int, count: int) -> None:
        if self._given_up or not self._pads or "position_ids" not in self._attachment.parameter_names:
            return
        given: Any = named.get("position_ids")
        if given is None and not any(self._pads):
            return
        pads = torch.tensor(self._pads).repeat_interleave(rows // len(self._pads))
        expected = torch.arange(self._held, self._held + count) - pads[:, None]
        fits = given is not None and given.ndim == 2 and given.shape[-1] == count
        if fits and bool(((given.cpu() == expected) | (expected < 0)).all()):
            return
        if self._begin:
            raise CacheUseError("rows of a batch need position_ids that count every row's own tokens, from 0")
        self._give_up("position_ids do not count every row's own tokens")

    def _end_forward(self) -> None:
        super()._end_forward()
        if self._feeding is not None:
            self._fed.append(self._feeding)
            self._feeding = None

    # the end

    def _hand_over(self) -> None:
        """Gives every row what is new of it, to be saved as that of any conversation."""
        if not self._given_up and self._fed:
            fed = torch.cat(self._fed, dim=1).numpy()
            copies = len(fed) // self._conversations
            for number in range(self._conversations):
                self._give_row(number, number * copies, fed[number * copies], alone=copies == 1)
        self._fed = []
        for row in self._row_caches:
            row.end_turn()
        if self._row_caches:  # a copy has none
            self._stats = added_up(self.row_stats, self._stats)

    def _give_row(self, number: int, place: int, fed: np.ndarray, *, alone: bool) -> None:
        row, pad = self._row_caches[number], self._pads[number]
        prompt = self._width - self._begin
        generated = fed[prompt:] if alone else fed[:0]  # of beams and samples only the prompt is one conversation
        ended = np.isin(generated, list(self._ends))
        real = prompt + (int(ended.argmax()) + 1 if ended.any() else len(generated))
        stop = min(self._begin + min(real, len(fed)), self._held)
        start = pad + row.get_seq_length()
        if stop <= start:
            return
        ids = fed[start - self._begin : stop - self._begin]
        whole = stop == self._held and alone
        row.absorb(ids, self.layers, place, start, stop, states=whole)
        row.stats.prefilled_tokens += max(0, min(stop, self._width) - start)
        row.stats.generated_tokens += max(0, stop - max(start, self._width))

    def _close_turn(self) -> None:
        for row in getattr(self, "_row_caches", ()):
            row.end_turn()
        super()._close_turn()

    def _open(self) -> None:
        super()._open()
        for row in self._row_caches:
            row.record_timeline = self.record_timeline
        self._given_up = True
        self._feeding = None


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
