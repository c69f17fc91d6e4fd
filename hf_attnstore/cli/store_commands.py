"""The commands that look after a store: ls, show, rm, rename, fork, verify, repair, gc, stats, export, import.

All of them can run while other processes use the store, but for `repair`. Exit codes: 0 all is well, 1 an error, or
`verify` found something, 2 a mistake in the command line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import AttentionStoreError
from ..sizes import format_bytes, parse_bytes
from .group import Command
from .options import Store

if TYPE_CHECKING:
    from ..store import AttentionStore, SessionInfo
    from ..store.disk.maintenance import Report
    from ..store.disk.rebuild import Progress as Told

Namespace = Annotated[str, typer.Option(help="The namespace to look at.")]
Account = Annotated[
    str | None, typer.Option(help="That of somebody who logs in to `attnstore ui`, instead.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
Shared = Annotated[
    bool, typer.Option("--shared", help="What machines share instead, on the engine that ATTNSTORE_SHARED names.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

_EXAMPLES = {
    "ls": "attnstore ls --all",
    "show": "attnstore show alice --messages",
    "rm": "attnstore rm alice bob --dry-run",
    "rename": "attnstore rename alice anna",
    "fork": 'attnstore fork alice "alice, another ending"',
    "export": "attnstore export alice alice.safetensors",
    "import": "attnstore import alice.safetensors --name anna",
    "verify": "attnstore verify --json",
    "repair": "attnstore repair --dry-run",
    "gc": "attnstore gc --older-than 90 --dry-run",
    "stats": "attnstore stats --json",
    "config": "ATTNSTORE_MEMORY=8GiB attnstore config",
}
_UNLIMITED = 1 << 62


@contextmanager
def opened(path: Path | None, namespace: str = "", disk: int = _UNLIMITED) -> Iterator[AttentionStore]:
    """A store that is there already. Without a cap: a tool must not evict what a larger cap had room for."""
    from ..store import AttentionStore
    from ..store.opened import default_path

    where = path.expanduser() if path is not None else default_path()
    if not (where / "store.json").exists():
        raise AttentionStoreError(f"there is no store in {where}; --store names another folder")
    with AttentionStore(
        where, memory=0, disk=disk, namespace=namespace, io_threads=1, older_than=float("inf")
    ) as store:
        yield store


@contextmanager
def _bar(title: str) -> Iterator[Told]:
    """A progress bar on standard error, for work whose end is known."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title + " {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield tell


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2, default=str))


def _space(namespace: str, account: str | None) -> str:
    if account is None:
        return namespace
    from ..ui.identity import namespace_of

    return namespace_of({}, account)


def ls(
    store: Store = None,
    namespace: Namespace = "",
    account: Account = None,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Those of all namespaces.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    offset: Annotated[int, typer.Option(min=0, help="Leave out so many of those used last.")] = 0,
    shared: Shared = False,
    as_json: Json = False,
) -> None:
    """The conversations in a store, last used first."""
    with opened(store, _space(namespace, account)) as it:
        if shared:
            _list_shared(it, None if everything else it.namespace, slice(offset, offset + limit), as_json)
            return
        views = [it.in_namespace(name) for name in it.namespaces()] if everything else [it]
        total = sum(view.session_count() for view in views)
        found = [(view.namespace, info) for view in views for info in view.sessions(offset + limit)]
        found.sort(key=lambda entry: entry[1].last_used, reverse=True)
        shown = found[offset : offset + limit]
        models = {info.fingerprint: it.model_name(info.fingerprint) for _, info in shown}
        if as_json:
            sessions = [{**asdict(info), "namespace": name, "model": models[info.fingerprint]} for name, info in shown]
            _print_json({"total": total, "sessions": sessions})
            return
        console = _console()
        if not found:
            console.print(
                f"no sessions in {escape(str(it.path))}" + ("" if everything else " here; --all looks further")
            )
            return
        spaces = [name for name, _ in shown] if everything else None
        console.print(sessions_table([info for _, info in shown], models=models, namespaces=spaces))
        together = sum(view.bytes_together() for view in views)
        count = "1 conversation" if total == 1 else f"{total:,} conversations"
        console.print(f"{count}, {format_bytes(together)} together: what they share counts once")
        if offset + len(shown) < total:
            console.print(f"{offset + 1} to {offset + len(shown)} of {total:,}; --offset {offset + len(shown)} goes on")


