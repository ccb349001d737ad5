"""The judge of people, and the package's drawings, against an independent drawing of the same description."""

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

from diffusers_moviegen.toybox.judges import SeenPerson, compare_people, recognize
from diffusers_moviegen.toybox.people import (
    EXPRESSIONS,
    HAIR_STYLES,
    SKINS,
    draw_people,
    render_people,
    render_references,
)
from diffusers_moviegen.toybox.scenes import draw_scenes, render
from diffusers_moviegen.toybox.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, PERSON_MOTIONS, SHAPES
from tests.toybox import reference_people
from tests.toybox.degradations import blurred, noisy
from tests.toybox.reference_people import Person, draw_person, render_person, render_reference


TREATMENTS = {
    "clean": lambda video: video,
    "noisy": noisy,
    "blurred": blurred,
    "noisy and blurred": lambda video: noisy(blurred(video)),
}
FIELDS = ("skin", "hair hue", "style", "glasses", "expression", "tilt")
NOBODY = SeenPerson()


def in_plain_words(people):
    """The package's `People` as the reference describes them."""
    return [
        Person(
            skin=people.skin[i].item(),
            hair=tuple(people.hair[i].tolist()),
            style=HAIR_STYLES[people.style[i]],
            iris=tuple(people.iris[i].tolist()),
            glasses=people.glasses[i].item(),
            expression=EXPRESSIONS[people.expression[i]],
            tilt=people.tilt[i].item(),
            light=people.light[i].item(),
            motion=MOTIONS[people.motion[i, 0]],
            background=list(BACKGROUNDS)[people.background[i]],
            radius=people.radius[i, 0].item(),
            x=people.x[i, 0].item(),
            y=people.y[i, 0].item(),
            touch_rate=people.touch_rate[i, 0].item(),
            touch_phase=people.touch_phase[i, 0].item(),
        )
        for i in range(len(people))
    ]


def words(count, motions=PERSON_MOTIONS):
    """Motions and backgrounds in turn."""
    return [pair for pair, _ in zip(list(product(motions, BACKGROUNDS)) * count, range(count), strict=False)]


@cache
def package_clips(count, num_frames=16, height=128, width=128):
    motions = ("stays still",) if num_frames == 1 else PERSON_MOTIONS
    people = draw_people(words(count, motions), torch.Generator().manual_seed(0))
    return render_people(people, num_frames, 8, height, width), in_plain_words(people)


@cache
def package_references(count, side=128):
    people = draw_people(words(count), torch.Generator().manual_seed(1))
    return render_references(people, side)[:, :, None], in_plain_words(people)


@cache
def reference_clips():
    """All motions, each over its two seconds."""
    random = np.random.default_rng(0)
    people = [draw_person(random, *pair) for pair in words(30)[::2]]
    return torch.stack([torch.tensor(render_person(person, 6, 3)) for person in people]), people


def pictures(people, side=128):
    """The reference's pictures on grey as clips of one frame."""
    return torch.stack([torch.tensor(render_reference(person, side)) for person in people])[:, :, None]


def hue_error(seen, person):
    return abs((seen.hair_hue - person.hair_hue + 180) % 360 - 180)


def assert_recognized(video, people, share, report):
    """`report(title, asked, judged)` returns the share judged right; measured values count as asked for if near."""
    seen = recognize(video)
    assert len(seen) == len(people)
    third = {-1: "left", 0: "upright", 1: "right"}
    answers = {
        "skin": [(person.skin, one.skin) for one, person in zip(seen, people, strict=True)],
        "hair hue": [],
        "style": [(person.style, one.style) for one, person in zip(seen, people, strict=True)],
        "glasses": [(person.glasses, one.glasses) for one, person in zip(seen, people, strict=True)],
        "expression": [(person.expression, one.expression) for one, person in zip(seen, people, strict=True)],
        "tilt": [],
    }
    for one, person in zip(seen, people, strict=True):
        hue, tilt = f"{60 * int(person.hair_hue // 60)}..", third[round(person.tilt / 10)]
        answers["hair hue"].append((hue, hue if one != NOBODY and hue_error(one, person) <= 15 else "off"))
        answers["tilt"].append((tilt, tilt if one != NOBODY and abs(one.tilt - person.tilt) <= 3 else "off"))
    for field in FIELDS:
        asked, judged = zip(*answers[field], strict=True)
        right = report(field, asked, judged)
        assert right >= share, f"{field}: {right:.3f}"


