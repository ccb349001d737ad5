"""Batches of pixels: what alone decides them, what they show, and that nothing held out is in them."""

import numpy as np
import pytest
import torch

from diffusers_moviegen.toybox import pixels
from diffusers_moviegen.toybox.pixels import draw_pixels, vary_colours
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


def record_scenes(monkeypatch, **options):
    drawn, render = [], pixels.render
    with monkeypatch.context() as patch:
        patch.setattr(pixels, "render", lambda scenes, *args: drawn.append((scenes, args[0])) or render(scenes, *args))
        for seed in range(20):
            draw(seed, **options)
    return drawn


def test_the_splits_do_not_mix(monkeypatch):
    for held_out in (False, True):
        for scenes, _ in record_scenes(monkeypatch, held_out=held_out):
            for index in range(len(scenes)):
                (words,) = scenes.tuples(index)
                assert is_held_out(*words) == held_out


def test_varied_scenes_have_up_to_four_objects_and_none_is_held_out(monkeypatch):
    objects = [scenes.tuples(i) for scenes, _ in record_scenes(monkeypatch, varied=True) for i in range(len(scenes))]
    assert {len(words) for words in objects} == {1, 2, 4}
    assert not any(is_held_out(*words) for scene in objects for words in scene)


def test_pictures_are_two_moments_of_each_scene(monkeypatch):
    drawn = record_scenes(monkeypatch, count=6, num_frames=1)
    assert {(len(scenes), num_frames) for scenes, num_frames in drawn} == {(3, 2)}


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
