"""The report: what was simulated, in tables, with the paper's figures beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..markdown import markdown_table
from .machine import CODECS, Prices
from .paper import BATCH, DISK, GB, MEMORY, PUBLISHED, SETTINGS, paper_workload
from .plan import (
    CURVES,
    DEFAULT_POLICY,
    DEPTHS,
    GAPS,
    LOOK_AHEAD_AT,
    PAPER_POLICIES,
    PAPER_POLICY,
    THINKING,
    TIMED_POLICIES,
    WRONG,
    Plan,
    Trace,
)
from .runs import NO_STORE, PaperRun, Run, ServedTrace, TraceRun, record_of

Found = Mapping[Run, dict[str, Any]]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    return "\n".join(markdown_table(head, rows))


def percent(share: float, digits: int = 1) -> str:
    """A share for people; one that is not quite all is not shown as all."""
    text = f"{100 * share:.{digits}f}"
    if share < 1 and float(text) == 100:
        return f">{100 - 10.0**-digits:.{digits}f} %"
    return f"{text} %"


def called(policy: str, ahead: bool) -> str:
    """A policy with or without knowledge of the queue, in words."""
    return f"queue + {policy}" if ahead else policy


def hit_rates(plan: Plan, trace: Trace, policy: str, found: Found) -> list[float]:
    """Shares of a trace's tokens that a policy finds, one at each capacity of the plan."""
    return [found[plan.trace(trace, policy, capacity)]["token_hit_rate"] for capacity in plan.capacities]


def as_markdown(plan: Plan, found: Found, live: str, machine: str, versions: str) -> str:
    """The whole report."""
    parts = [
        "# The hierarchy on real traces and on the paper's workload",
        "Made by `attnstore lab sim report`. Figures are simulated on a virtual clock, by the policies, orders, "
        "accounts and windows of the store itself (`hf_attnstore/store`); only bytes, devices and clocks are not there."
        f"\n\n{machine}; {versions}.",
        _bars_part(plan, found),
        _paper_part(plan, found),
        _assumptions(plan, found),
    ]
    for trace in plan.traces:
        parts.append(_trace_part(plan, trace, found))
    if plan.agent is not None:
        parts.append(_thinking_part(plan, plan.agent, found))
    parts += [_codecs_part(plan, found), live]
    if plan.left_out:
        parts.append("## Left out\n\n" + "\n".join(f"- {reason}" for reason in plan.left_out))
    return "\n\n".join(parts) + "\n"


# what was to be reached


def bars(plan: Plan, found: Found) -> list[tuple[str, str, str, bool]]:
    """What was to be reached: in words, the bar, what was found, and whether it was met."""
    rows = []
    for number, setting in enumerate(SETTINGS):
        ours = found[plan.paper(number, PAPER_POLICY)]
        hits, memory = ours["session_hit_rate"], ours["memory_share"]
        rows.append(
            (
                f"{setting.model.name}, 128 GB / 10 TB, queue: hits; of these in memory",
                f"≥ {percent(setting.hit_rate, 0)}; ≥ 99 %",
                f"{percent(hits)}; {percent(memory)}",
                hits >= setting.hit_rate and memory >= 0.99,
            )
        )
    for trace in plan.traces:
        ratios = dict(zip(plan.capacities, _against_lru(plan, trace, found), strict=True))
        if trace == plan.mooncake:
            for capacity, bar in ((0.05, 1.05), (0.10, 1.03)):
                ratio = ratios[capacity]
                about = f"{trace.title}, {percent(capacity, 0)}: {DEFAULT_POLICY} / lru"
                rows.append((about, f"≥ {bar}", f"{ratio:.3f}", ratio >= bar))
            for capacity, depth, bar in ((0.05, 1.0, 0.26), (0.10, 1.0, 0.33), (0.05, 4.0, 0.33), (0.10, 4.0, 0.36)):
                rate = found[replace(plan.trace(trace, DEFAULT_POLICY, capacity), depth=depth)]["token_hit_rate"]
                about = f"{trace.title}, {percent(capacity, 0)}: schedule, depth {depth:g}"
                rows.append((about, f"≥ {bar}", f"{rate:.3f}", rate >= bar))
        worst = min(ratios.values())
        about = f"{trace.title}, 1 to 50 %: least of {DEFAULT_POLICY} / lru"
        rows.append((about, "≥ 0.99", f"{worst:.3f}", worst >= 0.99))
    return rows


