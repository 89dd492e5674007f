"""Bad input of every kind, as hypothesis strategies: flags, recipes, DeepSpeed JSON files, data files, chat templates.

A `Case` is a command line and the files it speaks of. Most cases are a run that would work with one to three things
changed. `benchmarks/mutate.py` and `tests/test_mutations.py` feed them to the functions that train_dpo.py calls.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from dpo.config import Config, to_dict
from dpo.recipe import keys_of

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """A command line, to be given in a folder that holds some files.

    Attributes:
        kind: Which strategy made it.
        argv: Without --model.policy, which the caller adds, and with paths relative to the folder.
        files: Path relative to the folder -> content; None makes a folder, text a symbolic link to that path.
    """

    kind: str
    argv: tuple[str, ...]
    files: dict[str, bytes | str | None] = field(default_factory=dict, repr=False)

    def write(self, folder: Path) -> None:
        """Put the files into an empty folder."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir(exist_ok=True)
            elif isinstance(content, str):
                path.symlink_to(content)
            else:
                path.write_bytes(content)


# --- values ----------------------------------------------------------------------------------------------------------

HUGE = "9" * 5000  # more digits than Python turns into an int
ODD_TEXTS = [
    "", " ", "\t\n", "\x00", "a\x00b", "\x1b[2J\x1b[31mred", "\x07\x08\r\x7f\x9b", "\ufeff", "\ud800", "x\udfff y",
    "\udc80",
    "\u202eright to left", "e\u0301\u0327" * 40, "\U0001f469\u200d\U0001f4bb", "\uff11\uff12",
    "\u2028\u2029\x85\x0b\x0c",
    "\U0010ffff\ufffe", "null", "nan", "inf", "-inf", "1e999", "-1", "0", "1.5", "0x10", "1_0", "true", "off", "yes",
    "~",
    "[", "[]", "{", "{}", "{a: 1}", "[1, nan]", "a: b", "- a", "&a [*a]", "*a", "!!python/object/apply:os.system [id]",
    "2024-13-45", "auto", "epoch", "file:///etc/passwd", "../../etc/passwd", "~nobody/x", "/dev/null", "http://[::1",
    "{{ 7 * 7 }}", "{% for", "<script>alert(1)</script>", "`rm`", "</s>", "<|im_end|>", "<s>",
    "\n\nHuman: x\n\nAssistant: y",
    "%s %(x)s {0} {}", "'\"\\", "--", "--train", "-", "=", ",", HUGE, "-" + HUGE, "x" * 300, "y/" * 3000, "z" * 100_000,
]  # fmt: skip
texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=20), st.text(st.characters(), max_size=3))
numbers = st.sampled_from([
    0, -1, 1, 2, 3, 7, 2**31, 2**32, 2**63, 2**64, -(2**63) - 1, 10**40, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf,
    -math.inf, True, False,
])  # fmt: skip
scalars = st.one_of(st.none(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)


def nested(depth: int, kind: str = "[") -> Any:
    """Lists in lists, or mappings in mappings."""
    value: Any = "deep"
    for _ in range(depth):
        value = [value] if kind == "[" else {"a": value}
    return value


def mutated(base: Any, paths: Sequence[tuple[Any, ...]], changes: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """`base` with up to three of its places changed, removed, renamed, or joined by a neighbour."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> Any:
        made = copy.deepcopy(base)
        for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
            *parents, key = draw(st.sampled_from(list(paths)))
            holder = made
            for name in parents:
                holder = holder[name] if isinstance(holder, (dict, list)) and _has(holder, name) else None
            if not isinstance(holder, dict):
                continue
            how = draw(st.sampled_from(["value", "value", "value", "value", "remove", "rename", "add"]))
            if how == "value":
                holder[key] = copy.deepcopy(draw(changes))  # sampled values are shared
            elif how == "add":
                holder[draw(texts)] = copy.deepcopy(draw(changes))
            elif key in holder:
                value = holder.pop(key)
                if how == "rename":
                    holder[draw(st.one_of(texts, st.just(f"{key}s"), st.just(str(key).upper())))] = value
        return made

    return draw_one()


def _has(holder: Any, name: Any) -> bool:
    return name in holder if isinstance(holder, dict) else isinstance(name, int) and name < len(holder)


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places of a nested value that are keys of mappings."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    found = []
    for key, inner in items:
        if isinstance(value, dict):
            found.append((*at, key))
        found += paths_of(inner, (*at, key))
    return found


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of a text file, mostly as they are, else damaged as editors, copies and disks do."""
    how = draw(st.sampled_from([*[""] * 20, "cut", "bom", "crlf", "nul", "bytes", "utf16", "twice", "empty", "tabs",
    "tail"]))
    at = draw(st.integers(0, max(0, len(content) - 1))) if how in ("cut", "nul", "bytes") else 0
    changes: dict[str, Callable[[], bytes]] = {
        "": lambda: content,
        "cut": lambda: content[:at],
        "bom": lambda: b"\xef\xbb\xbf" + content,
        "crlf": lambda: content.replace(b"\n", b"\r\n"),
        "nul": lambda: content[:at] + b"\x00" + content[at:],
        "bytes": lambda: content[:at] + b"\xff\xfe\xc3(" + content[at + 1 :],
        "utf16": lambda: content.decode("utf-8", "replace").encode("utf-16", "replace"),
        "twice": lambda: content + content,
        "empty": lambda: b"",
        "tabs": lambda: content.replace(b"  ", b"\t"),
        "tail": lambda: content + b"\n\n]}\x00",
    }
    return changes[how]()


# --- a run that would work -------------------------------------------------------------------------------------------


def plain_row(index: int) -> dict[str, Any]:
    """A row of the format `prompt`."""
    return {"prompt": f"Say {index}:", "chosen": f" {index}" * (index % 5 + 1), "rejected": " no"}


def lines_of(rows: Sequence[Any]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


DATA = lines_of([plain_row(i) for i in range(6)])
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USUAL = ("--data.train", "train.jsonl", "--data.cache_dir", "cache", "--train.output_dir", "run",
         "--train.global_batch_size", "2")  # fmt: skip


# --- flags -----------------------------------------------------------------------------------------------------------

OPTIONS = ["config", "recipe", "local_rank", "help", "dry_run", "prepare_only", "model", "train", "data", ""]
# A cache folder is made wherever it is named, and a made-up hub id is looked for: these keep to harmless names.
HARMLESS = {"data.cache_dir": ["", "cache", "train.jsonl", "n" * 300, "a\x00b", "\ud800", "ca\nche"]}


@st.composite
def flags(draw: st.DrawFn) -> Case:
    """A working command line with one to three odd arguments."""
    argv = list(USUAL)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        key = draw(st.sampled_from([*keys_of(), *OPTIONS]))
        shape = draw(st.sampled_from(["pair", "pair", "pair", "equals", "alone", "misspelt", "value"]))
        value = draw(st.sampled_from(HARMLESS[key]) if key in HARMLESS else texts)
        if shape == "misspelt":
            key = draw(st.sampled_from([key[:-1], key + "s", key.upper(), key.replace(".", "_"), f"{key}.x",
            "\u00fc" + key]))
        added = {"pair": [f"--{key}", value], "misspelt": [f"--{key}", value], "equals": [f"--{key}={value}"],
                 "alone": [f"--{key}"], "value": [value]}[shape]  # fmt: skip
        at = draw(st.sampled_from([0, len(argv)]))
        argv[at:at] = added
    return Case("flags", tuple(argv), {"train.jsonl": DATA})


# --- recipes ---------------------------------------------------------------------------------------------------------


def _recipe() -> dict[str, Any]:
    """Every setting at its default."""
    from dpo.config import DataConfig, ModelConfig

    whole = to_dict(Config(model=ModelConfig(policy="x"), data=DataConfig(train="train.jsonl")))
    whole["data"] |= {"cache_dir": "cache"}
    whole["train"] |= {"output_dir": "run", "global_batch_size": 2}
    del whole["model"]["policy"]
    return whole


RECIPE = _recipe()
_RECIPE_PATHS = [path for path in paths_of(RECIPE) if path != ("data", "cache_dir")]
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{'bcdefghij'[i]}: &{'bcdefghij'[i]} [{', '.join(['*' + 'abcdefghij'[i]] * 8)}]\n" for i in range(9)
)
ODD_RECIPES = [
    BOMB, "train: *train", "train: &a {seed: 0, epochs: *a}", "model: !!python/object:os.system {}",
    "data: !include /etc/passwd",
    "train: {seed: !!int ''}", "train: {seed: !!float ''}", "train: {shuffle: !!bool x}",
    "data: {train: !!timestamp x}",
    "data: {train: 2024-13-45}", "data: {train: 2024-01-01}", "data: {train: !!binary aGk=}", "train: {epochs: 0x_}",
    "train:\n\tepochs: 1", "--- \n...\n--- \n", "? [a, b]\n: c", "? {a: b}\n: c", "1: {2: 3}", "train: {1: 2}",
    "null: {}",
    "train: {seed: 1, seed: 2}", "train: {}\ntrain: {}", "<<: {train: {epochs: 1}}", "train: {<<: [1]}", "train: []",
    "- train",
    "train", "[" * 500, "[" * 100_000, "{a: " * 5000, "- " * 3000 + "a", "%YAML 9.9\n---\ntrain: {}",
    "%TAG ! x\n---\na",
    f"train: {{seed: {HUGE}}}", f"loss: {{beta: 0x{HUGE}}}", "loss: {beta: .nan}", "loss: {beta: .inf}",
    "loss: {beta: nan}",
    "optim: {betas: [0.9]}", "optim: {betas: [0.9, .nan]}", "optim: {betas: {a: 1}}", "log: {backends: tensorboard}",
    "log: {backends: [wandb, 3]}", "log: {backends: {a: b}}", "\u00fcmlaut: {}", "train: {\u0435pochs: 1}",
    "train: {epochs: '1'}",
    "train: \x00", "#" * 2_000_000, "x: " + "y" * 2_000_000, "train: {epochs: \u0661}", "train: !!str {}",
    "train: !!set {epochs}",
]  # fmt: skip


@st.composite
def recipes(draw: st.DrawFn) -> Case:
    """A recipe with odd values, or an odd recipe."""
    if draw(st.integers(0, 3)) == 0:
        text = draw(st.sampled_from(ODD_RECIPES))
        if draw(st.booleans()):
            text += "\nmodel: {chat_template: null}\n"
    else:
        made = draw(mutated(RECIPE, _RECIPE_PATHS, values))
        text = yaml.safe_dump(made, allow_unicode=draw(st.booleans()), default_flow_style=draw(st.booleans()))
        if draw(st.integers(0, 5)) == 0:
            lines = text.splitlines(keepends=True)
            at = draw(st.integers(0, len(lines) - 1))
            lines.insert(draw(st.integers(0, len(lines))), lines[at])
            text = "".join(lines)
    content = draw(damaged(text.encode("utf-8", "surrogatepass")))
    return Case("recipe", ("--recipe", "recipe.yaml"), {"train.jsonl": DATA, "recipe.yaml": content})


# --- DeepSpeed JSON --------------------------------------------------------------------------------------------------

DEEPSPEED = {
    "zero_optimization": {
        "stage": 2, "overlap_comm": False, "contiguous_gradients": True, "reduce_scatter": True,
        "reduce_bucket_size": 50000000, "allgather_bucket_size": 50000000, "stage3_prefetch_bucket_size": 50000000,
        "stage3_param_persistence_threshold": 100000, "stage3_max_live_parameters": 1000000000,
        "sub_group_size": 1000000,
        "offload_optimizer": {"device": "none", "pin_memory": False}, "offload_param": {"device": "none"},
        "round_robin_gradients": False, "ignore_unused_parameters": True,
    },
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "data_types": {"grad_accum_dtype": "fp32"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": "auto"},
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "steps_per_print": 10, "wall_clock_breakdown": False,
    "communication_data_type": "fp32",
    "prescale_gradients": False, "gradient_predivide_factor": 1.0,
}  # fmt: skip
ODD_JSON = [
    "", "null", "[]", "3", '"x"', "{", "{}", "{]", '{"a": }', '{"a": NaN}', "[" * 100_000, '{"a":' * 5000,
    f'{{"train_batch_size": {HUGE}}}',
    '{"fp16": {}, "fp16": {}}', '{"zero_optimization": {"stage": 2, "stage": 3}}',
    '{"zero_optimisation": {"stage": 3}}',
    '{"tensorboard": {"enabled": true}}', '{"activation_checkpointing": [1]}', '{"aio": 3}',
    '{"elasticity": {"enabled": true}}',
    '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', '{"sparse_attention": {"mode": "x"}}',
    '{"\\ud800": 1}', '{"zero_optimization": "\\u0000"}', "// comment\n{}", "{'a': 1}", '{"compression_training": {}}',
    '{"zero_optimization": {"stage": Infinity}}', '{"zero_optimization": {"stage": -0.0}}',
    '{"train_batch_size": [[]]}',
]  # fmt: skip
json_values = st.one_of(values, st.sampled_from([{}, [], "auto", "cpu", "nvme", 3, "fp16", {"enabled": True},
{"device": "cpu"}]))


@st.composite
def deepspeed_json(draw: st.DrawFn) -> Case:
    """A DeepSpeed JSON with odd values, or odd text in its place."""
    if draw(st.integers(0, 3)) == 0:
        text = draw(st.sampled_from(ODD_JSON))
    else:
        made = draw(mutated(DEEPSPEED, paths_of(DEEPSPEED), json_values))
        text = json.dumps(made, indent=draw(st.sampled_from([None, 2])))
    content = draw(damaged(text.encode()))
    return Case("deepspeed json", (*USUAL, "--config", "ds.json"), {"train.jsonl": DATA, "ds.json": content})
