"""Batches of pixels: what alone decides them, what they show, and that nothing held out is in them."""

import itertools

import numpy as np
import pytest
import torch

from diffusers_moviegen.toybox import captions, pixels
from diffusers_moviegen.toybox.pixels import draw_looks, draw_pixels, vary_colours
from diffusers_moviegen.toybox.scenes import sample_tuples
from diffusers_moviegen.toybox.vocabulary import BACKGROUNDS, COLOURS, is_held_out


def draw(seed, count=4, num_frames=9, **options):
    return draw_pixels(count, num_frames, 32, 40, 8, torch.Generator().manual_seed(seed), "cpu", **options)


@pytest.mark.parametrize("varied", [True, False])
@pytest.mark.parametrize("num_frames", [1, 9])
def test_batches_depend_on_the_generator_alone(num_frames, varied):
    video = draw(7, num_frames=num_frames, varied=varied)
    assert video.shape == (4, 3, num_frames, 32, 40) and video.dtype == torch.uint8
    assert video.int().max() - video.int().min() > 25
    torch.manual_seed(123)
    assert torch.equal(video, draw(7, num_frames=num_frames, varied=varied))
    assert not torch.equal(video, draw(8, num_frames=num_frames, varied=varied))


def record_scenes(monkeypatch, seeds=20, **options):
    drawn, render = [], pixels.render
    with monkeypatch.context() as patch:
        patch.setattr(pixels, "render", lambda scenes, *args: drawn.append((scenes, args[0])) or render(scenes, *args))
        for seed in range(seeds):
            draw(seed, **options)
    return drawn


def test_the_splits_do_not_mix(monkeypatch):
    for held_out in (False, True):
        for scenes, _ in record_scenes(monkeypatch, held_out=held_out):
            for index in range(len(scenes)):
                (words,) = scenes.tuples(index)
                assert is_held_out(*words) == held_out


def test_varied_scenes_have_up_to_four_objects_and_none_is_held_out(monkeypatch):
    drawn = record_scenes(monkeypatch, seeds=50, num_frames=2, varied=True)
    objects = [scenes.tuples(i) for scenes, _ in drawn for i in range(len(scenes))]
    assert {len(words) for words in objects} == {1, 2, 4}
    assert not any(is_held_out(*words) for scene in objects for words in scene)


def test_pictures_are_two_moments_of_each_scene(monkeypatch):
    drawn = record_scenes(monkeypatch, count=6, num_frames=1)
    assert {(len(scenes), num_frames) for scenes, num_frames in drawn} == {(3, 2)}


def record_looks(monkeypatch) -> list:
    """What is drawn from now on with looks: each sampler with the columns it gave."""
    calls, sample = [], pixels.Sampler.__call__

    def record(self, batch):
        columns = sample(self, batch)
        calls.append((self, columns))
        return columns

    monkeypatch.setattr(pixels.Sampler, "__call__", record)
    return calls


def tuples_of(truth: dict) -> list[tuple]:
    """Colour, shape, motion and background of the objects before and after an edit, or of one object."""
    if "edit" not in truth:
        return [(truth["colour"], truth["shape"], truth["motion"], truth["background"])]
    source = [truth[name] for name in ("colour", "shape", "motion", "background")]
    if truth["edit"] == "add":
        return [tuple(source), (truth["new_colour"], truth["new_shape"], "stays still", truth["background"])]
    target = [truth[f"new_{name}"] or truth[name] for name in ("colour", "shape")]
    return [tuple(source), (*target, truth["motion"], truth["new_background"] or truth["background"])]


def test_every_look_and_edit_is_drawn_and_none_is_held_out(monkeypatch):
    calls = record_looks(monkeypatch)
    for size, seeds in ((32, 40), (128, 12)):
        calls.clear()
        for seed in range(seeds):
            video = draw_looks(6, 2, size, size, 8, torch.Generator().manual_seed(seed))
            assert video.shape == (6, 3, 2, size, size) and video.dtype == torch.uint8
        truths = [truth for _, columns in calls for truth in columns["truth"]]
        looks = {"text", "camera", "checkered"} | ({"person"} if size == 128 else set())
        assert {truth["look"] for truth in truths if "look" in truth} == looks
        if size == 32:
            assert {truth["edit"] for truth in truths if "edit" in truth} == set(captions.EDIT_INSTRUCTIONS)
        assert {sampler.split for sampler, _ in calls} == {"train"}
        objects = [words for truth in truths if truth.get("look") != "person" for words in tuples_of(truth)]
        assert not any(is_held_out(*words) for words in objects)


def test_some_varied_batches_have_looks_and_some_of_those_are_edited(monkeypatch):
    calls = record_looks(monkeypatch)
    for seed in range(80):
        draw(seed, count=1, num_frames=2, varied=True)
    assert 0.15 < len(calls) / 80 < 0.6
    assert 0.15 < sum(sampler.task == "edit" for sampler, _ in calls) / len(calls) < 0.6
    calls.clear()
    for seed in range(10):
        draw(seed, count=1, num_frames=2)
    assert not calls


