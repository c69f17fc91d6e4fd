"""The example's model class in the real lm-evaluation-harness: the results of its own class, with less computed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attnstore import AttentionStore, detach

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (pip install lm_eval)"
)

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "examples" / "small-model"
SHOTS = 6


def example() -> Any:
    spec = importlib.util.spec_from_file_location("lm_eval_model", ROOT / "examples" / "lm_eval_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_task(folder: Path) -> dict[str, Any]:
    """A task of four choices, whose data are in a folder."""
    things = "king queen sword castle river army storm crown letter garden shadow market".split()
    for name, count, step in (("train", SHOTS, 5), ("test", 6, 7)):
        rows = []
        for number in range(count):
            a, b, c, d = (things[(number * step + offset) % len(things)] for offset in range(4))
            choices = [f"the {a}", f"the {b} of the old town", c, f"the {c} and the {d}"]
            rows.append({"q": f"The {a} was taken from the {b} by the {c}. What was taken?", "choices": choices})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({**row, "gold": 0}) + "\n" for row in rows))
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    return {
        "task": "things",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "training_split": "train",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{q}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": SHOTS,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def evaluate(model: Any, task: dict[str, Any]) -> tuple[dict[str, Any], list[float], list[bool]]:
    """Results, and the log-likelihoods of all requests and whether they are greedy."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    none = TaskManager(include_defaults=False)  # reading all tasks that there are would take twelve seconds
    found = lm_eval.simple_evaluate(model, tasks=[ConfigurableTask(config=task)], bootstrap_iters=0, task_manager=none)
    answers = [answer for sample in found["samples"]["things"] for answer in sample["filtered_resps"]]
    return found["results"]["things"], [float(a) for a, _ in answers], [bool(greedy) for _, greedy in answers]


def test_results_are_those_of_its_own_class_and_shots_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval.models.huggingface import HFLM

    task = write_task(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(SMALL).eval()
    tokenizer = AutoTokenizer.from_pretrained(SMALL)
    settings: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": 4, "device": "cpu"}
    results, likely, greedy = evaluate(HFLM(model, **settings), task)
    fed = []
    for _ in range(2):  # in this run, and in one that finds it on disk
        with AttentionStore(tmp_path / "store") as store:
            ours = example().StoreLM(model, store, **settings)
            again, same, same_greedy = evaluate(ours, task)
            assert again == results
            assert same == pytest.approx(likely, abs=2e-5)
            assert same_greedy == greedy
            fed.append(ours.fed_tokens)
            detach(model)
    shots = len(tokenizer("Question: The king was taken from the queen by the sword. What was taken?")["input_ids"])
    questions = len(likely) // 4
    assert SHOTS * shots < fed[0] < (SHOTS + 4 * questions) * shots  # by itself each of them would be SHOTS and one
    assert fed[1] == 0  # each context's last token is computed with what comes after it
