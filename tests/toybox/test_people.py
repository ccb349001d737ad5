"""People against an independent reading of the world: areas, places and colours in closed form, float64 NumPy."""

import colorsys
import dataclasses
import math

import numpy as np
import pytest
import torch

from diffusers_moviegen.toybox.people import (
    EXPRESSIONS,
    HAIR_STYLES,
    SKINS,
    People,
    _distance_from_ground,
    draw_people,
    redraw_pose,
    render_people,
    render_references,
)
from diffusers_moviegen.toybox.vocabulary import BACKGROUNDS, MOTIONS, PERSON_MOTIONS


SKIN, HAIR, IRIS = (222, 175, 135), (30, 60, 210), (40, 180, 70)
EYE_WHITE, GLASSES, MOUTH = (245, 245, 245), (20, 20, 25), (140, 30, 45)
IDENTITY = ("skin", "hair", "style", "iris", "glasses")
POSE = ("expression", "tilt", "light")


def person(style="short", expression="neutral", motion="stays still", background="grey", **changes):
    """One person, upright and in the middle, without glasses unless `changes` say otherwise."""
    numbers = {"radius": 0.26, "x": 0.5, "y": 0.5, "touch_rate": 1.0, "touch_phase": 0.25}
    numbers |= {name: changes.pop(name) for name in tuple(changes) if name in numbers}
    looks = {"skin": SKINS.index(SKIN), "hair": HAIR, "iris": IRIS, "glasses": False, "tilt": 0.0, "light": 1.0}
    looks |= changes
    return People(
        skin=torch.tensor([looks["skin"]]),
        hair=torch.tensor([looks["hair"]], dtype=torch.float32),
        style=torch.tensor([HAIR_STYLES.index(style)]),
        iris=torch.tensor([looks["iris"]], dtype=torch.float32),
        glasses=torch.tensor([looks["glasses"]]),
        expression=torch.tensor([EXPRESSIONS.index(expression)]),
        tilt=torch.tensor([looks["tilt"]], dtype=torch.float32),
        light=torch.tensor([looks["light"]], dtype=torch.float32),
        motion=torch.tensor([[MOTIONS.index(motion)]]),
        background=torch.tensor([list(BACKGROUNDS).index(background)]),
        **{name: torch.tensor([[value]], dtype=torch.float32) for name, value in numbers.items()},
    )


def group(*people):
    return People(**{f.name: torch.cat([getattr(p, f.name) for p in people]) for f in dataclasses.fields(People)})


def equal(first, second):
    return all(torch.equal(getattr(first, f.name), getattr(second, f.name)) for f in dataclasses.fields(People))


def words(count):
    motions, backgrounds = PERSON_MOTIONS, list(BACKGROUNDS)
    return [(motions[i % len(motions)], backgrounds[i % len(backgrounds)]) for i in range(count)]


def picture(people, height=128, width=128):
    return render_people(people, 1, 8, height, width)[0, :, 0].numpy()


def of_colour(image, colour, tolerance=0):
    """Mask of the pixels of `image` `(3, height, width)` that have a colour."""
    return (np.abs(image.astype(int) - np.array(colour)[:, None, None]) <= tolerance).all(0)


def centroid(mask):
    """`(x, y)` in pixels, pixel centres at + 0.5."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean() + 0.5, rows.mean() + 0.5])


def turned(x, y, degrees):
    """Clockwise on the screen: what is on the right goes down."""
    turn = math.radians(degrees)
    return np.array([x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)])


def ellipse_segment(a, b, level):
    """Area of the part of an ellipse above the horizontal `level * b` over its centre."""
    return a * b * (math.acos(level) - level * math.sqrt(1 - level**2))


def arc(a, b, start, end):
    """Length of an ellipse's outline between two parameters."""
    t = np.linspace(start, end, 4001)
    return np.hypot(np.diff(a * np.cos(t)), np.diff(b * np.sin(t))).sum()


def mouth_shape(expression):
    """Area and length of the outline."""
    if expression == "neutral":
        return 0.44 * 0.12, 2 * (0.44 + 0.12)
    if expression == "open":
        return math.pi * 0.17 * 0.22, arc(0.17, 0.22, 0, 2 * math.pi)
    halves = {radius: math.acos(0.08 / radius) for radius in (0.36, 0.24)}
    area = ellipse_segment(0.36, 0.36, 0.08 / 0.36) - ellipse_segment(0.24, 0.24, 0.08 / 0.24)
    ends = 2 * (math.sqrt(0.36**2 - 0.08**2) - math.sqrt(0.24**2 - 0.08**2))
    return area, sum(2 * radius * half for radius, half in halves.items()) + ends


