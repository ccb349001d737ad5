"""Scenes against an independent reading of the world: closed forms and brute force in float64 NumPy."""

import math
import string
from collections import Counter

import numpy as np
import pytest
import torch

from diffusers_moviegen.toybox.scenes import (
    SIZES,
    Scenes,
    draw_scenes,
    draw_two_object_scenes,
    render,
    sample_tuple_pairs,
    sample_tuples,
    signed_distance,
    trajectories,
)
from diffusers_moviegen.toybox.vocabulary import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SPINNING_SHAPES,
    TEXT_MOTIONS,
    TWO_OBJECT_MOTIONS,
    core_tuples,
    is_held_out,
)
from tests.toybox import reference_scenes


def scene(*objects, background="black", **shared):
    """One scene; an object is a dict of what differs from a white circle of radius 0.18 that stays still."""
    default = {"colour": "white", "shape": "circle", "motion": "stays still", "radius": 0.18, "x": 0.5, "y": 0.5}
    default |= {"touch_rate": 1.0, "touch_phase": 0.25} | shared
    objects = [default | changes for changes in objects or ({},)]
    words = {"colour": list(COLOURS), "shape": list(SHAPES), "motion": list(MOTIONS)}
    indices = {name: torch.tensor([[known.index(o[name]) for o in objects]]) for name, known in words.items()}
    numbers = {
        name: torch.tensor([[o[name] for o in objects]], dtype=torch.float32)
        for name in ("radius", "x", "y", "touch_rate", "touch_phase")
    }
    return Scenes(**indices, **numbers, background=torch.tensor([list(BACKGROUNDS).index(background)]))


def objects_of(scenes, index):
    """The objects of one scene as the reference wants them."""
    numbers = ("radius", "x", "y", "touch_rate", "touch_phase")
    return [
        dict(zip(("colour", "shape", "motion"), words, strict=False))
        | {name: getattr(scenes, name)[index, i].item() for name in numbers}
        for i, words in enumerate(scenes.tuples(index))
    ]


def assert_as_in_the_reference(scenes, frames, frame_rate, height, width):
    """Every pixel of the frames is within rounding of the reference, but for those whose centre lies on a seam."""
    video = render(scenes, max(frames) + 1, frame_rate, height, width).numpy()
    for i in range(len(scenes)):
        camera, background = scenes.camera[i].item(), scenes.tuples(i)[0][3]
        camera = None if camera < 0 else CAMERAS[camera]
        checkered = scenes.checkered[i].item()
        for frame in frames:
            tau = frame / frame_rate
            expected = reference_scenes.frame(
                objects_of(scenes, i), background, tau, height, width, camera, checkered, scenes.word(i)
            )
            # Half a level of rounding, and what float32 adds to places and distances.
            wrong = np.abs(video[i, :, frame] - expected).max(axis=0) >= 0.52
            if checkered:
                x, y = reference_scenes.plane_of(camera, tau, height, width)
                cells = np.stack([x, y]) / (min(height, width) / 4)
                on_seam = (np.abs(cells - cells.round()) < 1e-4).any(axis=0)
                assert on_seam.mean() < 0.1
                wrong &= ~on_seam
            assert not wrong.any(), (scenes.tuples(i), camera, scenes.word(i), frame, wrong.sum())


def coverage_of(video):
    """Share of every pixel that a white object on black covers, from the red channel (240 on 15)."""
    return (video[:, 0].double().numpy() - 15) / 225


# Time to the share of the motion done, at 8 and 16 frames a second; after two seconds it runs backwards.
@pytest.mark.parametrize(
    ("frame_rate", "shares"),
    [
        (8, {0: 0, 4: 0.25, 8: 0.5, 15: 0.9375, 16: 1, 17: 0.9375, 20: 0.75, 32: 0, 36: 0.25}),
        (16, {0: 0, 8: 0.25, 15: 0.46875, 16: 0.5, 31: 0.96875, 32: 1, 40: 0.75, 64: 0, 72: 0.25}),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (192, 128)])
