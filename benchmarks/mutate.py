"""Feed bad input to the functions that train_dpo.py calls, and count what comes of it.

    python -m benchmarks.mutate --count 10000 --seed 0

In process, each input with a time limit, as `train_dpo.py ... --prepare_only`: parse, validate, tokenise, plan. The
first of them also go through the command line, each in a process of its own. Allowed is a run that works, or one line
that names what is wrong and says what to do; nothing may be left of a run. Prints the figures, and every input that was
received badly.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import inspect
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis

from benchmarks.mutations import ROOT, Case
from benchmarks.mutations_data import cases, for_a_shell
from dpo.errors import printable

LIMIT = 20.0
"""Seconds for one input in process; the machine may be busy with other things."""
LONGEST_LINE = 1100
NAMES = (
    r"--\w|\b(model|reference|data|loss|optim|train|log)\.\w|chat template|tokenizer|data '|local_rank|section|"
    r"argument|unknown key"
)
REMEDY = (
    r"\b(use|fix|remove|name|give|write|keep|download|leave|drop|install|make|rename|did you mean|lists all|are in|"
    r"set|raise|start|accepted|are given as|expected|it has|there is one|should hold|quote|shorten|save|convert)\b"
)


class Hang(BaseException):
    """An input took longer than its limit."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` after a while; where C code does not come back to be told, end the process."""

    def late(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(10 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def complaint(case: Case, code: int, out: str, err: str, folder: Path) -> str | None:
    """What is wrong with the way in which an input was received; None if nothing is.

    Args:
        case: The input.
        code: Exit code.
        out, err: What was printed.
        folder: Where it ran.
    """
    left = [name for name in ("run", "runs") if (folder / name).exists()]
    left += [str(path) for path in folder.glob("**/*.tmp-*")]
    if left:
        return f"left {left}"
    if code == 0:
        return None if "Traceback" not in err else f"a traceback: {err}"
    if code != 2:
        return f"exit code {code}: {err}"
    line = err.removesuffix("\n")
    if out or not line.startswith("train_dpo.py: "):
        return f"not one line: {out!r} {err!r}"
    if not line.isprintable() or len(line) > LONGEST_LINE:
        return f"not a line for a terminal ({len(line)} characters): {line!r}"
    files = [printable(name.split("/")[0]) for name in case.files]
    if not re.search(NAMES, line) and not any(name in line for name in files):
        return f"names nothing: {line}"
    if not re.search(REMEDY, line):
        return f"no remedy: {line}"
    return None


def in_process(
    case: Case, policy: Path, folder: Path, limit: float = LIMIT, show: bool = False
) -> tuple[str, str | None]:
    """Give an input to `train_dpo.main` in an empty folder.

    Args:
        case: The input.
        policy: Folder of a small model.
        folder: Empty.
        limit: Seconds.
        show: Print what was said.
    Returns:
        What came of it: works, refused, help, traceback, hang or wrong; and what is to be complained of, if anything.
    """
    import train_dpo

    case.write(folder)
    out, err = io.StringIO(), io.StringIO()
    argv = ["--model.policy", str(policy), *case.argv, "--prepare_only"]
    before = Path.cwd()
    os.chdir(folder)
    try:
        with time_limit(limit), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = train_dpo.main(argv)
    except Hang:
        return "hang", f"longer than {limit} s: {traceback.format_exc(limit=-6)}"
    except SystemExit as leaving:
        if leaving.code == 0 and "usage:" in out.getvalue():
            return "help", None
        return "wrong", f"left with {leaving.code}: {err.getvalue()}"
    except Exception:
        return "traceback", traceback.format_exc()
    finally:
        os.chdir(before)
    found = complaint(case, code, out.getvalue(), err.getvalue(), folder)
    if show and code:
        print(f"{case.kind}: {err.getvalue()}", end="")
    return ("wrong" if found else "works" if code == 0 else "refused"), found


def on_the_command_line(case: Case, policy: Path, folder: Path, limit: float = 300) -> tuple[str, str | None]:
    """The same, in a process of its own."""
    case.write(folder)
    argv = [sys.executable, str(ROOT / "train_dpo.py"), "--model.policy", str(policy), *case.argv, "--prepare_only"]
    try:
        done = subprocess.run(argv, capture_output=True, cwd=folder, timeout=limit)
    except subprocess.TimeoutExpired:
        return "hang", f"longer than {limit} s"
    out, err = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
    if "Traceback" in err:
        return "traceback", err
    if done.returncode == 0 and "usage:" in out:
        return "help", None
    found = complaint(case, done.returncode, out, err, folder)
    return ("wrong" if found else "works" if done.returncode == 0 else "refused"), found


def quiet_surroundings(folder: Path) -> None:
    """Keep this process and its children off the hub and out of the user's caches."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "DPO_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8",
    }  # fmt: skip


def small_policy(folder: Path) -> Path:
    """A random Llama with the built-in tokenizer and the turn tokens of `mutations.TEMPLATE`, saved."""
    from dpo.model import example

    tokenizer, model = example.build_tokenizer(), example.build_model(0)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def main() -> int:
    """Run as many inputs as asked for; 1 if any was received badly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="inputs in process")
    parser.add_argument("--command_line", type=int, default=0, help="how many of them also go through the command line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print what was said of every input that was refused")
    options = parser.parse_args()
    # Every parse looks up the help texts in the source of dpo/config.py, which is half of its time and never changes.
    inspect.getsource = functools.cache(inspect.getsource)
    counts: Counter[tuple[str, str, str]] = Counter()
    slowest, started = (0.0, ""), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        quiet_surroundings(Path(name))
        policy = small_policy(Path(name) / "policy")
        shell_left = options.command_line

        @hypothesis.seed(options.seed)
        @hypothesis.settings(
            max_examples=options.count, database=None, deadline=None, phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(cases)
        def receive(case: Case) -> None:
            nonlocal shell_left, slowest
            done = sum(counts.values())
            if done and not done % 1000:
                print(f"{done} of {options.count}", file=sys.__stderr__, flush=True)
            runs = [("in process", functools.partial(in_process, show=options.show))]
            if shell_left > 0 and for_a_shell(case):
                shell_left -= 1
                runs.append(("command line", on_the_command_line))
            for where, run in runs:
                begun = time.monotonic()
                with tempfile.TemporaryDirectory(dir=name) as folder:
                    result, found = run(case, policy, Path(folder))
                counts[where, case.kind, result] += 1
                if where == "in process":
                    slowest = max(slowest, (time.monotonic() - begun, f"{case.kind}: {case.argv}"[:300]))
                if found:
                    print(f"--- {where}, {case.kind}, {result}: {case.argv!r}\n{found}\n", flush=True)

        receive()
    for key, count in sorted(counts.items()):
        print(f"{', '.join(key)}: {count}")
    totals = Counter()
    for (where, _, result), count in counts.items():
        totals[where, result] += count
    print(f"seed {options.seed}, {time.monotonic() - started:.0f} s; slowest input {slowest[0]:.1f} s ({slowest[1]})")
    print(", ".join(f"{where} {result} {count}" for (where, result), count in sorted(totals.items())))
    return int(any(result in ("hang", "traceback", "wrong") for _, result in totals))


if __name__ == "__main__":
    sys.exit(main())