def spike_shape():
    """Area of one tuft outside the cap and the length of its two sides there.

    Where the hair's ellipse is a circle of radius 1, the tuft's side runs from (0.97, 13 degrees) to (1.3, 0 degrees).
    """
    foot = np.array([0.97 * math.sin(math.radians(13)), 0.97 * math.cos(math.radians(13))])
    along = np.linspace(0, 1, 20001)[:, None]
    side = foot * (1 - along) + np.array([0, 1.3]) * along
    side = side[np.hypot(*side.T) >= 1]
    angle, distance = np.arctan2(side[:, 0], side[:, 1]), np.hypot(*side.T)
    area = 2 * np.trapezoid((distance**2 - 1) / 2, -angle)
    return area * 0.92 * 1.15, 2 * np.hypot(*np.diff(side, axis=0).T).sum()


def bridge_outside_rings():
    y = np.linspace(-0.045, 0.045, 2001)
    return np.trapezoid(2 * (0.32 - np.sqrt(0.305**2 - y**2)), y)


def box_beside_face():
    """Area of one box of long hair outside the face: below the top of the box, right of x = 0.5."""
    x = np.linspace(0.5, 1.0, 20001)
    half_height = np.sqrt(np.clip(1 - (x / 0.8) ** 2, 0, None))
    return 0.5 * 1.23 - np.trapezoid(half_height + np.minimum(half_height, 0.23), x)


def expected_shapes(style, expression, glasses):
    """Visible area and length of the outline, in units of the radius, of everything that has one colour."""
    cap_edge = 2 * 0.92 * math.sqrt(1 - 0.2**2)
    hair = [ellipse_segment(0.92, 1.15, 0.2), arc(0.92, 1.15, math.asin(0.2), math.pi - math.asin(0.2)) + cap_edge]
    if style == "spiky":
        hair = [hair[0] + 5 * spike_shape()[0], hair[1] + 5 * spike_shape()[1]]
    if style == "long":
        hair = [hair[0] + 2 * box_beside_face(), hair[1] + 2 * (2 * 1.23 + 1.0)]
    mouth = mouth_shape(expression)
    # Lenses do not touch one another: the gap between the rings is 0.03 wide.
    frame = [2 * math.pi * (0.305**2 - 0.215**2) + bridge_outside_rings(), 4 * math.pi * (0.305 + 0.215)]
    frame = frame if glasses else [0.0, 0.0]
    skin_area = math.pi * 0.8 - ellipse_segment(0.8, 1.0, 0.23) - 2 * math.pi * 0.16**2 - mouth[0] - frame[0]
    skin_edge = arc(0.8, 1.0, 0, 2 * math.pi) + 4 * math.pi * 0.16 + mouth[1] + frame[1]
    return {
        HAIR: hair,
        SKIN: [skin_area, skin_edge],
        IRIS: [2 * math.pi * 0.10**2, 4 * math.pi * 0.10],
        EYE_WHITE: [2 * math.pi * (0.16**2 - 0.10**2), 4 * math.pi * (0.16 + 0.10)],
        MOUTH: mouth,
        GLASSES: frame,
    }


@pytest.mark.parametrize("tilt", [0.0, -13.0])
@pytest.mark.parametrize(
    ("style", "expression", "glasses"),
    [("short", "neutral", False), ("long", "smile", True), ("spiky", "open", True), ("spiky", "smile", False)],
)
def test_visible_area_of_every_part(style, expression, glasses, tilt):
    side, radius = 1024, 0.3
    image = picture(person(style, expression, glasses=glasses, tilt=tilt, radius=radius), side, side)
    scale = radius * side
    for colour, (area, edge) in expected_shapes(style, expression, glasses).items():
        # Half a pixel inside an outline is blended, so it does not have the colour itself.
        expected = area * scale**2 - 0.5 * edge * scale
        tolerance = 0.001 * area * scale**2 + 0.12 * edge * scale + 2
        assert abs(of_colour(image, colour).sum() - expected) < tolerance, (colour, expected)


