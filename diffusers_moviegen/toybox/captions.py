"""The sentences of Toybox: captions of pictures, clips and sounds, and edit instructions.

The core caption is fixed by the world's definition and keeps its articles literal ("a orange circle"); the other
phrasings use synonyms, other word orders and proper articles. Everything drawn at random comes from the
`random.Random` the caller passes, so a corpus is a function of its seed.
"""

import functools
import random
import string

from .vocabulary import (
    AMBIENCES,
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    CORNERS,
    EVENTS,
    LUMA_WEIGHTS,
    MOTIONS,
    PERSON_MOTIONS,
    SHAPES,
    SPINNING_SHAPES,
    TEXT_MOTIONS,
    TWO_OBJECT_MOTIONS,
    VOICES,
    core_tuples,
    is_held_out,
    is_sound_held_out,
)


SHAPE_NOUNS = {
    "circle": ("circle", "ball", "disc"),
    "ring": ("ring", "hoop"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "pyramid"),
    "star": ("star",),
}
"""Names of each shape; the first is the one of the core caption. No name is shared between shapes."""

MOTION_VERBS = {
    "stays still": (("stays still", "staying still"), ("rests", "resting"), ("does not move", "not moving")),
    "moves left": (
        ("moves left", "moving left"),
        ("slides to the left", "sliding to the left"),
        ("drifts left", "drifting left"),
        ("travels leftwards", "travelling leftwards"),
    ),
    "moves right": (
        ("moves right", "moving right"),
        ("slides to the right", "sliding to the right"),
        ("drifts right", "drifting right"),
        ("travels rightwards", "travelling rightwards"),
    ),
    "moves up": (
        ("moves up", "moving up"),
        ("slides to the top", "sliding to the top"),
        ("rises", "rising"),
        ("travels upwards", "travelling upwards"),
    ),
    "moves down": (
        ("moves down", "moving down"),
        ("slides to the bottom", "sliding to the bottom"),
        ("sinks", "sinking"),
        ("travels downwards", "travelling downwards"),
    ),
    "bounces": (("bounces", "bouncing"), ("hops", "hopping"), ("jumps up and down", "jumping up and down")),
    "grows": (("grows", "growing"), ("gets bigger", "getting bigger"), ("becomes larger", "becoming larger")),
    "shrinks": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("becomes smaller", "becoming smaller"),
    ),
    "spins": (("spins", "spinning"), ("rotates", "rotating"), ("turns around", "turning around")),
}
"""Ways to say each motion, as (finite verb, participle); the first is the one of the core caption."""

PHRASINGS = (
    (
        "{a_colour} {noun} {verb} against a {background} backdrop",
        "{a_colour} {noun} against a {background} backdrop",
    ),
    (
        "on a {background} background, {a_colour} {noun} {verb}",
        "on a {background} background, {a_colour} {noun}",
    ),
    (
        "there is {a_colour} {noun} {participle} in front of a {background} backdrop",
        "there is {a_colour} {noun} in front of a {background} backdrop",
    ),
    (
        "a {noun} that is {colour} {verb} on a {background} background",
        "a {noun} that is {colour} on a {background} background",
    ),
    (
        "{background} background, {colour} {noun}, {participle}",
        "{background} background, {colour} {noun}",
    ),
    (
        "a video of {a_colour} {noun} {participle} over a {background} background",
        "a picture of {a_colour} {noun} over a {background} background",
    ),
    (
        "the {colour} {noun} {verb} and the background is {background}",
        "the {noun} is {colour} and the background is {background}",
    ),
    (
        "against a {background} backdrop, {participle}: {a_colour} {noun}",
        "against a {background} backdrop: {a_colour} {noun}",
    ),
)
"""Phrasings other than the core caption, as (clip, single frame without motion)."""

