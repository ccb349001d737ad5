"""The grammar of captions and instructions: the literal sentences of the world, and what may be drawn for training."""

import random
import re

import pytest

from diffusers_moviegen.toybox import captions
from diffusers_moviegen.toybox.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, core_tuples, is_held_out


def objects_of(fields):
    """Tuples a drawn sentence is about, source and target of an edit included."""
    if "objects" in fields:
        return [(*words.values(), fields["background"]) for words in fields["objects"]]
    source = [fields[name] for name in ("colour", "shape", "motion", "background")]
    tuples = [tuple(source)]
    if fields.get("edit") == "add":
        tuples.append((fields["new_colour"], fields["new_shape"], "stays still", fields["background"]))
    elif "edit" in fields:
        for i, name in ((0, "new_colour"), (1, "new_shape"), (3, "new_background")):
            if name in fields:
                tuples.append(tuple(source[:i] + [fields[name]] + source[i + 1 :]))
    return tuples


def test_core_captions_are_literal():
    assert captions.core_caption("red", "circle", "bounces", "grey") == "a red circle bounces on a grey background"
    assert captions.core_caption("orange", "circle", None, "navy") == "a orange circle on a navy background"
    two = [("red", "ring", "moves left"), ("blue", "star", "spins")]
    assert (
        captions.two_object_caption(two, "pink") == "a red ring moves left and a blue star spins on a pink background"
    )
    still = [("red", "ring", None), ("blue", "star", None)]
    assert captions.two_object_caption(still, "pink") == "a red ring and a blue star on a pink background"
    assert captions.person_caption("moves up", "black") == "a person moves up on a black background"
    assert captions.person_caption(None, "black") == "a person on a black background"
    caption = captions.core_caption("cyan", "star", "spins", "checkered brown")
    assert captions.add_camera(caption, "Pan left") == "Pan left. a cyan star spins on a checkered brown background"
    assert captions.add_written_word("a red circle", "CAT") == 'a red circle with the word "CAT"'


@pytest.mark.parametrize(
    ("shape", "motion", "background", "has_strike", "expected"),
    [
        ("circle", "bounces", "navy", True, "a bell knocks, with rain in the background"),
        ("circle", "bounces", "navy", False, "rain"),
        ("square", "moves down", "grey", True, "a whoosh passes, with a low rumble in the background"),
        ("triangle", "grows", "black", True, "a flute glides up"),
        ("ring", "shrinks", "brown", True, "a chime glides down, with crickets in the background"),
        ("star", "spins", "pink", True, "a shaker warbles, with soft music in the background"),
        ("star", "stays still", "black", True, "silence"),
    ],
)
def test_sound_captions_are_literal(shape, motion, background, has_strike, expected):
    assert captions.sound_caption(shape, motion, background, has_strike) == expected


def test_sound_prefix_is_literal():
    assert captions.sound_prefix(7, True) == "Quality: 7. Music: yes. "


def test_edit_instructions_are_literal():
    rng, drawn = random.Random(0), {}
    for _ in range(300):
        text, fields = captions.sample_caption("edit", rng)
        drawn[fields["edit"]] = text
    patterns = {
        "recolour": f"make the ({'|'.join(SHAPES)}) ({'|'.join(COLOURS)})",
        "replace": f"turn the ({'|'.join(SHAPES)}) into a ({'|'.join(SHAPES)})",
        "background": f"change the background to ({'|'.join(BACKGROUNDS)})",
        "remove": f"remove the ({'|'.join(SHAPES)})",
        "add": f"add a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) in the (top|bottom) (left|right)",
        "black and white": "make it black and white",
        "invert": "invert the colours",
        "segmentation": f"mark the ({'|'.join(SHAPES)}) in magenta",
    }
    assert drawn.keys() == patterns.keys()
    for edit, text in drawn.items():
        assert re.fullmatch(patterns[edit], text), text