def test_places_in_closed_form(frame_rate, shares, height, width):
    tau = torch.tensor([frame / frame_rate for frame in shares])
    u, side = np.array(list(shares.values())), min(height, width)
    start_x, start_y, r = 0.4 * width, 0.6 * height, 0.16 * side
    ones = np.ones_like(u)
    expected = {
        "stays still": (start_x * ones, start_y * ones, r * ones, 0 * u),
        "moves left": (0.75 * width - u * width / 2, start_y * ones, r * ones, 0 * u),
        "moves right": (0.25 * width + u * width / 2, start_y * ones, r * ones, 0 * u),
        "moves up": (start_x * ones, 0.75 * height - u * height / 2, r * ones, 0 * u),
        "moves down": (start_x * ones, 0.25 * height + u * height / 2, r * ones, 0 * u),
        "grows": (start_x * ones, start_y * ones, r * (0.5 + u), 0 * u),
        "shrinks": (start_x * ones, start_y * ones, r * (1.5 - u), 0 * u),
        "spins": (start_x * ones, start_y * ones, r * ones, 2 * np.pi * u),
    }
    for motion, path in expected.items():
        got = trajectories(scene(motion=motion, radius=0.16, x=0.4, y=0.6), tau, height, width)
        for name, value, reference in zip(("x", "y", "radius", "angle"), got, path, strict=True):
            np.testing.assert_allclose(value[0, 0].numpy(), reference, atol=1e-3, err_msg=f"{motion}: {name}")


def test_bounce_follows_the_clock_and_not_u():
    # 0.8 touches a second from phase 0.6: touches at 0.5 s, 1.75 s, 3 s, 4.25 s.
    touches, tops = [0.5, 1.75, 3.0, 4.25], [1.125, 2.375, 3.625]
    for height, width in ((64, 64), (64, 96), (96, 64)):
        bouncing = scene(motion="bounces", radius=0.15, x=0.4, y=0.5, touch_rate=0.8, touch_phase=0.6)
        x, y, radius, angle = trajectories(bouncing, torch.tensor(touches + tops + [0.0]), height, width)
        r = 0.15 * 64
        np.testing.assert_allclose(x[0, 0], 0.4 * width, atol=1e-3)
        np.testing.assert_allclose(y[0, 0, :4], 0.8 * height - r, atol=1e-3)
        np.testing.assert_allclose(y[0, 0, 4:7], 0.4 * height - r, atol=1e-3)
        np.testing.assert_allclose(y[0, 0, 7], 0.8 * height - r - math.sin(0.6 * math.pi) * 0.4 * height, atol=1e-3)
        np.testing.assert_allclose(radius[0, 0], r, atol=1e-4)
        assert not angle.any()


def test_bounce_touches_the_floor_in_the_picture():
    # At 80 pixels the floor lies between rows 63 and 64; f tau + phi is whole at 0.75 s and 1.75 s.
    bouncing = scene(motion="bounces", radius=0.2, touch_rate=1.0, touch_phase=0.25)
    coverage = coverage_of(render(bouncing, num_frames=16, height=80, width=80))[0]
    for frame, (top, bottom) in {6: (32, 63), 14: (32, 63), 2: (0, 31), 10: (0, 31)}.items():
        filled = np.nonzero(coverage[frame].max(axis=1) > 0.45)[0]
        assert (filled[0], filled[-1]) == (top, bottom), frame


