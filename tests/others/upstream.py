"""Runs transformers' own tests of generating and caches with the product put in, and counts what passes.

They are not in transformers' package nor in its source distribution: `ATTNSTORE_TRANSFORMERS` names the folder of a
checkout of its repository. Started as a script it tries all families, or those it is given, and writes what each test
said into one file, as JSON, and counts into another, as Markdown:

    ATTNSTORE_TRANSFORMERS=… python tests/others/upstream.py upstream.json docs/upstream-tests.md [family …]
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

CHECKOUT = Path(os.environ.get("ATTNSTORE_TRANSFORMERS", "no checkout")).absolute()
HERE = Path(__file__).parent
PACKAGE = HERE.parent.parent

DECODERS = (
    "llama mistral qwen2 qwen3 gemma3 gpt2 gpt_neox phi3 bloom falcon opt qwen3_next lfm2 mamba2 falcon_h1 gpt_oss "
    "deepseek_v3 olmoe"
).split()
OTHERS = (
    "t5 bart mbart pegasus marian m2m_100 blenderbot whisper speech_to_text umt5 qwen2_vl qwen2_5_vl qwen3_vl qwen3_5 "
    "llava llava_next internvl qwen2_audio"
).split()

SECONDS = 1800
"""For all tests of a family."""

MODES = {
    "attach once one": "attached, prompts of one row",
    "attach again one": "the same, everything a second time from a reopened store",
    "explicit again one": "a cache in the call, one row, a second time from a reopened store",
    "attach again left": "attached, batches padded on the left, a second time",
    "attach again asis": "attached, batches as the tests have them, mostly padded on the right, a second time",
}
"""Those in which the product is put in, in words."""
COUNTS = ("plain", "passed", "calls", "served", "compared", "differing")
_PADDING = (
    "a batch of a model that takes no positions is computed again where it goes on; what its layers hold in places of "
    "padding, which no token attends to, depends on how many are computed at once, and the test compares that too"
)
EXEMPT = {
    "attach again left: BloomModelTest::test_generate_continue_from_past_key_values": _PADDING,
    "attach again asis: BloomModelTest::test_generate_continue_from_past_key_values": _PADDING,
}
"""By mode and test: what can't hold with a cache of ours, and why."""

Tested = Mapping[str, Any]
"""A test: its name, and by mode what was said and counted. See `put_in.py`."""


def run(family: str) -> list[Tested]:
    """Runs a family's tests.

    Raises:
        RuntimeError: they could not be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        path = [CHECKOUT / "src", PACKAGE, CHECKOUT, HERE]  # one copy of transformers, and all of it the checkout's
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "ATTNSTORE_RESULTS": str(results),
            "ATTNSTORE_GATE": "off",
            "HF_HUB_OFFLINE": "1",
        }
        file = f"tests/models/{family}/test_modeling_{family}.py"
        options = ["-q", "-p", "put_in", "-p", "no:cacheprovider", "-W", "ignore", file]
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", *options],
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if ran.returncode not in (0, 1):  # 1: some tests fail without the product too
            raise RuntimeError(f"the tests of {family} could not be run:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
        return [json.loads(line) for line in results.read_text().splitlines()]


def losses(tests: Iterable[Tested]) -> dict[str, str]:
    """What passes plain and not in a mode, if it isn't exempt, or has other tokens there: by mode and test, why."""
    found = {}
    for test in tests:
        name = test["test"].split("::", 1)[1]
        for mode, said in with_the_product(test).items():
            which = f"{mode}: {name}"
            if said["words"] != "passed" and which not in EXEMPT:
                found[which] = said["words"]
            elif said.get("differing"):
                found[which] = f"{said['differing']} of {said['compared']} outputs differ"
    return found


def with_the_product(test: Tested) -> dict[str, Any]:
    """A test's runs in the modes in which the product is put in, if it passes plain with the same inputs."""
    return {mode: said for mode, said in test["runs"].items() if mode in MODES}


def count(tests: Iterable[Tested], mode: str) -> Counter[str]:
    """Tests that pass `plain`, those that `passed` in a mode, and what was counted there."""
    counts: Counter[str] = Counter()
    for test in tests:
        said = with_the_product(test).get(mode)
        if said is not None:
            counts["plain"] += 1
            counts["passed"] += said["words"] == "passed"
            counts.update({name: said.get(name, 0) for name in ("calls", "served", "compared", "differing")})
    return counts


def markdown(tried: Mapping[str, Sequence[Tested]]) -> str:
    """Counts by mode, and by family."""
    everything = [test for tests in tried.values() for test in tests]
    modes = []
    for number, (mode, words) in enumerate(MODES.items(), 1):
        counts = count(everything, mode)
        modes.append(_row(number, words, *(f"{counts[name]:,}" for name in COUNTS)))
    families = []
    for family, tests in tried.items():
        of = [count(tests, mode) for mode in MODES]
        families.append(_row(family, *(f"{each['passed']} of {each['plain']} ({each['served']})" for each in of)))
    return TEXT.format(
        families=len(tried),
        modes="\n".join(modes),
        header=" | ".join(str(number) for number in range(1, len(MODES) + 1)),
        ruler=" | ".join("---:" for _ in MODES),
        by_family="\n".join(families),
        exempt="\n".join(f"- {test}: {why}." for test, why in EXEMPT.items()),
        transformers=_version(),
        torch=version("torch"),
    )


def _version() -> str:
    found = re.search(r'^__version__ = "(.+)"', (CHECKOUT / "src/transformers/__init__.py").read_text(), re.MULTILINE)
    return found[1] if found else "of unknown version"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


TEXT = """\
# transformers' own tests

transformers has tests of generating and of caches for each model family. Here they run with this package put into every
`generate` that they call, and each that passes without it has to pass with it: served from the store or left alone,
but never with an error or other tokens. {families} families were tried, with transformers {transformers} and
torch {torch}, on the CPU.

| | how the package is put in | pass without | pass with | calls | served | compared | differing |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
{modes}

`pass without` counts tests that call `generate` and pass with the same inputs and no store; `calls` are those of
`generate` in them, `served` those for which the store had something. The others had to be computed: whoever asks for
hidden states or attentions has all of the prompt computed, and other caches, batches of encoder-decoders or with
pictures, and what is padded on the right are left alone. `compared` are the sequences that were put beside those of
plain `generate` (1) or of the first run (2 to 5), and `differing` those that were others.

In (2) to (5) each call of `generate` runs twice, the store is closed and opened again in between, and the test sees the
second result.

| family | {header} |
| --- | {ruler} |
{by_family}

Of each family: tests that pass with the package, of those that pass without; in brackets the calls that were served.
What does not pass, and why:

{exempt}

The tests are neither in transformers' package nor in its source distribution: they take a checkout of its repository,
whose `src` is used then, and the package `parameterized`. Left out are tests that need another device, the network or
other packages, and those that take minutes: of compiling, and of caches of a fixed size (`static`).

```
git clone --branch v5.23.0 https://github.com/huggingface/transformers
ATTNSTORE_TRANSFORMERS=transformers python tests/others/upstream.py upstream.json docs/upstream-tests.md
```
"""


def main(results: Path, output: Path, families: Sequence[str]) -> None:
    """Tries families one after the other. Those that are in `results` already are not tried again."""
    tried: dict[str, list[Tested]] = json.loads(results.read_text()) if results.is_file() else {}
    for family in families or [*DECODERS, *OTHERS]:
        if family not in tried:
            tried[family] = run(family)
            results.write_text(json.dumps(tried, indent=1))
        print(family, *losses(tried[family]), sep="\n    ")
    output.write_text(markdown(tried))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
