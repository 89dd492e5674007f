"""Every setting of a run: its default, its help, its validation.

    defaults below  <  --recipe NAME.yaml  <  --section.key VALUE

The dataclasses are the single owner of batch size, accumulation, clipping and precision; the DeepSpeed JSON given by
`--config` says only how memory and communication are organised. The string under a field is its help text.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dpo.errors import UserError
from dpo.objective.catalog import Divergence, LossName, complaint, needs_reference


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_plain(value: Any, name: str) -> None:
    """Refuse text and numbers that no file name, no file and no tensor could hold.

    Raises:
        ValueError: Names the setting.
    """
    for part in value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else ():
        _check_plain(part, name)
    if isinstance(value, int):
        _require(abs(value) < 2**63, f"{name} is a number of {value.bit_length()} bits; use one below 2**63")
    if isinstance(value, str):
        _require("\0" not in value, f"{name} is {value!r}; remove the NUL character")
        try:
            size = max(len(part) for part in value.encode("utf-8").split(b"/"))
        except UnicodeEncodeError:
            raise ValueError(f"{name} is {value!r}, which is no Unicode; rename it") from None
        is_path = "chat_template" not in name
        _require(
            not is_path or (size <= 255 and len(value) <= 4000),
            f"{name} is {value[:40]!r}... of {len(value):,} characters; use a shorter name (255 bytes, a path 4,000)",
        )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA) beside frozen weights; docs/adapters.md."""

    r: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float | None = None
    """The adapters' output is scaled by alpha / r (rslora: alpha / sqrt r); default: 2 r."""
    dropout: float = 0.0
    """Only 0: a step is defined by its pairs, dropout would depend on how they are spread over ranks."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get one, such as [q_proj, v_proj]; default: all but the head."""
    dora: bool = False
    """Train the norms of an adapted matrix's rows apart from their directions (DoRA)."""
    rslora: bool = False
    """Scale by alpha / sqrt r, which keeps large ranks learning (rsLoRA)."""

    def __post_init__(self) -> None:
        _require(self.r >= 0, f"model.lora.r is {self.r}; use a rank such as 16, or 0 for no adapter")
        _require(
            self.alpha is None or (self.alpha > 0 and math.isfinite(self.alpha)),
            f"model.lora.alpha is {self.alpha}; use a positive number such as 32",
        )
        _require(
            self.dropout == 0,
            f"model.lora.dropout is {self.dropout}; use 0: with dropout a step would depend on how its pairs are spread"
            f" over ranks and micro-batches, and policy and reference would no longer be comparable token by token",
        )
        changed = [f.name for f in dataclasses.fields(self) if f.name != "r" and getattr(self, f.name) != f.default]
        _require(
            self.r > 0 or not changed,
            f"model.lora.{changed[0] if changed else 'r'} is set without a rank; set model.lora.r, such as 16",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy that is trained, and its tokenizer."""

    policy: str | None = None
    """Hub id, folder in Hugging Face form, folder of a LoRA adapter to train on, or builtin:tiny."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; default: the policy's own."""
    revision: str | None = None
    """Branch, tag or commit of the policy on the hub; pin it to make a run repeatable."""
    tokenizer_revision: str | None = None
    """The same of a hub tokenizer that model.tokenizer names."""
    attention: Literal["auto", "varlen", "flash", "flex", "sdpa"] = "auto"
    """Kernel behind packed and prefix-shared attention. auto: the fastest that passes its self-test, sdpa on a CPU."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in backward: less memory, about a quarter more time. auto: on a GPU that lacks room."""
    loss_in_forward: Literal["auto"] | bool = "auto"
    """Take the loss's gradient while a tile of logits is there: no logits kept, none computed twice. auto: on a GPU."""
    vocabulary_multiple: int = 1
    """Compute logits over a vocabulary padded to a multiple of this; 64 aligns an odd one for tensor cores."""
    compile: bool = False
    """Compile the transformer blocks (torch.compile) at one static shape; not under ZeRO-3."""
    chat_template: str | None = None
    """Chat template (text or file) for conversations, in place of the tokenizer's own."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the model. Only for sources you have read."""
    load_in_4bit: bool = False
    """Hold the frozen weights under adapters in 4 bits (QLoRA); needs bitsandbytes."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters in place of training all weights"""

    def __post_init__(self) -> None:
        _require(self.policy != "", "model.policy is empty; give a hub id or a folder")
        multiple = self.vocabulary_multiple
        _require(multiple >= 1, f"model.vocabulary_multiple is {multiple}; use 1 for none, or 64")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen reference: the policy as it starts (after SFT, where there is one)."""

    mode: Literal["auto", "online", "cached", "adapter", "none"] = "auto"
    """online: score every batch with a frozen copy. cached: score every pair once and keep the scores on disk.
    adapter: the policy with its adapters off. auto: adapter where adapters are trained, else online.
    none: there is none, as for every loss that needs none, whatever is set here."""
    path: str | None = None
    """Another model as reference, hub id or folder, with the policy's tokenizer; default: the policy as it starts."""
    revision: str | None = None
    """Branch, tag or commit of reference.path on the hub."""
    dtype: Literal["auto", "fp16", "bf16", "fp32", "policy"] = "auto"
    """auto: the policy's on a CPU, under ZeRO-3 and if cached, else fp16 on a GPU."""
    cache_dir: str | None = None
    """Where scores of cached and moving references are kept, for this and later runs; default: data.cache_dir."""
    sync_steps: int | None = None
    """Steps after which the reference moves towards the policy (TR-DPO); default: never."""
    sync_alpha: float = 0.6
    """How far it moves: reference <- alpha policy + (1 - alpha) reference; 1 replaces it."""

    def __post_init__(self) -> None:
        _require(self.path != "", "reference.path is empty; give a hub id or a folder, or leave it out")
        _require(
            self.sync_steps is None or self.sync_steps >= 1,
            f"reference.sync_steps is {self.sync_steps}; use a whole number of at least 1",
        )
        _require(0 < self.sync_alpha <= 1, f"reference.sync_alpha is {self.sync_alpha}; use a number in (0, 1]")
        _require(
            self.sync_steps is None or self.mode in ("auto", "online"),
            f"reference.sync_steps is {self.sync_steps} with reference.mode {self.mode}, whose reference cannot move;"
            f" use online",
        )
        _require(
            self.path is None or self.mode != "adapter",
            f"reference.path is {self.path} with reference.mode adapter, whose reference is the policy without its"
            f" adapters; use online or cached",
        )


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of data.train or data.validation.

    Attributes:
        path, subset, data_dir, revision, split, format: As the settings of these names.
        weight: Share of the pairs of an epoch, relative to the other training sources; > 0.
        name: What metrics and log call it: letters, digits, - and _.
    """

    path: str
    subset: str | None = None
    data_dir: str | None = None
    revision: str | None = None
    split: str | None = None
    format: str | None = None
    weight: float | None = None
    name: str | None = None


def _sources(key: str, given: Sequence[dict[str, Any] | str]) -> tuple[Source, ...]:
    """Read a list of sources; raises ValueError naming the source and what is wrong."""
    known = [f.name for f in dataclasses.fields(Source)]
    listed: list[dict[str, Any]] = [{"path": one} if isinstance(one, str) else one for one in given]
    for number, one in enumerate(listed, start=1):
        where = f"{key} source {number}"
        for name, value in one.items():
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"use {', '.join(known)}"
            _require(name in known, f"{where}: unknown key {name}; {hint}")
            fits = isinstance(value, (int, float)) if name == "weight" else isinstance(value, str) and value != ""
            wanted = "a number" if name == "weight" else "text"
            _require(value is None or fits, f"{where}: {name} is {value!r}; use {wanted}")
        _require(one.get("path") is not None, f"{where} has no path")
        weight, called = one.get("weight"), one.get("name")
        _require(weight is None or 0 < weight < math.inf, f"{where}: weight is {weight}; use a positive number")
        fits = called is None or re.fullmatch(r"[\w-]+", called) is not None
        _require(fits, f"{where}: name is {called}; use letters, digits, - and _")
    return tuple(Source(**one) for one in listed)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Preference data and how text becomes tokens."""

    train: tuple[dict[str, Any] | str, ...] | str | None = None
    """Hub id, folder, .jsonl, .json, .csv, .parquet, or builtin:world; or a list of them or {path, weight, ...}."""
    validation: tuple[dict[str, Any] | str, ...] | str | None = None
    """The same for validation, a list of {name, path, ...}; default: the validation (else test) split of data.train."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    data_dir: str | None = None
    """Directory within a hub data set, e.g. helpful-base."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    train_split: str = "train"
    """Split to train on, where the source has splits."""
    validation_split: str | None = None
    """Split to validate on; default: validation, else test."""
    validation_fraction: float | None = None
    """Validate on this share of the prompts of data.train, which are then not trained on (docs/data.md)."""
    format: Literal["auto", "hh", "prompt", "conversation", "ranked", "votes"] = "auto"
    """Schema of the rows; auto looks at the first ones."""
    ranked_pairs: Literal["best_worst", "best_each"] = "best_worst"
    """Pairs of a ranked list: the best completion against the worst, or against each that is rated lower."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, such as {enable_thinking: false}; a row's own come before them."""
    streaming: bool = False
    """Read rows one by one and keep only their tokens: for sources too large for disk or memory (docs/data.md)."""
    max_length: int | None = None
    """Longest prompt + completion in tokens; default: 1024, or the model's context if that is shorter."""
    max_prompt_length: int | None = None
    """In pairs longer than max_length the prompt loses its start down to this; default: half of max_length."""
    train_limit: int | None = None
    """Use only the first rows of the training split."""
    validation_limit: int | None = None
    """Use only the first rows of the validation split."""
    shuffle: bool = True
    """Draw every epoch's order from (seed, epoch); false keeps the file's order."""
    workers: int | None = None
    """Processes that tokenise; default: one per 4,096 rows, at most the cores of this node, at most 16."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be trained on: stop and name it, or drop and count it."""
    cache_dir: str | None = None
    """Where tokenised data is kept; default: $DPO_CACHE, else ~/.cache/dpo."""

    def __post_init__(self) -> None:
        for key in ("max_length", "max_prompt_length", "train_limit", "validation_limit", "workers"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"data.{key} is {value}; use a whole number of at least 1")
        if self.max_length is not None:
            _require(self.max_length >= 2, f"data.max_length is {self.max_length}; use at least 2")
        self._check_sources()
        if self.validation_fraction is not None:
            self._check_fraction(self.validation_fraction)

    def _check_fraction(self, fraction: float) -> None:
        _require(0 < fraction < 1, f"data.validation_fraction is {fraction}; use a number between 0 and 1")
        for key in ("validation", "validation_split", "validation_limit"):
            _require(
                getattr(self, key) is None,
                f"data.validation_fraction is {fraction} and data.{key} is given too; validation pairs come from one"
                f" place, so leave one of them out",
            )
        names = [source.name for source in self.train_sources]
        _require(
            len(names) == 1 or (None not in names and len(set(names)) == len(names)),
            f"data.validation_fraction is {fraction} and data.train has {len(names)} sources; give each a name of"
            f" its own, for its validation metrics",
        )

    def _check_sources(self) -> None:
        for key in ("train", "validation"):
            _require(getattr(self, key) != (), f"data.{key} is an empty list; name a source, or leave it out")
        train, validation = self.train_sources, self.validation_sources
        if not isinstance(self.train, str | None):
            for key in ("subset", "data_dir", "revision", "validation_split"):
                _require(
                    getattr(self, key) is None,
                    f"data.{key} is {getattr(self, key)} and data.train a list; "
                    + ("name data.validation" if key == "validation_split" else f"give {key} to its sources"),
                )
            weighted = [source.weight is not None for source in train]
            _require(all(weighted) or not any(weighted), "data.train gives a weight to some sources; to all or to none")
        if not isinstance(self.validation, str | None):
            _require(not any(s.weight for s in validation), "data.validation has a weight; every pair is scored once")
            names = [source.name for source in validation]
            _require(
                self.validation_split is None,
                f"data.validation_split is {self.validation_split} and data.validation a list; give split to its"
                f" sources",
            )
            _require(
                len(names) == 1 or (None not in names and len(set(names)) == len(names)),
                f"data.validation has the names {names}; give each source a name of its own",
            )

    @property
    def train_sources(self) -> tuple[Source, ...]:
        """Training sources; one where data.train is a path."""
        if isinstance(self.train, str):
            return (Source(**self._place_of_train, split=self.train_split),)
        return _sources("data.train", self.train or ())

    @property
    def validation_sources(self) -> tuple[Source, ...]:
        """Validation sources that data.validation names."""
        if isinstance(self.validation, str):
            place = self._place_of_train if self.validation == self.train else {"path": self.validation}
            return (Source(**place, split=self.validation_split),)
        return _sources("data.validation", self.validation or ())

    @property
    def _place_of_train(self) -> dict[str, Any]:
        """Subset, directory and revision belong to the source that data.train names."""
        return {"path": self.train, "subset": self.subset, "data_dir": self.data_dir, "revision": self.revision}

    @property
    def cache_folder(self) -> str:
        """Folder of the tokenised data."""
        return os.path.expanduser(self.cache_dir or os.environ.get("DPO_CACHE") or "~/.cache/dpo")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective; formulas in docs/objectives.md."""

    name: LossName | tuple[LossName, ...] = "sigmoid"
    """A loss of docs/objectives.md, or a list of them whose weighted sum is taken: [sigmoid, sft] is RPO."""
    weights: tuple[float, ...] | None = None
    """Weights of the losses named by a list; default: 1 each."""
    beta: float = 0.1
    """Strength of the pull towards the reference, > 0."""
    label_smoothing: float = 0.0
    """Probability that a preference is labelled the wrong way round (cDPO with sigmoid), in [0, 0.5)."""
    f_divergence: Divergence = "reverse_kl"
    """What keeps the policy near the reference; reverse_kl is DPO."""
    f_alpha: float = 0.5
    """Alpha of f_divergence alpha; 1 is reverse_kl."""
    length_normalize: bool = False
    """Divide the log-ratio of a completion by its tokens."""
    reference_free: bool = False
    """Take log-probs in place of log-ratios: no reference is loaded."""
    wpo: bool = False
    """Weigh every pair by how likely the policy would write it (WPO)."""
    ld_alpha: float | None = None
    """LD-DPO: weight of the tokens beyond the shorter completion's length, in [0, 1]; default: 1."""
    discopop_tau: float = 0.05
    """Temperature of discopop's blend."""
    dpop_lambda: float = 50.0
    """What dpop charges for a chosen completion that falls below the reference."""
    odpo_alpha: float = 1.0
    """Weight of odpo's offset; 0 is sigmoid."""
    odpo_scale: Literal["log", "identity"] = "log"
    """What odpo makes of a pair's margin (docs/data.md, ratings) before it is an offset."""
    simpo_gamma: float = 0.5
    """Target margin of simpo; the paper's gamma, not gamma / beta."""
    cpo_alpha: float = 1.0
    """Weight of cpo's negative log-likelihood."""
    tdpo_alpha: float = 0.5
    """Weight of tdpo's sequential KL."""
    beta_dpo_alpha: float = 0.6
    """How much beta_dpo's beta follows the batch; 0 is sigmoid."""
    beta_dpo_momentum: float = 0.9
    """Of beta_dpo's running mean, in [0, 1)."""
    router_aux_coef: float | None = None
    """Weight of the load-balancing loss of a mixture of experts, taken on every micro-batch; 0 for none. Default: that
    of the model's config, if it sets output_router_logits."""

    def __post_init__(self) -> None:
        _require(bool(self.names), "loss.name is an empty list; name a loss, sigmoid is DPO")
        for key in ("beta", "discopop_tau"):
            value, usual = getattr(self, key), {"beta": "0.1 to 0.5"}.get(key, "0.05")
            _require(
                value > 0 and math.isfinite(value), f"loss.{key} is {value}; use a positive number, {usual} is usual"
            )
        _require(
            0 <= self.label_smoothing < 0.5,
            f"loss.label_smoothing is {self.label_smoothing}; use a number in [0, 0.5)",
        )
        _require(
            self.ld_alpha is None or 0 <= self.ld_alpha <= 1,
            f"loss.ld_alpha is {self.ld_alpha}; use a number in [0, 1]",
        )
        _require(
            0 <= self.beta_dpo_momentum < 1,
            f"loss.beta_dpo_momentum is {self.beta_dpo_momentum}; use a number in [0, 1)",
        )
        for key in ("f_alpha", "dpop_lambda", "odpo_alpha", "simpo_gamma", "cpo_alpha", "tdpo_alpha", "beta_dpo_alpha"):
            value = getattr(self, key)
            _require(value >= 0 and math.isfinite(value), f"loss.{key} is {value}; use a number of at least 0")
        _require(
            self.router_aux_coef is None or (self.router_aux_coef >= 0 and math.isfinite(self.router_aux_coef)),
            f"loss.router_aux_coef is {self.router_aux_coef}; use a number of at least 0, 0.001 to 0.02 is usual",
        )
        self._check_combination()

    def _check_combination(self) -> None:
        weights = self.weights_of_names
        _require(
            self.weights is None or not isinstance(self.name, str),
            f"loss.weights is {list(weights)} and loss.name is {self.name} alone; leave the weights out, or name a"
            f" list of losses, such as [sigmoid, sft]",
        )
        _require(
            len(weights) == len(self.names) and all(w > 0 and math.isfinite(w) for w in weights),
            f"loss.weights is {list(weights)}; use a positive number for each of {', '.join(self.names)}",
        )
        of_all = ("name", "weights", "beta", "f_alpha", "router_aux_coef")
        own = [f for f in dataclasses.fields(self) if f.name not in of_all]
        given = {f.name: getattr(self, f.name) for f in own if getattr(self, f.name) != f.default}
        wrong = complaint(self.names, given)
        _require(wrong is None, wrong or "")
        _require(
            self.f_divergence == "alpha" or self.f_alpha == 0.5,
            f"loss.f_alpha is {self.f_alpha} with loss.f_divergence {self.f_divergence}; it belongs to alpha",
        )
        _require(
            "exo_pair" not in self.names or self.label_smoothing > 0,
            "loss.label_smoothing is 0 with loss.name exo_pair, which divides by it; use 1e-3",
        )

    @property
    def names(self) -> tuple[LossName, ...]:
        """The losses of the sum."""
        return (self.name,) if isinstance(self.name, str) else self.name

    @property
    def weights_of_names(self) -> tuple[float, ...]:
        """Their weights."""
        return (1.0,) * len(self.names) if self.weights is None else self.weights


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with fp32 master weights."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit: AdamW's states in 8 bits, a quarter of their memory; needs bitsandbytes."""
    lr: float = 1e-6
    """Peak learning rate of DPO."""
    sft_lr: float | None = None
    """Peak learning rate of the SFT stage; default: 20 x lr."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """Decay after the warm-up, down to zero just after the last step."""
    warmup_steps: float = 0.1
    """Steps of linear warm-up; below 1: the share of all steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and the weights of norms are left out."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging constants."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        for key in ("lr", "sft_lr"):
            value = getattr(self, key)
            _require(
                value is None or (value > 0 and math.isfinite(value)),
                f"optim.{key} is {value}; use a positive number such as 1e-6",
            )
        for key in ("warmup_steps", "weight_decay", "max_grad_norm"):
            value = getattr(self, key)
            _require(value >= 0 and math.isfinite(value), f"optim.{key} is {value}; use a number of at least 0")
        _require(
            all(0 <= b < 1 for b in self.betas), f"optim.betas is {list(self.betas)}; use two numbers in [0, 1)"
        )
        _require(self.eps > 0, f"optim.eps is {self.eps}; use a positive number")

    @property
    def peak_sft_lr(self) -> float:
        """Peak learning rate of the SFT stage."""
        return self.sft_lr if self.sft_lr is not None else 20 * self.lr


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: how long, how large, where it is kept."""

    output_dir: str = "runs/dpo"
    """The run directory."""
    seed: int = 0
    """Decides the order of the pairs, and the weights of the built-in model."""
    deterministic: bool = False
    """On a GPU take only kernels that give the same bits each time; slower. On a CPU every run does."""
    epochs: int = 1
    """Passes over the training pairs."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever epochs says."""
    sft_epochs: int = 0
    """Passes of supervised fine-tuning on chosen completions before DPO; the result becomes the reference."""
    global_batch_size: int = 64
    """Pairs per optimizer step, over all GPUs."""
    micro_batch_size: int | None = None
    """At most this many pairs per forward pass; default: as many as tokens_per_micro_batch allows."""
    tokens_per_micro_batch: Literal["auto"] | int = "auto"
    """Tokens per forward pass of one GPU; changes speed and memory alone. auto: what fits a GPU's memory, found out by
    running the costliest micro-batch (under ZeRO-3: what is free, at most 16384); 4096 on a CPU."""
    static_shapes: Literal["auto"] | bool = "auto"
    """Fill packed rows with a dummy tail, so that all have one shape. auto: on a GPU, if the tail is under 10 %."""
    sequence_parallel_size: int = 1
    """GPUs that compute a row of pairs together, each a cut of its tokens: for pairs that do not fit on one GPU
    (docs/long_context.md). 1: a row a GPU."""
    layout: Literal["shared", "packed", "padded"] = "shared"
    """shared: a pair's prompt is computed once; packed: no padding; padded: one sequence a row."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Precision of the policy's weights and products (some CPUs multiply bf16 in fp32). auto: bf16 on a GPU that has
    it, else fp16; fp32 on a CPU."""
    eval_every: int | Literal["epoch"] = "epoch"
    """Steps between evaluations, of SFT too, or epoch; there is always one at the start and one at the end."""
    save_every: int | Literal["epoch"] = "epoch"
    """Steps between checkpoints, or epoch."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    save_weights_only: bool = False
    """Checkpoints of the weights alone, for small disks; from one of them AdamW's moments start anew."""
    export_dtype: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Dtype of final/; auto: that of the starting weights."""
    resume: str = "auto"
    """auto: continue what is in output_dir; never: refuse if something is there; or the path of a checkpoint."""
    hang_timeout: int = 600
    """Seconds after which a rank without a sign of life, or that stands still within a step, ends the job; 0: never."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite no rank steps, and the run stops; skip: it goes on without the step."""
    max_nonfinite: int = 10
    """Steps that on_nonfinite skip leaves out, in SFT and in DPO each; at one more the run stops."""

    def __post_init__(self) -> None:
        for key in ("epochs", "global_batch_size", "keep_checkpoints", "sequence_parallel_size", "max_nonfinite"):
            value = getattr(self, key)
            _require(value >= 1, f"train.{key} is {value}; use a whole number of at least 1")
        for key in ("max_steps", "micro_batch_size", "eval_every", "save_every", "tokens_per_micro_batch"):
            value = getattr(self, key)
            _require(
                value is None or isinstance(value, str) or value >= 1,
                f"train.{key} is {value}; use a whole number of at least 1",
            )
        for key in ("sft_epochs", "seed", "hang_timeout"):
            _require(getattr(self, key) >= 0, f"train.{key} is {getattr(self, key)}; use 0 or more")
        _require(bool(self.output_dir), "train.output_dir is empty; name a folder")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown and recorded."""

    every: int = 1
    """Steps between lines of metrics.jsonl."""
    backends: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers beside metrics.jsonl."""
    samples: int = 4
    """Prompts answered by the reference and by the policy; 0 for none."""
    sample_every: int | Literal["epoch", "end"] = "end"
    """Steps between samples, epoch, or only at the end."""
    sample_tokens: int = 64
    """Longest sampled answer, in tokens."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"log.every is {self.every}; use a whole number of at least 1")
        _require(self.samples >= 0, f"log.samples is {self.samples}; use 0 or more")
        _require(self.sample_tokens >= 1, f"log.sample_tokens is {self.sample_tokens}; use at least 1")
        _require(
            isinstance(self.sample_every, str) or self.sample_every >= 1,
            f"log.sample_every is {self.sample_every}; use at least 1, epoch or end",
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy that is trained, and its tokenizer"""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The frozen reference"""
    data: DataConfig = field(default_factory=DataConfig)
    """Preference data and how text becomes tokens"""
    loss: LossConfig = field(default_factory=LossConfig)
    """The objective"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW with fp32 master weights"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The run: how long, how large, where it is kept"""
    log: LogConfig = field(default_factory=LogConfig)
    """What is shown and recorded"""

    def __post_init__(self) -> None:
        if self.model.policy is None:
            raise ValueError("model.policy is not set; give a hub id, a folder, or builtin:tiny")
        if self.model.compile and self.train.static_shapes is False:
            raise ValueError("model.compile is true and train.static_shapes false: every row would compile anew")
        if self.data.train is None:
            raise ValueError("data.train is not set; give a hub id, a folder, a file, or builtin:world")
        for section in dataclasses.fields(self):
            for key, value in vars(getattr(self, section.name)).items():
                _check_plain(value, f"{section.name}.{key}")
        self._check_reference()

    def revision_of(self, path: str, *, is_policy: bool) -> str | None:
        """The revision at which policy or reference is read from the hub; None for the newest, and for others."""
        if path == self.reference.path and not is_policy:
            return self.reference.revision
        return self.model.revision if path == self.model.policy else None

    def _check_reference(self) -> None:
        """Refuse a reference that the loss cannot use, or the lack of one that it needs."""
        named, mode = ", ".join(self.loss.names), self.reference.mode
        if mode == "none" and self.needs_reference:
            raise ValueError(
                f"reference.mode is none with loss.name {named}, which needs a reference; use online or cached, or"
                f" loss.reference_free"
            )
        for key in ("path", "sync_steps"):
            if not self.needs_reference and getattr(self.reference, key) is not None:
                what = f"reference.{key} is set with loss.name {named}"
                raise ValueError(f"{what}, which needs no reference; leave it out")
        if mode == "cached" and "tdpo" in self.loss.names:
            raise ValueError(
                "reference.mode is cached with loss.name tdpo, which needs whole next-token distributions; use online"
            )
        if mode == "cached" and "sampo" in self.loss.names:
            raise ValueError("reference.mode is cached with loss.name sampo, which draws tokens anew; use online")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs one."""
        return needs_reference(self.loss.names, self.loss.reference_free)


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values of a config, as written to the run directory."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def check_world_size(config: Config, world_size: int) -> None:
    """Refuse more ranks than pairs in a step, and ranks that cannot be grouped.

    Raises:
        UserError: If a rank could never get a pair.
    """
    together = config.train.sequence_parallel_size
    if world_size % together:
        raise UserError(
            f"train.sequence_parallel_size is {together} for {world_size} ranks; use a number that divides {world_size}"
        )
    groups, of = world_size // together, "ranks" if together == 1 else f"groups of {together} ranks"
    if groups > config.train.global_batch_size:
        raise UserError(
            f"train.global_batch_size is {config.train.global_batch_size} pairs for {groups} {of}: some would"
            f" never have a pair; use at least {groups}, or fewer ranks"
        )
