"""The interactive chat in a terminal, over `ChatSession`: it reads lines, streams answers, and shows what was
reused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from ..chat.session import ChatSession, ChatTurn
from ..errors import AttentionStoreError
from ..sizes import format_bytes, format_seconds
from ..store import AttentionStore
from .store_commands import sessions_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELP = """\
/sessions       the conversations in this store
/switch NAME    go on with another conversation, or begin it
/fork NAME      copy this conversation under NAME and go on there; its KV is shared, not copied
/delete NAME    delete a conversation
/retry          another answer to the last message (sampled)
/undo           take the last message and its answer back
/history        what was said so far
/help           this list
/quit           leave; the conversation stays in the store"""


class TerminalChat:
    """A chat that reads from standard input until it ends or `/quit`.

    `options` are those of `ChatSession`, and the arguments for every `generate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: AttentionStore,
        session: str,
        system: str | None,
        console: Console,
        options: dict[str, Any],
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.store = store
        self.system = system
        self.console = console
        self.options = options
        self.chat = self._open(session)
        self.commands: dict[str, Callable[[str], None]] = {
            "/sessions": self._sessions,
            "/switch": self._switch,
            "/fork": self._fork,
            "/delete": self._delete,
            "/retry": self._retry,
            "/undo": self._undo,
            "/history": self._history,
            "/help": self._help,
        }

    def run(self) -> None:
        """Reads messages and commands until `/quit` or the end of the input. Ctrl-C ends an answer, not the
        chat.
        """
        self._introduce()
        while True:
            try:
                line = self.console.input(f"[bold]{escape(self.chat.session)} ›[/] ").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line == "/quit":
                return
            if line:
                self._do(line)

    def _do(self, line: str) -> None:
        """One line of input. A mistake is shown and the chat goes on."""
        word, _, argument = line.partition(" ")
        try:
            if not line.startswith("/"):
                self._say(lambda: self.chat.send(line, stream=self._stream))
            elif word in self.commands:
                self.commands[word](argument.strip())
            else:
                self.console.print(f"no command {escape(word)}; /help shows them")
        except AttentionStoreError as error:
            self.console.print(f"[red]{escape(str(error))}[/]")

    def _say(self, answer: Callable[[], str]) -> None:
        before = self.chat.stats
        try:
            answer()
        except KeyboardInterrupt:
            kept = "what was said is kept" if self.chat.stats is not before else "the message was dropped"
            self.console.print(f"\n[dim]interrupted: {kept}[/]")
            return
        self.console.print()
        if self.chat.stats is not None:
            self.console.print(f"[dim]{escape(turn_in_words(self.chat.stats))}[/]")

    def _stream(self, text: str) -> None:
        self.console.out(text, end="", highlight=False)
        self.console.file.flush()

    def _open(self, session: str) -> ChatSession:
        return ChatSession(self.model, self.tokenizer, self.store, session, system=self.system, **self.options)

    def _introduce(self) -> None:
        count = sum(message["role"] == "user" for message in self.chat.history)
        state = f"goes on after {count} {'turn' if count == 1 else 'turns'}" if count else "begins"
        self.console.print(f"session [bold]{escape(self.chat.session)}[/] {state}. /help shows the commands.")

    def _sessions(self, _: str) -> None:
        self.console.print(sessions_table(self.store.sessions(), current=self.chat.session))

    def _switch(self, name: str) -> None:
        if self._named("/switch", name):
            self.chat.close()
            self.chat = self._open(name)
            self._introduce()

    def _fork(self, name: str) -> None:
        if not self._named("/fork", name):
            return
        if not self.chat.history or self.chat.history[-1]["role"] == "system":
            self.console.print("nothing to fork yet: this conversation has no turn")
            return
        self.store.fork(self.chat.session, name)
        self._switch(name)

    def _delete(self, name: str) -> None:
        if not self._named("/delete", name):
            return
        self.chat.close()
        self.store.delete(name)
        self.console.print(f"deleted {escape(name)}")
        if name == self.chat.session:
            self._switch(name)

    def _retry(self, _: str) -> None:
        if self._has_turn():
            self._say(lambda: self.chat.retry(stream=self._stream, do_sample=True))

    def _undo(self, _: str) -> None:
        if self._has_turn():
            self.console.print(f"[dim]taken back:[/] {escape(self.chat.undo())}")

    def _history(self, _: str) -> None:
        for message in self.chat.history:
            self.console.print(f"[bold]{message['role']}:[/] {escape(message['content'])}")

    def _help(self, _: str) -> None:
        self.console.print(HELP, markup=False)

    def _named(self, command: str, name: str) -> bool:
        if not name:
            self.console.print(f"{command} needs a session's name")
        return bool(name)

    def _has_turn(self) -> bool:
        found = any(message["role"] == "assistant" for message in self.chat.history)
        if not found:
            self.console.print("no turn to take back yet")
        return found


def turn_in_words(turn: ChatTurn) -> str:
    """One line about a turn: time to first token, what was reused, what computing would have taken, speed."""
    stats = turn.cache
    parts = [f"reused {turn.reused_tokens:,}, prefilled {turn.prefilled_tokens:,} tokens"]
    if turn.ttft_seconds is not None:
        parts.insert(0, f"first token after {format_seconds(turn.ttft_seconds)}")
    if stats.loaded_bytes:
        parts.append(f"{format_bytes(stats.loaded_bytes)} from {' and '.join(sorted(stats.blocks_from))}")
    if stats.recomputing:
        parts.append(stats.recomputing)
    if turn.tokens_per_second is not None:
        parts.append(f"{turn.tokens_per_second:.1f} tokens/s")
    if stats.dropped_tokens:
        how = "moved" if stats.truncation == "rotated" else "computed again"
        parts.append(f"the oldest {stats.dropped_tokens:,} tokens are out of the window, the others {how}")
    if stats.why_not_more:
        parts.append(stats.why_not_more)
    if turn.finish == "window":
        parts.append("cut: the context window is full")
    elif turn.finish == "length":
        parts.append("cut at the longest answer")
    return " · ".join(parts)