@pytest.mark.parametrize("tilt", [0.0, 15.0, -9.0])
def test_places_of_eyes_and_mouth(tilt):
    height, width, x, y = 512, 640, 0.45, 0.53
    scale, centre = 0.26 * 512, np.array([0.45 * 640, 0.53 * 512])
    mouths = {
        "neutral": 0.55,
        "open": 0.57,
        # Moment of the part of a ring below y = 0.46: 2/3 of the cubes of the half chords, over its area.
        "smile": 0.38 + 2 / 3 * ((0.36**2 - 0.08**2) ** 1.5 - (0.24**2 - 0.08**2) ** 1.5) / mouth_shape("smile")[0],
    }
    for expression, level in mouths.items():
        image = picture(person(expression=expression, tilt=tilt, x=x, y=y), height, width)
        mouth = of_colour(image, MOUTH)
        assert np.abs(centroid(mouth) - centre - scale * turned(0, level, tilt)).max() < 0.4
        rows, columns = np.nonzero(of_colour(image, IRIS))
        for side in (-1, 1):
            eye = centre + scale * turned(side * 0.32, 0.08, tilt)
            near = np.hypot(columns + 0.5 - eye[0], rows + 0.5 - eye[1]) < 0.2 * scale
            assert near.sum() > 400
            assert abs(columns[near].mean() + 0.5 - eye[0]) < 0.15 and abs(rows[near].mean() + 0.5 - eye[1]) < 0.15


# Points in units of the radius, well inside what is seen there.
SEEN = {
    (0.0, 0.2): SKIN,
    (0.0, 0.9): SKIN,
    (0.6, 0.3): SKIN,  # in front of long hair
    (0.75, -0.18): SKIN,
    (0.0, -0.18): SKIN,
    (0.0, -0.28): HAIR,  # in front of the face
    (0.0, -1.1): HAIR,
    (-0.85, -0.28): HAIR,
    (0.32, 0.08): IRIS,
    (-0.39, 0.08): IRIS,
    (-0.45, 0.08): EYE_WHITE,
    (0.32, 0.21): EYE_WHITE,
    (0.0, 1.05): None,
    (0.0, -1.2): None,
    (0.86, -0.05): None,
    (0.65, 0.9): None,
}
SEEN_WITH = {
    ("style", "short"): {(-0.75, 0.6): None},
    ("style", "long"): {
        (0.65, 0.9): HAIR,
        (-0.55, 0.95): HAIR,
        (0.86, -0.05): HAIR,
        (0.95, -0.18): HAIR,
        (0.45, 0.95): None,
    },
    ("style", "spiky"): {
        (0.0, -1.2): HAIR,
        (0.0, -1.43): HAIR,
        (0.92 * 1.25 * math.sin(math.pi / 6), -1.15 * 1.25 * math.cos(math.pi / 6)): HAIR,
        (-0.92 * 1.25 * math.sin(math.pi / 3), -1.15 * 1.25 * math.cos(math.pi / 3)): HAIR,
        (0.92 * 1.15 * math.sin(math.pi / 12), -1.15 * 1.15 * math.cos(math.pi / 12)): None,
        (0.0, -1.55): None,
    },
    ("glasses", True): {
        (0.0, 0.08): GLASSES,
        (0.0, 0.113): GLASSES,
        (0.0, 0.047): GLASSES,
        (0.32, 0.34): GLASSES,
        (-0.58, 0.08): GLASSES,
        (0.32, -0.18): GLASSES,
        (0.32, 0.08): IRIS,
        (-0.32, 0.27): SKIN,
        (0.0, 0.137): SKIN,
    },
    ("expression", "neutral"): {(0.2, 0.57): MOUTH, (-0.2, 0.51): MOUTH, (0.25, 0.55): SKIN, (0.0, 0.65): SKIN},
    ("expression", "smile"): {
        (0.0, 0.72): MOUTH,
        (0.3, 0.48): MOUTH,
        (-0.3, 0.44): SKIN,
        (0.0, 0.55): SKIN,
        (0.0, 0.78): SKIN,
    },
    ("expression", "open"): {(0.0, 0.75): MOUTH, (-0.14, 0.57): MOUTH, (0.0, 0.39): MOUTH, (0.2, 0.57): SKIN},
}


