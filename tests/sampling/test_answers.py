"""Answers: drawn reproducibly, scored by both models, and written so that every line can be read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo.data.chat import listed
from dpo.model.check import use_layout
from dpo.model.forward import Scorer
from dpo.model.head import logps_of_logits
from dpo.runtime.files import read_records
from dpo.sampling.answers import Decoding, answer_logps, answers_to, write_samples
from tests import ranks, tiny
from tests.test_stages import arguments

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]


class Words:
    """The little that answers_to asks of a tokenizer."""

    pad_token_id, eos_token_id, bos_token_id = None, 0, None

    def batch_decode(self, ids: Any, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [" ".join(str(int(i)) for i in row if int(i) != 0) for row in ids]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(tiny.model("llama"))


def greedy_by_hand(model: Any, prompt: list[int], most: int) -> list[int]:
    ids = list(prompt)
    while len(ids) - len(prompt) < most:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 0:
            break
    return ids[len(prompt) :]


def test_greedy_answers_are_those_of_one_prompt_at_a_time_and_end_with_their_end_token(scorer):
    prompts = [[i] for i in range(1, 61)]
    found = answers_to(prompts, scorer, Words(), Decoding(12, batch_size=25), CPU)
    by_hand = [greedy_by_hand(scorer.model, prompt, 12) for prompt in prompts]
    assert [answer.ids.tolist() for answer in found] == by_hand
    assert any(ids[-1] == 0 and len(ids) < 12 for ids in by_hand), "no answer of this model ends by itself"
    assert [answer.text for answer in found] == [" ".join(str(i) for i in ids if i != 0) for ids in by_hand]


def test_answers_follow_none_of_the_models_own_settings(scorer):
    """A model of the hub may bring a penalty on repetition, and then it answers as it is not scored."""
    plain = [answer.ids.tolist() for answer in answers_to(PROMPTS, scorer, Words(), Decoding(8), CPU)]
    own = scorer.model.generation_config
    scorer.model.generation_config = type(own)(repetition_penalty=1.8, no_repeat_ngram_size=1, eos_token_id=0)
    try:
        found = answers_to(PROMPTS, scorer, Words(), Decoding(8), CPU)
        assert scorer.model.generation_config.repetition_penalty == 1.8
    finally:
        scorer.model.generation_config = own
    assert [answer.ids.tolist() for answer in found] == plain
    assert any(len(set(ids)) < len(ids) for ids in plain), "no answer repeats a token"


def test_answers_stop_where_training_has_ended_them(scorer):
    ends_at = int(answers_to(PROMPTS, scorer, Words(), Decoding(8), CPU)[0].ids[2])

    class Other(Words):
        eos_token_id = ends_at

    found = answers_to(PROMPTS, scorer, Other(), Decoding(8), CPU)
    assert found[0].ids.tolist().index(ends_at) == len(found[0].ids) - 1 <= 2
    assert [listed(ends) for ends in (0, [0, 3], None)] == [[0], [0, 3], []]


def test_prompts_of_unequal_lengths_are_answered_without_a_pad_token_and_an_end(scorer):
    """As of a conversation's tokenizer whose template alone ends turns."""

    class Endless(Words):
        pad_token_id = eos_token_id = None

    own = scorer.model.generation_config
    scorer.model.generation_config = type(own)()
    try:
        found = answers_to([[5], [5, 6, 7]], scorer, Endless(), Decoding(4), CPU)
        alone = [answers_to([prompt], scorer, Endless(), Decoding(4), CPU)[0] for prompt in ([5], [5, 6, 7])]
    finally:
        scorer.model.generation_config = own
    assert [answer.ids.tolist() for answer in found] == [answer.ids.tolist() for answer in alone]


def test_draws_depend_on_the_seed_alone(scorer):
    before = torch.get_rng_state()
    draw = lambda **how: [a.ids.tolist() for a in answers_to(PROMPTS, scorer, Words(), Decoding(8, **how), CPU)]  # noqa: E731
    first = draw(temperature=1.0, seed=3)
    assert draw(temperature=1.0, seed=3) == first and draw(temperature=1.0, seed=4) != first
    assert torch.equal(torch.get_rng_state(), before)
    greedy = draw()
    assert draw(temperature=1.0, top_p=1e-6, seed=3) == greedy and draw(temperature=1e-4, seed=5) == greedy != first