TWO_OBJECT_PHRASINGS = (
    (
        "on a {background} background, {a_colour} {noun} {verb} and {a_colour_2} {noun_2} {verb_2}",
        "on a {background} background, {a_colour} {noun} and {a_colour_2} {noun_2}",
    ),
    (
        "{a_colour} {noun} {verb} while {a_colour_2} {noun_2} {verb_2} against a {background} backdrop",
        "{a_colour} {noun} next to {a_colour_2} {noun_2} against a {background} backdrop",
    ),
    (
        "two objects over a {background} background: "
        "{a_colour} {noun} {participle}, {a_colour_2} {noun_2} {participle_2}",
        "two objects over a {background} background: {a_colour} {noun}, {a_colour_2} {noun_2}",
    ),
)
"""Phrasings for two objects other than the core one, as (clip, single frame without motion)."""

EDIT_INSTRUCTIONS = {
    "recolour": "make the {shape} {new_colour}",
    "replace": "turn the {shape} into a {new_shape}",
    "background": "change the background to {new_background}",
    "remove": "remove the {shape}",
    "add": "add a {new_colour} {new_shape} in the {corner}",
    "black and white": "make it black and white",
    "invert": "invert the colours",
    "segmentation": "mark the {shape} in magenta",
}
"""Instruction of each edit. "black and white" and "invert" are the two edits of the task "style"."""

CAPTION_KINDS = (
    "core",
    "phrasing",
    "still",
    "two_objects",
    "text",
    "camera",
    "checkered",
    "person",
    "sound",
    "edit",
)
"""Corpora `sample_caption` can draw from."""


def _on_background(subject: str, background: str) -> str:
    return f"{subject} on a {background} background"


def core_caption(colour: str, shape: str, motion: str | None, background: str) -> str:
    """`a {colour} {shape} {motion} on a {background} background`; `motion=None` describes a single frame."""
    subject = f"a {colour} {shape}" if motion is None else f"a {colour} {shape} {motion}"
    return _on_background(subject, background)


def two_object_caption(
    objects: list[tuple[str, str, str | None]],
    background: str,
) -> str:
    """Core caption of two `(colour, shape, motion)`; both motions are `None` in a single frame."""
    first, second = (" ".join(word for word in ("a", *parts) if word is not None) for parts in objects)
    return _on_background(f"{first} and {second}", background)


def person_caption(motion: str | None, background: str) -> str:
    """`a person {motion} on a {background} background`; `motion=None` describes a single frame."""
    return _on_background("a person" if motion is None else f"a person {motion}", background)


def _with_article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _object_slots(colour: str, shape: str, motion: str | None, rng: random.Random, suffix: str = "") -> dict[str, str]:
    slots = {
        f"colour{suffix}": colour,
        f"a_colour{suffix}": _with_article(colour),
        f"noun{suffix}": rng.choice(SHAPE_NOUNS[shape]),
    }
    if motion is not None:
        slots[f"verb{suffix}"], slots[f"participle{suffix}"] = rng.choice(MOTION_VERBS[motion])
    return slots


def phrase(colour: str, shape: str, motion: str | None, background: str, rng: random.Random) -> str:
    """
    Draw one of the phrasings other than the core caption.

    Args:
        colour, shape, background: words of `vocabulary`; the background may also be "checkered grey" and the like.
        motion: a motion of `vocabulary`, or `None` for a single frame.
        rng: source of randomness.

    Returns:
        A sentence that names colour, shape, motion (if any) and background unambiguously.
    """
    moving, still = rng.choice(PHRASINGS)
    template = still if motion is None else moving
    return template.format(background=background, **_object_slots(colour, shape, motion, rng))


def phrase_two_objects(objects: list[tuple[str, str, str | None]], background: str, rng: random.Random) -> str:
    """Draw one of the two-object phrasings other than the core one; both motions are `None` in a single frame."""
    moving, still = rng.choice(TWO_OBJECT_PHRASINGS)
    template = still if objects[0][2] is None else moving
    first = _object_slots(*objects[0], rng)
    second = _object_slots(*objects[1], rng, suffix="_2")
    return template.format(background=background, **first, **second)


def add_written_word(caption: str, word: str) -> str:
    """End a caption with `with the word "{word}"`; the word has one to three capital letters."""
    return f'{caption} with the word "{word}"'


def add_camera(caption: str, camera: str) -> str:
    """Put camera words in front of a caption: `Pan left. a red circle ...`."""
    return f"{camera}. {caption}"