@pytest.mark.parametrize(
    ("frame_rate", "height", "width", "frames"),
    [(8, 64, 64, (0, 5, 11, 21)), (16, 64, 96, (0, 7, 15, 37)), (8, 96, 64, (3, 16, 19))],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_rendering_against_brute_force(shape, frame_rate, height, width, frames):
    generator = torch.Generator().manual_seed(height + width)
    motions = [motion for motion in MOTIONS if motion != "spins" or shape in SPINNING_SHAPES]
    colours, grounds = list(COLOURS), list(BACKGROUNDS)
    tuples = [(colours[i % 8], shape, motion, grounds[i % 5]) for i, motion in enumerate(motions)]
    drawn = draw_scenes(tuples, generator)
    video = render(drawn, max(frames) + 1, frame_rate, height, width)
    assert video.dtype == torch.uint8
    assert video.shape == (len(motions), 3, max(frames) + 1, height, width)
    for i, (_, _, motion, background) in enumerate(tuples):
        for frame in frames:
            expected = reference_scenes.frame(objects_of(drawn, i), background, frame / frame_rate, height, width)
            # Half a level of rounding, and what float32 adds to places and distances.
            worst = np.abs(video[i, :, frame].numpy() - expected).max()
            assert worst < 0.52, (motion, frame, worst)


def test_antialiasing_at_chosen_pixels():
    # A white circle of radius 16 about (40, 40) on black: (row, column) and the distance of its centre to the outline.
    circle = coverage_of(render(scene(radius=0.2), 1, height=80, width=80))[0, 0]
    for row, column in ((40, 55), (40, 56), (51, 51), (51, 50), (24, 39), (23, 39), (28, 28), (40, 40), (0, 0)):
        distance = math.sqrt((row - 39.5) ** 2 + (column - 39.5) ** 2) - 16
        assert circle[row, column] == pytest.approx(min(max(0.5 - distance, 0), 1), abs=0.5 / 225 + 1e-4)
    # A square of half side 13.6: the pixels just inside its sides and corners lie 0.1 inside.
    square = coverage_of(render(scene(shape="square", radius=0.2), 1, height=80, width=80))[0, 0]
    for row, column in ((40, 53), (40, 26), (26, 40), (53, 40), (26, 26), (53, 53)):
        assert square[row, column] == pytest.approx(0.6, abs=0.5 / 225 + 1e-4)
    assert square[40, 25] == 0 and square[40, 54] == 0
    # A triangle whose tip is at (40, 24): its right side falls at 60 degrees.
    triangle = coverage_of(render(scene(shape="triangle", radius=0.2), 1, height=80, width=80))[0, 0]
    for row, column in ((26, 41), (30, 43), (30, 44), (36, 47), (36, 46), (36, 48)):
        right, down = column + 0.5 - 40, row + 0.5 - 24
        distance = right * math.cos(math.radians(30)) - down * math.sin(math.radians(30))
        assert triangle[row, column] == pytest.approx(min(max(0.5 - distance, 0), 1), abs=0.5 / 225 + 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distance_against_every_edge(shape):
    rows, columns = np.mgrid[-30:31:1.0, -30:31:1.0] + 0.1
    for radius in (4.3, 11.0, 19.2):
        got = signed_distance(
            shape,
            torch.tensor(columns, dtype=torch.float32),
            torch.tensor(rows, dtype=torch.float32),
            torch.tensor(radius),
        )
        np.testing.assert_allclose(got.numpy(), reference_scenes.distance(shape, columns, rows, radius), atol=2e-4)


def test_unknown_shape_is_named():
    with pytest.raises(ValueError, match="'hexagon'.*circle, ring"):
        signed_distance("hexagon", torch.zeros(1), torch.zeros(1), torch.ones(1))


@pytest.mark.parametrize(
    ("shape", "unit_area"),
    [
        ("circle", math.pi),
        ("ring", 0.75 * math.pi),
        ("square", 1.7**2),
        ("triangle", 3 * math.sqrt(3) / 4),
        ("star", 5 * 0.45 * math.sin(math.radians(36))),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (192, 128)])
def test_areas_in_closed_form(shape, unit_area, height, width):
    for fraction in (0.10, 0.14, 0.17, 0.20):
        radius = fraction * min(height, width)
        still = scene(shape=shape, radius=fraction, x=0.47, y=0.53)
        area = coverage_of(render(still, 1, height=height, width=width)).sum()
        # A ramp of one pixel keeps areas along straight edges; only sharp corners deviate, by a share of a pixel each.
        assert area == pytest.approx(unit_area * radius**2, rel=0.01, abs=1.5)


def test_one_corner_is_up():
    def covered(shape, x, y):
        """Coverage of the pixel at `(x, y)` radii from the centre of a large upright shape."""
        coverage = coverage_of(render(scene(shape=shape, radius=0.4), 1, height=160, width=160))[0, 0]
        return coverage[int(80 + y * 64), int(80 + x * 64)]

    for shape in ("triangle", "star"):
        assert covered(shape, 0, -0.9) == 1
        assert covered(shape, 0, -1.05) == 0
        assert covered(shape, 0, 0.6) == 0
    assert covered("triangle", 0.75, 0.43) == 1 and covered("triangle", -0.75, 0.43) == 1
    assert covered("star", 0.52, 0.72) == 1 and covered("star", -0.52, 0.72) == 1
    assert covered("square", 0.8, 0.8) == 1 and covered("square", 0, -0.9) == 0
    assert covered("ring", 0, 0) == 0 and covered("ring", 0.45, 0) == 0 and covered("ring", 0, 0.55) == 1


@pytest.mark.parametrize("shape", SPINNING_SHAPES)
def test_spin_is_clockwise(shape):
    # A twelfth of a turn (triangle, star: the upper corner goes right) after a sixth of a second. A square's corner
    # on the upper right goes down.
    spinning = scene(shape=shape, motion="spins", radius=0.4)
    coverage = coverage_of(render(spinning, 2, 6, 160, 160))[0, 1]
    direction = math.radians(45 + 30 if shape == "square" else 30)
    reach = 0.9 * 64 * (0.85 * math.sqrt(2) if shape == "square" else 1)
    x, y = reach * math.sin(direction), -reach * math.cos(direction)
    assert coverage[int(80 + y), int(80 + x)] == 1
    assert coverage[int(80 + y), int(80 - x)] == 0
    x, y, radius, angle = trajectories(spinning, torch.tensor([0.5]), 160, 160)
    assert angle.item() == pytest.approx(math.pi / 2)


def test_ground_is_flat_and_exact():
    for background, colour in BACKGROUNDS.items():
        video = render(scene(background=background, shape="star", motion="spins"), 16, 8, 64, 96)[0]
        rows, columns = np.mgrid[:64, :96] + 0.5
        far = np.hypot(columns - 48, rows - 32) > 0.18 * 64 + 1
        assert far.sum() > 4000
        outside = video.numpy()[:, :, far]
        assert (outside == np.array(colour)[:, None, None]).all()


def test_object_is_exact_inside():
    for name, colour in COLOURS.items():
        centre = render(scene(colour=name, background="pink"))[0, :, :, 32, 32]
        assert (centre == torch.tensor(colour)[:, None]).all()


def test_frame_rates_show_the_same_moments():
    generator = torch.Generator().manual_seed(3)
    scenes = draw_scenes(sample_tuples(12, generator), generator)
    slow, fast = render(scenes, 16, 8), render(scenes, 32, 16)
    assert torch.equal(fast[:, :, ::2], slow)
    assert torch.equal(render(scenes, 16, 16), fast[:, :, :16])
    assert torch.equal(render(scenes, 1), slow[:, :, :1])


def test_single_frame_shows_the_start():
    still = scene(x=0.4, y=0.6, radius=0.15)
    video = render(still, num_frames=1, height=96, width=64)
    assert video.shape == (1, 3, 1, 96, 64)
    expected = reference_scenes.frame(objects_of(still, 0), "black", 0, 96, 64)
    assert np.abs(video[0, :, 0].numpy() - expected).max() < 0.52


def test_part_of_a_batch_renders_the_same():
    generator = torch.Generator().manual_seed(4)
    scenes = draw_scenes(sample_tuples(20, generator), generator)
    video = render(scenes, 16, 8)
    picked = [17, 2, 5, 11]
    assert torch.equal(render(scenes[picked], 16, 8), video[picked])
    assert torch.equal(render(scenes[7:8], 16, 8), video[7:8])
    assert scenes[picked].tuples(1) == scenes.tuples(2)
    assert len(scenes[picked]) == 4
    pairs = draw_two_object_scenes(sample_tuple_pairs(6, generator), generator, 64, 64)
    assert torch.equal(render(pairs[4:], 8, 8), render(pairs, 8, 8)[4:])


def test_drawing_is_repeatable():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        tuples = sample_tuples(50, generator)
        drawn = draw_scenes(tuples, generator)
        return tuples, [
            vars(part)
            for part in (drawn, draw_two_object_scenes(sample_tuple_pairs(20, generator), generator, 64, 96))
        ]

    (tuples, parts), (again, same) = draw(7), draw(7)
    assert tuples == again
    for one, other in zip(parts, same, strict=True):
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
    (others, different) = draw(8)
    assert others != tuples
    assert not torch.equal(parts[0]["x"], different[0]["x"])
    # A second draw from one generator goes on instead of repeating the first.
    generator = torch.Generator().manual_seed(7)
    assert sample_tuples(50, generator) == tuples != sample_tuples(50, generator)


def test_scene_shows_its_tuple():
    words = [("purple", "ring", "grows", "navy"), ("cyan", "star", "spins", "brown")]
    scenes = draw_scenes(words, torch.Generator().manual_seed(0))
    assert [scenes.tuples(i) for i in range(2)] == [[words[0]], [words[1]]]
    video = render(scenes, 2)
    for i, (_, _, _, background) in enumerate(words):
        assert tuple(video[i, :, 0, 0, 0].tolist()) == BACKGROUNDS[background]
    assert (video[1, :, 0] == torch.tensor(COLOURS["cyan"])[:, None, None]).all(0).sum() > 20


def test_parameters_fill_their_ranges():
    generator = torch.Generator().manual_seed(5)
    scenes = draw_scenes(sample_tuples(5000, generator), generator)
    ranges = {
        "radius": (0.14, 0.20),
        "x": (0.35, 0.65),
        "y": (0.35, 0.65),
        "touch_rate": (0.7, 1.6),
        "touch_phase": (0, 1),
    }
    for name, (low, high) in ranges.items():
        values = getattr(scenes, name).double().flatten().sort().values
        assert len(values) == 5000
        assert low - 1e-6 <= values[0] and values[-1] <= high + 1e-6, name
        # Evenly: no empirical quantile is off by more than 3 % (Kolmogorov-Smirnov, p about 0.0002).
        even = torch.linspace(low, high, 5000, dtype=torch.float64)
        assert (values - even).abs().max() < 0.03 * (high - low), name
    columns = torch.stack([getattr(scenes, name).flatten() for name in ranges])
    assert (torch.corrcoef(columns) - torch.eye(5)).abs().max() < 0.06


def test_training_never_draws_held_out_tuples():
    generator = torch.Generator().manual_seed(6)
    drawn = sample_tuples(10_000, generator)
    trained = set(core_tuples(False))
    assert len(drawn) == 10_000 and set(drawn) <= trained
    assert not any(is_held_out(*words) for words in drawn)
    # All 1553 are equally likely: 6.4 times each, Poisson.
    assert len(set(drawn)) > 1535
    assert max(drawn.count(words) for words in set(drawn)) < 25
    evaluated = sample_tuples(1000, generator, held_out=True)
    assert all(is_held_out(*words) for words in evaluated) and len(set(evaluated)) > 150
    still = sample_tuples(300, generator, held_out=True, motions=("stays still",))
    assert set(still) == set(core_tuples(True, ("stays still",)))


def test_tuples_of_weighted_shapes_and_motions():
    generator = torch.Generator().manual_seed(0)
    weights = {"ring": 2, "spins": 6, "bounces": 3, "grows": 0}
    drawn = sample_tuples(10_000, generator, weights=weights)
    assert set(drawn) <= set(core_tuples(False))
    expected = Counter()
    for _, shape, motion, _ in core_tuples(False):
        expected[shape, motion] += weights.get(shape, 1) * weights.get(motion, 1)
    counts = Counter(words[1:3] for words in drawn)
    for kind, weight in expected.items():
        share = weight / expected.total()
        # Four standard deviations.
        assert abs(counts[kind] - 10_000 * share) <= 4 * math.sqrt(10_000 * share), kind


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (128, 192)])
def test_two_objects_keep_apart(height, width):
    generator = torch.Generator().manual_seed(height)
    pairs = sample_tuple_pairs(150, generator)
    scenes = draw_two_object_scenes(pairs, generator, height, width)
    assert len(scenes) == 150 and scenes.colour.shape == (150, 2)
    assert [tuple(scenes.tuples(i)) for i in range(150)] == pairs
    moments, motions = np.linspace(0, 2, 1001), set()
    side = min(height, width)
    for i in range(150):
        first, second = scenes.tuples(i)
        assert first[0] != second[0] and first[3] == second[3]
        assert not is_held_out(*first) and not is_held_out(*second)
        motions |= {first[2], second[2]}
        paths = []
        for j, (_, shape, motion, _) in enumerate((first, second)):
            assert motion != "spins" or shape in SPINNING_SHAPES
            radius, x, y = (getattr(scenes, name)[i, j].item() for name in ("radius", "x", "y"))
            assert 0.10 - 1e-6 <= radius <= 0.14 + 1e-6
            assert 0.2 - 1e-6 <= min(x, y) and max(x, y) <= 0.8 + 1e-6
            path = np.array([reference_scenes.path(motion, radius, x, y, 1, 0, t, height, width) for t in moments])
            # The corners of a square lie on a larger circle than those of a triangle or a star.
            reach = path[:, 2] * (0.85 * math.sqrt(2) if shape == "square" else 1)
            for centre, size in ((path[:, 0], width), (path[:, 1], height)):
                assert (centre - reach).min() > -1e-3 and (centre + reach).max() < size + 1e-3
            paths.append((path, reach))
        (one, reach), (other, other_reach) = paths
        apart = np.hypot(one[:, 0] - other[:, 0], one[:, 1] - other[:, 1]) - reach - other_reach
        assert apart.min() > side / 32 - 0.02, (first, second)
    assert motions == set(MOTIONS) - {"bounces"}


