"""python -m dpo sample: prompts from anywhere -> answers of reference and policy, and a judge's verdict.

Prompts are dressed as in training: by the chat template where the data is conversations, as a Human turn where it is
transcripts, else as they stand.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo.commandline import config_of
from dpo.config import Config
from dpo.data.boundary import encode_prompt
from dpo.data.kinds import transcript
from dpo.errors import UserError
from dpo.model import adapters
from dpo.model.forward import Scorer
from dpo.model.load import load_model
from dpo.run.checks import check_same_tokens
from dpo.run.inputs import changed_pairs, changed_weights
from dpo.run.prepare import prepare
from dpo.run.setup import Setup
from dpo.runtime.console import console_on, say
from dpo.runtime.distributed import World
from dpo.runtime.files import read_records, write_records
from dpo.sampling.answers import Answer, Decoding, answer_logps, answers_to, side_by_side
from dpo.sampling.judge import Case, WinRate, make_judge, win_rate
from dpo.types import Message

Prompt = str | list[Message]
DEFAULT_PROMPTS = (
    "What are the main differences between Python and C++?",
    "Explain to a child why the sky is blue.",
    "My flight was cancelled. Write a short, polite message that asks for a refund.",
    "How do I pick a lock?",
)
SHOWN = 8


@dataclass(frozen=True)
class Options:
    """Arguments of python -m dpo sample."""

    run: str
    """Run directory with a final/."""
    prompt: list[str] = field(default_factory=list)
    """A prompt; may be given several times."""
    file: str | None = None
    """Prompts from a file: .txt, one a line, or .jsonl with a field prompt (text or messages)."""
    validation: int | None = None
    """Prompts of this many validation pairs of the run; default: 4, beside four of our own, if no other is named."""
    temperature: float = 0.0
    """0: greedy. 1: drawn from the model as it is, which makes the KL estimate one."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that hold this share together."""
    max_tokens: int = 256
    """Longest answer."""
    seed: int = 0
    """Of the draws."""
    batch_size: int = 16
    """Prompts answered at once."""
    judge: str | None = None
    """Win rate by heuristic, reward:FOLDER or openai:MODEL."""
    output: str | None = None
    """File for the answers; default: answers.jsonl in the run directory, or answers-2.jsonl and so on beside it."""
    policy: str | None = None
    """Model to ask in place of final/, such as an export of a checkpoint."""

    def __post_init__(self) -> None:
        checks = {
            "temperature": self.temperature >= 0, "top_p": 0 < self.top_p <= 1, "max_tokens": self.max_tokens >= 1,
            "batch_size": self.batch_size >= 1, "validation": self.validation is None or self.validation >= 1,
        }  # fmt: skip
        allowed = {"temperature": "0 or more", "top_p": "a number above 0, at most 1"}
        for name, fine in checks.items():
            if not fine:
                raise ValueError(f"--{name} is {getattr(self, name)}; use {allowed.get(name, 'at least 1')}")


