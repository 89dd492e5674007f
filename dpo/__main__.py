"""python -m dpo VERB: what can be done beside training.

    python -m dpo audit DATA [--validation DATA] [--tokenizer NAME] [--json FILE]
    python -m dpo plan --config ds_configs/zero2.json [--recipe recipes/NAME.yaml] [--section.key VALUE ...] --ranks N
    python -m dpo export RUN [--to FOLDER] [--merge true] [--checkpoint STEP]
    python -m dpo sample RUN [--prompt TEXT ...] [--judge heuristic]
    python -m dpo report RUN [RUN ...] [--output FILE]

Exit code 2 and one line for whatever the user can fix, as train_dpo.py.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import sys

from dpo.commandline import Verb, parse, parse_options
from dpo.errors import UserError
from dpo.estimate import Hardware


def _plan(argv: list[str]) -> None:
    verb = Verb("plan", "Print what a run would do and need on GPUs that need not be here; trains nothing.", Hardware)
    command = parse(argv, verb)
    from dpo.plan import show_forecast  # after --help and typing errors: it imports DeepSpeed

    show_forecast(command)


def _audit(argv: list[str]) -> None:
    from dpo.audit import DESCRIPTION, AuditOptions, show_audit

    show_audit(parse_options(argv, "audit", DESCRIPTION, AuditOptions))


def _export(argv: list[str]) -> None:
    from dpo.export import Options, export_run  # it imports DeepSpeed

    options = parse_options(argv, "export", "Write the weights of a run as a folder to hand on.", Options)
    print(export_run(options))


def _report(argv: list[str]) -> None:
    # The parser reads a list from one argument; run directories are given as words.
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    rest = argv[len(words) :]
    from dpo.report import page

    print(page.report(parse_options([json.dumps(words), *rest] if words else rest, "report", REPORT, page.Options)))


def _sample(argv: list[str]) -> None:
    # Taken out word for word: the parser would read a prompt such as "1" or "[x]" as YAML.
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--prompt", action="append", default=[])
    try:
        known, rest = own.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"--prompt: {error.message}") from None
    from dpo import sample as verb

    given = ["--prompt", json.dumps(known.prompt)] if known.prompt else []
    verb.sample(parse_options([*rest, *given], "sample", SAMPLE, verb.Options))


VERBS = {
    "audit": (_audit, "what a preference data set is like, and how far trivial rules get"),
    "plan": (_plan, "what a run would do and need on GPUs that need not be here"),
    "export": (_export, "the weights of a run, or of one of its checkpoints, as a folder; adapters merged if asked"),
    "sample": (_sample, "answers of a run's reference and policy to your prompts, and a win rate"),
    "report": (_report, "report.html of a run, or of several beside each other"),
}
SAMPLE = "Answer prompts by the reference and the policy of a finished run, side by side; --judge adds a win rate."
REPORT = "Write report.html of a run directory, of a crashed run too, or compare several runs in one page."


def _usage() -> str:
    lines = [f"  {name:8} {what}" for name, (_, what) in VERBS.items()]
    return "\n".join(["usage: python -m dpo VERB [--help] ...", "", *lines, "", "Training itself: train_dpo.py"])


def main(argv: list[str]) -> int:
    """Run a verb.

    Args:
        argv: The verb and its arguments.
    Returns:
        Exit code: 0, or 2 for a mistake of the user's.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name, *rest = argv
    try:
        if name not in VERBS:
            close = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"use {', '.join(VERBS)}"
            raise UserError(f"unknown verb {name}; {hint}")
        VERBS[name][0](rest)
    except UserError as error:
        print(f"python -m dpo{f' {name}' if name in VERBS else ''}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
