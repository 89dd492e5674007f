"""An evaluation reports every pair by its id, whatever the order in which it was scored."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpo.config import LossConfig
from dpo.data.batch import collate
from dpo.evaluate import ValidationShare, evaluate
from dpo.model.check import use_layout
from dpo.model.forward import Scorer, own_logits_logps, pair_logps
from dpo.objective.objective import Objective
from dpo.report.pairs import COLUMNS
from dpo.runtime import distributed
from tests import tiny


def test_every_pair_gets_the_log_probs_of_plain_logits_and_its_own_reward():
    policy, reference = (Scorer(tiny.model("llama", seed=seed)) for seed in (0, 1))
    pairs = tiny.pairs(7)
    shuffled = [[4, 1], [6, 0, 2], [], [5, 3]]
    batches = [collate([pairs[i] for i in ids], "padded") for ids in shuffled]
    shares = {"one": ValidationShare(batches[:1], 5.0), "rest": ValidationShare(batches[1:], 5.0)}
    scored: Any = SimpleNamespace(scorer=policy, logps=lambda batch, _: pair_logps(policy, batch))
    loss = Objective(LossConfig(beta=0.5))
    metrics, table = evaluate(scored, lambda batch: pair_logps(reference, batch), shares, loss, distributed.start())
    of = {name: table[:, index] for index, name in enumerate(COLUMNS)}
    assert of["pair_id"].tolist() == list(range(7))
    own = torch.stack([own_logits_logps(policy, pair, torch.device("cpu")) for pair in pairs]).detach().numpy()
    base = torch.stack([own_logits_logps(reference, pair, torch.device("cpu")) for pair in pairs]).detach().numpy()
    for side, index in (("chosen", 0), ("rejected", 1)):
        np.testing.assert_allclose(of[f"policy_{side}_logps"], own[:, index], atol=1e-5)
        np.testing.assert_allclose(of[f"reference_{side}_logps"], base[:, index], atol=1e-5)
        np.testing.assert_allclose(of[f"{side}_reward"], 0.5 * (own - base)[:, index], atol=1e-5)
        assert of[f"{side}_length"].tolist() == [pair.targets[index] for pair in pairs]
    assert metrics["eval_loss"] == pytest.approx(of["loss"].mean())
    margins = of["chosen_reward"] - of["rejected_reward"]
    assert metrics["eval_rewards/margins"] == pytest.approx(margins.mean())
    assert metrics["eval_one_rewards/margins"] == pytest.approx(margins[[1, 4]].mean())


def test_the_reference_is_asked_of_every_batch_in_the_first_evaluation_and_of_none_in_the_next():
    """Of dummies too, whichever rank has them: under ZeRO-3 the others wait for its pass, and must not later."""
    pairs = tiny.pairs(5)
    shares = {
        name: ValidationShare([collate([pairs[i] for i in part], "shared") for part in parts], 5.0)
        for name, parts in {"one": [[0, 1], [], [2]], "two": [[], []]}.items()
    }
    model = Scorer(tiny.model("llama"))
    use_layout(model, "shared")
    scored: Any = SimpleNamespace(scorer=model, logps=lambda batch, _: pair_logps(model, batch))
    asked: list[tuple[int, ...]] = []

    def reference(batch):
        asked.append(batch.pair_ids)
        return pair_logps(model, batch)

    found = [evaluate(scored, reference, shares, Objective(LossConfig()), distributed.start())[0] for _ in range(2)]
    assert asked == [(0, 1), (), (2,), (), ()] and found[0]["eval_loss"] == found[1]["eval_loss"]
