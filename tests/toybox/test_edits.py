"""Edits against an independent reading of the world, and what source and target must share."""

import random
from functools import cache

import numpy as np
import pytest
import torch

from diffusers_moviegen.toybox.captions import EDIT_INSTRUCTIONS, sample_caption
from diffusers_moviegen.toybox.edits import EDITS, draw_edits, render_edits, task_of
from diffusers_moviegen.toybox.scenes import SIZES, render
from diffusers_moviegen.toybox.vocabulary import CORNERS, EDIT_TASKS, is_held_out
from tests.toybox.reference_scenes import distance, frame, path


SOURCE = {"colour": "red", "shape": "circle", "motion": "stays still", "background": "grey"}


@cache
def drawn_words(count, seed=0, motion=None):
    """Words of edits, as many of each, the sources of both splits."""
    rng, words = random.Random(seed), {edit: [] for edit in EDITS}
    while any(len(of_one) < count // len(EDITS) for of_one in words.values()):
        _, fields = sample_caption("edit", rng, held_out=rng.random() < 0.3)
        if motion in (None, fields["motion"]) and len(words[fields["edit"]]) < count // len(EDITS):
            words[fields["edit"]].append(fields)
    return [fields for of_one in words.values() for fields in of_one]


def draw(words, seed=0):
    return draw_edits(words, torch.Generator().manual_seed(seed))


def edit(name, **words):
    """One edit of `SOURCE` and its clips."""
    edits = draw([SOURCE | {"edit": name} | words])
    return edits, *render_edits(edits, 4)


def item_of(scenes, index):
    """The object of a scene as the reference takes it."""
    ((colour, shape, motion, _),) = scenes.tuples(index)
    numbers = {n: getattr(scenes, n)[index, 0].item() for n in ("radius", "x", "y", "touch_rate", "touch_phase")}
    return {"colour": colour, "shape": shape, "motion": motion} | numbers


def added_item(words, height, width):
    inset = 0.18 * min(height, width)
    place = {
        "x": (width - inset if words["corner"].endswith("right") else inset) / width,
        "y": (height - inset if words["corner"].startswith("bottom") else inset) / height,
    }
    return {"colour": words["new_colour"], "shape": words["new_shape"], "motion": "stays still", "radius": 0.1} | place


def inside(item, tau, height, width):
    """How far every pixel's centre is inside the object, plus half a pixel: what it covers if cut to 0 and 1."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    numbers = [item.get(name, 0.0) for name in ("radius", "x", "y", "touch_rate", "touch_phase")]
    x, y, radius, degrees = path(item["motion"], *numbers, tau, height, width)
    return 0.5 - distance(item["shape"], columns - x, rows - y, radius, degrees)


@pytest.mark.parametrize(("frame_rate", "height", "width", "frames"), [(8, 64, 64, (0, 7, 19)), (16, 64, 96, (9,))])
def test_against_brute_force(frame_rate, height, width, frames):
    words = drawn_words(10 * len(EDITS))
    edits = draw(words)
    source, target, mask = render_edits(edits, max(frames) + 1, frame_rate, height, width)
    assert source.dtype == target.dtype == torch.uint8 and mask.dtype == torch.bool
    assert source.shape == target.shape == (len(words), 3, max(frames) + 1, height, width)
    assert mask.shape == (len(words), 1, max(frames) + 1, height, width)
    assert torch.equal(source, render(edits.source, max(frames) + 1, frame_rate, height, width))
    for i, fields in enumerate(words):
        for t in frames:
            tau, name = t / frame_rate, fields["edit"]
            before, item = source[i, :, t].numpy().astype(np.float64), item_of(edits.source, i)
            depth = inside(item, tau, height, width)
            ground = fields["background"]
            if name == "black and white":
                red, green, blue = before
                expected = np.broadcast_to(0.2126 * red + 0.7152 * green + 0.0722 * blue, before.shape)
            elif name == "invert":
                expected = 255 - before
            elif name == "segmentation":
                bare = frame([], ground, tau, height, width)
                expected = bare + np.clip(depth, 0, 1) * (np.array([255.0, 0.0, 255.0])[:, None, None] - bare)
            elif name == "remove":
                expected = frame([], ground, tau, height, width)
            elif name == "add":
                added = added_item(fields, height, width)
                expected = frame([item, added], ground, tau, height, width)
                depth = inside(added, tau, height, width)
            else:
                item |= {"colour": fields.get("new_colour", item["colour"])}
                item |= {"shape": fields.get("new_shape", item["shape"])}
                expected = frame([item], fields.get("new_background", ground), tau, height, width)
                depth = np.maximum(depth, inside(item, tau, height, width))
            worst = np.abs(target[i, :, t].numpy() - expected).max()
            assert worst < 0.52, (fields, t, worst)

            if name in ("black and white", "invert"):
                assert mask[i].all()
                continue
            # A pixel may change if it is touched, or for another ground if it is not covered all over. What float32
            # adds to distances leaves a few open.
            room, slack = 1 - depth if name == "background" else depth, 1e-4
            marked = mask[i, 0, t].numpy()
            assert marked[room > slack].all() and not marked[room < -slack].any(), fields


@pytest.mark.parametrize(
    ("num_frames", "frame_rate", "height", "width"),
    [(16, 8, 64, 64), (16, 16, 64, 96), (32, 16, 96, 64), (4, 8, 128, 192), (4, 16, 192, 128)]
    + [(1, 8, height, width) for height, width in SIZES],
)
def test_nothing_changes_outside_the_mask(num_frames, frame_rate, height, width):
    words = drawn_words(2 * len(EDITS), seed=num_frames, motion="stays still" if num_frames == 1 else None)
    source, target, mask = render_edits(draw(words), num_frames, frame_rate, height, width)
    assert source.shape == (len(words), 3, num_frames, height, width)
    assert torch.equal(source.masked_fill(mask, 0), target.masked_fill(mask, 0))
    # And something does inside, in every frame.
    assert (source != target).any(dim=1).flatten(2).any(dim=2).all()


def test_frames_show_the_same_moments_at_every_rate():
    edits = draw(drawn_words(2 * len(EDITS)))
    slow, fast = render_edits(edits, 8, 8), render_edits(edits, 16, 16)
    for one, other in zip(slow, fast, strict=True):
        assert torch.equal(one, other[:, :, ::2])


def test_luma_of_named_colours():
    _, source, target, _ = edit("black and white", colour="yellow", background="navy")
    # 0.2126 240 + 0.7152 220 + 0.0722 50 = 211.98; 0.2126 20 + 0.7152 25 + 0.0722 80 = 27.91.
    assert target.unique().min() == 28 and target.unique().max() == 212
    yellow = (source == torch.tensor([240, 220, 50])[:, None, None, None]).all(dim=1)
    assert yellow.sum() > 500
    assert (target.movedim(1, -1)[yellow] == 212).all()


def test_marked_object_is_magenta_and_the_rest_unchanged():
    _, source, target, mask = edit("segmentation", background="pink")
    assert (target.movedim(1, -1)[source[:, 0] == 220] == torch.tensor([255, 0, 255])).all()
    assert 0.05 < mask.float().mean() < 0.2


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (128, 128)])
def test_added_object_is_in_its_corner(corner, height, width):
    added = {"edit": "add", "new_colour": "cyan", "new_shape": "circle", "corner": corner}
    _, target, mask = render_edits(draw([SOURCE | added]), 2, 8, height, width)
    cyan = (target[0, :, 0] == torch.tensor([50, 210, 220])[:, None, None]).all(dim=0).numpy()
    (rows, columns), side = np.nonzero(cyan), min(height, width)
    from_right, from_bottom = "right" in corner, "bottom" in corner
    x, y = columns.mean() + 0.5, rows.mean() + 0.5
    assert (width - x if from_right else x) == pytest.approx(0.18 * side, abs=0.3)
    assert (height - y if from_bottom else y) == pytest.approx(0.18 * side, abs=0.3)
    # Pixels that are touched and those that are full enclose the disc of radius 0.10.
    assert cyan.sum() < np.pi * (0.1 * side) ** 2 < mask[0, 0, 0].sum()
    assert torch.equal(mask[:, :, 0], mask[:, :, 1])


def test_added_object_is_in_front():
    added = {"edit": "add", "new_colour": "cyan", "new_shape": "square", "corner": "top left"}
    edits = draw([SOURCE | added])
    edits.source.x[:], edits.source.y[:] = 0.2, 0.2
    source, target, _ = render_edits(edits, 1)
    assert source[0, :, 0, 11, 11].tolist() == [220, 40, 40]
    assert target[0, :, 0, 11, 11].tolist() == [50, 210, 220]


def test_targets_carry_the_new_words():
    words = drawn_words(10 * len(EDITS))
    edits = draw(words)
    for i, fields in enumerate(words):
        (source,), (target,) = edits.source.tuples(i), edits.target.tuples(i)
        assert source == tuple(fields[name] for name in ("colour", "shape", "motion", "background"))
        changed = {"recolour": (0, "new_colour"), "replace": (1, "new_shape"), "background": (3, "new_background")}
        place, name = changed.get(fields["edit"], (2, "motion"))
        assert target == (*source[:place], fields[name], *source[place + 1 :])
        assert (target != source) == (fields["edit"] in changed)
        assert EDITS[edits.edit[i]] == fields["edit"]


def test_training_edits_are_never_held_out():
    rng = random.Random(1)
    words = [sample_caption("edit", rng)[1] for _ in range(2000)]
    edits = draw(words)
    for i, fields in enumerate(words):
        assert not is_held_out(*edits.source.tuples(i)[0]) and not is_held_out(*edits.target.tuples(i)[0])
        if fields["edit"] == "add":
            assert not is_held_out(fields["new_colour"], fields["new_shape"], "stays still", fields["background"])


def test_drawing_is_repeatable_and_parts_are_the_same():
    words = drawn_words(3 * len(EDITS))
    edits, again, different = draw(words, 1), draw(words, 1), draw(words, 2)
    clips = render_edits(edits, 4)
    for one, other in zip(clips, render_edits(again, 4), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(edits.source.radius, different.source.radius)
    picked = [20, 3, 11, 7]
    assert len(edits[picked]) == 4
    for whole, part in zip(clips, render_edits(edits[picked], 4), strict=True):
        assert torch.equal(whole[picked], part)
    assert edits.source.radius.min() >= 0.14 and edits.source.radius.max() <= 0.20


def test_tasks():
    assert [task_of(name) for name in EDIT_INSTRUCTIONS] == [
        "recolour",
        "replace",
        "background",
        "remove",
        "add",
        "style",
        "style",
        "segmentation",
    ]
    assert {task_of(name) for name in EDITS} == set(EDIT_TASKS)
    with pytest.raises(ValueError, match="'blur'.*recolour"):
        task_of("blur")
    with pytest.raises(ValueError, match="'blur'.*recolour"):
        draw([SOURCE | {"edit": "blur"}])