def plain_share(_, asked, judged):
    return sum(a == j for a, j in zip(asked, judged, strict=True)) / len(asked)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_reference_clips(treatment):
    video, people = reference_clips()
    assert {person.motion for person in people} == set(PERSON_MOTIONS)
    assert_recognized(TREATMENTS[treatment](video), people, 0.97, plain_share)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_base_clips(treatment, confusion):
    video, people = package_clips(48)
    tables = lambda field, asked, judged: confusion(f"people, {treatment}: {field}", asked, judged)  # noqa: E731
    assert_recognized(TREATMENTS[treatment](video), people, 0.97, tables)


@pytest.mark.parametrize("treatment", ["clean", "noisy and blurred"])
@pytest.mark.parametrize(("height", "width"), [(128, 192), (192, 128)])
def test_other_sizes(height, width, treatment):
    video, people = package_clips(12, 16, height, width)
    assert_recognized(TREATMENTS[treatment](video), people, 0.97, plain_share)


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("make", [lambda: package_clips(24, 1), lambda: package_references(24)], ids=["still", "grey"])
def test_pictures(make, treatment):
    video, people = make()
    assert_recognized(TREATMENTS[treatment](video), people, 0.97, plain_share)


@pytest.mark.parametrize("treatment", ["clean", "noisy and blurred"])
@pytest.mark.parametrize("num_frames", [1, 16])
def test_half_the_size(num_frames, treatment):
    video, people = package_clips(24, num_frames, 64, 64)
    assert_recognized(TREATMENTS[treatment](video), people, 0.9, plain_share)


def test_every_face_in_the_strongest_and_weakest_light():
    random = np.random.default_rng(1)
    faces = product(range(len(SKINS)), HAIR_STYLES, (False, True), EXPRESSIONS)
    people = [
        replace(
            draw_person(random, "stays still", "black"),
            skin=skin,
            style=style,
            glasses=glasses,
            expression=expression,
            light=(0.85, 1.15)[i % 2],
        )
        for i, (skin, style, glasses, expression) in enumerate(faces)
    ]
    assert_recognized(noisy(pictures(people)), people, 0.99, plain_share)


def test_hair_the_colour_of_the_skin():
    # The style shows in the outline alone.
    random = np.random.default_rng(2)
    people = [
        replace(draw_person(random, "stays still", "black"), skin=skin, hair=SKINS[skin], style=style)
        for skin, style in product((1, 2, 4), HAIR_STYLES)
    ]
    assert_recognized(pictures(people), people, 1.0, plain_share)


def test_tilt_and_hue_are_measured_finely():
    video, people = package_references(24)
    for one, person in zip(recognize(video), people, strict=True):
        assert abs(one.tilt - person.tilt) < 0.5
        assert hue_error(one, person) < 3
    for one, person in zip(recognize(video.flip(-1)), people, strict=True):
        assert abs(one.tilt + person.tilt) < 0.5


@pytest.mark.parametrize(("height", "width"), [(128, 128), (128, 192), (192, 128), (64, 64)])
def test_package_draws_what_the_reference_draws(height, width):
    people = draw_people(words(30), torch.Generator().manual_seed(2))
    # Uneven times, beyond the two seconds after which motions run back.
    video = render_people(people, 3, 0.7, height, width)
    for clip, person in zip(video, in_plain_words(people), strict=True):
        expected = torch.tensor(render_person(person, 3, 0.7, height, width))
        assert (clip.int() - expected.int()).abs().max() <= 1


