"""Whole conversations through a store that is opened anew for every turn, token by token beside the same without.

Each dialogue is said turn by turn; then it is forked, its last answer is asked for again, greedily under another
setting and sampled, and its second message is edited. Every answer is compared with that of a cache that is kept in
memory and with that of plain `generate`.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_attnstore import AttentionStore, ChatSession
from hf_attnstore.chat.timed import GenerateRun, timed_generate
from hf_attnstore.lab.bench.shapes import BenchError, is_exact
from hf_attnstore.lab.demo.kept import KeptCache
from hf_attnstore.lab.record import write_record
from hf_attnstore.session.chain import common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DIALOGUES = (
    ("Name three colours.", "Which of them is the sky?", "And at night?"),
    ("I have two apples and buy four. How many are there?", "I eat one of them.", "Can two friends share the rest?"),
    ("Write the first line of a poem about rain.", "Now the second one.", "Give it a title."),
    ("What does a baker do?", "When does he get up?", "Say it as a child would."),
    ("My name is Ada, and I live in Turin.", "What is my name?", "In which country do I live?"),
)  # fmt: skip
PLAIN_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {{- message['role'] + (':' if message['role'] == 'assistant' else ': ') + message['content'] + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}
"""
"""For models that were not taught to chat: a text of who says what."""
ANOTHER, EDITED = "Say that in other words.", "No, tell me of ships instead."
PENALTY = {"repetition_penalty": 1.3}
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 50}


@dataclass
class Answer:
    """One answer of a dialogue, and what the same prompt gives otherwise."""

    kind: str
    """`turn`, `fork`, `again` (a retry under another setting), `sampled` or `edited`."""
    prompt_tokens: int
    known_tokens: int
    """Tokens of the prompt that the conversation had before, in the same order."""
    reused_tokens: int
    loaded_bytes: int
    tokens: int
    as_kept: bool
    """Whether a kept cache gives the same tokens."""
    as_plain: bool | None
    """Whether plain `generate` does; None for a sampled answer: its draw depends on the last bit."""
    retokenised_at: int | None = None
    """The first of its tokens that is another one when its text is tokenised again; None: none is."""
    kept_as_plain: bool | None = None
    """Whether a kept cache gives what plain `generate` gives: in 16 bits rounding decides."""
    gate: str = ""
    """What the gate said, where not all that was known was reused."""

    @property
    def known_but_computed(self) -> int:
        """Tokens that were known and not reused; the last one of a prompt is always computed."""
        return max(0, self.known_tokens - 1 - self.reused_tokens)


@dataclass
class Study:
    """The answers of all dialogues."""

    model: str
    dtype: str
    max_new_tokens: int
    dialogues: int = 0
    answers: list[Answer] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """What it says, in numbers."""
        greedy = [answer for answer in self.answers if answer.as_plain is not None]
        sampled = [answer for answer in self.answers if answer.kind == "sampled"]
        other = [answer for answer in sampled if answer.retokenised_at is not None]
        return {
            "model": self.model,
            "dtype": self.dtype,
            "max_new_tokens": self.max_new_tokens,
            "dialogues": self.dialogues,
            "answers": len(self.answers),
            "kinds": dict(Counter(answer.kind for answer in self.answers)),
            "not_as_kept": sum(not answer.as_kept for answer in self.answers),
            "compared_with_plain": len(greedy),
            "not_as_plain": sum(not answer.as_plain for answer in greedy),
            "kept_not_as_plain": sum(not answer.kept_as_plain for answer in greedy),
            "prompt_tokens": sum(answer.prompt_tokens for answer in self.answers),
            "reused_tokens": sum(answer.reused_tokens for answer in self.answers),
            "known_but_computed": sum(answer.known_but_computed for answer in self.answers),
            "sampled": len(sampled),
            "retokenise_otherwise": len(other),
            "tokens_after_that": sum(answer.tokens - (answer.retokenised_at or 0) for answer in other),
            "sampled_tokens": sum(answer.tokens for answer in sampled),
        }

    def write(self, path: Path) -> None:
        """Summary and answers as JSON, whole or not at all."""
        write_record(path, {**self.summary(), "each": [asdict(answer) for answer in self.answers]})


def read_study(path: Path) -> Study:
    """What `Study.write` wrote.

    Raises:
        BenchError: it is something else.
    """
    try:
        found = json.loads(path.read_text())
        answers = [Answer(**answer) for answer in found["each"]]
        return Study(found["model"], found["dtype"], found["max_new_tokens"], found["dialogues"], answers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path} has no study of dialogues to go on with: {error}") from error


def chatting(tokenizer: Any) -> Any:
    """The tokenizer, with `PLAIN_TEMPLATE` where it has no chat template of its own."""
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    return tokenizer