@pytest.mark.parametrize("tilt", [0.0, 14.0, -15.0])
@pytest.mark.parametrize("with_what", SEEN_WITH, ids=str)
def test_what_is_in_front(with_what, tilt):
    side, scale = 512, 0.28 * 512
    shown = person(**dict([with_what]), radius=0.28, tilt=tilt)
    image = picture(shown, side, side)
    for place, colour in (SEEN | SEEN_WITH[with_what]).items():
        x, y = side / 2 + scale * turned(*place, tilt)
        expected = BACKGROUNDS["grey"] if colour is None else colour
        assert tuple(image[:, int(y), int(x)]) == expected, (place, with_what)


def distance_to_ellipse(x, y, a, b):
    """Signed distance, negative inside, by brute force over the outline."""
    t = np.linspace(0, 2 * math.pi, 100001)
    outline = np.stack([a * np.cos(t), b * np.sin(t)], 1)
    nearest = np.array([np.hypot(outline[:, 0] - p, outline[:, 1] - q).min() for p, q in zip(x, y, strict=True)])
    return np.where((x / a) ** 2 + (y / b) ** 2 < 1, -nearest, nearest)


@pytest.mark.parametrize(
    ("part", "a", "b", "level", "expression"),
    [("face", 0.8, 1.0, 0.0, "smile"), ("hair", 0.92, 1.15, 0.0, "smile"), ("mouth", 0.17, 0.22, 0.57, "open")],
)
def test_ellipses_are_smoothed_by_their_distance(part, a, b, level, expression):
    """Coverage of every pixel on an outline, against exact distances, in the smallest pictures."""
    side, tilt = 64, 8.0
    shown = person(expression=expression, radius=0.24, x=0.507, y=0.493, tilt=tilt)
    image, scale = picture(shown, side, side).astype(float), 0.24 * side
    front, behind = {
        "face": (SKIN, BACKGROUNDS["grey"]),
        "hair": (HAIR, BACKGROUNDS["grey"]),
        "mouth": (MOUTH, SKIN),
    }[part]
    rows, columns = np.mgrid[:side, :side] + 0.5
    x, y = turned(columns - 0.507 * side, rows - 0.493 * side, -tilt)
    # The part of the outline that nothing else comes near.
    alone = {"face": y > 0.0, "hair": y < -0.23 * scale - 1.5, "mouth": y > 0}[part]
    distance = np.full((side, side), np.inf)
    near = alone & (np.abs(np.hypot(x / a, (y - level * scale) / b) - scale) < 2 / min(a, 1))
    distance[near] = distance_to_ellipse(x[near], y[near] - level * scale, a * scale, b * scale)
    edge = np.abs(distance) < 0.6
    assert edge.sum() > 10
    alpha = np.clip(0.5 - distance[edge], 0, 1)
    expected = np.array(behind)[:, None] + alpha * (np.array(front) - behind)[:, None]
    contrast = np.abs(np.array(front) - behind).max()
    assert np.abs(image[:, edge] - expected).max() < 0.51 + 0.005 * contrast


def test_straight_edges_are_smoothed_by_their_distance():
    """The cap's edge at y = -0.23, the mouth's at 0.55 +- 0.06 and the hair's outer one at x = 1, upright."""
    side, centre_x, centre_y = 128, 0.503, 0.497
    image = picture(person("long", radius=0.27, x=centre_x, y=centre_y)).astype(float)
    scale = 0.27 * side
    for level, above, below in ((-0.23, HAIR, SKIN), (0.49, SKIN, MOUTH), (0.61, MOUTH, SKIN)):
        column = int(centre_x * side)
        for row in range(side):
            below_edge = row + 0.5 - (centre_y * side + level * scale)
            if abs(below_edge) < 1.4:
                alpha = np.clip(0.5 + below_edge, 0, 1)
                expected = np.array(above) * (1 - alpha) + np.array(below) * alpha
                assert np.abs(image[:, row, column] - expected).max() < 0.52
    row = int(centre_y * side + 0.7 * scale)
    for column in range(side):
        outside = column + 0.5 - (centre_x * side + scale)
        if abs(outside) < 1.4:
            alpha = np.clip(0.5 - outside, 0, 1)
            expected = np.array(HAIR) * alpha + np.array(BACKGROUNDS["grey"]) * (1 - alpha)
            assert np.abs(image[:, row, column] - expected).max() < 0.52


