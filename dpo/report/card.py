"""The closing table of a run, and the model card of its final folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dpo.errors import one_line
from dpo.objective.catalog import needs_reference
from dpo.report.content import MAIN, objective


def closing_rows(lines: list[dict[str, Any]]) -> list[list[str]]:
    """Validation before and after, or training at first and last step where there was no validation.

    Args:
        lines: Of metrics.jsonl.
    Returns:
        Rows of a table, heading first.
    """
    prefix = "eval_" if any("eval_loss" in line for line in lines) else ""
    found = [line for line in lines if f"{prefix}loss" in line]
    kind = "validation" if prefix else "training"
    rows = [[kind, "before" if prefix else "first step", "after" if prefix else "last step"]]
    for name, title in MAIN[::-1]:
        values = [found[0].get(prefix + name), found[-1].get(prefix + name)] if found else [None, None]
        rows.append([title, *("-" if v is None else f"{v:.4f}" for v in values)])
    return rows


def model_card(
    config: dict[str, Any],
    lines: list[dict[str, Any]],
    versions: dict[str, str],
    facts: dict[str, str] | None = None,
    *,
    adapter: bool = False,
) -> str:
    """README.md of final/: what was trained from what, how, and what came out.

    Args:
        config: Resolved settings; they hold no secrets, those live in the environment.
        lines: Of metrics.jsonl.
        versions: Of the libraries.
        facts: What else is known of data, training and hardware, for a table.
        adapter: Whether the folder holds a LoRA adapter, to be loaded by peft, and no whole weights.
    Returns:
        Markdown with the hub's metadata block; text of the user's stands in code alone, so it is never markup.
    """
    policy, train = str(config["model"]["policy"]), config["data"]["train"]
    paths = [train] if isinstance(train, str) else [one if isinstance(one, str) else one["path"] for one in train]
    data = ", ".join(code(path) for path in paths)
    library = "peft" if adapter else "transformers"
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["dpo"]}
    base, history = _origin(policy)
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not base.startswith(".")
    if is_hub_id and not Path(base).exists():
        front["base_model"] = base
    what = f", as a LoRA adapter for {code(base)}," if adapter else ""
    sft = _sft(config)
    loss = config["loss"]
    names: list[Any] = [loss["name"]] if isinstance(loss["name"], str) else loss["name"]
    method, by = "by Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290), loss", "DPO"
    if names != ["sigmoid"]:
        method = "under the objective"
    beta = "" if names == ["sft"] else f", beta {loss['beta']}"
    gained, compared = "gained more log-probability over the reference", "the change goes"
    if not needs_reference(names, loss.get("reference_free", False)):
        by = code(objective(loss))
        gained = "has the higher reward (beta times its log-probability, per token for simpo and orpo)"
        compared = "the model itself goes"
    known = _table([["", ""], *([name, code(value)] for name, value in facts.items())]) if facts else ""
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {_escaped(Path(base).name)} trained with {by}",
        f"{code(policy)}{history} trained{what}{sft} on the preferences of {data} {method} {code(objective(loss))}"
        f"{beta}.",
        "## Metrics",
        _table(closing_rows(lines)),
        f"Accuracy: share of pairs whose chosen completion {gained} than the rejected one; a tie counts one half."
        f" It says how often {compared} the right way, not how good answers are; nothing here was tested for safety.",
        "## Data and training" if known else "",
        known,
        f"<details><summary>Settings</summary>\n\n{_block(yaml.safe_dump(config, sort_keys=False))}\n\n</details>",
        f"Made with {', '.join(f'{k} {v}' for k, v in versions.items())}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sft(config: dict[str, Any]) -> str:
    epochs = config["train"]["sft_epochs"]
    return f" after {epochs} {'epoch' if epochs == 1 else 'epochs'} of SFT" if epochs else ""


def _origin(policy: str) -> tuple[str, str]:
    """What a policy was made from, if it is the result of a run beside its settings: the base; how, in brackets."""
    folder = Path(policy)
    settings = folder.parent / "config.yaml"
    if folder.name not in ("reference", "final") or not settings.is_file():
        return policy, ""
    try:
        run = yaml.safe_load(settings.read_text(encoding="utf-8"))
        base, then = str(run["model"]["policy"]), f", then {code(objective(run['loss']))}"
        return base, f" ({code(base)}{_sft(run)}{then if folder.name == 'final' else ''})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return policy, ""


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]])


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def code(text: str) -> str:
    """A text as inline code of Markdown, which no renderer takes for markup; line breaks become spaces."""
    text = one_line(text) or " "
    fence = "`" * (_longest_run(text) + 1)
    space = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{space}{text}{space}{fence}"


def _block(text: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}yaml\n{text}{fence}"


def _escaped(text: str) -> str:
    """A text outside code: no markup of Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~$<>&])", lambda found: f"&#{ord(found[1])};", one_line(text))
