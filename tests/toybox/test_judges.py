"""The judge of sight against scenes whose words are known; `pytest -s` prints who is taken for whom."""

from collections import Counter
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from diffusers_moviegen.toybox.judges import FIELDS, SeenObject, Sight, compare, see
from diffusers_moviegen.toybox.scenes import draw_scenes, draw_two_object_scenes, render, sample_tuples
from diffusers_moviegen.toybox.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, core_tuples


@cache
def held_out_clips(count, num_frames=16, frame_rate=8, height=64, width=64, seed=0):
    """Clips of held-out tuples, every motion among them, and the tuples."""
    generator = torch.Generator().manual_seed(seed)
    motions = ("stays still",) if num_frames == 1 else MOTIONS
    tuples = sample_tuples(count, generator, held_out=True, motions=motions)
    return render(draw_scenes(tuples, generator), num_frames, frame_rate, height, width), tuples


def clip(colour, shape, motion, background, frames=16, seed=0):
    """One clip `(1, 3, frames, 64, 64)`."""
    scenes = draw_scenes([(colour, shape, motion, background)], torch.Generator().manual_seed(seed))
    return render(scenes, frames)


def noisy(video, sigma=6.0):
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    return (video + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def blurred(video):
    """Every frame averaged over 3 x 3 pixels."""
    frames = video.float().transpose(1, 2).flatten(0, 1)
    frames = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return frames.unflatten(0, (video.shape[0], video.shape[2])).transpose(1, 2).round().to(torch.uint8)


def confusion(asked, seen, names):
    """Rows: asked for; columns: seen, the last one for anything else."""
    counts = Counter(zip(asked, seen, strict=True))
    columns = [*names, None]
    lines = [" " * 12 + "".join(f"{str(name):>12}" for name in columns)]
    for name in names:
        lines.append(f"{name:>12}" + "".join(f"{counts[name, column] or '.':>12}" for column in columns))
    return "\n".join(lines)


def assert_judged_right(video, tuples, frame_rate):
    sights = see(video, frame_rate)
    assert len(sights) == len(tuples)
    rows = compare(sights, tuples)
    vocabulary = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS}
    for position, (field, names) in enumerate(vocabulary.items()):
        seen = [
            sight.background
            if field == "background"
            else getattr(sight.objects[0], field)
            if sight.objects
            else "nothing"
            for sight in sights
        ]
        table = confusion([words[position] for words in tuples], seen, names)
        print(f"\n{field}, {tuple(video.shape)} at {frame_rate} frames a second\n{table}")
        right = sum(row[field] for row in rows)
        assert right >= 0.99 * len(tuples), f"{field}: {right} of {len(tuples)}\n{table}"
    return rows


@pytest.mark.parametrize("treatment", ["clean", "noisy", "blurred"])
def test_base_clips(treatment):
    video, tuples = held_out_clips(120)
    video = {"clean": video, "noisy": noisy(video), "blurred": blurred(video)}[treatment]
    rows = assert_judged_right(video, tuples, 8)
    assert {words[2] for words, row in zip(tuples, rows, strict=True) if row["motion"]} == set(MOTIONS)


@pytest.mark.parametrize("treatment", ["clean", "noisy"])
@pytest.mark.parametrize(
    ("count", "num_frames", "frame_rate", "height", "width"),
    [(30, 16, 16, 64, 96), (30, 16, 16, 96, 64), (12, 32, 16, 64, 64), (8, 16, 8, 128, 128), (120, 1, 8, 64, 64)],
)
def test_other_lengths_rates_and_sizes(treatment, count, num_frames, frame_rate, height, width):
    video, tuples = held_out_clips(count, num_frames, frame_rate, height, width, seed=1)
    assert_judged_right(noisy(video) if treatment == "noisy" else video, tuples, frame_rate)


def test_all_combinations_of_still_words():
    tuples = core_tuples(True, ("stays still",)) + core_tuples(False, ("stays still",))
    video = render(draw_scenes(tuples, torch.Generator().manual_seed(2)), 1)
    assert len(tuples) == 200
    assert all(row["all"] for row in compare(see(video), tuples))


@pytest.mark.parametrize("frames", [1, 2, 16])
@pytest.mark.parametrize("sigma", [0, 6])
def test_empty_ground(frames, sigma):
    grounds = torch.tensor(list(BACKGROUNDS.values()))[:, :, None, None, None]
    video = grounds.expand(-1, -1, frames, 64, 96).to(torch.uint8)
    assert see(noisy(video, sigma)) == [Sight([], name) for name in BACKGROUNDS]


@pytest.mark.parametrize("colour", COLOURS)
def test_static_pair_of_frames(colour):
    video = clip(colour, "star", "stays still", "navy", frames=1).expand(-1, -1, 2, -1, -1)
    assert see(video) == [Sight([SeenObject(colour, "star", "stays still")], "navy")]