def test_corners_are_smoothed_by_their_distance():
    """Round a corner of the long hair's box, and at the tip of the topmost tuft, which is 56 degrees wide."""
    # The corners lie 0.3 pixels before the centre of a pixel in both directions, where they cover little of it.
    side, scale = 128, 0.27 * 128
    centre = np.array([0.5051, 0.4971]) * side
    feet = [(0.92 * 0.97 * math.sin(turn), -1.15 * 0.97 * math.cos(turn)) for turn in np.radians([-13, 13])]
    for style, corner, ends in (
        ("long", (1.0, 1.0), [(1.0, -0.23), (0.5, 1.0)]),
        ("spiky", (0.0, -1.495), feet),
    ):
        image = picture(person(style, radius=0.27, x=0.5051, y=0.4971)).astype(float)
        corner = centre + scale * np.array(corner)
        ends = [centre + scale * np.array(end) for end in ends]
        for row, column in np.ndindex(side, side):
            place = np.array([column + 0.5, row + 0.5])
            if np.hypot(*(place - corner)) > 2.5:
                continue
            distances, sides = [], []
            for end in ends:
                along = np.clip((place - corner) @ (end - corner) / ((end - corner) @ (end - corner)), 0, 1)
                distances.append(np.hypot(*(place - corner - along * (end - corner))))
                normal = np.array([corner[1] - end[1], end[0] - corner[0]])
                # Inside is where the other edge is.
                other = ends[0] if end is ends[1] else ends[1]
                sides.append(((place - corner) @ normal) * ((other - corner) @ normal) > 0)
            alpha = np.clip(0.5 + min(distances) * (1 if all(sides) else -1), 0, 1)
            expected = np.array(HAIR) * alpha + np.array(BACKGROUNDS["grey"]) * (1 - alpha)
            assert np.abs(image[:, row, column] - expected).max() < 0.52, (style, row, column)


def test_skins():
    assert SKINS == ((240, 205, 190), (222, 175, 135), (190, 132, 82), (150, 108, 84), (120, 72, 38), (82, 58, 52))
    for index, skin in enumerate(SKINS):
        assert tuple(picture(person(skin=index, background="navy"))[:, 70, 64]) == skin


def test_extent_of_hair_styles():
    """Left, top, right and bottom of what is not ground, in units of the radius."""
    cap_end = 0.92 * math.sqrt(1 - 0.2**2)
    tuft = 0.92 * 1.3 * math.sin(math.pi / 3)
    expected = {"short": (cap_end, -1.15, 1.0), "long": (1.0, -1.15, 1.0), "spiky": (tuft, -1.495, 1.0)}
    for style, (right, top, bottom) in expected.items():
        image = picture(person(style, radius=0.28), 512, 512)
        scale = 0.28 * 512
        rows, columns = np.nonzero(~of_colour(image, BACKGROUNDS["grey"]))
        # Edges end within half a pixel of the outline; the tip of a tuft is thinner than a pixel.
        assert abs(columns.max() + 1 - (256 + right * scale)) < 1.5, style
        assert abs(columns.min() - (256 - right * scale)) < 1.5, style
        assert abs(rows.min() - (256 + top * scale)) < 1.5, style
        assert abs(rows.max() + 1 - (256 + bottom * scale)) < 1.5, style


@pytest.mark.parametrize("light", [0.85, 0.97, 1.15])
def test_light_scales_the_figure_and_clips(light):
    hair, iris, skin = (230.0, 120.5, 40.25), (28.7, 191.25, 28.7), SKINS[0]
    shown = person("long", "open", hair=hair, iris=iris, skin=0, glasses=True, light=light, background="pink")
    image = picture(shown, 256, 256)
    seen = {(0, 0.25): skin, (0, -0.7): hair, (0.32, 0.08): iris, (0.45, 0.08): EYE_WHITE, (0, 0.08): GLASSES}
    seen[0, 0.57] = MOUTH
    for place, colour in seen.items():
        x, y = 128 + 0.26 * 256 * np.array(place)
        expected = np.minimum(255, light * np.array(colour))
        assert np.abs(image[:, int(y), int(x)] - expected).max() < 0.51, place
    assert tuple(image[:, 2, 2]) == BACKGROUNDS["pink"]
    assert tuple(image[:, -1, -1]) == BACKGROUNDS["pink"]
    assert (light * 245 > 255) == (image.max() == 255)


def least_distance(colours, ground):
    """Least distance between colours `(count, 3)` and a ground over all lights, by brute force."""
    lights = np.linspace(0.85, 1.15, 1201)[:, None, None]
    return np.linalg.norm(np.minimum(255, lights * colours) - np.array(ground), axis=-1).min(0)