def read_dialogues(path: Path, *, whole: bool = False) -> list[tuple[str, ...]]:
    """What users say in a JSON-lines file, gzipped or not, of `{"history": [{"user": …}, …]}`; `whole` has what
    they were answered in between, as `{"user": …, "bot": …}`.

    Raises:
        BenchError: it is no such file.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            roles = ("user", "bot") if whole else ("user",)
            return [tuple(turn[role] for turn in json.loads(line)["history"] for role in roles) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f'{path} has no dialogues, a line {{"history": [{{"user": …}}]}} each: {error}') from error


def study(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Sequence[str]],
    folder: Path,
    *,
    max_new_tokens: int = 24,
    plain: bool = True,
    one_store: bool = False,
    tell: Callable[[Study], object] = lambda study: None,
    done: Study | None = None,
) -> Study:
    """Says all `dialogues` and compares every answer.

    Args:
        folder: the store's; all dialogues share it, and what they begin with. In 16 bits each has a store of its own
            in it: a prompt whose beginning another one has brought is prefilled in other parts than the kept cache's,
            and so rounded otherwise.
        plain: whether to compare with plain `generate` too, which takes most of the time.
        one_store: in 16 bits, too, all dialogues share a store. A kept cache then begins with as much of what an
            earlier one has computed as the store found of the first prompt, so that both prefill the same parts.
        tell: is given the study after each dialogue.
        done: an earlier study of the same dialogues that ended too soon; those that it has are not said again.

    Raises:
        BenchError: `done` is of another model, dtype or length of answers.
    """
    result = Study(Path(str(model.name_or_path)).name, str(model.dtype).removeprefix("torch."), max_new_tokens)
    if done is not None:
        if replace(done, dialogues=0, answers=[]) != result:
            raise BenchError(
                f"What is there was said by {done.model} in {done.dtype}, answers of {done.max_new_tokens} tokens: "
                "name another --output, or the same settings."
            )
        result = done
    earlier: list[KeptCache] | None = [] if one_store else None
    for number, messages in list(enumerate(dialogues))[result.dialogues :]:
        own = folder if one_store or is_exact(model) else folder / str(number)
        talk = _Talk(model, tokenizer, own, f"dialogue {number}", max_new_tokens, plain, earlier)
        result.answers.extend(talk.answers(messages))
        result.dialogues += 1
        tell(result)
    return result


class _Talk:
    """One dialogue, with the store and without."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        session: str,
        max_new_tokens: int,
        plain: bool,
        earlier: list[KeptCache] | None = None,
    ) -> None:
        self.earlier = earlier
        self.model, self.tokenizer, self.folder, self.session = model, chatting(tokenizer), folder, session
        self.max_new_tokens, self.plain = max_new_tokens, plain
        self.kept = KeptCache(model, tokenizer)

    def answers(self, messages: Sequence[str]) -> Iterator[Answer]:
        """Says everything that there is to say, in order."""
        for text in messages:
            yield self._say("turn", self.session, self.kept, lambda chat, text=text, **kw: chat.send(text, **kw))
        if self.earlier is not None:
            self.earlier.append(self.kept.fork())
        with AttentionStore(self.folder) as store:
            store.fork(self.session, f"{self.session}, forked")
        fork = self.kept.fork()
        yield self._say("fork", f"{self.session}, forked", fork, lambda chat, **kw: chat.send(ANOTHER, **kw))
        yield self._say("again", self.session, self.kept, lambda chat, **kw: chat.retry(**kw), **PENALTY)
        yield self._say("sampled", self.session, self.kept, lambda chat, **kw: chat.retry(**kw), **SAMPLED)
        if len(messages) > 1:
            yield self._say("edited", self.session, self.kept, lambda chat, **kw: chat.edit(1, EDITED, **kw))

    def _begun(self, prompt: Sequence[int], reused: int) -> KeptCache:
        """A kept cache that has of another dialogue what the store has found of the first prompt."""
        for other in self.earlier or ():
            if other.shared_with(prompt) >= reused > 0:
                return other.beginning(reused)
        return self.kept

    def _say(self, kind: str, session: str, kept: KeptCache, say: Callable[..., Any], **settings: Any) -> Answer:
        from transformers import set_seed

        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        options = {"do_sample": False, "max_new_tokens": self.max_new_tokens, "pad_token_id": pad, **settings}
        with AttentionStore(self.folder) as store:
            chat = ChatSession(self.model, self.tokenizer, store, session)
            before = chat.token_ids
            set_seed(len(before))
            say(chat, **options)
            turn, ids = chat.stats, chat.token_ids
        assert turn is not None
        prompt, answer = ids[: turn.prompt_tokens], ids[turn.prompt_tokens :]
        set_seed(len(before))
        if self.earlier is not None and not before:
            self.kept = kept = self._begun(prompt, turn.reused_tokens)
        from_kept = kept.answer(prompt, **options)
        as_plain = kept_as_plain = None
        if self.plain and not options["do_sample"]:
            run = GenerateRun()
            timed_generate(self.model, self.tokenizer, prompt, run, **options)
            as_plain, kept_as_plain = run.ids == answer, run.ids == from_kept
        same = common_prefix(np.asarray(before), np.asarray(prompt))
        found = Answer(
            kind,
            turn.prompt_tokens,
            same,
            turn.reused_tokens,
            turn.cache.loaded_bytes,
            len(answer),
            from_kept == answer,
            as_plain,
            _retokenised_at(self.tokenizer, answer),
            kept_as_plain,
        )
        return replace(found, gate=turn.cache.gate) if found.known_but_computed else found


def _retokenised_at(tokenizer: Any, ids: list[int]) -> int | None:
    """The first token that is another one when the text of an answer is tokenised again."""
    words = [token for token in ids if token not in tokenizer.all_special_ids]
    again = tokenizer.encode(tokenizer.decode(words), add_special_tokens=False)
    return None if again == words else common_prefix(np.asarray(words), np.asarray(again))
