"""The study of codecs as Markdown, and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_attnstore.lab.bench.codec_bench import Quality, Resumed
from hf_attnstore.lab.bench.machine import versions_in_words

_OURS, _THEIRS = "#1f6feb", "#57606a"


def quality_rows(found: Mapping[str, Quality]) -> list[tuple[str, ...]]:
    """Codec, bytes, perplexity, divergence, likeliest token and answers, as text."""
    rows: list[tuple[str, ...]] = []
    for name, one in found.items():
        gained, error = one.perplexity
        rows.append(
            (
                name,
                f"{one.bytes:.3f}" if one.bytes else "",
                f"{100 * gained:+.2f} ± {100 * error:.2f} %",
                f"{statistics.fmean(one.kl):.6f}",
                f"{100 * statistics.fmean(one.top):.1f} %",
                f"{sum(one.same)} of {len(one.same)}" if one.same else "",
            )
        )
    return rows


QUALITY_COLUMNS = (
    "codec",
    "bytes of a full block / raw",
    "perplexity, ± standard error over texts",
    "KL, nats a token",
    "same likeliest token",
    "same greedy answer",
)


def resumed_rows(found: Resumed) -> list[tuple[str, ...]]:
    """Milliseconds and ratio to raw by codec and medium, as text."""
    codecs = next(iter(found.seconds.values()))
    rows: list[tuple[str, ...]] = []
    for codec in codecs:
        cells = [
            f"{statistics.median(seconds[codec]) * 1e3:,.0f} ms ({found.ratio(medium, codec):.2f})"
            for medium, seconds in found.seconds.items()
        ]
        rows.append((codec, *cells))
    return rows


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def as_markdown(
    about: str, quality: Mapping[str, Quality], resumed: Resumed | None, machine: str, versions: Mapping[str, Any]
) -> str:
    """The report for docs/results."""
    parts = [f"# Codecs: {about}", "", *markdown_table(QUALITY_COLUMNS, quality_rows(quality))]
    parts += [
        "",
        "The history of each text went through the codec, in blocks of 256 tokens, and the tokens after it are exact; "
        "all figures are against the exact history. `bfloat16 model` is the same model, all of it in bfloat16.",
    ]
    if resumed is not None:
        columns = ("codec", *(f"from {medium}" for medium in resumed.seconds))
        parts += ["", *markdown_table(columns, resumed_rows(resumed))]
        parts += [
            "",
            f"Time to the first token of a turn that resumes {resumed.history:,} tokens: median, and in brackets the "
            "median of the ratios to `raw` within each repeat, in which the codecs take turns. What has a limit is "
            "simulated: a queue before the page cache that lets so many bytes a second through.",
        ]
    return "\n".join([*parts, "", f"Measured on {machine}; {versions_in_words(versions)}.", ""])


def draw(about: str, found: Mapping[str, Quality], path: Path) -> None:
    """Writes a PNG: bytes against divergence."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    for name, one in found.items():
        kl = max(statistics.fmean(one.kl), 1e-9)
        if not one.bytes:
            axis.axhline(kl, color=_THEIRS, linestyle="--", linewidth=1)
            axis.annotate(name, (0.02, kl), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
            continue
        axis.plot([one.bytes], [kl], "o", color=_THEIRS if "(" in name else _OURS)
        axis.annotate(name, (one.bytes, kl), xytext=(6, 4), textcoords="offset points", fontsize=9)
    axis.set_yscale("log")
    axis.set_xlabel("bytes of a full block, raw is 1")
    axis.set_ylabel("KL of the next token, nats (log scale)")
    axis.set_title(f"Codecs: {about}", fontsize=11)
    figure.savefig(path, dpi=130)