def test_identities_keep_their_distance_from_the_ground():
    people = draw_people(words(2000), torch.Generator().manual_seed(5))
    skins, hair = np.array(SKINS, dtype=float)[people.skin.numpy()], people.hair.double().numpy()
    kept_skins, backgrounds = {}, people.background.numpy()
    for index, (name, ground) in enumerate(BACKGROUNDS.items()):
        here = backgrounds == index
        assert here.sum() == 400
        assert least_distance(skins[here], ground).min() > 60, name
        # Hair goes as near as allowed.
        assert 60 < least_distance(hair[here], ground).min() < 70, name
        kept_skins[name] = set(people.skin[torch.from_numpy(here)].tolist())
    for name, ground in BACKGROUNDS.items():
        allowed = least_distance(np.array(SKINS, dtype=float), ground) > 60
        assert kept_skins[name] == set(np.flatnonzero(allowed)), name
    # The rule is not idle: some skins never appear on some grounds.
    assert any(len(skins) < len(SKINS) for skins in kept_skins.values())


def test_distance_counts_what_the_light_clips():
    rng = np.random.default_rng(3)
    colours, grounds = rng.uniform(20, 255, (3000, 3)), rng.uniform(0, 255, (3000, 3))
    # Bright grounds and saturated colours, where clipping keeps a colour near the ground in strong light.
    colours[:1000, 0], grounds[:1000, 0] = 250, 235
    found = _distance_from_ground(torch.from_numpy(colours).float(), torch.from_numpy(grounds).float()).numpy()
    # The brute force steps over the least by half a step of 0.00025 at most.
    expected = least_distance(colours, grounds)
    assert (found < expected + 1e-3).all() and (found > expected - 0.06).all()


def test_rejected_identities_are_drawn_again_as_a_whole():
    """What is accepted is the share of free draws that pass: hair colour stays independent of style and glasses."""
    people = draw_people([("stays still", "black")] * 4000, torch.Generator().manual_seed(6))
    values = people.hair.max(dim=1).values / 255
    # Dark hair is rejected on black whatever its style, and no style is preferred.
    rng = np.random.default_rng(0)
    free = np.array(
        [
            np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 255
            for hue, saturation, value in zip(
                rng.random(4000), rng.uniform(0.5, 0.9, 4000), rng.uniform(0.25, 0.9, 4000), strict=True
            )
        ]
    )
    free = free[least_distance(free, BACKGROUNDS["black"]) > 60]
    assert abs(values.mean().item() - free.max(1).mean() / 255) < 0.012
    for style in range(len(HAIR_STYLES)):
        assert abs(values[people.style == style].mean() - values.mean()) < 0.025
        assert abs((people.style == style).float().mean() - 1 / 3) < 0.03


def test_draws_cover_every_option_and_range():
    people = draw_people([("bounces", "navy")] * 3000, torch.Generator().manual_seed(7))
    assert len(people) == 3000
    assert set(people.skin.tolist()) == set(range(6))
    assert set(people.style.tolist()) == set(range(3))
    assert set(people.expression.tolist()) == set(range(3))
    assert abs(people.glasses.float().mean() - 0.5) < 0.04
    for expression in range(3):
        assert abs((people.expression == expression).float().mean() - 1 / 3) < 0.04
    ranges = {"tilt": (-15, 15), "light": (0.85, 1.15), "radius": (0.24, 0.28), "x": (0.42, 0.58), "y": (0.42, 0.58)}
    ranges |= {"touch_rate": (0.7, 1.6), "touch_phase": (0, 1)}
    for name, (low, high) in ranges.items():
        values = getattr(people, name)
        margin = 0.01 * (high - low)
        assert low - 1e-5 <= values.min() < low + margin and high - margin < values.max() <= high + 1e-5, name
        assert abs(values.mean() - (low + high) / 2) < 3 * margin, name
        assert values.shape == ((3000,) if name in POSE else (3000, 1))
    hair = np.array([colorsys.rgb_to_hsv(*(colour / 255)) for colour in people.hair.double().numpy()])
    iris = np.array([colorsys.rgb_to_hsv(*(colour / 255)) for colour in people.iris.double().numpy()])
    assert np.abs(iris[:, 1:] - (0.85, 0.75)).max() < 1e-5
    assert 0.5 - 1e-5 <= hair[:, 1].min() < 0.51 and 0.89 < hair[:, 1].max() <= 0.9 + 1e-5
    assert 0.25 - 1e-5 <= hair[:, 2].min() < 0.27 and 0.89 < hair[:, 2].max() <= 0.9 + 1e-5
    # Every iris hue is as likely as any other; hair hues all occur, blue ones less often on navy.
    assert np.histogram(iris[:, 0], 12, (0, 1))[0].min() > 200
    assert np.histogram(hair[:, 0], 12, (0, 1))[0].min() > 100
    assert (people.motion == MOTIONS.index("bounces")).all()
    assert (people.background == list(BACKGROUNDS).index("navy")).all()