def _against_lru(plan: Plan, trace: Trace, found: Found) -> list[float]:
    """How many times as much the default policy finds as LRU, at each capacity of the plan."""
    rates = (hit_rates(plan, trace, policy, found) for policy in (DEFAULT_POLICY, "lru"))
    return [ours / max(lru, 1e-9) for ours, lru in zip(*rates, strict=True)]


def _bars_part(plan: Plan, found: Found) -> str:
    rows = [(about, bar, ours, "met" if met else "**missed**") for about, bar, ours, met in bars(plan, found)]
    return "## What was to be reached\n\n" + table(["", "bar", "here", ""], rows)


# the paper's workload


def against(base: Mapping[str, float], ours: Mapping[str, float]) -> dict[str, float]:
    """What a run is worth beside another one: shares that were cut, and how many times as good."""
    return {
        "ttft_cut": 1 - ours["ttft_mean"] / base["ttft_mean"],
        "prefill": ours["prefill_tokens_per_second"] / base["prefill_tokens_per_second"],
        "gpu_time": base["gpu_seconds"] / ours["gpu_seconds"],
        "cost": 1 - ours["dollars"] / base["dollars"],
    }


def against_recompute(run: PaperRun, found: Found) -> dict[str, float]:
    """What a run is worth beside recomputing everything."""
    return against(found[replace(run, policy=NO_STORE, ahead=True, depth=1.0)], found[run])


def _paper_part(plan: Plan, found: Found) -> str:
    rows = []
    for number, setting in enumerate(SETTINGS):
        run = plan.paper(number, PAPER_POLICY)
        ours, gain = found[run], against_recompute(run, found)
        rows.append(
            [
                setting.model.name,
                f"{percent(setting.hit_rate, 0)} / **{percent(ours['session_hit_rate'])}**",
                f"{percent(ours['token_hit_rate'])}",
                f">99.6 % / **{percent(ours['memory_share'], 2)}**",
                f"{percent(setting.ttft_cut, 0)} / **{percent(gain['ttft_cut'])}**",
                f"{setting.prefill}× / **{gain['prefill']:.1f}×**",
                f"{setting.gpu_time}× / **{gain['gpu_time']:.2f}×**",
                percent(gain["cost"], 0),
            ]
        )
    head = [
        "paper / here", "hit rate (turns)", "hit rate (tokens)", "hits in memory", "TTFT cut", "prefill throughput",
        "GPU time", "cost cut",
    ]  # fmt: skip
    policies = []
    for number, setting in enumerate(SETTINGS):
        cells = [setting.model.name]
        for policy, ahead in PAPER_POLICIES:
            ours = found[plan.paper(number, policy, ahead)]
            turns, tokens, memory = (ours[k] for k in ("session_hit_rate", "token_hit_rate", "memory_share"))
            cells.append(f"{percent(turns)} / {percent(tokens)} ({percent(memory)})")
        policies.append(cells)
    times = []
    for number, setting in enumerate(SETTINGS):
        for policy, ahead in TIMED_POLICIES:
            ours = found[plan.paper(number, policy, ahead)]
            times.append(
                [
                    f"{setting.model.name}, {called(policy, ahead) if policy != NO_STORE else policy}",
                    *(f"{1000 * ours[key]:,.0f} ms" for key in ("ttft_mean", "ttft_p50", "ttft_p99")),
                    f"{ours['prefill_tokens_per_second']:,.0f}/s",
                    f"{ours['exposed_seconds']:,.0f} s",
                    f"{ours['gpu_seconds'] / 3600:.2f} h",
                    f"${ours['dollars']:,.0f}",
                    f"{ours['deepest_queue']:,}",
                ]
            )
    workload = paper_workload(plan.sessions)
    facts = ", ".join(
        f"{name} {workload.facts[key]:.2f} (there {PUBLISHED[key]:.2f})"
        for key, name in (
            ("turns", "mean turns"), ("multi", "share with several turns"), ("over_2k", "over 2 K tokens"),
            ("over_4k", "over 4 K tokens"),
        )
    )  # fmt: skip
    prices = Prices()
    return "\n\n".join(
        [
            "## The paper's four models",
            f"{workload.turns:,} turns of {plan.sessions:,} sessions, arriving at one a second; {MEMORY // GB} GB of "
            f"memory, {DISK // GB:,} GB of disk, batch {BATCH}, windows of 4 K tokens (65B: 2 K) of which the oldest "
            f"half goes on overflow, blocks of {plan.block_tokens} tokens. The first 10,000 turns are not counted. The "
            f"sessions are drawn from distributions fitted to what the paper says of its own: {facts}.",
            table(head, rows),
            "A turn is a hit if it has a history and finds all of it; tokens count each for itself. TTFT is without "
            "the wait in the queue, as there: the paper's TTFT cut is 1 − 1/throughput.",
            "Hit rate of turns / of tokens, and in brackets the share of the tokens found that were in memory, by "
            "policy (paper, 13B: look-ahead 86 %, LRU 58 %, FIFO 48 %; in memory > 99.6 % and about 0.5 %):",
            table(["", *(called(policy, ahead) for policy, ahead in PAPER_POLICIES)], policies),
            "Where every turn waits in a queue that grows without end, `predictive` takes the wait for the time that "
            "people stay away, and learns of ever longer ones only as they come to pass. It is made for servers that "
            "answer at once.",
            "Times, by the clock of the simulation:",
            table(
                ["", "TTFT mean", "p50", "p99", "prefill", "exposed load", "GPU busy", "cost", "longest queue"], times
            ),
            f"Prices (assumed, of the kind of AWS on-demand ones): ${prices.accelerator:g} an hour for an A100, "
            f"${prices.memory:g} for a GB of memory, ${prices.disk:g} for a GB of disk; the hours are those in which "
            "the accelerators are busy.",
        ]
    )


