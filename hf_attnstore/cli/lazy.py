"""Commands whose modules are imported when they are invoked: listing all commands imports none of them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand
from typer.main import get_command


def named(target: str) -> Any:
    """What a text such as "package.module:name" names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


class CommandByName(TyperCommand):
    """Stands for a command in the list of commands, and hands over to it when it is invoked."""

    target = ""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        return command_of(self.name or "", self.target).make_context(*args, **kwargs)


def add_lazily(
    app: typer.Typer, name: str, target: str, help: str, *, panel: str | None = None, hidden: bool = False
) -> None:
    """Adds a command to `app`.

    Args:
        target: names the command's function, or the `Typer` of a group.
        help: its first line, for the list of commands: what the target itself says.
        panel: of the list, where it stands.
        hidden: not in the list.
    """
    kind = type("CommandByName", (CommandByName,), {"target": target})

    @app.command(name, cls=kind, help=help, rich_help_panel=panel, hidden=hidden)
    def _() -> None:
        """Never called: the context is another command's."""


def command_of(name: str, target: str) -> Any:
    """The command, or group of commands, that is called `name` and made of what `target` names."""
    app, found = typer.Typer(add_completion=False), named(target)
    if not isinstance(found, typer.Typer):
        app.command(name)(found)
        return get_command(app)
    app.add_typer(found, name=name)
    group: Any = get_command(app)
    return group.commands[name]