@pytest.mark.parametrize("num_frames", [1, 5])
def test_clips_with_looks_are_what_the_sampler_drew(monkeypatch, num_frames):
    """Clips as they are and edited ones after their edit, at the rate asked for; of pictures two moments each."""
    calls, found = record_looks(monkeypatch), {"edit": [], "text_to_video": []}
    for seed in itertools.count():
        calls.clear()
        video = draw(seed, num_frames=num_frames, varied=True)
        if not calls:
            continue
        ((sampler, columns),) = calls
        if any(truth.get("edit") in ("invert", "black and white") for truth in columns["truth"]):
            continue
        clips = torch.stack(columns["target" if sampler.task == "edit" else "video"])
        if num_frames == 5:
            assert sampler.frame_rate == 8 and torch.equal(video, clips)
        else:
            assert torch.equal(video[0::2, :, 0], clips[:, :, 0])
            assert torch.equal(video[1::2, :, 0], clips[:, :, 1])
        torch.manual_seed(seed)
        assert torch.equal(video, draw(seed, num_frames=num_frames, varied=True))
        found[sampler.task].append(1 / sampler.frame_rate)
        if min(map(len, found.values())) == 2:
            break
    moments = sum(found.values(), [])
    if num_frames == 1:
        assert len(set(moments)) == len(moments) and 0 < min(moments) < 0.9 < max(moments) < 2.01


def most_frequent_colours(clip: torch.Tensor) -> np.ndarray:
    """RGB of a clip `(3, frames, height, width)`, the most frequent first."""
    red, green, blue = clip.flatten(1).int()
    values, counts = np.unique((red << 16 | green << 8 | blue).numpy(), return_counts=True)
    values = values[np.argsort(-counts)]
    return np.stack([values >> 16, values >> 8 & 255, values & 255], axis=1).astype(float)


def nearest(colour: np.ndarray, palette: dict) -> str | None:
    distances = {name: np.linalg.norm(colour - np.asarray(value)) for name, value in palette.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= 70 else None


@pytest.mark.parametrize(("edit", "number"), [("invert", 80), ("black and white", 200)])
def test_edits_of_the_whole_picture_never_show_a_held_out_tuple(monkeypatch, edit, number):
    """Cyan on grey is what red on grey inverted looks like, and white what yellow looks like without colour."""
    monkeypatch.setattr(captions, "EDIT_INSTRUCTIONS", {edit: captions.EDIT_INSTRUCTIONS[edit]})
    calls = record_looks(monkeypatch)
    edits, kept = 0, 0
    for seed in itertools.count():
        calls.clear()
        video = draw_looks(40, 2, 48, 48, 8, torch.Generator().manual_seed(seed))
        ((sampler, columns),) = calls
        if sampler.task != "edit":
            continue
        for clip, source, target, truth in zip(
            video, columns["source"], columns["target"], columns["truth"], strict=True
        ):
            held_out = []
            for shown in (clip, target):
                ground, colour = most_frequent_colours(shown)[:2]
                words = nearest(colour, COLOURS), truth["shape"], truth["motion"], nearest(ground, BACKGROUNDS)
                held_out.append(None not in words and is_held_out(*words))
            assert not held_out[0]
            assert torch.equal(clip, source if held_out[1] else target)
            kept += held_out[1]
        edits += len(video)
        if edits == number:
            break
    # Of the edits of the training split 6 % and 1.2 %.
    assert 0 < kept < 16


def test_both_moments_of_a_scene_are_recoloured_alike():
    for seed in range(20):
        for first, second in draw(seed, count=8, num_frames=1, varied=True).unflatten(0, (4, 2)):
            colours = [{tuple(colour) for colour in most_frequent_colours(picture)[:2]} for picture in (first, second)]
            assert colours[0] & colours[1]


def test_recolouring_never_makes_a_held_out_tuple():
    generator = torch.Generator().manual_seed(0)
    tuples = sample_tuples(400, generator)
    # Object colour in the upper half, ground in the lower, of one pixel each.
    painted = torch.tensor([[COLOURS[words[0]], BACKGROUNDS[words[3]]] for words in tuples], dtype=torch.uint8)
    video = painted.permute(0, 2, 1)[:, :, None, :, None]
    varied = vary_colours(video, [[words] for words in tuples], generator)
    changed = 0
    for clip, original, (_, shape, motion, _) in zip(varied, video, tuples, strict=True):
        changed += not torch.equal(clip, original)
        colour, ground = (np.asarray(value) for value in clip[:, 0, :, 0].T.tolist())
        near = [
            (name, background)
            for name, value in COLOURS.items()
            for background, other in BACKGROUNDS.items()
            if np.linalg.norm(colour - value) == min(np.linalg.norm(colour - v) for v in COLOURS.values()) <= 70
            and np.linalg.norm(ground - other) == min(np.linalg.norm(ground - v) for v in BACKGROUNDS.values()) <= 70
        ]
        assert not any(is_held_out(name, shape, motion, background) for name, background in near)
    assert 120 < changed < 300
