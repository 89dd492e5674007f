"""The built-in world: its ground truth, what it holds out, and that no shortcut solves it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest

from dpo.data.example import SPLIT_SIZES, parses, reward, rows, slot_values

SEEDS = [0, 1, 2]
TURN = "\n\nAssistant:"
PROMPT = f"\n\nHuman: I am Mira. The tag of the teapot says: price 171, town Westford. What does the teapot cost?{TURN}"
FOLLOW_UP = f"{PROMPT} The teapot costs 171 coins.\n\nHuman: And who made it?{TURN}"


def split_pair(row: dict[str, str]) -> tuple[str, str, str]:
    """Cut a row into prompt, chosen completion and rejected completion."""
    boundary = row["chosen"].rindex(TURN) + len(TURN)
    assert row["rejected"].rindex(TURN) + len(TURN) == boundary
    assert row["rejected"][:boundary] == row["chosen"][:boundary]
    return row["chosen"][:boundary], row["chosen"][boundary:], row["rejected"][boundary:]


def decided_share(score: Callable[[str], float], seed: int) -> float:
    """The share of held-out pairs in which the chosen completion has the higher score; ties count one half."""
    pairs = [split_pair(row)[1:] for row in rows("validation", seed)]
    scores = [(score(chosen), score(rejected)) for chosen, rejected in pairs]
    return sum((chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in scores) / len(scores)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("The teapot costs 171 coins, Mira.", 3),
        ("The teapot costs 171 coins.", 2),
        ("The teapot costs 171 coins. Buy two.", 1),
        ("The teapot costs 171 coins, Kane.", 1),
        ("The teapot comes from Westford.", -1),
        ("I do not know what the teapot costs.", -1),
        ("The teapot costs 172 coins.", -2),
        ("The teapot was made by Gorwin.", -2),
        ("The inkbox costs 171 coins.", -2),
        ("I do not know what the inkbox costs.", -2),
        ("The inkbox costs 171 coins, Kane. You will love it.", -4),
        ("The teapot costs a lot.", -5),
        ("", -5),
    ],
)
def test_reward_is_the_documented_sum(completion: str, expected: float) -> None:
    assert reward(PROMPT, f" {completion}") == reward(PROMPT, completion) == expected


def test_reward_judges_the_last_question_of_a_dialogue() -> None:
    assert reward(FOLLOW_UP, " I do not know who made the teapot, Mira.") == 3
    assert reward(FOLLOW_UP, " The teapot was made by Gorwin, Mira.") == -1
    assert reward(FOLLOW_UP, " The teapot costs 171 coins, Mira.") == 0


@pytest.mark.parametrize(
    "prompt", ["", f"\n\nHuman: Hello{TURN}", PROMPT.removesuffix(TURN), PROMPT.replace("cost?", "cost, please?")]
)
def test_reward_refuses_a_prompt_of_another_world(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a prompt of the built-in world"):
        reward(prompt, "The teapot costs 171 coins.")


@pytest.mark.parametrize(
    "completion",
    [
        "The teapot costs 171 coins",
        "the teapot costs 171 coins.",
        "The teapot costs 999 coins.",
        "The teaspoon costs 171 coins.",
        "The teapot costs 171 coins, Bob.",
        "The teapot costs 171 coins. Buy three.",
        "The teapot costs 171 coins.. Buy two.",
        "The teapot costs 171 coins.\n\nHuman: And who made it?",
        "The teapot costs Gorwin coins.",
        "Welcome, Mira.",
    ],
)
def test_other_sentences_do_not_parse(completion: str) -> None:
    assert not parses(completion)


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_every_answer_parses_and_chosen_always_has_higher_reward(split: str) -> None:
    for row in rows(split):
        prompt, chosen, rejected = split_pair(row)
        assert parses(chosen) and parses(rejected)
        assert reward(prompt, chosen) >= reward(prompt, rejected) + 1


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_completions_begin_with_a_space(split: str) -> None:
    assert {text[:1] for row in rows(split) for text in split_pair(row)[1:]} == {" "}


@pytest.mark.parametrize("seed", SEEDS)
def test_heldout_slot_values_never_occur_in_training_prompts(seed: int) -> None:
    held_out = {value for values in slot_values(held_out=True).values() for value in values}
    in_training = {word for row in rows("train", seed) for word in re.findall(r"\w+", row["chosen"] + row["rejected"])}
    assert not held_out & in_training
    # The other half of the claim: every slot of a held-out prompt is filled from the held-out values.
    for row in rows("validation", seed):
        name, thing, *tag = re.findall(r"I am (\w+)|the (\w+) says: \w+ (\w+), \w+ (\w+)\.", split_pair(row)[0])
        words = [word for group in (name, thing, *tag) for word in group if word]
        assert len(words) == 4 and set(words) <= held_out


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("measure", [len, lambda text: len(text.split())], ids=["characters", "words"])
@pytest.mark.parametrize("sign", [1, -1], ids=["longer", "shorter"])
def test_longer_or_shorter_decides_at_most_60_percent_of_heldout_pairs(
    seed: int, measure: Callable[[str], int], sign: int
) -> None:
    assert decided_share(lambda text: sign * measure(text), seed) <= 0.6


@pytest.mark.parametrize("seed", SEEDS)
def test_first_token_decides_at_most_60_percent_of_heldout_pairs(seed: int) -> None:
    # The best ranking of first words that the training pairs support; the first word is the first token.
    chosen = Counter(split_pair(row)[1].split()[0] for row in rows("train", seed))
    rejected = Counter(split_pair(row)[2].split()[0] for row in rows("train", seed))
    assert len(chosen) > 1
    share = decided_share(lambda text: chosen[text.split()[0]] / (1 + rejected[text.split()[0]]), seed)
    assert 0.4 <= share <= 0.6


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_a_good_share_of_prompts_has_several_turns(split: str) -> None:
    several = sum(split_pair(row)[0].count(TURN) > 1 for row in rows(split)) / SPLIT_SIZES[split]
    assert 0.4 <= several <= 0.8


@pytest.mark.parametrize("split", SPLIT_SIZES)
def test_rows_depend_on_the_seed_alone(split: str) -> None:
    assert rows(split) == rows(split, seed=0) == rows(split, seed=0)
    assert len(rows(split)) == SPLIT_SIZES[split]
    assert rows(split, seed=1) != rows(split, seed=0)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split 'test'"):
        rows("test")
