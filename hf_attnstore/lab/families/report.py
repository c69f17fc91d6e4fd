"""What a sweep found, as a page for people and as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from .encoder_decoders import family_of
from .sweep import FAILED, NOT_BUILT, NOT_KEPT, OUTSIDE, SAME, WRONG, Row, counted
from .variants import KINDS, NOT_TRIED, REUSED
from .variants import NOT_KEPT as NOT_KEPT_VARIANT
from .variants import WRONG as VARIANT_WRONG

COLUMNS = ("family", "layers", "reuse", "truncation", "attached", "verdict", "reason")

_TEXT = """# Models

What this package does for every causal language model of transformers, as `attnstore models` measured it: of each
family a tiny model with random weights is built from its configuration class (float32, on the CPU), and has
conversations with a store and without. Nothing is downloaded for it, and nothing here says how well a checkpoint of the
family answers.

The measure is transformers' own `DynamicCache`, kept in memory and fed in the same steps. Where a loop of forwards with
it gives what one forward over everything gives, the family is a reference, and `generate` with the store must give the
same logits bit for bit: turns in one process, turns across restarts, a history that was edited, and a prompt that is
repeated. How many tokens were reused and computed is compared too, so that a store that does nothing would not pass;
and all of it is compared with plain `generate`, to within rounding.

The main families of encoder-decoders are there too, with a document for the encoder. There the measure is plain
`generate`, to within rounding and over restarts: the same document and words again, an answer that is gone on with,
another document.
"""

_VARIANTS = """
## Other classes, and tokens that see ahead

The same families without a head and with other heads, in loops of forwards across a restart, and twins that were told
to let tokens see those that come later. Reused means bit for bit as with a `DynamicCache` that was kept, and within
rounding as one forward over everything; what sees ahead may never be. Not tried are those that do not run on token ids
alone, and those that take a cache of their own class only.

"""

_MEANINGS = {
    "layers": "the kinds of layers in the tiny model: one of each that the family has",
    "reuse": "what a conversation is taken up by: any `token`; the last `checkpoint` of its running states; "
    "`some` of it or `none`, where that was not to be compared",
    "truncation": "when the window overflows, the keys of kept tokens are `rotated` to their new places, or the tokens "
    "are `recomputed`",
    "attached": "what plain `generate` does after `attach`: its turns are `kept`, or it runs `as without`; its tokens "
    "are the same. Empty where it does not run on token ids without a store either",
    "verdict": "see below",
    "reason": "why a family is no reference, or what went wrong",
}
_VERDICTS = {
    SAME: "a reference, and bit for bit as with `DynamicCache`",
    OUTSIDE: "no reference, for the reason given; where the store takes the model all the same, its tokens were those "
    "of plain `generate`",
    NOT_KEPT: "a reference of which this package keeps nothing, and says so; the output is right without",
    NOT_BUILT: "there is no model to try",
    WRONG: "something differs: a bug",
    FAILED: "an error: a bug",
}


def markdown(rows: Sequence[Row]) -> str:
    """A page with a table of all rows."""
    found = counted(rows)
    meanings = _listed(("column", "meaning"), _MEANINGS)
    verdicts = _listed(("verdict", "meaning"), {name: text for name, text in _VERDICTS.items() if name in found})
    return f"{_TEXT}\n{summary(rows)}\n\n{meanings}\n\n{verdicts}\n\n## Families\n\n{table(rows)}\n" + (_variants(rows))


def _listed(heads: Sequence[str], meanings: Mapping[str, str]) -> str:
    return "\n".join([_line(heads), _line(["---"] * len(heads)), *map(_line, meanings.items())])


def summary(rows: Sequence[Row]) -> str:
    """The counts, in two sentences."""
    references = sum(row.reference for row in rows)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counted(rows).items(), key=lambda c: -c[1]))
    return (
        f"{len(rows)} families, {references} of them references: {counts}. Made with transformers "
        f"{transformers.__version__}, torch {_release(torch.__version__)}, Python {platform.python_version()}."
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as a markdown table."""
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    return "\n".join([*lines, *(_line(cells(row)) for row in rows)])


def cells(row: Row) -> tuple[str, ...]:
    """A row by columns."""
    return row.family, row.layers, row.reuse, row.truncation, row.attached, row.verdict, row.reason


def variants_in_words(row: Row) -> list[str]:
    """What is wrong with a family's other classes and twins."""
    return [f"{row.family}, {v.kind} ({v.model_class}): {v.reason}" for v in row.variants if v.verdict == VARIANT_WRONG]


def _variants(rows: Sequence[Row]) -> str:
    """How many other classes and twins there are of each verdict."""
    found = [variant for row in rows for variant in row.variants]
    if not found:
        return ""
    verdicts = (REUSED, NOT_KEPT_VARIANT, NOT_TRIED, VARIANT_WRONG)
    lines = [_line(["kind", *verdicts]), _line(["---"] * (1 + len(verdicts)))]
    for kind in KINDS:
        counts = [sum(v.kind == kind and v.verdict == verdict for v in found) for verdict in verdicts]
        lines.append(_line([kind, *map(str, counts)]))
    return _VARIANTS + "\n".join(lines) + "\n"


def write(rows: Sequence[Row], page: Path) -> Path:
    """Writes the page, and the same as JSON beside it; returns the latter's path."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(markdown(rows))
    data = page.with_suffix(".json")
    content = {
        "transformers": transformers.__version__,
        "torch": _release(torch.__version__),
        "families": [{name: value for name, value in asdict(row).items() if name != "seconds"} for row in rows],
    }
    data.write_text(json.dumps(content, indent=1) + "\n")
    return data


def _release(version: str) -> str:
    return version.split("+")[0]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def write_verified(rows: Sequence[Row], path: Path) -> Path:
    """Writes which families are known to continue their cache, token by token: `probing/continuing.py` does not ask
    their models."""
    known = (row for row in rows if row.verdict == SAME and row.reuse == "token" and row.reference)
    classes = {row.family: row.model_class for row in known if family_of(row.family) is None}
    content = {"transformers": transformers.__version__, "classes": dict(sorted(classes.items()))}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
