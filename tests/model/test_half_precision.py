"""bf16 on real pairs: no path is further from the truth than the plain one with full logits."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn.functional import logsigmoid

from dpo.data.batch import collate
from dpo.model import products
from dpo.model.check import use_layout
from dpo.model.forward import Scorer
from dpo.model.head import logps_of_logits
from dpo.model.load import load_model
from tests.by_path import prepare_pairs

COUNT = 64


def losses(chosen, rejected, pairs):
    return -logsigmoid(0.1 * (chosen - rejected)) / COUNT


@pytest.fixture(scope="module")
def paths(shared_data, tmp_path_factory):
    """Path -> (rms error of a token's log-prob, relative error of the whole gradient) against fp64."""
    folder = shared_data / "stories260k-llama"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pairs, _ = prepare_pairs(
        shared_data / "hh-rlhf/train.jsonl.gz", tokenizer, limit=300, max_length=128, on_bad_row="skip",
        cache_dir=tmp_path_factory.mktemp("cache"),
    )

    def measure(dtype, layout, backend="sdpa", way="plain", rows=2048, together=8, wide=False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, "fp32_is_faster", lambda: wide)
            return outcome(dtype, layout, backend, way, rows, together)

    def outcome(dtype, layout, backend, way, rows, together):
        batches = [[pairs[i] for i in range(first, first + together)] for first in range(0, COUNT, together)]
        products.widen(model := load_model(str(folder), dtype=dtype))
        scorer = Scorer(model, rows)
        use_layout(scorer, layout, backend=backend)
        sums = []
        for some in batches:
            batch = collate(some, layout)
            if way == "in_forward":
                total, logps = scorer(batch, pair_losses=losses)
            elif way == "full":
                logits = scorer.model(input_ids=batch.input_ids.view(batch.num_rows, -1), use_cache=False).logits
                rows_of = logits.reshape(-1, logits.shape[-1])[batch.score_index]
                tokens = logps_of_logits(rows_of, batch.target_ids)
                logps = tokens.new_zeros(batch.num_sequences).index_add(0, batch.sequence_ids, tokens)
                total = losses(*logps.tensor_split(2), None).sum()
            else:
                logps = scorer(batch)
                total = losses(*logps.tensor_split(2), None).sum()
            total.backward()
            a_token = logps.detach().double() / batch.completion_lengths.double().sqrt()
            sums.append(torch.stack(a_token.tensor_split(2)))  # chosen, rejected, however many pairs a batch has
        gradient = torch.cat([p.grad.double().reshape(-1) for p in scorer.model.parameters()])
        return torch.cat(sums, dim=1), gradient

    truth = measure(torch.float64, "padded", way="full")

    def errors(*path, **more):
        logps, gradient = measure(torch.bfloat16, *path, **more)
        return float((logps - truth[0]).square().mean().sqrt()), float((gradient - truth[1]).norm() / truth[1].norm())

    return {
        "full logits": errors("padded", way="full"),
        "sdpa": errors("shared"),
        "varlen": errors("shared", "varlen_eager"),
        "flex": errors("shared", "flex_eager", together=2),
        "in forward": errors("shared", way="in_forward"),
        "in forward, chunks": errors("shared", way="in_forward", rows=600),
        "recomputed": errors("shared", rows=600),
        "by way of fp32": errors("shared", wide=True),
    }


PATHS = ["sdpa", "varlen", "flex", "in forward", "in forward, chunks", "recomputed", "by way of fp32"]


@pytest.mark.parametrize("path", PATHS)
def test_errors_in_bf16_are_at_most_a_tenth_above_those_of_full_logits(paths, path):
    """Per pair: the rms error of log-probs, over the root of their tokens; over all parameters: of the gradient."""
    plain = paths["full logits"]
    assert 0 < plain[0] and 0 < plain[1] < 0.1
    assert paths[path][0] <= 1.1 * plain[0] and paths[path][1] <= 1.1 * plain[1], paths