def sound_event(shape: str, motion: str, has_strike: bool = True) -> str | None:
    """What an object is heard doing, or `None`. A bounce is heard only if the clip holds a floor touch."""
    event = EVENTS[motion]
    if event is None or (motion == "bounces" and not has_strike):
        return None
    return "a whoosh passes" if event == "passes" else f"a {VOICES[shape]} {event}"


def sound_caption(shape: str, motion: str, background: str, has_strike: bool = True) -> str:
    """Caption of a clip's sound: `{event}, with {ambience} in the background`, the one that exists, or `silence`."""
    event = sound_event(shape, motion, has_strike)
    ambience = AMBIENCES[background]
    if event is not None and ambience is not None:
        return f"{event}, with {ambience} in the background"
    return event or ambience or "silence"


def sound_prefix(quality: int, music: bool) -> str:
    """Control prefix `Quality: {1..10}. Music: yes|no. ` of a sound caption, with its trailing space."""
    return f"Quality: {quality}. Music: {'yes' if music else 'no'}. "


@functools.cache
def _tuples(held_out: bool, motions: tuple[str, ...] = MOTIONS) -> list[tuple[str, str, str, str]]:
    return core_tuples(held_out, motions)


@functools.cache
def _sound_tuples(held_out: bool) -> list[tuple[str, str, str]]:
    return [
        (shape, motion, background)
        for shape in SHAPES
        for motion in MOTIONS
        for background in BACKGROUNDS
        if (motion != "spins" or shape in SPINNING_SHAPES) and is_sound_held_out(shape, motion, background) == held_out
    ]


def _sample_two_objects(rng: random.Random, held_out: bool, single_frame: bool) -> tuple[str, dict]:
    motions = ("stays still",) if single_frame else TWO_OBJECT_MOTIONS
    while True:
        colours = rng.sample(list(COLOURS), 2)
        background = rng.choice(list(BACKGROUNDS))
        objects = []
        for colour in colours:
            motion = rng.choice(motions)
            shape = rng.choice(SPINNING_SHAPES if motion == "spins" else SHAPES)
            objects.append((colour, shape, motion))
        if any(is_held_out(*parts, background) for parts in objects) == held_out:
            break
    said = [(colour, shape, None) for colour, shape, _ in objects] if single_frame else objects
    if rng.random() < 0.5:
        text = two_object_caption(said, background)
    else:
        text = phrase_two_objects(said, background, rng)
    fields = {
        "objects": [dict(zip(("colour", "shape", "motion"), parts, strict=True)) for parts in objects],
        "background": background,
    }
    return text, fields


def _survives_black_and_white(colour: str, background: str) -> bool:
    """Whether object and ground stay apart without colour (lumas 30 or more apart) and lose some by it."""
    values = COLOURS[colour], BACKGROUNDS[background]
    lumas = [sum(weight * level for weight, level in zip(LUMA_WEIGHTS, value, strict=True)) for value in values]
    return abs(lumas[0] - lumas[1]) >= 30 and any(max(value) - min(value) >= 20 for value in values)


def _sample_edit(rng: random.Random, held_out: bool) -> tuple[str, dict]:
    while True:
        edit = rng.choice(list(EDIT_INSTRUCTIONS))
        source = rng.choice(_tuples(False) + _tuples(True))
        colour, shape, motion, background = source
        fields = {"edit": edit, "colour": colour, "shape": shape, "motion": motion, "background": background}
        tuples = [source]
        if edit == "recolour":
            fields["new_colour"] = rng.choice([name for name in COLOURS if name != colour])
            tuples.append((fields["new_colour"], shape, motion, background))
        elif edit == "replace":
            shapes = SPINNING_SHAPES if motion == "spins" else SHAPES
            fields["new_shape"] = rng.choice([name for name in shapes if name != shape])
            tuples.append((colour, fields["new_shape"], motion, background))
        elif edit == "background":
            fields["new_background"] = rng.choice([name for name in BACKGROUNDS if name != background])
            tuples.append((colour, shape, motion, fields["new_background"]))
        elif edit == "add":
            fields |= {
                "new_colour": rng.choice(list(COLOURS)),
                "new_shape": rng.choice(SHAPES),
                "corner": rng.choice(CORNERS),
            }
            tuples.append((fields["new_colour"], fields["new_shape"], "stays still", background))
        elif edit == "black and white" and not _survives_black_and_white(colour, background):
            continue
        if any(is_held_out(*parts) for parts in tuples) == held_out:
            return EDIT_INSTRUCTIONS[edit].format(**fields), fields