def _assumptions(plan: Plan, found: Found) -> str:
    gaps, seen = [], [called(policy, ahead) for policy, ahead in PAPER_POLICIES[:3]]
    for gap in GAPS:
        cells = [f"{gap:g} s"]
        for policy, ahead in PAPER_POLICIES[:3]:
            ours = found[replace(plan.paper(0, policy, ahead), gap=gap)]
            cells.append(_hits(ours))
        cells.append(f"{ours['deepest_queue']:,}")
        gaps.append(cells)
    prefilling = _gains(
        "prefill, policy",
        [(percent(run.flops, 0), run) for run in plan.prefilling()],
        ["TTFT cut", "prefill throughput", "GPU time", "cost cut"],
        found,
    )
    decoding = _gains(
        "decoding",
        [(f"× {run.decode:g}", run) for run in plan.decoding()],
        ["prefill throughput", "GPU time", "longest queue"],
        found,
    )
    disks = []
    for run in plan.disks():
        ours = found[run]
        disks.append(
            [f"{run.disk // GB:,} GB, {called(run.policy, run.ahead)}", percent(ours["session_hit_rate"]),
             percent(ours["token_hit_rate"]), percent(ours["memory_share"])]
        )  # fmt: skip
    depths = [
        [
            f"{depth:g}",
            percent(ours["session_hit_rate"]),
            percent(ours["token_hit_rate"]),
            percent(ours["memory_share"]),
        ]
        for depth, ours in ((run.depth, found[run]) for run in plan.depths())
    ]
    mechanisms = []
    for name, run in plan.mechanisms().items():
        ours, gain = found[run], against(found[plan.paper(0, NO_STORE)], found[run])
        mechanisms.append(
            [name, percent(ours["session_hit_rate"]), f"{1000 * ours['ttft_mean']:,.0f} ms",
             f"{gain['prefill']:.1f}×", f"{ours['exposed_seconds']:,.0f} s", f"{ours['gpu_seconds'] / 3600:.2f} h"]
        )  # fmt: skip
    return "\n\n".join(
        [
            "## What is assumed, and what it matters",
            "The paper leaves open how long people take between an answer and their next turn, how fast its server "
            "decodes, and the distributions behind its moments. Here: gaps are exponential with a mean of 30 s; "
            "prefill reaches 58 % of an A100's arithmetic, which gives the 360 ms that the paper states for 2,000 "
            "tokens of LLaMA-65B on four of them; decoding reaches 60 % of its memory bandwidth; links carry 26 GB/s "
            "to the device and 5 GB/s from and to the disk. All of it for LLaMA-2 13B unless said otherwise.",
            "Mean gap between turns: hit rate of turns (share of tokens found in memory):",
            table(["gap", *seen, "longest queue"], gaps),
            "Speed of prefilling, as the share of the accelerators' arithmetic that it reaches. The slower it is, the "
            "more reuse is worth, and the more of a load hides behind it. The paper's speed-ups in prefill and in GPU "
            "time go with a prefill that takes several times as long, beside decoding and loading, as the arithmetic "
            "that its 360 ms for LLaMA-65B stand for:",
            prefilling,
            "Speed of decoding, as a multiple of the time that the arithmetic gives. Fast decoding keeps the queue "
            "short: then there is nothing to look ahead at, and the disk is what limits:",
            decoding,
            "Size of the disk. The sessions that are open at the same time fit onto 10 TB here, so LRU loses little "
            "there; on half of that the look-ahead makes the difference that the paper shows:",
            table(["disk", "hit rate (turns)", "hit rate (tokens)", "in memory"], disks),
            "Depth of the look-ahead, as a multiple of the paper's windows (65B, whose sessions do not all fit):",
            table(["depth", "hit rate (turns)", "hit rate (tokens)", "in memory"], depths),
            "One mechanism left out at a time:",
            table(["", "hit rate", "TTFT mean", "prefill throughput", "exposed load", "GPU busy"], mechanisms),
        ]
    )