def test_cross_paired_keeps_the_identity_and_changes_the_pose():
    people = draw_people(words(200), torch.Generator().manual_seed(8))
    before = dataclasses.replace(people)
    other = redraw_pose(people, torch.Generator().manual_seed(9))
    assert equal(people, before)
    for field in dataclasses.fields(People):
        if field.name not in POSE:
            assert torch.equal(getattr(people, field.name), getattr(other, field.name)), field.name
    assert (people.tilt != other.tilt).all() and (people.light != other.light).all()
    assert 0.5 < (people.expression != other.expression).float().mean() < 0.83
    assert other.tilt.abs().max() <= 15 and 0.85 <= other.light.min() and other.light.max() <= 1.15
    images, others = render_references(people[:5]), render_references(other[:5])
    assert (images != others).flatten(1).any(1).all()


@pytest.mark.parametrize("side", [64, 128, 512])
def test_reference_image(side):
    """The figure alone on grey, face at (0.50, 0.54), r = 0.32, in the people's own pose, wherever they are."""
    tilt, light = 11.0, 0.9
    pose = {"style": "spiky", "expression": "open", "tilt": tilt, "light": light}
    shown = group(
        person(radius=0.24, x=0.42, background="pink", **pose),
        person(radius=0.28, x=0.58, background="black", motion="moves up", **pose),
    )
    images = render_references(shown, side)
    assert images.shape == (2, 3, side, side) and images.dtype == torch.uint8
    assert torch.equal(images[0], images[1])
    image, scale, centre = images[0].numpy(), 0.32 * side, np.array([0.50, 0.54]) * side
    seen = {(0, 0.25): SKIN, (0, -0.7): HAIR, (0, 0.57): MOUTH, (0.32, 0.08): IRIS, (-0.32, 0.08): IRIS}
    for place, colour in seen.items():
        x, y = centre + scale * turned(*place, tilt)
        assert np.abs(image[:, int(y), int(x)] - light * np.array(colour)).max() < 0.51
    border = np.concatenate([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], axis=1)
    assert (border == 128).all()
    mouth = centre + scale * turned(0, 0.57, tilt)
    found = centroid(of_colour(image, np.array(MOUTH) * light, 1))
    assert np.abs(found - mouth).max() < (0.2 if side == 512 else 0.6)
    # The lowest point of a tilted ellipse lies sqrt((a sin)^2 + (b cos)^2) below its centre.
    rows = np.nonzero(~of_colour(image, (128, 128, 128)))[0]
    reach = math.hypot(0.8 * math.sin(math.radians(tilt)), math.cos(math.radians(tilt)))
    assert abs(rows.max() + 1 - (centre[1] + scale * reach)) < 1.5


def expected_centre(motion, radius, x, y, rate, phase, tau, height, width):
    u = (tau / 2) % 2
    u = 2 - u if u > 1 else u
    place = [x * width, y * height]
    if motion == "moves left":
        place[0] = width * (0.5 + 0.25 * (0.5 - u))
    elif motion == "moves right":
        place[0] = width * (0.5 + 0.25 * (u - 0.5))
    elif motion == "moves up":
        place[1] = height * (0.5 + 0.25 * (0.5 - u))
    elif motion == "moves down":
        place[1] = height * (0.5 + 0.25 * (u - 0.5))
    elif motion == "bounces":
        r = radius * min(height, width)
        place[1] = 0.80 * height - r - abs(math.sin(math.pi * (rate * tau + phase))) * 0.20 * height
    return np.array(place)