def test_two_objects_are_both_drawn():
    pair = scene(
        {"colour": "red", "x": 0.25, "radius": 0.12},
        {"colour": "cyan", "shape": "square", "motion": "moves down", "x": 0.75, "radius": 0.13},
        background="pink",
    )
    video = render(pair, 16, 8, 64, 96)
    for frame in (0, 9, 15):
        expected = reference_scenes.frame(objects_of(pair, 0), "pink", frame / 8, 64, 96)
        assert np.abs(video[0, :, frame].numpy() - expected).max() < 0.52


def test_sizes_of_the_world():
    assert sorted(SIZES) == sorted([(64, 64), (96, 64), (64, 96), (128, 128), (192, 128), (128, 192)])
    for height, width in SIZES:
        assert render(scene(), 2, 8, height, width).shape == (1, 3, 2, height, width)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_words_against_the_reference(height, width):
    # All letters on all grounds, in every place of words of one, two and three letters.
    letters = string.ascii_uppercase
    words = [letters[i % 26] for i in range(5)]
    words += [letters[i : i + 2] for i in range(0, 26, 2)] + [
        "".join(letters[(i + 9 * j) % 26] for j in range(3)) for i in range(26)
    ]
    tuples = [(list(COLOURS)[i % 8], "star", TEXT_MOTIONS[i % 4], list(BACKGROUNDS)[i % 5]) for i in range(len(words))]
    scenes = draw_scenes(tuples, torch.Generator().manual_seed(0), words=words)
    assert [scenes.word(i) for i in range(len(words))] == words
    assert_as_in_the_reference(scenes, (0, 3), 8, height, width)