def _gains(about: str, runs: Iterable[tuple[str, PaperRun]], columns: Sequence[str], found: Found) -> str:
    """A table of what stores are worth beside recomputing everything, a row for each named run that has one."""
    rows = []
    for name, run in runs:
        if run.policy == NO_STORE:
            continue
        ours, gain = found[run], against_recompute(run, found)
        cells = {
            "TTFT cut": percent(gain["ttft_cut"]),
            "prefill throughput": f"{gain['prefill']:.1f}×",
            "GPU time": f"{gain['gpu_time']:.2f}×",
            "cost cut": percent(gain["cost"], 0),
            "longest queue": f"{ours['deepest_queue']:,}",
        }
        policy = called(run.policy, run.ahead)
        rows.append([f"{name}, {policy}", _hits(ours), *(cells[column] for column in columns)])
    return table([about, "hit rate (in memory)", *columns], rows)


def _hits(ours: Mapping[str, float]) -> str:
    """Hit rate of turns, and in brackets the share of the tokens found that were in memory."""
    return f"{percent(ours['session_hit_rate'])} ({percent(ours['memory_share'])})"


# traces


def _trace_part(plan: Plan, trace: Trace, found: Found) -> str:
    infinite = found[plan.trace(trace, "lru", 2.0)]
    rows = [[policy, *(f"{rate:.3f}" for rate in hit_rates(plan, trace, policy, found))] for policy in CURVES]
    relative = ["predictive / lru", *(f"{ratio:.3f}" for ratio in _against_lru(plan, trace, found))]
    depths = []
    for capacity in LOOK_AHEAD_AT:
        for policy in ("lru", DEFAULT_POLICY):
            cells = [f"{percent(capacity, 0)}, {policy}"]
            for depth in (0.0, *DEPTHS):
                ours = found[replace(plan.trace(trace, policy, capacity), depth=depth)]
                cells.append(f"{ours['token_hit_rate']:.3f} ({ours['window']:,})")
            depths.append(cells)
    wrong = []
    for capacity in LOOK_AHEAD_AT:
        cells = [percent(capacity, 0)]
        for share in WRONG:
            run = replace(plan.trace(trace, DEFAULT_POLICY, capacity), depth=1.0, wrong=share)
            cells.append(f"{found[run]['token_hit_rate']:.3f}")
        wrong.append(cells)
    served = []
    for serving in plan.served(trace):
        ours = found[serving]
        name = serving.policy if serving.policy == NO_STORE else called(serving.policy, serving.ahead)
        served.append(
            [
                name,
                f"{ours['token_hit_rate']:.3f}",
                percent(ours["memory_share"]),
                *(f"{ours[key]:,.2f} s" for key in ("ttft_mean", "ttft_p50", "ttft_p99", "wait_mean")),
                f"{ours['gpu_seconds'] / 3600:.2f} h",
                f"{ours['deepest_queue']:,}",
            ]
        )
    return "\n\n".join(
        [
            f"## {trace.title}",
            f"{infinite['turns']:,} requests, {infinite['tokens'] / 1e6:,.0f} M tokens, blocks of {trace.block_tokens} "
            "tokens. Tokens found in contiguous beginnings, as a share of all tokens of prompts, at capacities in "
            f"percent of the trace's different blocks; without a limit {infinite['token_hit_rate']:.3f}. The optimum "
            "is Belady's MIN with bypass, which knows what comes.",
            table(["", *(percent(c, 0) for c in plan.capacities)], [*rows, relative]),
            f"![{trace.title}: hit rate by capacity]({picture_of(trace)})",
            "`fifo` and all policies after it drop ends of chains only; `fifo (any block)` is the plain one. And "
            "`predictive` takes nothing in that it thinks is worth less than what would have to go for it.",
            "With the next requests known in their true order (`schedule`), by depth: 1 is as many turns as fit into "
            "the store (in brackets). Of a turn is known what its conversation has already; of a first turn nothing.",
            table(["capacity, policy", *(f"depth {d:g}" for d in (0.0, *DEPTHS))], depths),
            "With a share of what is foreseen replaced by other conversations (depth 1, predictive):",
            table(["capacity", *(f"{percent(w, 0)} wrong" for w in WRONG)], wrong),
            "In its own time, on the paper's machine for LLaMA-2 70B (prompt windows not limited; token hit rate of "
            "what the conversation had before):",
            table(
                ["", "hit rate", "in memory", "TTFT mean", "p50", "p99", "mean wait", "GPU busy", "longest queue"],
                served,
            ),
        ]
    )