@pytest.mark.parametrize("single_frame", [False, True])
def test_every_phrasing_says_one_thing_only(single_frame):
    """No two different contents share a sentence, and no phrasing is the core caption."""
    motions = (None,) if single_frame else MOTIONS
    said_by = {}
    for template in range(len(captions.PHRASINGS)):
        rng = FixedFirstChoice(template)
        for colour, shape, motion, background in (
            (colour, shape, motion, background)
            for colour in COLOURS
            for shape in SHAPES
            for motion in motions
            for background in BACKGROUNDS
        ):
            text = captions.phrase(colour, shape, motion, background, rng)
            words = re.findall(r"[a-z]+", text)
            assert colour in words and background in words
            assert any(noun in words for noun in captions.SHAPE_NOUNS[shape])
            assert " a orange" not in f" {text}"
            assert text != captions.core_caption(colour, shape, motion, background)
            assert said_by.setdefault(text, (colour, shape, motion, background)) == (colour, shape, motion, background)
    assert len(captions.PHRASINGS) >= 6


class FixedFirstChoice(random.Random):
    """Draws a chosen phrasing, and its synonyms at random."""

    def __init__(self, template):
        super().__init__(0)
        self.template = template

    def choice(self, options):
        return options[self.template] if options is captions.PHRASINGS else super().choice(options)


def test_synonyms_belong_to_one_word():
    nouns = [noun for nouns in captions.SHAPE_NOUNS.values() for noun in nouns]
    verbs = [verb for forms in captions.MOTION_VERBS.values() for pair in forms for verb in pair]
    assert len(set(nouns)) == len(nouns) and len(set(verbs)) == len(verbs)
    assert {shape: nouns[0] for shape, nouns in captions.SHAPE_NOUNS.items()} == {shape: shape for shape in SHAPES}
    assert {motion: forms[0][0] for motion, forms in captions.MOTION_VERBS.items()} == {name: name for name in MOTIONS}


@pytest.mark.parametrize("kind", captions.CAPTION_KINDS)
def test_draws_are_a_function_of_the_seed(kind):
    first, second = ([captions.sample_caption(kind, rng) for _ in range(50)] for rng in map(random.Random, (3, 3)))
    assert first == second
    assert len({text for text, _ in first}) > 5


@pytest.mark.parametrize("kind", [kind for kind in captions.CAPTION_KINDS if kind != "person"])
@pytest.mark.parametrize("held_out", [False, True])
def test_draws_keep_to_their_split(kind, held_out):
    rng = random.Random(1)
    for _ in range(2000):
        _, fields = captions.sample_caption(kind, rng, held_out)
        if kind == "sound":
            tuples = [("sound", fields["shape"], fields["motion"], fields["background"])]
        else:
            tuples = objects_of(fields)
        assert any(is_held_out(*words) for words in tuples) == held_out, fields


def test_all_training_tuples_are_drawn():
    rng = random.Random(2)
    drawn = {objects_of(captions.sample_caption("core", rng)[1])[0] for _ in range(15000)}
    assert drawn == set(core_tuples(held_out=False))


def test_edits_change_something_that_can_be_seen():
    rng, turned_grey = random.Random(4), set()
    for _ in range(6000):
        _, fields = captions.sample_caption("edit", rng)
        for name in ("colour", "shape", "background"):
            if fields["edit"] != "add":
                assert fields.get(f"new_{name}") != fields[name]
        if fields["edit"] == "replace" and fields["motion"] == "spins":
            assert fields["new_shape"] not in ("circle", "ring")
        if fields["edit"] == "black and white":
            turned_grey.add((fields["colour"], fields["background"]))
    # Rec. 709 lumas: blue 84, yellow 212, red 78; grey 110, pink 185, black 15. White, grey and black have no colour.
    assert not turned_grey & {("blue", "grey"), ("yellow", "pink"), ("white", "grey"), ("white", "black")}
    assert {("yellow", "grey"), ("blue", "pink"), ("red", "black")} <= turned_grey


def test_what_cannot_go_together_is_not_drawn():
    rng = random.Random(5)
    for _ in range(2000):
        _, fields = captions.sample_caption("text", rng)
        assert fields["motion"] in ("stays still", "moves left", "moves right", "spins")
        assert re.fullmatch("[A-Z]{1,3}", fields["word"])
        _, fields = captions.sample_caption("two_objects", rng)
        first, second = fields["objects"]
        assert first["colour"] != second["colour"] and "bounces" not in (first["motion"], second["motion"])
        _, fields = captions.sample_caption("person", rng)
        assert fields["motion"] not in ("spins", "grows", "shrinks")


def test_unknown_corpora_are_refused():
    with pytest.raises(ValueError, match="'poem'.*core"):
        captions.sample_caption("poem", random.Random(0))
    with pytest.raises(ValueError, match="identities"):
        captions.sample_caption("person", random.Random(0), held_out=True)
