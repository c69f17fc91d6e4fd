"""The study of codecs as Markdown, and as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_attnstore.lab.bench.codec_bench import KEPT, MEDIA, Quality, Resumed
from hf_attnstore.lab.bench.machine import in_words, versions, versions_in_words
from hf_attnstore.lab.bench.shapes import BenchError
from hf_attnstore.lab.markdown import markdown_table

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


def timed_rows(
    times: Mapping[str, Mapping[str, Sequence[float]]], ratio: Callable[[str, str], float], digits: int
) -> list[tuple[str, ...]]:
    """Milliseconds and ratio to raw by codec and medium, as text."""
    codecs = next(iter(times.values()))
    rows: list[tuple[str, ...]] = []
    for codec in codecs:
        cells = [
            f"{statistics.median(seconds[codec]) * 1e3:,.{digits}f} ms ({ratio(medium, codec):.2f})"
            for medium, seconds in times.items()
        ]
        rows.append((codec, *cells))
    return rows


class Record:
    """What was measured of a model, at one time or several: by type of numbers, by length of history."""

    def __init__(self, folder: Path | None, label: str, content: dict[str, Any]) -> None:
        self.folder, self.label, self.stem = folder, label, f"codecs-{label}"
        self._content: dict[str, Any] = {"model": label, "quality": {}, "resumed": {}} | content

    @classmethod
    def opened(cls, folder: Path | None, label: str) -> Record:
        """What a folder has of a model; nothing without one.

        Raises:
            BenchError: its file is none of a record.
        """
        path = folder / f"codecs-{label}.json" if folder is not None else None
        if path is None or not path.exists():
            return cls(folder, label, {})
        try:
            return cls(folder, label, json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise BenchError(f"{path} is no record of codecs ({error}): move it away.") from error

    def judge(
        self, kind: str, history: int, scored: int, passages: int, texts: list[str], found: Mapping[str, Quality]
    ) -> None:
        """Enters quality. What the same passages gave by other codecs stays."""
        about = {"history": history, "scored": scored, "passages": passages, "texts": texts}
        before = self._content["quality"].get(kind, {})
        kept = before.get("codecs", {}) if before.items() >= about.items() else {}
        codecs = kept | {name: asdict(one) for name, one in found.items()}
        self._content["quality"][kind] = about | self._now() | {"codecs": codecs}

    def time(self, kind: str, found: Resumed, others: float, machine: dict[str, str | int]) -> None:
        """Enters times. `others`: the share of all CPUs that other processes had meanwhile."""
        entry = asdict(found) | self._now() | {"others": others, "machine": machine}
        self._content["resumed"][f"{kind}, {found.history:,} tokens"] = entry

    @staticmethod
    def _now() -> dict[str, Any]:
        return {"created": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}

    def write(self) -> None:
        """Writes JSON, Markdown and a picture into the folder."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self.stem}.json").write_text(json.dumps(self._content, indent=1) + "\n")
        report = self.as_markdown()
        for kind, found in self._judged().items():
            picture = f"{self.stem}.png" if kind == "float32" else f"{self.stem}-{kind}.png"
            draw(f"{self.label}, {kind}", found, self.folder / picture)
            report += f"\n![Bytes against quality, {kind}]({picture})\n"
        (self.folder / f"{self.stem}.md").write_text(report)

    def _judged(self) -> dict[str, dict[str, Quality]]:
        return {
            kind: {name: Quality(**one) for name, one in entry["codecs"].items()}
            for kind, entry in self._content["quality"].items()
        }

    def as_markdown(self) -> str:
        """The report for docs/results."""
        parts = [f"# Codecs: {self.label}", ""]
        for kind, found in self._judged().items():
            entry = self._content["quality"][kind]
            parts += [
                f"## What becomes of the next tokens, in {kind}", "",
                f"{entry['history']:,} tokens of history, {entry['passages']} passages of {entry['scored']:,} tokens "
                f"scored, of {' and '.join(entry['texts'])}.", "",
                *markdown_table(QUALITY_COLUMNS, quality_rows(found)), "",
            ]  # fmt: skip
        if self._content["quality"]:
            parts += [
                "The history of each text went through the codec, in blocks of 256 tokens, and the tokens after it are "
                "exact; all figures are against the exact history. The model in other numbers is the floor: the same "
                "weights, the history computed by itself.", "",
            ]  # fmt: skip
        for name, entry in self._content["resumed"].items():
            resumed = Resumed(*(entry[field] for field in ("history", "new", "raw_bytes", "seconds", "loading")))
            columns = ("codec", *(f"from {medium}" for medium in resumed.seconds))
            rates = [(medium, rate) for medium in resumed.seconds if (rate := MEDIA.get(medium))]
            takes = ", ".join(f"{resumed.raw_bytes / rate * 1e3:,.0f} ms from {medium}" for medium, rate in rates)
            parts += [
                f"## Time to the first token, {name} of history", "",
                *markdown_table(columns, timed_rows(resumed.seconds, resumed.ratio, 0)), "",
                f"A turn that resumes {resumed.history:,} tokens and computes {resumed.new}: median, and in brackets "
                "the median of the ratios to `raw` within each repeat, in which the codecs take turns. What has a "
                "limit is simulated: a queue before the page cache that lets so many bytes a second through. Raw, the "
                f"history has {resumed.raw_bytes / 1e6:,.0f} MB" + (f", which take {takes}" if takes else "") + ". "
                f"`{KEPT}` is a history in the model's own cache: its ratios are what no codec can go below.", "",
                "Of these times the load alone, reading and decoding:", "",
                *markdown_table(columns, timed_rows(resumed.loading, resumed.loading_ratio, 1)), "",
                f"Measured on {in_words(entry['machine'])}; other processes had {entry['others']:.0%} of it.", "",
            ]  # fmt: skip
        last = max((*self._content["quality"].values(), *self._content["resumed"].values()), key=lambda e: e["created"])
        return "\n".join([*parts, f"{versions_in_words(last['versions'])}.", ""])


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
