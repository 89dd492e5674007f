"""What a run leaves to look at: training_metrics.png, the model card, the closing table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PANELS = (("loss", "loss"), ("rewards/margins", "reward margin"), ("rewards/accuracies", "accuracy"))


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None and "step" in line]
    return [p[0] for p in points], [p[1] for p in points]


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, reward margin and accuracy of training and validation, and the SFT loss where there is one.

    Args:
        lines: Of metrics.jsonl.
        path: Of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sft = [line for line in lines if "sft_loss" in line]
    figure = Figure(figsize=(5 * (len(PANELS) + bool(sft)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, len(PANELS) + bool(sft)))
    if sft:
        axis = axes.pop(0)
        axis.plot([line["sft_step"] for line in sft], [line["sft_loss"] for line in sft], label="train")
        axis.set(title="SFT loss (nats per token)", xlabel="SFT step")
        axis.grid(alpha=0.3)
    for axis, (name, title) in zip(axes, PANELS, strict=True):
        axis.plot(*_series(lines, name), label="train", linewidth=1)
        steps, values = _series(lines, f"eval_{name}")
        if steps:
            axis.plot(steps, values, marker="o", label="validation")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


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
    for name, title in PANELS[::-1]:
        values = [found[0].get(prefix + name), found[-1].get(prefix + name)] if found else [None, None]
        rows.append([title, *("-" if v is None else f"{v:.4f}" for v in values)])
    return rows


def model_card(
    config: dict[str, Any], lines: list[dict[str, Any]], versions: dict[str, str], *, adapter: bool = False
) -> str:
    """README.md of final/: what was trained from what, how, and what came out.

    Args:
        config: Resolved settings; they hold no secrets, those live in the environment.
        lines: Of metrics.jsonl.
        versions: Of the libraries.
        adapter: Whether the folder holds a LoRA adapter, to be loaded by peft, and no whole weights.
    Returns:
        Markdown with the hub's metadata block.
    """
    import yaml

    policy, train = str(config["model"]["policy"]), config["data"]["train"]
    data = train if isinstance(train, str) else "`, `".join(source["path"] for source in train)
    library = "peft" if adapter else "transformers"
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["dpo"]}
    is_hub_id = not policy.startswith((".", "/", "~", "builtin:")) and policy.count("/") <= 1
    if is_hub_id and not Path(policy).exists():
        front["base_model"] = policy
    rows = closing_rows(lines)
    table = "\n".join(
        ["| " + " | ".join(rows[0]) + " |", "| --- | ---: | ---: |"] + ["| " + " | ".join(r) + " |" for r in rows[1:]]
    )
    what = ", as a LoRA adapter for the same weights," if adapter else ""
    sft = f" after {config['train']['sft_epochs']} SFT epoch(s)" if config["train"]["sft_epochs"] else ""
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {Path(policy).name} trained with DPO\n\n"
        f"`{policy}` trained{what}{sft} on the preferences of `{data}` by Direct Preference Optimization"
        f" (Rafailov et al. 2023, arXiv:2305.18290).\n\n{table}\n\n"
        f"Accuracy: share of pairs whose chosen completion gained more log-probability over the reference than the"
        f" rejected one; a tie counts one half.\n\n"
        f"<details><summary>Settings</summary>\n\n```yaml\n{yaml.safe_dump(config, sort_keys=False)}```\n\n"
        f"</details>\n\n"
        f"Made with {', '.join(f'{k} {v}' for k, v in versions.items())}.\n"
    )