def _thinking_part(plan: Plan, trace: Trace, found: Found) -> str:
    rows = []
    for policy in ("lru", DEFAULT_POLICY):
        cells = [policy]
        for factor in THINKING:
            run = replace(plan.trace(trace, policy, 0.05), thinking=factor)
            cells.append(f"{found[run]['token_hit_rate']:.3f}")
        rows.append(cells)
    return "\n\n".join(
        [
            "## Think time",
            f"{trace.title} at 5 % of its blocks, with think times multiplied (sessions begin when they did: the "
            "longer people think, the more sessions are open at the same time):",
            table(["", *(f"× {factor:g}" for factor in THINKING)], rows),
        ]
    )


# codecs


def coded_rates(plan: Plan, trace: Trace, found: Found) -> dict[str, list[float]]:
    """Shares of a trace's tokens that are found at each capacity of the plan, by codec and policy."""
    rates: dict[str, list[float]] = {}
    for run in plan.coded(trace):
        rates.setdefault(f"{run.codec}, {run.policy}", []).append(found[run]["token_hit_rate"])
    return rates


def _codecs_part(plan: Plan, found: Found) -> str:
    kept = ", ".join(f"`{codec}` {percent(share, 0)}" for codec, share in CODECS.items())
    columns = [(policy, codec) for policy in ("queue + lru", "lru") for codec in CODECS]
    rows: dict[str, dict[tuple[str, str], str]] = {}
    for run in plan.coded_paper():
        name = f"{SETTINGS[run.setting].model.name}, {run.disk // GB:,} GB"
        ours = found[run]
        cell = f"{_hits(ours)}, {1000 * ours['ttft_mean']:,.0f} ms"
        rows.setdefault(name, {})[called(run.policy, run.ahead), run.codec] = cell
    parts = [
        "## Codecs: the same bytes",
        f"Memory and disk keep KV as a codec writes it: of 16-bit KV {kept} of the bytes, as measured on full blocks "
        "(codecs-smollm2.md). So more fits, and less is read and written; over the link to the device goes what is "
        "computed with, and decoding is taken to keep up with that. With loss, so answers may differ (docs/codecs.md).",
        "The paper's workload: hit rate of turns, in brackets the share of the tokens found that were in memory, and "
        "the mean TTFT:",
        table(
            ["", *(f"{policy}, {codec}" for policy, codec in columns)],
            [[name, *(cells[column] for column in columns)] for name, cells in rows.items()],
        ),
    ]
    for trace in plan.traces:
        rates = coded_rates(plan, trace, found)
        served = []
        for serving in plan.coded_served(trace):
            ours = found[serving]
            served.append(
                [f"{called(serving.policy, serving.ahead)}, {serving.codec}", f"{ours['token_hit_rate']:.3f}",
                 percent(ours["memory_share"]), *(f"{ours[key]:,.2f} s" for key in ("ttft_mean", "ttft_p50")),
                 f"{ours['gpu_seconds'] / 3600:.2f} h"]
            )  # fmt: skip
        parts += [
            f"{trace.title}: tokens found, with room for so many percent of the trace's blocks as they are computed:",
            table(
                ["", *(percent(c, 0) for c in plan.capacities)],
                [[name, *(f"{rate:.3f}" for rate in row)] for name, row in rates.items()],
            ),
            f"![{trace.title}: hit rate by codec]({picture_of(trace, 'hierarchy-codecs')})",
            "In its own time, on the paper's machine for LLaMA-2 70B (more than 1: what others had before, too):",
            table(["", "hit rate", "in memory", "TTFT mean", "p50", "GPU busy"], served),
        ]
    return "\n\n".join(parts)