def test_a_word_in_closed_form():
    # 64 pixels: font pixels of 2, a letter 10 wide and 14 high that ends with row 60. 128 pixels: 4, 20, 28, row 121.
    for side, pixel, left, bottom in ((64, 2, 27, 61), (128, 4, 54, 122)):
        for background, ink in (
            ("navy", 240),
            ("pink", (15, 15, 20)),
            ("grey", (15, 15, 20)),
            ("black", 240),
            ("brown", 240),
        ):
            tuples = [("red", "circle", "stays still", background)]
            video = render(draw_scenes(tuples, torch.Generator().manual_seed(0), words=["L"]), 2, 8, side, side)
            expected = np.full((3, 1, 9 * pixel, 7 * pixel), np.array(BACKGROUNDS[background])[:, None, None, None])
            ink = np.broadcast_to(ink, (3,))[:, None, None, None]
            expected[:, :, pixel : 8 * pixel, pixel : 2 * pixel] = ink
            expected[:, :, 7 * pixel : 8 * pixel, pixel : 6 * pixel] = ink
            rows = slice(bottom - 8 * pixel, min(bottom + pixel, side))
            columns = slice(left - pixel, left + 6 * pixel)
            expected = expected[:, :, : rows.stop - rows.start]
            np.testing.assert_array_equal(video[0, :, :, rows, columns], expected.repeat(2, axis=1))


