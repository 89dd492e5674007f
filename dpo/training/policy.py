"""The policy under training: loaded, placed, checked against the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpo.data.planner import Layout
from dpo.errors import UserError
from dpo.model import adapters, blocks, router
from dpo.model.check import settle
from dpo.model.forward import Scorer, pair_logps
from dpo.model.sequence import sequence_notes
from dpo.run.setup import Setup
from dpo.runtime import engine as deepspeed_engine
from dpo.runtime import sequence
from dpo.runtime.distributed import agree, together
from dpo.runtime.weights import num_parameters
from dpo.training.load_models import add_adapter, load_weights
from dpo.types import PackedBatch, PairLogps, TokenizedPair


@dataclass
class Policy:
    """A policy under training.

    Attributes:
        engine: DeepSpeed's, around the scorer.
        scorer: Backbone and head.
        layout: Of its micro-batches: the one that is exact for this model, in SFT of chosen completions alone.
        attention: How it attends.
        notes: Lines for the log.
        router_coefficient: Weight of the load-balancing loss of a mixture of experts; 0 for none.
        in_forward: Take the gradient of losses in the forward pass of the head, where that is possible.
        certain: Measure how certain the policy is of every token, for loss.wpo.
    """

    engine: Any
    scorer: Scorer
    layout: Layout
    attention: str
    notes: list[str]
    router_coefficient: float = 0.0
    in_forward: bool = False
    certain: bool = False

    def router_loss(self, share: float) -> Tensor | float:
        """The weighted load-balancing loss of the last forward pass, for a micro-batch of a share of the step."""
        if not self.router_coefficient:
            return 0.0
        assert self.scorer.router_loss is not None
        return self.router_coefficient * share * self.scorer.router_loss

    def score(self, batch: PackedBatch, **terms: Any) -> Tensor:
        """Log-probs of a batch through the engine; see `Scorer.forward`."""
        return self.engine(batch, **terms)

    def takes_loss_in_forward(self, batch: PackedBatch, reference: PairLogps) -> bool:
        """Whether the gradient of a loss is taken in the forward pass of the head.

        It can be of a loss of summed log-probs; a KL over the vocabulary, a certainty, the model's own head and a pair
        longer than a tile rule it out.
        """
        of_sums = reference.tokens is None and not self.certain
        return self.in_forward and of_sums and self.scorer.chunks(batch) is not None

    def logps(self, batch: PackedBatch, reference: PairLogps) -> PairLogps:
        """Log-probs of a preference batch, with what the loss needs beside them."""
        return pair_logps(self.score, batch, reference.tokens, self.certain)


def start_policy(setup: Setup, path: str, model: Any = None, *, for_sft: bool = False) -> Policy:
    """Start the engine that trains a policy, with the layout that is exact for it; collective.

    Args:
        setup: The run.
        path: Weights to start from.
        model: The loaded policy; None to load it from `path`.
        for_sft: For batches of chosen completions, without what the preference loss needs.
    Returns:
        The policy.
    Raises:
        UserError: If the model cannot be loaded or scored faithfully.
    """
    config = setup.config
    model = load_weights(setup, path, setup.dtype, setup.engine_config, policy=True) if model is None else model
    if setup.trains_adapters and not adapters.attached(model):
        add_adapter(setup, path, model)
    notes: list[str] = []
    if config.model.gradient_checkpointing is True:
        blocks.checkpoint_activations(model)
        notes.append("activations: recomputed in backward (model.gradient_checkpointing)")
    scorer = Scorer(model)
    engine = deepspeed_engine.start_training(scorer, setup.engine_config, config.optim)
    scorer.across = sequence.join(config.train.sequence_parallel_size, model.config)
    coefficient = together(lambda: router.coefficient(model, config.loss.router_aux_coef))
    wanted: Layout = "packed" if coefficient else config.train.layout
    layout, given_up = settled_layout(setup, scorer, wanted)
    notes += sequence_notes(scorer.across, coefficient)
    if coefficient:
        notes.append(
            f"router: load-balancing loss x {coefficient:g} on every micro-batch; layout packed, where every token of a"
            f" sequence counts once (loss.router_aux_coef)"
        )
        if layout != "packed":
            raise UserError(f"loss.router_aux_coef is {coefficient:g} and {given_up[0]}; set it to 0")
        scorer.balance = router.balance_of(model)
    notes += given_up
    attention = "one causal call per row" if layout == "padded" else f"{scorer.attention} per segment"
    size = f"{num_parameters(model) / 1e6:.1f}M parameters in {setup.precision}"
    if setup.trains_adapters:
        size += f", {num_parameters(model, trained=True) / 1e6:.3g}M of them trained (LoRA)"
    notes.append(f"layout: {layout}; attention: {attention}; {size}")
    scorer.head.multiple = config.model.vocabulary_multiple
    certain = config.loss.wpo and not for_sft
    if for_sft:  # a model that cannot attend in segments has one causal call per row here too
        layout = "padded_chosen" if layout == "padded" else "chosen"
    return Policy(engine, scorer, layout, attention, notes, coefficient, setup.loss_in_forward, certain)


def settled_layout(setup: Setup, scorer: Scorer, wanted: Layout) -> tuple[Layout, list[str]]:
    """See `check.settle`; the same on every rank."""
    middle, longest, kernel = middling_pairs(setup), setup.longest_sequence, setup.config.model.attention
    device = setup.world.device
    return together(lambda: settle(scorer, wanted, middle, longest, device, kernel, agree))


def middling_pairs(setup: Setup) -> list[TokenizedPair]:
    """Two pairs of middling length, or the one there is."""
    by_length = setup.train_pairs.lengths.sum(axis=1).argsort()
    return [setup.train_pairs[int(i)] for i in by_length[len(by_length) // 2 :][:2]]
