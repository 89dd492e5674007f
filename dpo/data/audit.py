"""What a preference data set is like before anything is trained on it: counts, examples, leaks, trivial baselines.

`audit` works on tokenised pairs and the reports that tokenisation left, without text, model or network, and gives plain
values, as they stand in `audit.json` of a run directory and in the file of `python -m dpo audit --json`:

    version     1; another number where this schema changes
    tokenizer   name, bos, eos (text or null)
    sets        of each training and validation source:
                  name, role ("train" or "validation"), source, format, rows, pairs, max_length (tokens)
                  findings: list of {kind, count, fate, rows, detail}; count and rows (1-based numbers of up to three)
                    are of rows of the source; fate is "bad" (refused or dropped), "tie" (no pair made), "cut" (to
                    max_length), "kept"; detail is what was found in the first of them; what matters most (ALWAYS) is
                    listed with count 0 where there is none
                  lengths: prompt, chosen, rejected (tokens after truncation), chosen_characters, rejected_characters
                    (before it) -> {mean, p50, p90, p99, max}
    leaks       of each validation set, where there are any: list of {kind, validation, count, examples}; kind is "pair"
                  (prompt and both completions are in the training pairs) or "prompt"; count is of validation pairs;
                  examples: up to three {row, train, train_row}
    heuristics  of each set: {set, role, pairs, longer_characters, longer_tokens, overlap, first_token, best, baseline}:
                  accuracies in [0, 1], see `heuristics.py`; first_token is null but for validation with training pairs;
                  best names the rule that is furthest from one half, baseline is its accuracy or that of its opposite
    seconds     that the audit took
    conclusions  in a run directory alone: what matters before a run, in a line each

Strings may hold anything that the data holds: JSON escapes control characters, whoever shows them elsewhere must.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo.data.encode import LONGER
from dpo.data.heuristics import first_token, first_token_rates, longer, overlap
from dpo.data.kinds import CHOSEN_IS_REJECTED, EMPTY_RESPONSE, PROMPTS_DIFFER
from dpo.data.store import EXAMPLES, DataReport, DataSet, TokenizedPairs, temporary

VERSION = 1
NO_END = "completion without end token"
REPEATS = "repeats an earlier pair"
CONTRADICTS = "contradicts an earlier pair"
ALWAYS = {
    CHOSEN_IS_REJECTED: "bad", PROMPTS_DIFFER: "bad", EMPTY_RESPONSE: "bad", LONGER: "cut", NO_END: "cut",
    REPEATS: "kept", CONTRADICTS: "kept",
}  # fmt: skip
"""Findings that are named also where there are none."""
RULES = {
    "longer_characters": "longer in characters",
    "longer_tokens": "longer in tokens",
    "overlap": "the one that shares more with the prompt",
    "first_token": "the one whose first token was chosen more often in training",
}
Audit = dict[str, Any]


class Specials(NamedTuple):
    """Token ids that mean something.

    Attributes:
        bos, eos: Of the tokenizer.
        every: All that no text should hold.
        ends: All that a completion may end with: those, and what was added to the vocabulary as plain text, which some
            chat templates end a turn with.
    """

    bos: int | None
    eos: int | None
    every: frozenset[int]
    ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any) -> Specials:
        """Read them off a tokenizer."""
        added = tokenizer.added_tokens_decoder
        every = frozenset({*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)})
        return cls(tokenizer.bos_token_id, tokenizer.eos_token_id, every, every | set(added))


def audit(sets: Sequence[DataSet], tokenizer: Any) -> Audit:
    """Look at training and validation pairs together.

    Args:
        sets: All sources, each as often as its role asks for.
        tokenizer: That made the ids.
    Returns:
        Plain values, see the module.
    """
    started = time.perf_counter()
    specials = Specials.of(tokenizer)
    digests = [_digests(one.pairs) for one in sets]
    train = [(one, own) for one, own in zip(sets, digests, strict=True) if one.role == "train"]
    held = [(one, own) for one, own in zip(sets, digests, strict=True) if one.role == "validation"]
    found: Audit = {
        "version": VERSION,
        "tokenizer": {
            "name": str(tokenizer.name_or_path), "bos": tokenizer.bos_token, "eos": tokenizer.eos_token,
        },
        "sets": [_of_set(one, own, specials) for one, own in zip(sets, digests, strict=True)],
        "leaks": _leaks(train, held) if train else [],
        "heuristics": _heuristics(sets),
    }  # fmt: skip
    return found | {"seconds": round(time.perf_counter() - started, 3)}


def cached_audit(sets: Sequence[DataSet], tokenizer: Any, cache: Path) -> Audit:
    """The audit of some sets, from the cache of tokenised data or made now and left there.

    Args:
        sets, tokenizer: As of `audit`.
        cache: Folder of the tokenised data.
    """
    parts = [(one.name, one.role, one.pairs.key, one.report.source) for one in sets]
    key = hashlib.sha256(json.dumps([VERSION, parts]).encode()).hexdigest()[:32]
    path = cache / f"audit-{key}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = audit(sets, tokenizer)
    new = temporary(path)  # of this process: jobs that share the cache may be here at once
    with suppress(OSError):  # it is made anew next time
        new.write_text(json.dumps(found), encoding="utf-8")
        new.replace(path)
    return found


# --- one set ---------------------------------------------------------------------------------------------------------


def _digests(pairs: TokenizedPairs) -> list[tuple[bytes, bytes, bytes]]:
    """Hashes of the whole prompt, and of chosen and rejected as they are trained on, of every pair."""

    def of(ids: np.ndarray) -> bytes:
        return hashlib.blake2b(ids.tobytes(), digest_size=12).digest()

    every = (pairs[i] for i in range(len(pairs)))
    prompts = (own.tobytes() for own in pairs.prompt_hashes)
    return [(own, of(pair.chosen_ids), of(pair.rejected_ids)) for own, pair in zip(prompts, every, strict=True)]


def _of_set(one: DataSet, digests: list[tuple[bytes, bytes, bytes]], specials: Specials) -> Audit:
    pairs, report = one.pairs, one.report
    kinds = [
        {"kind": kind, "count": found.count, "fate": found.fate, "rows": found.rows, "detail": found.detail}
        for kind, found in report.kinds.items()
    ]
    findings = kinds + _token_findings(pairs, report, specials) + _repetitions(pairs, digests)
    there = {finding["kind"] for finding in findings}
    findings += [
        {"kind": kind, "count": 0, "fate": fate, "rows": [], "detail": ""}
        for kind, fate in ALWAYS.items()
        if kind not in there
    ]
    columns = dict(zip(("prompt", "chosen", "rejected"), pairs.lengths.T, strict=True))
    columns |= dict(zip(("chosen_characters", "rejected_characters"), pairs.characters.T, strict=True))
    return {
        "name": one.name, "role": one.role, "source": report.source, "format": report.format,
        "rows": report.rows_read, "pairs": len(pairs), "max_length": report.max_length,
        "findings": findings,
        "lengths": {name: _spread(values) for name, values in columns.items()},
    }  # fmt: skip


def _spread(values: np.ndarray) -> dict[str, float]:
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99, "max": float(values.max())}


def _finding(pairs: TokenizedPairs, kind: str, ids: Sequence[int], fate: str = "kept", detail: str = "") -> list[Audit]:
    """A finding of some pairs, none where there are none."""
    rows = list(dict.fromkeys(int(pairs.row_numbers[i]) for i in ids))
    if not rows:
        return []
    return [{"kind": kind, "count": len(rows), "fate": fate, "rows": rows[:EXAMPLES], "detail": detail}]


def _token_findings(pairs: TokenizedPairs, report: DataReport, specials: Specials) -> list[Audit]:
    """Surprises among special tokens, and completions without an end."""
    starts = pairs.starts[:-1]
    prompts, chosen = pairs.lengths[:, 0], pairs.lengths[:, 1]
    ends = np.cumsum(pairs.lengths, axis=1)  # where prompt, chosen and rejected end, within the pair
    last = pairs.tokens[(starts[:, None] + ends[:, 1:] - 1)]  # (n, 2)
    ended = np.isin(last, list(specials.ends)).all(axis=1)
    places = np.flatnonzero(np.isin(pairs.tokens, list(specials.every)))
    owner = np.searchsorted(starts, places, side="right") - 1
    within = places - starts[owner]
    ids = pairs.tokens[places]
    in_prompt = within < prompts[owner]
    is_end = (within == ends[owner, 1] - 1) | (within == ends[owner, 2] - 1)
    first, second = (pairs.tokens[np.minimum(starts + i, len(pairs.tokens) - 1)] for i in (0, 1))
    found = _finding(pairs, NO_END, np.flatnonzero(~ended).tolist(), "cut", "truncated")
    if report.prompts_cut:
        whole = {"kind": "prompt lost its start", "count": report.prompts_cut, "fate": "cut", "rows": [], "detail": ""}
        found.append(whole)
    if specials.bos is not None:
        twice = (first == specials.bos) & (second == specials.bos) & (prompts > 1)
        found += _finding(pairs, "BOS twice at the start", np.flatnonzero(twice).tolist())
        if specials.bos != specials.eos:
            late = owner[(ids == specials.bos) & (within > 1)]
            found += _finding(pairs, "BOS within a text", np.unique(late).tolist())
    of_turns = np.isin(places, pairs.unscored) | np.isin(places + 1, pairs.unscored)  # written by the chat template
    inside = owner[~in_prompt & ~is_end & ~of_turns]
    found += _finding(pairs, "special token within a completion", np.unique(inside).tolist())
    if report.format in ("hh", "prompt"):  # a chat template writes them
        early = owner[in_prompt & ~((within == 0) & (ids == specials.bos))]
        found += _finding(pairs, "special token within a prompt", np.unique(early).tolist())
    empty = np.flatnonzero((chosen < 2) | (pairs.lengths[:, 2] < 2))
    return found + _finding(pairs, "completion of a single token", empty.tolist())


def _repetitions(pairs: TokenizedPairs, digests: list[tuple[bytes, bytes, bytes]]) -> list[Audit]:
    """Pairs that repeat an earlier one, or contradict it."""
    first: dict[tuple[bytes, bytes, bytes], int] = {}
    repeated, opposed = [], []
    for i, (prompt, chosen, rejected) in enumerate(digests):
        if first.setdefault((prompt, chosen, rejected), i) != i:
            repeated.append(i)
        if (prompt, rejected, chosen) in first:
            opposed.append(i)
    prompts: dict[bytes, int] = {}
    again = [i for i, (prompt, _, _) in enumerate(digests) if prompts.setdefault(prompt, i) != i]

    def example(ids: list[int], of: Callable[[int], tuple[bytes, bytes, bytes]]) -> str:
        return f"row {pairs.row_numbers[first[of(ids[0])]]}" if ids else ""

    same = example(repeated, lambda i: digests[i])
    other = example(opposed, lambda i: (digests[i][0], digests[i][2], digests[i][1]))
    return (
        _finding(pairs, REPEATS, repeated, detail=f"the same as {same}")
        + _finding(pairs, CONTRADICTS, opposed, detail=f"the other way round in {other}")
        + _finding(pairs, "repeats an earlier prompt", again)
    )


# --- sets against one another ----------------------------------------------------------------------------------------


def _leaks(train: Sequence[tuple[DataSet, list]], held: Sequence[tuple[DataSet, list]]) -> list[Audit]:
    """Validation pairs, and prompts, that training holds too."""
    known: dict[str, dict[Any, tuple[str, int]]] = {"pair": {}, "prompt": {}}
    for one, digests in train:
        for i, digest in enumerate(digests):
            place = one.name, int(one.pairs.row_numbers[i])
            known["pair"].setdefault(digest, place)
            known["prompt"].setdefault(digest[0], place)
    leaks = []
    for one, digests in held:
        for kind, whole in (("pair", True), ("prompt", False)):
            keys = digests if whole else [digest[0] for digest in digests]
            found = [(i, known[kind][key]) for i, key in enumerate(keys) if key in known[kind]]
            examples = [
                {"row": int(one.pairs.row_numbers[i]), "train": name, "train_row": row} for i, (name, row) in found
            ]
            if found:
                leak = {"kind": kind, "validation": one.name, "count": len(found), "examples": examples[:EXAMPLES]}
                leaks.append(leak)
    return leaks


def _heuristics(sets: Sequence[DataSet]) -> list[Audit]:
    train = [one.pairs for one in sets if one.role == "train"]
    held = any(one.role == "validation" for one in sets)
    rates = first_token_rates(train) if held and train else {}
    found = []
    for one in sets:
        first = first_token(one.pairs, rates) if one.role == "validation" and train else None
        scores = {**longer(one.pairs), "overlap": overlap(one.pairs)}
        known = scores if first is None else scores | {"first_token": first}
        best = max(known, key=lambda name: abs(known[name] - 0.5))
        row: Audit = {"set": one.name, "role": one.role, "pairs": len(one.pairs)}
        row |= scores | {"first_token": first, "best": best, "baseline": 0.5 + abs(known[best] - 0.5)}
        found.append(row)
    return found