@pytest.mark.parametrize(
    ("height", "width", "num_frames", "frame_rate"), [(128, 128, 16, 8), (192, 128, 16, 16), (128, 192, 40, 8)]
)
@pytest.mark.parametrize("motion", PERSON_MOTIONS)
def test_motions(motion, height, width, num_frames, frame_rate):
    """Both irises together are centred 0.08 r below the face's centre, turned with it."""
    rate, phase, radius, x, y, tilt = 1.3, 0.2, 0.25, 0.46, 0.55, -10.0
    shown = person(motion=motion, radius=radius, x=x, y=y, touch_rate=rate, touch_phase=phase, tilt=tilt)
    # Nothing else is green: weigh every pixel by how much it is.
    shown = dataclasses.replace(shown, iris=torch.tensor([[0.0, 255.0, 0.0]]))
    video = render_people(shown, num_frames, frame_rate, height, width)
    assert video.shape == (1, 3, num_frames, height, width) and video.dtype == torch.uint8
    rows, columns = np.mgrid[:height, :width] + 0.5
    for frame in range(num_frames):
        image = video[0, :, frame].double().numpy()
        green = np.clip(image[1] - np.maximum(image[0], image[2]) - 20, 0, None)
        found = np.array([(columns * green).sum(), (rows * green).sum()]) / green.sum()
        centre = expected_centre(motion, radius, x, y, rate, phase, frame / frame_rate, height, width)
        expected = centre + radius * min(height, width) * turned(0, 0.08, tilt)
        assert np.abs(found - expected).max() < 0.2, frame


@pytest.mark.parametrize("motion", PERSON_MOTIONS)
def test_every_frame_is_the_picture_of_its_place(motion):
    """Frames that share a painting show what a picture of its own would, also where the border cuts the hair."""
    height, width = 128, 192
    shown = person("spiky", motion=motion, glasses=True, tilt=7.0, radius=0.28, x=0.43, y=0.421, touch_rate=0.9)
    video = render_people(shown, 16, 8, height, width)
    for frame in range(16):
        x, y = expected_centre(motion, 0.28, 0.43, 0.421, 0.9, 0.25, frame / 8, height, width)
        still = picture(person("spiky", glasses=True, tilt=7.0, radius=0.28, x=x / width, y=y / height), height, width)
        # A place in float32 is right to a few 1e-6 pixels.
        assert np.abs(video[0, :, frame].numpy().astype(int) - still).max() <= 1, frame


def test_figures_cut_by_the_border():
    """The window of a larger picture: same figure, ground beyond it, nothing wrapped around."""
    shown = person("long", x=0.05, y=0.02, radius=0.25)
    image = picture(shown, 128, 128)
    large = picture(person("long", x=(64 + 0.05 * 128) / 256, y=(64 + 0.02 * 128) / 256, radius=0.125), 256, 256)
    assert np.abs(image.astype(int) - large[:, 64:192, 64:192]).max() <= 1
    assert of_colour(image, HAIR).any() and of_colour(image[:, 64:], BACKGROUNDS["grey"]).all()


def test_batches_are_deterministic_and_independent():
    people = draw_people(words(30), torch.Generator().manual_seed(11))
    again = draw_people(words(30), torch.Generator().manual_seed(11))
    assert equal(people, again) and not equal(people, draw_people(words(30), torch.Generator().manual_seed(12)))
    state = torch.random.get_rng_state()
    video, references = render_people(people), render_references(people)
    redraw_pose(people, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(video, render_people(again)) and torch.equal(references, render_references(again))
    # A clip does not depend on who else is in the batch.
    for i in (0, 7, 29):
        assert torch.equal(video[i : i + 1], render_people(people[i : i + 1]))
        assert torch.equal(references[i : i + 1], render_references(people[[i]]))
    assert len(people[3:9]) == 6 and torch.equal(people[3:9].iris, people.iris[3:9])


def test_one_person_from_a_generator_of_its_own():
    """The sample of a seed is the same whatever was drawn before."""
    for seed, (motion, background) in enumerate(words(20)):
        first, second = (draw_people([(motion, background)], torch.Generator().manual_seed(seed)) for _ in range(2))
        assert equal(first, second)
        assert first.hair.shape == (1, 3) and first.x.shape == (1, 1)
        assert MOTIONS[first.motion[0, 0]] == motion and list(BACKGROUNDS)[first.background[0]] == background


def test_unknown_words():
    with pytest.raises(ValueError, match="a person cannot do 'spins': use one of stays still,"):
        draw_people([("spins", "grey")], torch.Generator())
    with pytest.raises(ValueError, match="unknown background 'beige': use one of black,"):
        draw_people([("bounces", "beige")], torch.Generator())