@pytest.mark.parametrize(("frame_rate", "frames"), [(8, (0, 5, 15, 16, 23)), (16, (7, 31, 37))])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_cameras_against_the_reference(height, width, frame_rate, frames):
    generator = torch.Generator().manual_seed(height + width)
    cameras = [camera for camera in (None, *CAMERAS) for _ in range(3)]
    tuples = sample_tuples(len(cameras), generator)
    scenes = draw_scenes(tuples, generator, cameras=cameras, checkered=[True] * len(cameras))
    assert_as_in_the_reference(scenes, frames, frame_rate, height, width)


@pytest.mark.parametrize(
    ("camera", "places"),
    [
        # Where the corner at the centre of the picture (32, 32) and the one a cell right are at u = 0, 0.5 and 1,
        # and the same for the middle of the object, on the plane half way between them.
        (None, ((32, 48), (32, 48), (32, 48))),
        ("Pan left", ((32, 48), (40, 56), (48, 64))),
        ("Pan right", ((32, 48), (24, 40), (16, 32))),
        ("Zoom in", ((32, 48), (32, 51.2), (32, 54.4))),
        ("Zoom out", ((32, 54.4), (32, 51.2), (32, 48))),
    ],
)
def test_cameras_in_closed_form(camera, places):
    scenes = draw_scenes([("red", "circle", "stays still", "black")], torch.Generator(), None, [camera], [True])
    scenes.x[:], scenes.y[:], scenes.radius[:] = 40 / 64, 48 / 64, 0.1
    video = render(scenes, 17)[0].numpy()
    for frame, (left, right) in zip((0, 8, 16), places, strict=True):
        # Just above the middle of the picture lies row 1 of the cells: columns 1 and 3 are dark, 2 is light.
        line = video[0, frame, 31]
        light = np.array([left < column + 0.5 < right for column in range(64)])
        near = np.abs(np.arange(64) + 0.5 - (left + right) / 2) < (right - left) * 0.9
        np.testing.assert_array_equal(line[near], np.where(light, 75, 15)[near])
        red = video[0, frame] > 150
        assert np.nonzero(red.any(axis=0))[0].mean() + 0.5 == pytest.approx((left + right) / 2, abs=0.3)
        scale = (right - left) / 16
        assert red.sum() == pytest.approx(math.pi * (6.4 * scale) ** 2, rel=0.06)