def sample_caption(
    kind: str, rng: random.Random, held_out: bool = False, single_frame: bool | None = None
) -> tuple[str, dict]:
    """
    Draw one sentence of a corpus together with what it says.

    Args:
        kind: one of `CAPTION_KINDS`. "still", "two_objects", "text", "camera" and "checkered" mix the core caption
            with the other phrasings; "checkered" has the ground of "camera" without its words.
        rng: source of randomness.
        held_out: draw from the tuples reserved for evaluation instead of the training tuples. A sentence about several
            tuples (two objects; source and target of an edit) is held out if any of them is. Persons have no colour or
            shape, hence no held-out tuples: their identities are what evaluations draw anew.
        single_frame: whether the sentence describes a single frame. By default "still" does, half of "two_objects",
            "text" and "person" does, and nothing else.

    Returns:
        The text, and its fields: "colour", "shape", "motion", "background" as far as they apply (a single frame has
        "single_frame" true and the motion "stays still"), and by kind "objects" (two dictionaries), "word",
        "camera", "quality", "music", "has_strike", or "edit" with "new_colour", "new_shape", "new_background",
        "corner" where the edit names them.

    Raises:
        ValueError: if `kind` is unknown, held-out persons are asked for, or `single_frame` is given where the kind
            leaves no choice: "still", "camera", "sound" and "edit".
    """
    if kind not in CAPTION_KINDS:
        raise ValueError(f"unknown kind of caption {kind!r}: choose one of {', '.join(CAPTION_KINDS)}")
    if single_frame is not None and kind in ("still", "camera", "sound", "edit"):
        raise ValueError(f"`single_frame` cannot be chosen for captions of the kind {kind!r}; leave it out")
    if single_frame is None:
        single_frame = kind == "still" or (kind in ("two_objects", "text", "person") and rng.random() < 0.5)
    if kind == "two_objects":
        text, fields = _sample_two_objects(rng, held_out, single_frame)
        return text, fields | {"single_frame": single_frame}
    if kind == "edit":
        return _sample_edit(rng, held_out)
    if kind == "person":
        if held_out:
            raise ValueError("captions of persons have no held-out tuples: draw new identities instead")
        motion = "stays still" if single_frame else rng.choice(PERSON_MOTIONS)
        background = rng.choice(list(BACKGROUNDS))
        fields = {"motion": motion, "background": background, "single_frame": single_frame}
        return person_caption(None if single_frame else motion, background), fields
    if kind == "sound":
        shape, motion, background = rng.choice(_sound_tuples(held_out))
        fields = {
            "shape": shape,
            "motion": motion,
            "background": background,
            "quality": rng.randint(1, 10),
            "music": AMBIENCES[background] == "soft music",
            "has_strike": motion != "bounces" or rng.random() < 0.9,
        }
        text = sound_caption(shape, motion, background, fields["has_strike"])
        return sound_prefix(fields["quality"], fields["music"]) + text, fields

    motions = ("stays still",) if single_frame else TEXT_MOTIONS if kind == "text" else MOTIONS
    colour, shape, motion, background = rng.choice(_tuples(held_out, motions))
    fields = {
        "colour": colour,
        "shape": shape,
        "motion": motion,
        "background": background,
        "single_frame": single_frame,
    }
    said_motion = None if single_frame else motion
    said_background = f"checkered {background}" if kind in ("camera", "checkered") else background
    if kind == "phrasing" or (kind != "core" and rng.random() < 0.5):
        text = phrase(colour, shape, said_motion, said_background, rng)
    else:
        text = core_caption(colour, shape, said_motion, said_background)
    if kind == "text":
        fields["word"] = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(1, 3)))
        text = add_written_word(text, fields["word"])
    elif kind == "camera":
        fields["camera"] = rng.choice(CAMERAS)
        text = add_camera(text, fields["camera"])
    return text, fields
