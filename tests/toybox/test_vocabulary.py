"""Words, their colours, and the split into trained and held-out tuples."""

import hashlib

import pytest

from diffusers_moviegen.toybox.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SPINNING_SHAPES,
    core_tuples,
    is_held_out,
)


ALL_COLOURS = "red green blue yellow purple orange cyan white".split()
ALL_GROUNDS = "black grey navy brown pink".split()


def test_words_and_their_colours():
    assert COLOURS == {
        "red": (220, 40, 40),
        "green": (40, 200, 60),
        "blue": (50, 80, 230),
        "yellow": (240, 220, 50),
        "purple": (160, 60, 200),
        "orange": (245, 140, 30),
        "cyan": (50, 210, 220),
        "white": (240, 240, 240),
    }
    assert BACKGROUNDS == {
        "black": (15, 15, 20),
        "grey": (110, 110, 115),
        "navy": (20, 25, 80),
        "brown": (90, 60, 35),
        "pink": (235, 170, 190),
    }
    assert sorted(SHAPES) == ["circle", "ring", "square", "star", "triangle"]
    assert sorted(SPINNING_SHAPES) == ["square", "star", "triangle"]
    moves = ["moves down", "moves left", "moves right", "moves up"]
    assert sorted(MOTIONS) == ["bounces", "grows", *moves, "shrinks", "spins", "stays still"]


def test_named_tuples():
    assert not is_held_out("red", "circle", "bounces", "grey")
    assert is_held_out("red", "circle", "stays still", "grey")


def test_held_out_rule_and_counts():
    expected = {True: set(), False: set()}
    for colour in ALL_COLOURS:
        for ground in ALL_GROUNDS:
            for shape in ("circle", "ring", "square", "triangle", "star"):
                for motion in MOTIONS:
                    if motion == "spins" and shape in ("circle", "ring"):
                        continue
                    text = f"{colour}|{shape}|{motion}|{ground}"
                    # The last decimal digit decides.
                    digits = str(int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"))
                    expected[digits.endswith("0")].add((colour, shape, motion, ground))
    for held_out in (True, False):
        tuples = core_tuples(held_out)
        assert len(tuples) == len(set(tuples))
        assert set(tuples) == expected[held_out]
        assert tuples == core_tuples(held_out)
    assert len(expected[True]) == 167
    assert len(expected[False]) == 8 * 5 * (5 * 8 + 3) - 167
    assert len(core_tuples(True, motions=("stays still",))) == 27


@pytest.mark.parametrize("motions", [("stays still",), ("spins", "grows")])
def test_motions_limit_the_tuples(motions):
    for held_out in (True, False):
        expected = [words for words in core_tuples(held_out) if words[2] in motions]
        assert sorted(core_tuples(held_out, motions)) == sorted(expected)
        assert {words[2] for words in expected} == set(motions)