def test_lighter_cells():
    # c + 0.25 (255 - c), the cells counted from the upper left corner of the picture.
    lighter = {
        "black": (75, 75, 79),
        "grey": (146, 146, 150),
        "navy": (79, 82, 124),
        "brown": (131, 109, 90),
        "pink": (240, 191, 206),
    }
    for background, light in lighter.items():
        scenes = draw_scenes([("red", "star", "stays still", background)], torch.Generator(), checkered=[True])
        picture = render(scenes, 1)[0, :, 0]
        assert tuple(picture[:, 0, 0].tolist()) == tuple(picture[:, 15, 15].tolist()) == BACKGROUNDS[background]
        for row, column in ((0, 16), (16, 0), (15, 31), (0, 63)):
            assert np.abs(picture[:, row, column].numpy() - np.array(light)).max() <= 1
            assert tuple(picture[:, row, column].tolist()) == tuple(picture[:, 0, 16].tolist())


def test_a_word_leaves_its_room():
    generator = torch.Generator().manual_seed(7)
    count = 2000
    tuples = sample_tuples(count, generator, motions=TEXT_MOTIONS)
    words = ["ABC" if i % 2 else None for i in range(count)]
    start = draw_scenes(tuples, generator, words=words).y[:, 0]
    for y, low, high in ((start[1::2], 0.30, 0.42), (start[::2], 0.35, 0.65)):
        assert low <= y.min() < low + 0.01 and high - 0.01 < y.max() <= high + 1e-6
        assert y.mean() == pytest.approx((low + high) / 2, abs=0.01)


def test_pairs_obey_the_held_out_rule():
    generator = torch.Generator().manual_seed(8)
    pairs = sample_tuple_pairs(10_000, generator)
    assert len(pairs) == 10_000
    for first, second in pairs:
        assert not is_held_out(*first) and not is_held_out(*second)
        assert first[0] != second[0] and first[3] == second[3]
    assert {words[2] for pair in pairs for words in pair} == set(TWO_OBJECT_MOTIONS)
    for first, second in sample_tuple_pairs(500, generator, held_out=True):
        assert is_held_out(*first) or is_held_out(*second)


@pytest.mark.parametrize("word", ["", "ABCD", "a", "A B", "1"])
def test_words_of_other_letters_are_refused(word):
    with pytest.raises(ValueError, match="one to three capital letters"):
        draw_scenes([("red", "star", "spins", "grey")], torch.Generator(), words=[word])


def test_scenes_without_room_are_refused():
    with pytest.raises(ValueError, match="bounces.*stays still, moves left"):
        draw_scenes([("red", "star", "bounces", "grey")], torch.Generator(), words=["A"])
    still = ("red", "star", "stays still", "grey")
    for other in (
        ("red", "ring", "grows", "grey"),
        ("blue", "ring", "grows", "pink"),
        ("blue", "ring", "bounces", "grey"),
    ):
        with pytest.raises(ValueError, match="two objects"):
            draw_two_object_scenes([(still, other)], torch.Generator(), 64, 64)
