"""Raw numbers of all rounds -> what they say: agreement of losses, ratios against the targets, tables.

A run is a dict: system, round, and what the Clock gave. Ratios pair the runs of one round, which lie minutes apart, and
are summed up by their median with the range.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from dpo.errors import UserError

Run = dict[str, Any]

TOLERANCE = {"bf16": 1e-2, "fp32": 1e-4}
"""Largest distance between two systems' losses of a step, nats."""

NAMES = {
    "ours_online": "ours, online reference",
    "ours_cached": "ours, cached reference",
    "ours_8_pairs": "ours, online reference, 8 pairs a forward pass",
    "ours_packed": "layout packed: prompts computed twice",
    "ours_padded": "layout padded: prompts computed twice, rows padded",
    "ours_single": "one pair a micro-batch",
    "ours_static": "rows of one length",
    "ours_sdpa": "attention sdpa",
    "ours_flex": "attention flex",
    "ours_flash": "attention flash",
    "ours_loss_in_forward": "loss in forward",
    "ours_loss_after_forward": "loss after forward",
    "ours_vocabulary_64": "vocabulary padded to a multiple of 64",
    "ours_own_gelu": "GELU not fused",
    "ours_whole_mlp": "last MLP on every row",
    "ours_own_products": "products of bf16 left to PyTorch",
    "ours_compiled": "blocks compiled, rows of one length",
    "ours_recomputed": "activations recomputed",
    "trl_default": "TRL, default",
    "trl_tuned": "TRL, tuned",
    "plain_loop": "plain loop",
}

TARGETS: dict[str, list[tuple[str, str, str, float]]] = {
    "cpu": [
        ("pairs/s", "ours_online", "trl_default", 8.0),
        ("pairs/s", "ours_cached", "trl_default", 10.0),
        ("pairs/s", "ours_cached", "trl_tuned", 3.0),
        ("pairs/s", "ours_online", "plain_loop", 3.0),
    ],
    "cuda": [
        ("pairs/s", "ours_online", "trl_default", 8.0),
        ("pairs/s", "ours_cached", "trl_default", 10.0),
        ("pairs/s", "ours_cached", "trl_tuned", 3.0),
        ("pairs/s", "ours_online", "plain_loop", 3.0),
        ("peak memory", "ours_8_pairs", "trl_default", 0.5),
    ],
    "llama_1b": [("MFU", "ours_cached", "", 0.5)],
}
"""Per table: measure, system, baseline (none for MFU), target; at least, for memory at most."""


def seconds_per_pair(run: Run) -> float:
    """Time of the timed window by pair."""
    return run["seconds"] / run["timed_pairs"]


def disagreements(runs: Sequence[Run], dtype: str) -> list[str]:
    """What is wrong with the losses; empty if they agree.

    Args:
        runs: Of all systems and rounds; those in another order of the pairs are only looked at for finite losses.
        dtype: bf16 or fp32.
    Returns:
        One line per finding.
    """
    found = [f"{name(run)}: a loss is not finite" for run in runs if not all(map(math.isfinite, run["losses"]))]
    if found:
        return found
    alike = [run for run in runs if run["same_order"]]
    for step, losses in enumerate(zip(*(run["losses"] for run in alike), strict=True), start=1):
        low, high = (alike[losses.index(end(losses))] for end in (min, max))
        if max(losses) - min(losses) > TOLERANCE[dtype]:
            found.append(
                f"step {step}: {name(low)} has loss {min(losses):.6f}, {name(high)} {max(losses):.6f};"
                f" at most {TOLERANCE[dtype]} apart in {dtype}"
            )
    several = len({run["system"] for run in alike}) > 1
    if several and not any(abs(loss - math.log(2)) > TOLERANCE[dtype] for run in alike for loss in run["losses"]):
        found.append("no loss has left ln 2, so that equal losses prove nothing; use a larger --lr")
    return found


def name(run: Run) -> str:
    """A system as the tables call it."""
    return NAMES[run["system"]]


def _spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    if len(values) == 1:
        return form(values[0])
    return f"{form(median(values))} ({form(min(values))} to {form(max(values))})"