def live_part(live: Mapping[str, Mapping[str, Any]]) -> str:
    """A live store beside the simulation."""
    rows = [
        [
            policy,
            f"{result['turns']:,}",
            f"{result['found']:,} / {result['found_simulated']:,}",
            f"{result['fast']:,} / {result['fast_simulated']:,}",
            f"{result['evicted']:,} / {result['evicted_simulated']:,}",
            str(len(result["differing"])),
            str(result["wrong"]),
        ]
        for policy, result in live.items()
    ]
    some = next(iter(live.values()))
    agree = all(result["agrees"] for result in live.values())
    verdict = (
        "They agree after every turn: the same blocks are found, and memory holds the same ones."
        if agree
        else "They do not agree everywhere."
    )
    return "\n\n".join(
        [
            "## A live store beside the simulator",
            f"{some['sessions']:,} conversations with several turns, {some['blocks']:,} different blocks, on a real "
            f"`AttentionStore` whose memory tier has room for {some['memory']:,} of them and whose disk for all; "
            "blocks are tiny, random, and compared byte by byte when they come back. The store goes by the trace's "
            "clock. Live / simulated, in blocks. " + verdict,
            *(
                [
                    "Where a model is named, it computes the turns, through `AttentionStoreCache` and `generate`: of "
                    "every block 16 tokens, and one token of an answer, of which every 20th was compared with what the "
                    "model says without a store."
                ]
                if any("model" in policy for policy in live)
                else []
            ),
            table(["policy", "turns", "found", "in memory", "evicted from memory", "turns that differ", "wrong"], rows),
        ]
    )


def picture_of(trace: Trace, of: str = "hierarchy") -> str:
    """The name of a trace's picture, of policies or of codecs."""
    words = "".join(letter if letter.isalnum() else "-" for letter in trace.title.lower())
    return f"{of}-{'-'.join(part for part in words.split('-') if part)}.png"


def from_record(record: Mapping[str, Any], plan: Plan) -> dict[Run, dict[str, Any]]:
    """The runs in an earlier report that are the plan's, too."""
    paths = {trace.title: trace.path for trace in plan.traces}
    kinds = {kind.__name__: kind for kind in (PaperRun, TraceRun, ServedTrace)}
    wanted = set(plan.runs())
    found: dict[Run, dict[str, Any]] = {}
    for item in record["runs"]:
        about = dict(item["run"])
        kind = kinds[about.pop("class")]
        if "path" in about:
            about["path"] = paths.get(about["path"], "")
        run = kind(**about)
        if run in wanted:
            found[run] = item["found"]
    return found


def as_record(plan: Plan, found: Found, live: dict[str, Any] | None) -> dict[str, Any]:
    """Everything, JSON-able. Traces are named by their title, not by where they lay."""
    titles = {trace.path: trace.title for trace in plan.traces}
    runs = []
    for run, figures in found.items():
        about = record_of(run)
        if "path" in about:
            about["path"] = titles.get(about["path"], "trace")
        runs.append({"run": about, "found": {key: value for key, value in figures.items() if key != "cpu_seconds"}})
    return {"runs": runs, "live": live, "left_out": plan.left_out}