def test_draws_at_temperature_one_have_the_frequencies_of_the_model(scorer):
    drawn = [int(a.ids[0]) for a in answers_to([[5]] * 4000, scorer, Words(), Decoding(1, 1.0, batch_size=4000), CPU)]
    truth = scorer.model(input_ids=torch.tensor([[5]])).logits[0, -1].softmax(-1).detach().numpy()
    found = np.bincount(drawn, minlength=len(truth)) / len(drawn)
    assert np.abs(found - truth).max() < 4 * np.sqrt(0.25 / len(drawn))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_answers_are_scored_as_the_models_own_logits_do(scorer, layout):
    own = answers_to(PROMPTS, scorer, Words(), Decoding(6), CPU)
    other = answers_to(PROMPTS, scorer, Words(), Decoding(9, temperature=1.0), CPU)
    judge = Scorer(tiny.model("llama", seed=1))
    use_layout(judge, layout, own_head=False)
    found = answer_logps(judge, own, other, layout, CPU)
    use_layout(judge, "padded", own_head=False)
    for row, (a, b) in enumerate(zip(own, other, strict=True)):
        for column, answer in enumerate((a, b)):
            ids = torch.tensor([[*PROMPTS[row], *answer.ids.tolist()]])
            logits = judge.model(input_ids=ids).logits[0, len(PROMPTS[row]) - 1 : -1]
            expected = logps_of_logits(logits, torch.tensor(answer.ids.astype("int64"))).sum()
            assert found[row, column] == pytest.approx(float(expected.detach()), abs=1e-9)


def test_samples_with_any_text_are_one_line_each_and_can_be_read_again(tmp_path: Path):
    text = "<script>alert(1)</script> \u2028 \u2029 \x85 \x0b \n \r \"quoted\" \\ {{ x }} | `x`"
    row = {"prompt": text, "reference": text, "policy": text + "!", "chosen": text}
    write_samples(tmp_path, 2, [row, row])
    write_samples(tmp_path, 4, [row])
    write_samples(tmp_path, 4, [row])  # after a resume
    assert read_records(tmp_path / "samples.jsonl") == ([{"step": step} | row for step in (2, 2, 4)], False)
    assert all(json.loads(line) for line in (tmp_path / "samples.jsonl").read_bytes().splitlines())


OTHER_ANSWERS = """
import sys
import torch.distributed as dist
import dpo.training.finish, dpo.training.frozen, train_dpo
from dataclasses import replace
from tests.invariants.jobs import without_drawings
without_drawings()
answers_to, answer_logps = dpo.training.finish.answers_to, dpo.training.finish.answer_logps
def own(*inputs):
    return [replace(a, ids=a.ids[: 1 + dist.get_rank()]) for a in answers_to(*inputs)]
def scored(score, after, before, *more):
    sizes = [len(answer.ids) for answer in [*after, *before]]
    print(f"rank {dist.get_rank()} scores {sizes}", flush=True)
    return answer_logps(score, after, before, *more)
dpo.training.finish.answers_to = dpo.training.frozen.answers_to = own
dpo.training.finish.answer_logps = scored
sys.exit(train_dpo.main(sys.argv[1:]))
"""


def test_all_ranks_score_the_answers_of_rank_0(tiny_policy, tmp_path):
    """Of two equal logits another GPU may take the other, and under ZeRO-3 all ranks score together."""
    (tmp_path / "other.py").write_text(OTHER_ANSWERS)
    argv = arguments(tmp_path, tiny_policy, "--log.samples", "3", "--train.max_steps", "1")
    done = ranks.run([str(tmp_path / "other.py"), *argv], ranks=2)
    assert done.codes == [0, 0], done.output
    assert {line for line in done.output.splitlines() if " scores " in line} == {
        f"rank {rank} scores {[1] * 6}" for rank in (0, 1)
    }