def test_frames_out_of_the_world():
    # Black is the nearest ground to a blacked-out clip; white is no ground at all.
    assert see(torch.zeros(1, 3, 16, 64, 64, dtype=torch.uint8)) == [Sight([], "black")]
    assert see(torch.full((1, 3, 16, 64, 64), 255, dtype=torch.uint8)) == [Sight([], None)]
    # Noise is judged, and not to show a shape.
    noise = torch.randint(0, 256, (2, 3, 16, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for sight in see(noise):
        assert all(seen.shape is None for seen in sight.objects)


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("frames_left", [4, 8, 12])
def test_half_blacked_out_clips_are_not_right(motion, frames_left):
    words = ("white", "star", motion, "pink")
    video = clip(*words)
    assert compare(see(video), [words])[0]["all"]
    video[:, :, frames_left:] = 0
    assert not compare(see(video), [words])[0]["all"]


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("missing", [slice(0, 4), slice(4, 8), slice(10, 16)])
def test_an_object_that_vanishes_does_nothing_in_the_vocabulary(motion, missing):
    video = clip("cyan", "square", motion, "brown")
    video[:, :, missing] = torch.tensor(BACKGROUNDS["brown"], dtype=torch.uint8)[:, None, None, None]
    (sight,) = see(video)
    assert sight.background == "brown"
    assert [seen.motion for seen in sight.objects] == [None]


def test_opposites_are_told_apart():
    opposites = {
        "moves left": "moves right",
        "moves up": "moves down",
        "grows": "shrinks",
        "stays still": "stays still",
        "bounces": "bounces",
    }
    opposites |= {b: a for a, b in opposites.items()}
    for motion, opposite in opposites.items():
        (sight,) = see(clip("orange", "star", motion, "navy").flip(2))
        assert sight == Sight([SeenObject("orange", "star", opposite)], "navy")
    mirrored = {"moves left": "moves right", "moves right": "moves left", "moves up": "moves up"}
    for motion, opposite in mirrored.items():
        (sight,) = see(clip("orange", "star", motion, "navy").flip(4))
        assert sight == Sight([SeenObject("orange", "star", opposite)], "navy")


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64)])
@pytest.mark.parametrize(("start", "end", "moves"), [(0.4, 0.6, False), (0.35, 0.65, True)])
def test_half_the_speed_of_a_move_decides(height, width, start, end, moves):
    # 16 stills with the object a little farther on: a move covers 0.47 of the picture from the first to the last.
    for field, direction in (("x", "moves right"), ("y", "moves down")):
        scenes = draw_scenes([("red", "circle", "stays still", "grey")] * 16, torch.Generator().manual_seed(0))
        scenes.radius[:], scenes.x[:], scenes.y[:] = 0.15, 0.5, 0.5
        getattr(scenes, field)[:, 0] = torch.linspace(start, end, 16)
        video = render(scenes, 1, 8, height, width).transpose(0, 2)
        (sight,) = see(video)
        assert sight.objects == [SeenObject("red", "circle", direction if moves else "stays still")]


@pytest.mark.parametrize("shape", ["square", "triangle", "star"])
def test_only_clockwise_spins(shape):
    video = clip("yellow", shape, "spins", "black")
    assert see(video) == [Sight([SeenObject("yellow", shape, "spins")], "black")]
    (sight,) = see(video.flip(4))
    assert (sight.objects[0].colour, sight.objects[0].motion) == ("yellow", None)


def test_figures_that_are_no_shape():
    video = torch.tensor(BACKGROUNDS["navy"], dtype=torch.uint8)[:, None, None, None].repeat(2, 1, 1, 64, 64)
    red = torch.tensor(COLOURS["red"], dtype=torch.uint8)[:, None, None, None]
    video[0, :, :, 30:34, 12:52] = red
    video[1, :, :, 20:44, 30:34] = red
    video[1, :, :, 30:34, 20:44] = red
    assert see(video) == [Sight([SeenObject("red", None, "stays still")], "navy")] * 2
    # The upright and the inverted triangle do not pass for one another.
    (sight,) = see(clip("green", "triangle", "stays still", "grey", frames=1).flip(3))
    assert sight.objects[0].shape != "triangle"


def test_two_objects_are_not_taken_for_one():
    scenes = draw_two_object_scenes(60, torch.Generator().manual_seed(0), 64, 64)
    for i, sight in enumerate(see(render(scenes, 16))):
        assert len(sight.objects) != 1 or sight.objects[0].shape is None, scenes.tuples(i)


def test_a_batch_is_judged_clip_by_clip():
    video, _ = held_out_clips(12, seed=3)
    empty = torch.zeros_like(video[:1])
    video = torch.cat([video[:5], empty, video[5:]])
    together = see(video)
    assert together == [see(video[i : i + 1])[0] for i in range(13)]
    assert together[5] == Sight([], "black")
    before = video.clone()
    see(video)
    assert torch.equal(video, before)


WORDS = ("red", "circle", "moves up", "grey")


@pytest.mark.parametrize(
    ("sight", "right"),
    [
        (Sight([SeenObject("red", "circle", "moves up")], "grey"), FIELDS),
        (Sight([SeenObject("blue", "circle", "moves up")], "grey"), ("shape", "motion", "background")),
        (Sight([SeenObject("red", "ring", "moves up")], "grey"), ("colour", "motion", "background")),
        (Sight([SeenObject("red", "circle", "moves down")], "grey"), ("colour", "shape", "background")),
        (Sight([SeenObject("red", "circle", "moves up")], "pink"), ("colour", "shape", "motion")),
        (Sight([SeenObject(None, "circle", "moves up")], "grey"), ("shape", "motion", "background")),
        (Sight([SeenObject("red", "circle", "moves up")], None), ("colour", "shape", "motion")),
        (Sight([SeenObject(None, None, None)], None), ()),
        (Sight([], "grey"), ("background",)),
        (Sight([], None), ()),
        # Two of them is not what was asked for.
        (Sight([SeenObject("red", "circle", "moves up")] * 2, "grey"), ("background",)),
    ],
)
def test_compare(sight, right):
    assert FIELDS == ("colour", "shape", "motion", "background")
    expected = {field: field in right for field in FIELDS} | {"all": len(right) == 4}
    assert compare([sight], [WORDS]) == [expected]


def test_compare_keeps_the_order_and_wants_pairs():
    good, nothing = Sight([SeenObject("red", "circle", "moves up")], "grey"), Sight([], "grey")
    assert [row["all"] for row in compare([nothing, good, nothing], [WORDS] * 3)] == [False, True, False]
    assert compare([], []) == []
    with pytest.raises(ValueError):
        compare([good], [])