def _by_system(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {system: [r for r in runs if r["system"] == system] for system in dict.fromkeys(r["system"] for r in runs)}


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and the others numbers."""
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def systems_table(runs: Sequence[Run], missing: dict[str, str], useful_tokens: int) -> str:
    """A row per system: speed, memory, share of the peak, distance of its losses from ours.

    Args:
        runs: Of all rounds.
        missing: System -> why it was not measured.
        useful_tokens: Of the timed pairs.
    """
    first = next((run for run in runs if run["same_order"]), None)
    rows = []
    for system, own in _by_system(runs).items():
        rate = 1 / median(run["seconds"] for run in own)
        gaps = [abs(a - b) for r in own for a, b in zip(r["losses"], first["losses"], strict=True)] if first else []
        build = [run["build_seconds"] for run in own if run["build_seconds"] is not None]
        rows.append(
            [
                NAMES[system],
                _spread([1 / seconds_per_pair(run) for run in own], lambda x: f"{x:.3g}"),
                f"{useful_tokens * rate:,.0f}",
                f"{median(run['peak_gib'] for run in own):.2f}",
                f"{median(run['mfu'] for run in own):.1%}",
                f"{max(gaps):.1e}" if own[0]["same_order"] else "other order",
                f"{median(build):.1f} s" if build else "-",
            ]
        )
    rows += [[NAMES[system], f"not measured: {why}", *["-"] * 5] for system, why in missing.items()]
    heading = ["system", "pairs/s", "useful tokens/s", "peak memory, GiB", "MFU", "loss, farthest from the first row",
               "building the reference's scores"]
    return table(heading, rows)


def ablations_table(runs: Sequence[Run], missing: dict[str, str]) -> str:
    """A row per changed part: speed, and how much slower than the default that is, run by run of a round.

    Args:
        runs: Of all rounds, the default among them.
        missing: System -> why it was not measured.
    """
    by_system = _by_system([run for run in runs if run["system"] not in missing])
    rows = []
    for system, own in by_system.items():
        pairs = zip(by_system["ours_online"], own, strict=False)  # the last round may have ended early
        rows.append(
            [
                NAMES[system],
                _spread([1 / seconds_per_pair(run) for run in own], lambda x: f"{x:.3g}"),
                _spread([seconds_per_pair(run) / seconds_per_pair(default) for default, run in pairs], "{:.2f}".format),
                f"{median(run['peak_gib'] for run in own):.2f}",
            ]
        )
    rows += [[NAMES[system], f"not measured: {why}", "-", "-"] for system, why in missing.items()]
    return table(["what is changed", "pairs/s", "time against the first row", "peak memory, GiB"], rows)


def ratios(runs: Sequence[Run], name_of_table: str) -> list[dict[str, Any]]:
    """What has a target.

    Returns:
        One dict per target: measure, system, baseline, target, and the values by round, paired where there is a
        baseline; empty where one of the two was not measured.
    """
    by_system = _by_system(runs)
    found = []
    for measure, system, baseline, target in TARGETS[name_of_table]:
        pairs = zip(by_system.get(system, []), by_system.get(baseline, []), strict=False)
        if measure == "MFU":
            values = [run["mfu"] for run in by_system.get(system, [])]
        elif measure == "pairs/s":
            values = [seconds_per_pair(theirs) / seconds_per_pair(ours) for ours, theirs in pairs]
        else:
            values = [ours["peak_gib"] / theirs["peak_gib"] for ours, theirs in pairs]
        found.append(
            {"measure": measure, "system": system, "baseline": baseline, "target": target, "values": values}
        )
    return found


def _verdict(ratio: dict[str, Any]) -> str:
    if not ratio["values"]:
        return "not measured"
    value, target = median(ratio["values"]), ratio["target"]
    if (value <= target) if ratio["measure"] == "peak memory" else (value >= target):
        return "met"
    return f"missed by {abs(value - target) / target:.0%}"


def ratios_table(found: Sequence[dict[str, Any]]) -> str:
    """A row per target."""
    rows = [
        [
            f"{ratio['measure']}: {' / '.join(NAMES[s] for s in (ratio['system'], ratio['baseline']) if s)}",
            _spread(ratio["values"], lambda x: f"{x:.2f}") if ratio["values"] else "not measured",
            f"{'at most' if ratio['measure'] == 'peak memory' else 'at least'} {ratio['target']:g}",
            _verdict(ratio),
        ]
        for ratio in found
    ]
    return table(["measure", "median (range)", "target", ""], rows)


def describe(options: dict[str, Any]) -> str:
    """TRL's options in words."""
    return ", ".join(
        (
            "activations recomputed" if options["checkpointing"] else "activations kept",
            "reference precomputed" if options["precompute"] else "reference online",
            f"micro-batch {options['micro_batch']}",
            "grouped by length" if options["grouped"] else "random order",
        )
    )


def sweep_table(tried: Sequence[dict[str, Any]]) -> str:
    """A row per combination of TRL's options, the fastest first; single runs."""
    ordered = sorted(tried, key=lambda t: -(t["pairs_per_second"] or 0.0))
    rows = [
        [describe(t), f"{t['pairs_per_second']:.3g}" if t["pairs_per_second"] else "out of memory"] for t in ordered
    ]
    return table(["TRL, options tried", "pairs/s"], rows)


def write_block(path: Path, block: str, text: str | None = None) -> None:
    """Replace what stands between a block's markers; all other text is kept.

    Args:
        path: A Markdown file.
        block: Name in the markers.
        text: None leaves it as it is: whether it could be written is known before hours are spent on measuring.
    Raises:
        UserError: If the file has no such markers.
    """
    begin, end = f"<!-- {block}: begin -->", f"<!-- {block}: end -->"
    old = path.read_text(encoding="utf-8")
    new, count = re.subn(
        f"({re.escape(begin)}\n)(.*?)({re.escape(end)})",
        lambda m: f"{m[1]}{m[2] if text is None else text + chr(10)}{m[3]}",
        old,
        flags=re.DOTALL,
    )
    if count != 1:
        raise UserError(f"{path} must hold {begin} and {end} once, in this order; add them")
    path.write_text(new, encoding="utf-8")
