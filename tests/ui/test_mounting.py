"""The page as a part of another application, on a queue that others use too."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.testclient import TestClient
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_attnstore import AttentionStore
from hf_attnstore.serving.queue import TurnQueue
from hf_attnstore.ui.identity import COOKIE
from hf_attnstore.ui.model import ModelLoader
from hf_attnstore.ui.serve import mount
from hf_attnstore.ui.sessions import UserSessions
from hf_attnstore.ui.turns import Turns, Wish


def test_the_page_is_served_beside_other_routes_and_gives_its_cookie_there_only(turns: Turns) -> None:
    app = FastAPI()
    app.get("/health")(lambda: {"status": "ok"})
    with TestClient(mount(app, turns, path="/ui")) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert COOKIE not in client.cookies
        page = client.get("/ui/")
        assert (page.status_code, COOKIE in client.cookies) == (200, True)
        assert "hf-attnstore" in page.text
        assert client.get("/ui", follow_redirects=True).status_code == 200


def test_turns_of_the_page_run_in_a_queue_that_goes_on_after_them(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, store: AttentionStore, ann: UserSessions
) -> None:
    with TurnQueue(model, store) as queue:
        turns = Turns(store, ModelLoader(lambda: (model, tokenizer)), queue=queue, max_new_tokens=4, do_sample=False)
        turns.begin(ann, "talk", Wish("send", "the old prince")).turn.result(60)
        turns.close()
        assert queue.stats().done == 1
        assert queue.run("other", lambda turn: "answered").result(60) == "answered"
    assert ann.open("talk").records[0] is not None