def _list_shared(it: AttentionStore, namespace: str | None, page: slice, as_json: bool) -> None:
    """The sessions that machines share, of a namespace or of all."""
    found = [each for each in it.shared_upkeep().sessions() if namespace in (None, each.namespace)]
    shown = found[page]
    if as_json:
        sessions = [{**asdict(each), **asdict(each.info)} for each in shown]
        _print_json({"total": len(found), "sessions": [{k: v for k, v in s.items() if k != "info"} for s in sessions]})
        return
    models = {each.info.fingerprint: it.model_name(each.info.fingerprint) for each in shown}
    spaces = [each.namespace for each in shown] if namespace is None else None
    console = _console()
    console.print(sessions_table([each.info for each in shown], models=models, namespaces=spaces))
    for each in shown:
        if each.there < each.blocks:
            console.print(f"{escape(each.info.name)}: {each.blocks - each.there} of {each.blocks} blocks are not there")
        if each.held:
            console.print(f"{escape(each.info.name)}: a machine is at it, or was when it ended")
    console.print(f"{len(found):,} conversations are shared")


def show(
    name: str,
    store: Store = None,
    namespace: Namespace = "",
    account: Account = None,
    messages: Annotated[bool, typer.Option("--messages", "-m", help="Show what was said.")] = False,
    as_json: Json = False,
) -> None:
    """What a conversation consists of, or what was said in it."""
    with opened(store, _space(namespace, account)) as it:
        model = it.model_name(it.session(name).fingerprint)
        manifest = it.manifest(name)
        info = it.session(name)
        codec = it.session_codec(name)
        metadata = it.metadata(name)
        spans = [
            {"block": span.block.hex(), "start": span.start, "stop": span.stop, "shift": span.shift}
            if span.block
            else {"dropped": len(span.dropped) // 4}
            for span in manifest.spans
        ]
    if as_json:
        _print_json(
            {
                **asdict(info),
                "model": model,
                "codec": codec,
                "base": manifest.base,
                "spans": spans,
                "metadata": metadata,
            }
        )
        return
    console = _console()
    if messages:
        said = metadata.get("chat", {}).get("messages", [])
        for message in said:
            console.print(f"[bold]{escape(str(message.get('role')))}:[/] {escape(str(message.get('content')))}")
        if not said:
            console.print(
                f"no messages are kept with {escape(name)}: only a ChatSession, the chat and the page keep them"
            )
        return
    facts = Table.grid(padding=(0, 2))
    for what, value in (
        ("session", escape(info.name)),
        ("tokens", f"{info.tokens:,} of {max(info.length, info.tokens):,} in the store"),
        ("bytes", format_bytes(info.bytes)),
        ("model", escape(model) or "none"),
        ("fingerprint", info.fingerprint or "none"),
        ("codec", codec or "none"),
        ("created", _when(info.created)),
        ("last used", _when(info.last_used)),
        ("metadata", ", ".join(map(escape, metadata)) or "none"),
    ):
        facts.add_row(f"[dim]{what}[/]", value)
    console.print(facts)
    table = Table("block", "tokens", "shift")
    for span in spans:
        if "block" in span:
            table.add_row(str(span["block"])[:16], f"{span['start']}–{span['stop']}", str(span["shift"]))
        else:
            table.add_row("[dim]dropped[/]", f"[dim]{span['dropped']}[/]", "")
    console.print(table)


def rm(
    names: Annotated[list[str], typer.Argument(help="The conversations to delete.")],
    store: Store = None,
    namespace: Namespace = "",
    account: Account = None,
    secure: Annotated[
        bool,
        typer.Option("--secure", help="Leave nothing of it in any file of the store; empties the quarantine too."),
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Delete conversations, and the KV that only they use."""
    console = _console()
    with opened(store, _space(namespace, account)) as it:
        found = [it.session(name) for name in dict.fromkeys(names)]
        for info in found:
            console.print(f"{escape(info.name)}: {info.tokens:,} tokens, {format_bytes(info.bytes)}")
        free = it.bytes_only_in(*(info.name for info in found))
        console.print(f"sets {format_bytes(free)} free: what other conversations share stays")
        if dry_run:
            return
        if not yes and not typer.confirm(f"delete {len(found)} conversation(s) for good?"):
            raise typer.Exit(1)
        for info in found:
            it.delete(info.name, secure=secure)
    console.print("deleted")


def rename(src: str, dst: str, store: Store = None, namespace: Namespace = "", account: Account = None) -> None:
    """Give a conversation another name."""
    with opened(store, _space(namespace, account)) as it:
        it.rename(src, dst)


def fork(src: str, dst: str, store: Store = None, namespace: Namespace = "", account: Account = None) -> None:
    """Copy a conversation under another name; its KV is shared, not copied."""
    with opened(store, _space(namespace, account)) as it:
        it.fork(src, dst)


def verify(
    store: Store = None,
    shared: Shared = False,
    as_json: Json = False,
) -> None:
    """Read everything in a store and say what is not as it was written. Changes nothing; exits with 1 if anything is
    wrong.
    """
    with opened(store) as it, _bar("checking") as tell:
        report = it.verify(tell, shared=shared)
    _show_report(report, as_json)
    if report.problems:
        raise typer.Exit(1)


def repair(store: Store = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Set right what `verify` finds: damaged files go into quarantine, lost ones are found, a damaged index is made
    anew from the files. No other process may have the store open.
    """
    from ..store.store import repair_store

    with _bar("repairing") as tell:
        report = repair_store(store, dry_run=dry_run, progress=tell)
    _show_report(report, as_json)
    if report.problems and not report.repaired:
        raise typer.Exit(1)


def _show_report(report: Report, as_json: bool) -> None:
    if as_json:
        _print_json(asdict(report))
        return
    console = _console()
    if report.problems:
        table = Table("problem")
        for column in ("where", "what"):
            table.add_column(column, overflow="fold")
        for problem in report.problems:
            table.add_row(problem.kind, escape(problem.where), escape(problem.detail))
        console.print(table)
    for session in report.affected:
        where = f" (namespace {session.namespace})" if session.namespace else ""
        console.print(
            f"{escape(session.name + where)}: KV of the first {session.whole:,} of {session.tokens:,} tokens is whole, "
            f"the next turn computes the rest again; what was said is kept"
        )
    size = format_bytes(report.bytes)
    state = "[green]all is well[/]" if not report.problems else f"{len(report.problems)} problem(s)"
    if report.problems and report.repaired:
        state += ", [green]repaired[/]"
    console.print(f"{report.blocks:,} blocks ({size}), {report.sessions:,} sessions: {state}")


def gc(
    store: Store = None,
    namespace: Namespace = "",
    account: Account = None,
    older_than: Annotated[
        float | None,
        typer.Option(min=0, help="Also delete conversations of the namespace not used for so many days."),
    ] = None,
    unowned: Annotated[bool, typer.Option("--unowned", help="Also delete KV that belongs to no conversation.")] = False,
    shared: Shared = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove what nobody needs: unknown files, the quarantine, unused locks, free room in the index."""
    with opened(store, _space(namespace, account)) as it, _bar("collecting") as tell:
        if shared and older_than is not None:
            raise AttentionStoreError("--older-than deletes conversations wherever they are: use it without --shared")
        if shared:
            _collect_shared(it, tell, unowned, dry_run, as_json)
            return
        old = []
        if older_than is not None:
            limit = time.time() - older_than * 86400
            old = [info.name for info in it.sessions() if info.last_used < limit]
        if not dry_run:
            for name in old:
                it.delete(name)
        found = it.collect_garbage(unowned=unowned, dry_run=dry_run, progress=tell)
        found.sessions += old
    if as_json:
        _print_json(asdict(found))
        return
    console = _console()
    for path in found.files:
        console.print(f"[dim]{escape(str(path))}[/]")
    what = (
        f"{len(found.sessions)} sessions, {len(found.files)} files, {found.unowned_blocks} blocks of no session "
        f"({format_bytes(found.bytes)})"
    )
    console.print(f"would remove {what}" if dry_run else f"removed {what}")


def _collect_shared(it: AttentionStore, tell: Told, unowned: bool, dry_run: bool, as_json: bool) -> None:
    upkeep = it.shared_upkeep()
    found = upkeep.unneeded(unowned=unowned, progress=tell)
    if not dry_run:
        upkeep.remove(found)
    counts = {
        "unowned_blocks": len(found.blocks),
        "bytes": found.nbytes,
        "entries": len(found.entries),
        "deleted_sessions": len(found.gone),
    }
    if as_json:
        _print_json(counts)
        return
    _console().print(
        f"{'would remove' if dry_run else 'removed'} {len(found.blocks)} blocks of no session "
        f"({format_bytes(found.nbytes)}), {len(found.entries)} entries of blocks that are gone, "
        f"{len(found.gone)} records of sessions deleted long ago"
    )


def stats(
    store: Store = None,
    shared: Shared = False,
    as_json: Json = False,
    prometheus: Annotated[bool, typer.Option("--prometheus", help="In Prometheus' text format.")] = False,
) -> None:
    """What a store holds, and what it has done for all processes so far: hits, misses by reason, speeds."""
    from ..store.index.counts import MISSED

    with opened(store) as it:
        now, totals = it.stats(), it.totals()
        there = it.shared_upkeep().stats() if shared else None
    if there is not None:
        _show_shared(there, {name: totals[name] for name in totals if name.startswith("shared_")}, as_json)
        return
    if prometheus:
        _print_metrics({**now, **totals})
        return
    held = {name: now[name] for name in ("disk_bytes", "disk_blocks", "sessions", "index_bytes", "quarantine_bytes")}
    speeds = {
        "load_bytes_per_second": _ratio(totals["loaded_bytes"], totals["load_seconds"]),
        "write_bytes_per_second": _ratio(totals["written_bytes"], totals["write_seconds"]),
        "hit_rate": _ratio(totals["turns_with_reuse"], totals["turns"]),
        "token_hit_rate": _ratio(totals["reused_tokens"], totals["prompt_tokens"]),
    }
    if as_json:
        _print_json({**held, **totals, **speeds})
        return
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("on disk", f"{format_bytes(held['disk_bytes'])} in {held['disk_blocks']:,} blocks"),
        ("of that, the index", format_bytes(held["index_bytes"])),
        ("of that, in quarantine", format_bytes(held["quarantine_bytes"])),
        ("sessions", f"{held['sessions']:,}"),
        ("turns", f"{totals['turns']:,}"),
        ("turns that reused KV", f"{totals['turns_with_reuse']:,} ({speeds['hit_rate']:.0%})"),
        ("prompt tokens reused", f"{totals['reused_tokens']:,} ({speeds['token_hit_rate']:.0%})"),
    ]
    rows += [(f"turns that {name}", f"{count:,}") for name, count in totals.items() if name.startswith(MISSED)]
    rows += [
        ("loaded", f"{format_bytes(totals['loaded_bytes'])}, {format_bytes(speeds['load_bytes_per_second'])}/s"),
        ("waited for loads", f"{totals['exposed_load_seconds']:.2f} s of {totals['load_seconds']:.2f} s"),
        ("written", f"{format_bytes(totals['written_bytes'])}, {format_bytes(speeds['write_bytes_per_second'])}/s"),
        ("blocks evicted", f"{totals['evicted_blocks']:,}"),
        ("blocks not taken in by the policy", f"{totals['not_admitted_blocks']:,}"),
        ("blocks rejected as damaged", f"{totals['rejected']:,}"),
        ("errors when reading, writing", f"{totals['read_errors']:,}, {totals['write_errors']:,}"),
    ]
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _show_shared(there: Mapping[str, int | str], totals: Mapping[str, int | float], as_json: bool) -> None:
    """What machines share, and what this store has sent there and got from there."""
    if as_json:
        _print_json({**there, **totals})
        return
    used, room = int(there["engine_used"]), int(there["engine_capacity"])
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in (
        ("engine", escape(str(there["engine"]))),
        ("in use there", format_bytes(used) + (f" of {format_bytes(room)}" if room else "")),
        ("shared under this prefix", f"{format_bytes(int(there['bytes']))} in {there['blocks']:,} blocks"),
        ("sessions", f"{there['sessions']:,}"),
        ("of these, some machine has", f"{there['held_sessions']:,}"),
        ("sent from here", f"{format_bytes(totals['shared_bytes'])} in {totals['shared_blocks']:,} blocks"),
        ("read from here", format_bytes(totals["shared_read_bytes"])),
        ("blocks left out, refused", f"{totals['shared_dropped_blocks']:,}, {totals['shared_refused_blocks']:,}"),
        ("errors", f"{totals['shared_errors']:,}"),
    ):
        table.add_row(*row)
    _console().print(table)


def _print_metrics(stats: dict[str, int | float]) -> None:
    try:
        from ..server.metrics import store_text
    except ImportError as error:
        raise AttentionStoreError(f'{error.name} is not installed: pip install "hf-attnstore[serve]"') from error
    typer.echo(store_text(stats), nl=False)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def export(
    name: str,
    output: Annotated[Path, typer.Argument(help="The file to write, such as alice.safetensors.")],
    store: Store = None,
    namespace: Namespace = "",
    account: Account = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that exists.")] = False,
) -> None:
    """Write a conversation, with its KV, to one portable safetensors file. The file is not encrypted."""
    if output.exists() and not force:
        raise AttentionStoreError(f"{output} exists; --force writes over it")
    with opened(store, _space(namespace, account)) as it, Console(stderr=True).status(f"exporting {escape(name)}"):
        done = it.export_session(name, output)
    _console().print(
        f"{escape(done.session)}: {done.tokens:,} tokens, {format_bytes(done.bytes)} in {escape(str(output))}"
    )


def import_(
    file: Annotated[Path, typer.Argument(help="A file that `export` wrote.")],
    store: Store = None,
    namespace: Namespace = "",
    account: Account = None,
    name: Annotated[
        str | None, typer.Option(help="What to call it; by default what it was called.", show_default=False)
    ] = None,
    disk: Annotated[str | None, typer.Option(help="The store's cap, such as 50GiB; by default none.")] = None,
) -> None:
    """Take a conversation from a file, after all of it was checked."""
    with (
        opened(store, _space(namespace, account), parse_bytes(disk) if disk else _UNLIMITED) as it,
        Console(stderr=True).status(f"importing {escape(str(file))}"),
    ):
        done = it.import_session(file, name)
    _console().print(f"{escape(done.session)}: {done.tokens:,} tokens in {done.blocks:,} blocks")


def config(as_json: Json = False) -> None:
    """What is set, by whom, and where: in the environment, else in a file, else as it comes."""
    from ..settings import SETTINGS, config_file, find
    from ..store.opened import default_path

    found = {setting: find(setting.name) for setting in SETTINGS}
    if as_json:
        _print_json({setting.name: asdict(value) for setting, value in found.items()})
        return
    table = Table("setting", "value", "from")
    table.add_column("what it is", overflow="fold")
    for setting, value in found.items():
        shown = value.value or (str(default_path()) if setting.name == "store" else "–")
        table.add_row(setting.name, escape(shown), escape(value.origin), f"[dim]{escape(setting.about)}[/]")
    console = _console()
    console.print(table)
    file = config_file()
    state = "" if file.exists() else ", which is not there yet"
    console.print(
        f'Set them in the environment (ATTNSTORE_MEMORY=8GiB) or in {escape(str(file))}{state}: memory = "8GiB"'
    )
    console.print("The key of an encrypted store comes from ATTNSTORE_KEY alone.")


def sessions_table(
    sessions: list[SessionInfo],
    current: str | None = None,
    *,
    models: Mapping[str, str] | None = None,
    namespaces: Sequence[str] | None = None,
) -> Table:
    """The sessions of a store, in the order given; `current` is marked.

    Args:
        models: what models are called, by fingerprint.
        namespaces: of each session.
    """
    table = Table()
    table.add_column("session", overflow="fold")
    for column in ("namespace",) if namespaces is not None else ():
        table.add_column(column, overflow="fold")
    for column in ("model",) if models is not None else ():
        table.add_column(column, overflow="fold")
    for column in ("tokens", "bytes", "last used"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, info in enumerate(sessions):
        row = [escape(info.name) + (" [bold]←[/]" if info.name == current else "")]
        row += [escape(namespaces[number])] if namespaces is not None else []
        row += [escape(models[info.fingerprint])] if models is not None else []
        table.add_row(*row, f"{info.tokens:,}", format_bytes(info.bytes), _when(info.last_used))
    return table


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def add_to(app: typer.Typer, panel: str) -> None:
    """Adds the commands to an app."""
    app.command("sessions", hidden=True)(ls)
    commands: dict[str, Any] = {f.__name__: f for f in (ls, show, rm, rename, fork, export)}
    commands |= {"import": import_, **{f.__name__: f for f in (verify, repair, gc, stats, config)}}
    for name, command in commands.items():
        app.command(name, cls=Command, rich_help_panel=panel, epilog=f"[dim]{_EXAMPLES[name]}[/]")(command)