def sample(options: Options) -> None:
    """Answer prompts by both models of a run, print and write the answers, and judge them.

    Raises:
        UserError: The run, a prompt file, the judge or an option cannot be used; before a model is loaded.
    """
    run, out = Path(options.run), console_on(sys.stdout)
    config, output = _config(run, options.policy), _output(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judge = make_judge(options.judge, device) if options.judge else None
    setup = _setup(config, device)
    if options.policy is not None:
        check_same_tokens("--policy", options.policy, setup.tokenizer, config)
    for name in changed_pairs(setup, run) + [f"weights of {name}" for name in changed_weights(config, run)]:
        say(out, f"{name} of {run} have changed since it was begun")
    prompts, ids = _prompts(options, setup)
    old, new, own, base = _answers(options, run, setup, ids)
    cases = [Case(prompt, a.text, b.text) for prompt, a, b in zip(prompts, old, new, strict=True)]
    for case in cases[:SHOWN]:
        say(out, side_by_side(transcript(case.prompt), case.reference, case.policy))
    decode = setup.tokenizer.decode
    rows: list[dict[str, Any]] = [
        {
            "prompt": case.prompt, "read": decode(answer.prompt_ids.tolist()), "reference": case.reference,
            "policy": case.policy, "logratio": float(p - r),
        }
        for case, answer, p, r in zip(cases, new, own, base, strict=True)
    ]  # fmt: skip
    _write(output, rows)
    if options.validation is not None and len(setup.validation_pairs or ()) < options.validation:
        say(out, f"\n{run} has no more than {len(setup.validation_pairs or ())} validation pairs")
    say(out, f"\n{_kl(options, own - base)}\nanswers of each: {len(rows)}, in {output}")
    if judge:
        verdicts = judge(cases)
        _write(output, [row | {"verdict": verdict} for row, verdict in zip(rows, verdicts, strict=True)])
        say(out, f"{options.judge}: {_verdict(win_rate(cases, verdicts))}")


def _write(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    try:
        write_records(output, rows)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}; name another by --output") from None


def _output(options: Options) -> Path:
    """Where the answers go.

    Raises:
        UserError: If nothing can be written there.
    """
    numbered = (Path(options.run) / f"answers{'' if i == 1 else f'-{i}'}.jsonl" for i in itertools.count(1))
    output = Path(options.output) if options.output else next(path for path in numbered if not path.exists())
    if not os.access(output.parent, os.W_OK):
        why = "cannot be written to" if output.parent.is_dir() else "is no folder"
        raise UserError(f"{output}: {output.parent} {why}; name another file by --output")
    return output


def _config(run: Path, policy: str | None) -> Config:
    config = config_of(run)
    if policy is not None and not any((Path(policy) / f).is_file() for f in ("config.json", "adapter_config.json")):
        raise UserError(f"--policy {policy} holds no model; python -m dpo export makes a folder of a checkpoint")
    if policy is None and not (run / "final").is_dir():
        raise UserError(
            f"{run} has no final/: the run has not finished; give it the rest of its steps, or --policy with an export"
            f" of a checkpoint"
        )
    return config


def _setup(config: Config, device: torch.device) -> Setup:
    """The run's data as it was tokenised; what concerns its own hardware is left out."""
    plain = replace(
        config,
        model=replace(config.model, load_in_4bit=False),
        optim=replace(config.optim, name="adamw"),
        train=replace(config.train, precision="auto", sequence_parallel_size=1),
        log=replace(config.log, backends=()),
    )
    return prepare(plain, World(0, 1, 0, device), None)


def _prompts(options: Options, setup: Setup) -> tuple[list[Prompt], list[list[int]]]:
    """What is asked, and its token ids; those of validation prompts are the very ones of training."""
    pairs = setup.validation_pairs
    if options.validation is not None and pairs is None:
        raise UserError(f"--validation: {options.run} has no validation pairs; give --prompt or --file")
    example, template_options = setup.texts(setup.train_pairs, 0).prompt, setup.config.data.chat_template_kwargs
    asked: list[Prompt] = [*options.prompt, *(_from_file(Path(options.file)) if options.file else [])]
    nothing = not asked and options.validation is None
    if nothing:
        asked = list(DEFAULT_PROMPTS)
    if options.file and not setup.tokenizer.chat_template and any(isinstance(prompt, list) for prompt in asked):
        raise UserError(f"--file {options.file}: has messages, and the run's tokenizer no chat template; give text")
    dressed = [_dressed(prompt, example) for prompt in asked]
    ids = [encode_prompt(setup.tokenizer, prompt, template_options=template_options) for prompt in dressed]
    if pairs is not None:
        count = min(4 if nothing else options.validation or 0, len(pairs))
        asked += [setup.texts(pairs, i).prompt for i in range(count)]
        ids += [pairs[i].prompt_ids.tolist() for i in range(count)]
    return asked, ids


def _dressed(prompt: Prompt, example: Prompt) -> Prompt:
    """A prompt in the form of the training data."""
    if isinstance(prompt, list):
        return prompt
    if isinstance(example, list):
        return [{"role": "user", "content": prompt}]
    return f"\n\nHuman: {prompt}\n\nAssistant:" if "Human:" in example and "Assistant:" in example else prompt


def _from_file(path: Path) -> list[Prompt]:
    """The prompts of a .txt or .jsonl file.

    Raises:
        UserError: It cannot be read, or holds none.
    """
    try:
        if path.suffix == ".jsonl":
            rows, torn = read_records(path)
            if not path.is_file():
                raise FileNotFoundError(2, "No such file or directory")
            if torn or not all(isinstance(row.get("prompt"), str | list) for row in rows):
                raise UserError(f"--file {path}: every line must be an object with a field prompt, text or messages")
            found: list[Prompt] = [row["prompt"] for row in rows]
        else:
            found = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise UserError(f"--file {path}: holds no prompt")
    return found


def _answers(
    options: Options, run: Path, setup: Setup, prompts: Sequence[Sequence[int]]
) -> tuple[list[Answer], list[Answer], np.ndarray, np.ndarray]:
    """Answers of reference and policy, and the log-probs of the policy's answers under policy and reference. (n,) each.

    One model is on the device at a time.
    """
    device, paths = setup.world.device, (_start_of(run, setup.config), options.policy or str(run / "final"))
    how = Decoding(options.max_tokens, options.temperature, options.top_p, options.seed, options.batch_size)
    scorers = [_scorer(path, setup) for path in paths]
    answers: list[list[Answer]] = []
    for scorer in scorers:
        answers.append(answers_to(prompts, scorer.to(device), setup.tokenizer, how, device))
        scorer.to("cpu")
    old, new = answers
    logps = []
    for scorer in scorers:
        logps.append(answer_logps(scorer.to(device), new, old, "padded", device)[:, 0])
        scorer.to("cpu")
    return old, new, logps[1], logps[0]


def _start_of(run: Path, config: Config) -> str:
    """The reference of a run, as it was at the start of DPO."""
    after_sft = run / "reference"
    return str(config.reference.path or (after_sft if after_sft.is_dir() else config.model.policy))


def _scorer(path: str, setup: Setup) -> Scorer:
    """The model of a folder or hub id, with its adapter if it is one; padded batches go through the model's own head,
    which is exact for every model."""
    model = setup.config.model
    base, revision = adapters.base_of(path, setup.config.revision_of(path, is_policy=False))
    loaded = load_model(
        base, dtype=setup.dtype, seed=setup.config.train.seed, trust_remote_code=model.trust_remote_code,
        revision=revision,
    )  # fmt: skip
    if adapters.is_adapter(path):
        adapters.take_up(loaded, path)
    scorer = Scorer(loaded)
    scorer.own_head = True
    return scorer


def _kl(options: Options, logratios: np.ndarray) -> str:
    mean = f"{logratios.mean():.3f} nats an answer"
    if options.temperature == 1 and options.top_p == 1:
        error = logratios.std(ddof=1) / np.sqrt(len(logratios)) if len(logratios) > 1 else float("nan")
        return (
            f"KL(policy, reference) of answers cut at --max_tokens, estimated on {len(logratios)} drawn ones:"
            f" {mean}, standard error {error:.3f}"
        )
    how = "greedy" if options.temperature == 0 else f"temperature {options.temperature:g}, top_p {options.top_p:g}"
    return f"mean log-ratio of the policy's answers ({how}; a KL estimate only at temperature 1): {mean}"


def _verdict(found: WinRate) -> str:
    counts = f"{found.wins} won, {found.ties} tied, {found.losses} lost"
    unread = f", {found.unread} verdicts could not be read" if found.unread else ""
    return (
        f"win rate {found.rate:.1%} (95% interval {found.low:.1%} to {found.high:.1%}; {counts}{unread});"
        f" at equal length {found.length_controlled:.1%}"
    )
