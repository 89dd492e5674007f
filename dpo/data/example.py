"""The built-in preference data (`builtin:world`): an old curiosity shop, and a written ground truth for every answer.

A customer gives a name, reads out the tag of a thing (two of price, maker and town) and asks for one of the three. A
good answer states what was asked, or admits that the tag does not say it, calls the customer by name and does not push.
`reward` scores exactly that, so a trained policy can be judged by what it says. Of two sampled answers the one with the
higher reward is `chosen`: the chosen ones are better, not perfect, which leaves DPO something to do after SFT.
Invariant: names, things and tag values of the validation rows occur in no training row, whatever the seed.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

SPLIT_SIZES = {"train": 4096, "validation": 320}

# A slot value is one word of two halves: every half occurs in both splits, a whole value in only one of them.
SLOT_HALVES = {
    "name": (
        "Mi To Ka Le Sa Ru Be Ju Do Ni Vi Pe Lu Ta Jo Se Na Fa".split(),
        "ra lo mi ne tan ris vin da bel ko ny sa dor lin mo net ri va".split(),
    ),
    "thing": (
        "tea ink moon fish book tool hat sand fire snow wind corn milk salt bird".split(),
        "pot box lamp bowl case bell stand cup bag jar clock horn rug desk kite".split(),
    ),
    "price": ([str(tens) for tens in range(10, 40)], list("0123456789")),
    "maker": (
        "Gor Hal Wen Bran Gun Eld Mar Ulf Rod Sig Fin Hol".split(),
        "win ric mund gar bert son wald helm stein olf ard mer".split(),
    ),
    "town": (
        "West North Oak Mill Stone Ash King Long Red High Clay Fox".split(),
        "ford ton field bridge wick mouth hill gate dale well port haven".split(),
    ),
}

# Of each attribute: the question, how a later turn asks it, what a statement says, and how not to know it.
ATTRIBUTES = {
    "price": ("What does the {} cost?", "And what does it cost?", "costs {} coins", "what the {} costs"),
    "maker": ("Who made the {}?", "And who made it?", "was made by {}", "who made the {}"),
    "town": ("Where is the {} from?", "And where is it from?", "comes from {}", "where the {} is from"),
}
SALES_TALK = ("Buy two.", "You will love it.", "It is the best in town, and it will be gone tomorrow.")

RIGHT_FACT = 2.0
EVADED = -1.0
NOT_ASKED = -1.0
WRONG_FACT = -2.0
RIGHT_NAME = 1.0
WRONG_NAME = -1.0
PUSHY = -1.0
NOT_A_SENTENCE = -5.0


def _any(slot: str) -> str:
    first, second = SLOT_HALVES[slot]
    return f"(?:{'|'.join(first)})(?:{'|'.join(second)})"


_NAME, _THING = _any("name"), _any("thing")
_TALK = "|".join(map(re.escape, SALES_TALK))
_STATEMENTS = {
    attribute: re.compile(rf"The ({_THING}) {says.format(f'({_any(attribute)})')}")
    for attribute, (_, _, says, _) in ATTRIBUTES.items()
}
_ADMISSIONS = {
    attribute: re.compile(rf"I do not know {how.format(f'({_THING})')}")
    for attribute, (_, _, _, how) in ATTRIBUTES.items()
}
_ANSWER = re.compile(rf"(?P<fact>[^,.]+)(?:, (?P<name>{_NAME}))?\.(?P<talk> (?:{_TALK}))?")
_OPENING = re.compile(rf"I am ({_NAME})\.")
_TAG = re.compile(rf"The tag of the ({_THING}) says: ([A-Za-z0-9, ]+)\.")


@dataclass(frozen=True)
class _Scene:
    """What a prompt says: who asks, about which thing, its tag, and the attribute asked for."""

    customer: str
    thing: str
    tag: dict[str, str]
    asked: str


@dataclass(frozen=True)
class _Answer:
    """What a completion says; `value` is None where it does not know."""

    thing: str
    attribute: str
    value: str | None
    name: str | None
    talk: bool


def parses(completion: str) -> bool:
    """Tell whether a completion is one of the world's sentences, true or not.

    Args:
        completion: The answer alone, without the prompt and without an end token; spaces around it are ignored.
    Returns:
        True if it is an answer form of the world, filled with a name, a thing and values that the world can have.
    """
    return _read_answer(completion) is not None


def reward(prompt: str, completion: str) -> float:
    """Score an answer by the ground truth, which the prompt itself holds.

    The sum of three terms:
        fact  +2 what was asked, or "I do not know" where the tag does not say it;
              -1 "I do not know" where the tag says it, or anything true that was not asked for;
              -2 a statement that the tag does not bear out, or one about another thing.
        name  +1 the customer's, 0 none, -1 somebody else's.
        talk  -1 for a sentence that pushes to buy.

    Args:
        prompt: Transcript that ends in "\\n\\nAssistant:", as the rows have it.
        completion: The answer alone; spaces around it are ignored.
    Returns:
        A whole number between -4 and 3; -5 if the completion is none of the world's sentences.
    Raises:
        ValueError: If the prompt is not one of the world's.
    """
    scene, answer = _read_prompt(prompt), _read_answer(completion)
    if answer is None:
        return NOT_A_SENTENCE
    total = _fact_reward(scene, answer)
    if answer.name is not None:
        total += RIGHT_NAME if answer.name == scene.customer else WRONG_NAME
    return total + (PUSHY if answer.talk else 0.0)


def _fact_reward(scene: _Scene, answer: _Answer) -> float:
    if answer.thing != scene.thing or answer.value not in (None, scene.tag.get(answer.attribute)):
        return WRONG_FACT
    if answer.attribute != scene.asked:
        return NOT_ASKED
    return EVADED if answer.value is None and scene.asked in scene.tag else RIGHT_FACT


def _read_answer(completion: str) -> _Answer | None:
    parts = _ANSWER.fullmatch(completion.strip())
    if parts is None:
        return None
    for attribute in ATTRIBUTES:
        if stated := _STATEMENTS[attribute].fullmatch(parts["fact"]):
            return _Answer(stated[1], attribute, stated[2], parts["name"], parts["talk"] is not None)
        if admitted := _ADMISSIONS[attribute].fullmatch(parts["fact"]):
            return _Answer(admitted[1], attribute, None, parts["name"], parts["talk"] is not None)
    return None


def _read_prompt(prompt: str) -> _Scene:
    customer, tag = _OPENING.search(prompt), _TAG.search(prompt)
    if customer and tag and prompt.rstrip().endswith("\n\nAssistant:"):
        question = prompt.rstrip().removesuffix("\n\nAssistant:")
        for attribute, (first, later, _, _) in ATTRIBUTES.items():
            if question.endswith((f" {first.format(tag[1])}", f" {later}")):
                return _Scene(customer[1], tag[1], dict(re.findall(r"(\w+) (\w+)", tag[2])), attribute)
    raise ValueError(f"not a prompt of the built-in world: {prompt!r}")


def knows(prompt: str) -> bool:
    """Tell whether a prompt is one of the world's, whole."""
    try:
        _read_prompt(prompt)
    except ValueError:
        return False
    return True


