"""Every objective that TRL has gives TRL's numbers: its own DPOTrainer runs here, on the same token ids."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo.training.frozen
from dpo.config import LossConfig
from dpo.data.batch import collate
from dpo.model.check import use_layout
from dpo.model.forward import Scorer, pair_logps
from dpo.model.reference import nothing, online
from dpo.objective.objective import Objective
from dpo.objective.tokens import weigher
from dpo.runtime import distributed
from dpo.types import Context, PackedBatch, PairLogps
from tests import ranks, tiny
from tests.invariants import run_losses

STEPS, SIZES, BETA = 5, (1, 6), 0.1
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
# Variant: TRL's settings, our loss section.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    name: ({"loss_type": [name]}, {"name": name}) for name in
    ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sft",
     "sigmoid_norm")
} | {
    name: ({"loss_type": [name], "label_smoothing": 0.1}, {"name": name, "label_smoothing": 0.1}) for name in SMOOTHED
} | {
    "rpo": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
            {"name": ("sigmoid", "sft"), "weights": (1.0, 0.3)}),
    "mpo": ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
            {"name": ("sigmoid", "bco_pair", "sft"), "weights": (0.8, 0.2, 1.0)}),
    "forward_kl": ({"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl"}, {"f_divergence": "forward_kl"}),
    "js": ({"loss_type": ["ipo"], "f_divergence_type": "js_divergence"}, {"name": "ipo", "f_divergence": "js"}),
    "alpha": ({"loss_type": ["sigmoid_norm"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
              {"name": "sigmoid_norm", "f_divergence": "alpha", "f_alpha": 0.3}),
    "ld_alpha": ({"loss_type": ["sigmoid"], "ld_alpha": 0.4}, {"ld_alpha": 0.4}),
    "ld_alpha_ipo": ({"loss_type": ["ipo"], "ld_alpha": 0.4}, {"name": "ipo", "ld_alpha": 0.4}),
    "wpo": ({"loss_type": ["sigmoid"], "use_weighting": True}, {"wpo": True}),
}  # fmt: skip
CHOSEN, REJECTED = [-0.2, -1.5, -4.0], [-0.9, -0.3, -6.0]  # log-probs per token
# 2e-4 for squared and exponential losses, whose gradients grow with the log-ratios.
LOOSER = {"ipo", "sppo_hard", "discopop", "forward_kl", "js", "alpha", "ld_alpha_ipo"}


@pytest.fixture(scope="module")
def pairs(tiny_policy: Path) -> tiny.Pairs:
    """The same for every step, so that the loss moves."""
    vocabulary = len(AutoTokenizer.from_pretrained(tiny_policy))
    return tiny.Pairs(tiny.pairs(run_losses.PAIRS_A_STEP, longest=9, vocab=vocabulary, all_scored=True))


@pytest.fixture(scope="module")
def trl(tiny_policy: Path, pairs: tiny.Pairs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What TRL gives, all variants in one process."""
    folder = tmp_path_factory.mktemp("trl_objectives")
    job = {
        "logps": {"chosen": CHOSEN, "rejected": REJECTED},
        "policy": str(tiny_policy), "output_dir": str(folder / "out"), "beta": BETA, "lr": run_losses.LR,
        "batch_size": run_losses.PAIRS_A_STEP, "steps": STEPS, "sizes": SIZES,
        "pad_token": AutoTokenizer.from_pretrained(tiny_policy).convert_ids_to_tokens(0),
        "variants": {name: theirs for name, (theirs, _) in VARIANTS.items()},
        "pairs": [
            {k: getattr(p, k).tolist() for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for p in pairs.items
        ],
    }
    (folder / "job.json").write_text(json.dumps(job))
    done = ranks.run(["tests/parity/trl_objectives.py", str(folder / "job.json"), str(folder)])
    assert done.codes == [0], done.output[-3000:]
    return {name: torch.load(folder / f"{name}.pt") for name in (*VARIANTS, "reference_free")}


def ours_on(policy: Scorer, reference: Scorer, objective: Objective, pairs: list[Any]) -> torch.Tensor:
    """Our loss of a global batch in one micro-batch."""
    weigh = weigher(False, objective.config.ld_alpha, 0)
    batch: PackedBatch = collate(pairs, "shared", [weigh(0, p) for p in pairs] if weigh else None)
    of_reference: PairLogps = online(reference)(batch) if objective.needs_reference else nothing(batch)
    of_policy = pair_logps(policy, batch, certain=objective.config.wpo)
    with torch.no_grad():
        partners = objective.couple(of_policy, of_reference, is_step=True)
    context = Context(float(of_policy.chosen_lengths.double().mean()), partners)
    return objective(of_policy, of_reference, context).losses.mean()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_gradient_equal_those_of_trls_compute_loss(trl, tiny_policy, pairs, variant, size):
    reference = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    trained = copy.deepcopy(reference)
    trained.load_state_dict(trl[variant]["weights"])
    policy, frozen = Scorer(trained), Scorer(reference)
    for scorer in (policy, frozen):
        use_layout(scorer, "shared")
    objective = Objective(LossConfig(beta=BETA, **VARIANTS[variant][1]))
    loss = ours_on(policy, frozen, objective, pairs.items[:size])
    theirs, their_gradients = trl[variant]["computed"][size]
    assert loss.item() == pytest.approx(theirs, rel=1e-5)
    loss.backward()
    mine = {name: p.grad for name, p in trained.named_parameters()}
    distance = sum(float((mine[name] - g).square().sum()) for name, g in their_gradients.items()) ** 0.5
    norm = sum(float(g.square().sum()) for g in their_gradients.values()) ** 0.5
    assert norm > 0 and distance <= 1e-5 * norm


@pytest.mark.parametrize(
    ("name", "options"),
    [("cpo", {"cpo_alpha": 0.0, "label_smoothing": 0.1}), ("simpo", {"simpo_gamma": 0.7}), ("orpo", {})],
)
def test_losses_without_a_reference_equal_those_of_trls_cpo_and_orpo_trainers(trl, name, options):
    ones = torch.ones(3)
    policy = PairLogps(torch.tensor(CHOSEN), torch.tensor(REJECTED), ones, ones)
    nothing_known = PairLogps(torch.zeros(3), torch.zeros(3), ones, ones)
    losses = Objective(LossConfig(name=name, beta=BETA, **options))(policy, nothing_known, Context(1.0)).losses
    nll = -policy.chosen if name == "orpo" else 0.0
    torch.testing.assert_close(losses, nll + trl["reference_free"][name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_five_steps_equal_those_of_trl(trl, tiny_policy, pairs, monkeypatch, variant):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    monkeypatch.setattr(dpo.training.frozen, "load_weights", lambda *_, **__: copy.deepcopy(model))
    case = {
        "loss": {"beta": BETA} | VARIANTS[variant][1], "layout": "shared", "micro_batches": 3, "steps": STEPS,
        "shuffle": False,
    }
    lines = run_losses.run(case, distributed.start(), pairs)["lines"]
    theirs = trl[variant]
    assert abs(lines[-1]["loss"] - lines[0]["loss"]) > 0.02 * lines[0]["loss"]
    assert [line["loss"] for line in lines] == pytest.approx(theirs["losses"], abs=5e-5, rel=2e-6)
    limit = 2e-4 if variant in LOOSER else 1e-4
    assert [line["grad_norm"] for line in lines] == pytest.approx(theirs["grad_norms"], rel=limit)
