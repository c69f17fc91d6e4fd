"""A machine of the demonstration of a shared tier: a process with a folder of its own that answers turns.

It is told the model, its folder and the URL in its arguments, reads turns from standard input, one on a line, and
writes what each was on a line, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ...cache import AttentionStoreCache
from ...chat.model import load_chat_model
from ...chat.timed import GenerateRun, timed_generate
from ...store import AttentionStore


def answer(model: Any, tokenizer: Any, store: AttentionStore, ids: list[int], new_tokens: int) -> dict[str, Any]:
    """One turn on a conversation of so many ids: what is generated, and what it took. What goes up has gone up when it
    returns, after the time to the first token was taken."""
    before, run = store.stats(), GenerateRun()
    cache = AttentionStoreCache(model, "demo", store)
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
    timed_generate(model, tokenizer, ids, run, past_key_values=cache, **settings)
    store.flush()
    after = store.stats()
    return {
        "ids": run.ids,
        "ttft": run.ttft_seconds,
        "reused": cache.stats.reused_tokens,
        "prefilled": cache.stats.prefilled_tokens,
        "down": after["shared_read_bytes"] - before["shared_read_bytes"],
        "up": after["shared_bytes"] - before["shared_bytes"],
    }


def main(name: str, folder: str, url: str) -> None:
    """Answers every turn twice: with the shared tier, and with a store of this machine's own."""
    model, tokenizer = load_chat_model(name)
    with (
        AttentionStore(Path(folder) / "shared", shared=url) as with_shared,
        AttentionStore(Path(folder) / "alone", shared="") as alone,
    ):
        for warm_up in (with_shared, alone):
            cache = AttentionStoreCache(model, None, warm_up, save=False)
            timed_generate(model, tokenizer, list(range(5, 37)), GenerateRun(), past_key_values=cache, max_new_tokens=2)
        print(json.dumps("ready"), flush=True)  # noqa: T201 the other process reads it
        for line in sys.stdin:
            task = json.loads(line)
            stores = {"with": with_shared, "alone": alone}
            order = ["with", "alone"] if task["number"] % 4 < 2 else ["alone", "with"]
            found = {which: answer(model, tokenizer, stores[which], task["ids"], task["new"]) for which in order}
            print(json.dumps(found), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