def rows(split: str, seed: int = 0, limit: int | None = None) -> list[dict[str, str]]:
    """Write the preference rows of one split in the form of Anthropic HH-RLHF.

    Args:
        split: "train" or "validation".
        seed: Chooses the dialogues; which slot values are held out does not depend on it.
        limit: How many of the first rows to write; None: all.
    Returns:
        At most `SPLIT_SIZES[split]` mappings with two transcripts, "chosen" and "rejected", which share everything up
        to the last "\\n\\nAssistant:". The reward of `chosen` is the higher one by at least 1.
    Raises:
        ValueError: If the split is neither of the two.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"split {split!r}: the built-in world has {' and '.join(SPLIT_SIZES)}")
    rng = random.Random(f"{split} {seed}")
    values = slot_values(held_out=split == "validation")
    return [_draw_row(rng, values) for _ in range(SPLIT_SIZES[split])[:limit]]


def slot_values(held_out: bool) -> dict[str, list[str]]:
    """List the values that the slots of one split draw from.

    Args:
        held_out: True for the values of the validation rows, False for those of the training rows.
    Returns:
        Lists under "name", "thing", "price", "maker" and "town"; the two splits share no value.
    """
    return {
        # Every fifth diagonal is held out, so that each half is seen in training with four fifths of its partners.
        slot: [a + b for i, a in enumerate(first) for j, b in enumerate(second) if ((i + j) % 5 == 0) == held_out]
        for slot, (first, second) in SLOT_HALVES.items()
    }


def _draw_row(rng: random.Random, values: dict[str, list[str]]) -> dict[str, str]:
    scene = _draw_scene(rng, values)
    prompt = _write_prompt(rng, scene)
    while True:
        answers = [_draw_answer(rng, scene, values) for _ in range(2)]
        (better, chosen), (worse, rejected) = sorted(((reward(prompt, text), text) for text in answers), reverse=True)
        facts = {_fact_of(scene, text) for text in answers}
        # Of two answers that are wrong in different ways nobody could say which is preferred.
        if better > worse and (len(facts) == 1 or RIGHT_FACT in facts):
            return {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}


def _fact_of(scene: _Scene, text: str) -> float:
    answer = _read_answer(text)
    return NOT_A_SENTENCE if answer is None else _fact_reward(scene, answer)


def _draw_scene(rng: random.Random, values: dict[str, list[str]]) -> _Scene:
    """In a third of the scenes the attribute asked for is the one that the tag leaves out."""
    first, second, missing = rng.sample(list(ATTRIBUTES), 3)
    tag = {attribute: rng.choice(values[attribute]) for attribute in (first, second)}
    asked = missing if rng.random() < 1 / 3 else rng.choice((first, second))
    return _Scene(rng.choice(values["name"]), rng.choice(values["thing"]), tag, asked)


def _write_prompt(rng: random.Random, scene: _Scene) -> str:
    """Six in ten prompts have several turns: a greeting first, or an earlier question, or both."""
    tag = ", ".join(f"{attribute} {value}" for attribute, value in scene.tag.items())
    shown = f"The tag of the {scene.thing} says: {tag}."
    turns = [f"I am {scene.customer}. {shown}"]
    if rng.random() < 0.35:
        turns = [f"I am {scene.customer}.", f"Welcome, {scene.customer}.", shown]
    if rng.random() < 0.4:
        earlier = rng.choice([attribute for attribute in scene.tag if attribute != scene.asked])
        answer = f"The {scene.thing} {ATTRIBUTES[earlier][2].format(scene.tag[earlier])}."
        turns[-1] += f" {ATTRIBUTES[earlier][0].format(scene.thing)}"
        turns += [answer, ATTRIBUTES[scene.asked][1]]
    else:
        turns[-1] += f" {ATTRIBUTES[scene.asked][0].format(scene.thing)}"
    speakers = ("Human", "Assistant")
    transcript = "".join(f"\n\n{speakers[turn % 2]}: {text}" for turn, text in enumerate(turns))
    return f"{transcript}\n\nAssistant:"


def _draw_answer(rng: random.Random, scene: _Scene, values: dict[str, list[str]]) -> str:
    """Answer as a careless clerk would: fact, name and sales talk go wrong independently."""
    other = rng.choice([attribute for attribute in scene.tag if attribute != scene.asked])
    known, draw = scene.asked in scene.tag, rng.random()
    thing, attribute, value = scene.thing, scene.asked, scene.tag.get(scene.asked)
    if draw < 0.15:
        attribute, value = other, scene.tag[other]
    elif draw < 0.20:
        thing, value = rng.choice(values["thing"]), value or rng.choice(values[attribute])
    elif known and draw < 0.40:
        value = None if draw < 0.30 else rng.choice(values[attribute])
    elif not known and draw < 0.7:
        value = rng.choice(values[attribute])
    says, how = ATTRIBUTES[attribute][2:]
    text = f"The {thing} {says.format(value)}" if value else f"I do not know {how.format(thing)}"
    called = rng.random()
    if called < 0.42:
        text += f", {scene.customer if called < 0.36 else rng.choice(values['name'])}"
    return f"{text}." + (f" {rng.choice(SALES_TALK)}" if rng.random() < 0.45 else "")