def test_package_draws_the_references_of_the_reference():
    pixels, people = package_references(24)
    assert (pixels.int() - pictures(people).int()).abs().max() <= 1


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("frames", [1, 16])
@pytest.mark.parametrize("sigma", [0, 6])
def test_nobody_on_empty_ground(side, frames, sigma):
    grounds = torch.tensor([*BACKGROUNDS.values(), (128, 128, 128), (0, 0, 0), (255, 255, 255)])
    video = grounds[:, :, None, None, None].expand(-1, -1, frames, side, side).to(torch.uint8)
    assert recognize(noisy(video, sigma)) == [NOBODY] * len(grounds)


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("frames", [1, 16])
def test_nobody_in_static(side, frames):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4, 3, frames, side, side), generator=generator, dtype=torch.uint8)
    assert recognize(noise) == [NOBODY] * 4
    # A picture of one colour but for its rim.
    noise[..., 3:-3, 3:-3] = 90
    assert recognize(noise) == [NOBODY] * 4


@pytest.mark.parametrize("side", [64, 128])
def test_shapes_are_nobody(side):
    tuples = list(product(COLOURS, SHAPES, ["stays still"], ["black", "brown", "pink"]))
    video = render(draw_scenes(tuples, torch.Generator().manual_seed(0)), 1, 8, side, side)
    assert recognize(video) == [NOBODY] * len(tuples)
    tuples = list(product(["white", "orange"], SHAPES, ["grows", "moves left"], ["black", "pink"]))
    video = render(draw_scenes(tuples, torch.Generator().manual_seed(1)), 4, 2, side, side)
    assert recognize(blurred(video)) == [NOBODY] * len(tuples)


@pytest.mark.parametrize("missing", ["eyes", "mouth"])
def test_a_face_without_eyes_or_mouth_is_nobody(missing, monkeypatch):
    # Light faces, on which eye whites stand out least, and dark ones, on which mouths do.
    random = np.random.default_rng(3)
    people = [replace(draw_person(random, "stays still", "black"), skin=i % 2 * 4) for i in range(20)]
    assert NOBODY not in recognize(pictures(people))
    whole = reference_people.figure

    def incomplete(person, x, y):
        left_out = [(245, 245, 245), person.iris] if missing == "eyes" else [(140, 30, 45)]
        return [part for part in whole(person, x, y) if part[1] not in left_out]

    monkeypatch.setattr(reference_people, "figure", incomplete)
    assert recognize(pictures(people)) == [NOBODY] * len(people)


@pytest.mark.parametrize("missing", [slice(0, 4), slice(6, 10), slice(15, 16)])
def test_somebody_who_vanishes_is_nobody(missing):
    video, people = package_clips(48)
    video = video[:30].clone()
    for clip, person in zip(video, people, strict=False):
        clip[:, missing] = torch.tensor(BACKGROUNDS[person.background], dtype=torch.uint8)[:, None, None, None]
    assert recognize(video) == [NOBODY] * 30


@pytest.mark.parametrize(
    ("seen", "asked", "right"),
    [
        ({"hair_hue": 355.0}, {"hair_hue": 9.0}, True),
        ({"hair_hue": 355.0}, {"hair_hue": 11.0}, False),
        ({"hair_hue": None}, {"hair_hue": 11.0}, False),
        ({"tilt": -2.0}, {"tilt": 1.0}, True),
        ({"tilt": -2.0}, {"tilt": 1.5}, False),
        ({"tilt": None}, {"tilt": 0.0}, False),
        ({"skin": 0}, {"skin": 0}, True),
        ({"glasses": None}, {"glasses": False}, False),
        ({"style": "long"}, {"style": "short"}, False),
    ],
)
def test_compare_people(seen, asked, right):
    nobody = dict.fromkeys(("skin", "hair_hue", "style", "glasses", "expression", "tilt"))
    assert compare_people([SeenPerson(**nobody | seen)], [asked]) == [dict.fromkeys(asked, right)]
