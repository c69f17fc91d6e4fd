"""Views and manifests: what of a session's bookkeeping outlives the process."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..store.blocks.keys import Key, decode_tokens, encode_tokens
from ..store.records.manifest import Manifest, SpanRow
from .spans import Span, overlapping, total_tokens
from .view import View

Describe = Callable[[Key], tuple[int, np.ndarray] | None]
"""The position for which a block's first keys were made, and its ids; None if it is not there."""


def write_manifest(view: View, spans: Sequence[Span], length: int) -> Manifest:
    """The manifest of a session that is seen through `view`.

    Args:
        spans: where the KV of the tokens in view is, from the first on.
        length: tokens of the whole conversation.
    """
    rows: list[SpanRow] = []
    position = 0
    known = total_tokens(spans)
    for start, stop, kept in view.runs():
        if not kept:
            rows.append(SpanRow(b"", 0, 0, 0, encode_tokens(view.ids[start:stop])))
            continue
        rows += _rows(spans, position, position + stop - start)
        position += stop - start
        if position > known:  # what comes after a hole could not be placed
            return Manifest(tuple(rows), view.root if view.base else b"", view.base, length)
    rows += _rows(spans, position, known)
    return Manifest(tuple(rows), view.root if view.base else b"", view.base, length)


def _rows(spans: Sequence[Span], first: int, last: int) -> list[SpanRow]:
    return [SpanRow(s.block, s.start, s.stop, s.shift) for s in overlapping(spans, first, last)]


def read_manifest(manifest: Manifest, plain: View, describe: Describe) -> View:
    """The view through which a session was seen when its manifest was written, as far as its blocks are there; `plain`
    is the view of which nothing was dropped."""
    rows = manifest.spans
    ends = [number + 1 for number, row in enumerate(rows) if not row.block]
    if not ends:
        return plain
    ids: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    prefix: list[Span] = []
    position = 0
    for number, row in enumerate(rows):
        if not row.block:
            ids.append(decode_tokens(row.dropped))
            kept.append(np.zeros(len(ids[-1]), dtype=bool))
            continue
        if number >= ends[-1] and position >= manifest.base:
            break
        found = describe(row.block)
        if found is None:
            break
        made_for, tokens = found
        span = Span(row.block, row.start, row.stop, position, len(tokens), row.shift)
        if made_for + row.start + row.shift != position or not 0 <= row.start < row.stop <= len(tokens):
            break  # not as this was written; what can't be explained is computed again
        ids.append(tokens[row.start : row.stop])
        kept.append(np.ones(len(ids[-1]), dtype=bool))
        if position < manifest.base:
            last = prefix[-1] if prefix else None
            if last is not None and (last.block, last.stop, last.shift) == (span.block, span.start, span.shift):
                prefix[-1] = last._replace(stop=span.stop)  # it was written in two: tokens were dropped between
            else:
                prefix.append(span)
        position = span.last
    if not ids:
        return plain
    view = replace(
        plain,
        root=manifest.root or plain.model_root,
        prefix=tuple(prefix),
        ids=np.concatenate(ids),
        kept=np.concatenate(kept),
    )
    return view if view.base == manifest.base else view.put_together(prefix)
