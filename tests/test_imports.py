"""Data flows one way: a module imports only from what stands above it, and each heavy library has one owner."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    "errors", "machine", "objective.catalog", "config", "recipe", "commandline", "types",
    "data.example", "data.files", "data.sources", "data.kinds", "data.fields", "data.formats", "data.labels",
    "data.chat", "data.boundary", "data.encode", "data.workers", "data.store", "data.tokenize", "data.mixture",
    "data.epochs", "data.planner", "data.batch", "data.loader", "data.heuristics", "data.audit",
    "model.example", "model.adapters", "model.blocks", "model.load", "model.shape", "model.sequence", "model.products",
    "model.attention_sdpa", "model.attention_varlen", "model.attention_flex", "model.attention",
    "model.logits", "model.head", "model.loss_in_forward", "model.vocabulary", "model.router", "model.forward",
    "model.check", "model.reference", "model.reward",
    "objective.divergences", "objective.losses", "objective.reference_free", "objective.coupled", "objective.tokens",
    "objective.objective", "objective.metrics",
    "runtime.console", "runtime.files", "runtime.distributed", "runtime.preemption", "runtime.status",
    "runtime.heartbeat", "runtime.folders", "runtime.run_directory", "runtime.manifest", "runtime.schedule",
    "runtime.deepspeed_json", "runtime.engine", "runtime.sequence", "runtime.weights", "runtime.universal",
    "runtime.checkpoint", "runtime.trackers", "runtime.tracking",
    "report.pairs", "report.content", "report.figures", "report.charts", "report.panels", "report.card",
    "report.comparison", "report.page",
    "sampling.answers", "sampling.judge",
    "estimate", "run.data", "run.roles", "run.checks", "run.setup", "run.prepare", "run.inputs",
    "training.load_models", "training.policy", "training.reference_cache", "training.frozen", "training.sync",
    "training.nonfinite", "training.context", "training.start", "training.meter", "training.step", "training.export",
    "training.finish",
    "memory.room", "memory.out_of_memory", "memory.budget", "planning.spread", "planning.forecast",
    "audit", "sft", "evaluate", "preference", "plan", "export", "sample", "train", "__main__",
]  # fmt: skip
OWNERS = {
    "datasets": {"data.sources"},
    "deepspeed": {"runtime.engine", "runtime.weights"},
    "torch.distributed": {"runtime.distributed"},
    "transformers": {m for m in ORDER if m.startswith("model.")},
    "peft": {"model.adapters"},
    "matplotlib": {"report.figures"},
    "jinja2": {"report.page"},
    "openai": {"sampling.judge"},
    "rich": {"runtime.console", "runtime.tracking"},
    "tensorboard": {"runtime.trackers"},
    "wandb": {"runtime.trackers"},
    "jsonargparse": {"commandline"},
}


@functools.cache
def imports(path: Path) -> set[str]:
    """Modules imported anywhere in a file, except for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def modules() -> dict[str, Path]:
    """Name below dpo -> file."""
    files = sorted((ROOT / "dpo").rglob("*.py"))
    names = {".".join(f.relative_to(ROOT / "dpo").with_suffix("").parts): f for f in files}
    return {name: file for name, file in names.items() if not name.endswith("__init__")}


def test_every_module_has_its_place_in_the_order():
    assert sorted(modules()) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_from_above(name):
    above = ORDER[: ORDER.index(name)]
    for imported in imports(modules()[name]):
        below = [m for m in ORDER if imported == f"dpo.{m}"]
        assert all(m in above for m in below), f"{name} imports {imported}"


@pytest.mark.parametrize("library", OWNERS)
def test_a_heavy_library_has_one_owner(library):
    users = {
        name
        for name, file in modules().items()
        if any(i == library or i.startswith(library + ".") for i in imports(file))
    }
    assert users <= OWNERS[library]


def test_files_and_functions_stay_short():
    for name, file in modules().items():
        text = file.read_text(encoding="utf-8")
        # config.py is one flat list of settings; whoever looks for a setting looks there.
        assert text.count("\n") <= (700 if name == "config" else 320), name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                limit = 120 if node.name == "train" else 70
                assert (node.end_lineno or 0) - node.lineno < limit, f"{name}.{node.name}"
