"""Previews show the very pixels and samples of the dataset, at places computed here from the layout."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_moviegen import toybox
from diffusers_moviegen.toybox.data import TASKS
from diffusers_moviegen.toybox.previews import describe, film, sheet, sound


MARGIN, GAP = 8, 4


def samples_of(task, count=3, **options):
    return list(toybox.dataset(task, num_samples=count, **options))


def enlarged(picture):
    """A picture `(3, height, width)` as it is shown: (height, width, 3), sides of 64 doubled."""
    picture = picture.permute(1, 2, 0).numpy()
    return picture.repeat(2, axis=0).repeat(2, axis=1) if min(picture.shape[:2]) == 64 else picture


def shown(canvas, left, top, picture):
    picture = enlarged(picture)
    area = np.asarray(canvas)[top : top + picture.shape[0], left : left + picture.shape[1]]
    return np.array_equal(area, picture)


def test_descriptions_leave_out_what_does_not_apply():
    truth = {"look": "core", "shape_2": "", "glasses": True, "checkered": False, "speed": math.nan, "tilt": -7.0}
    truth |= {"skin": 0, "strikes": torch.tensor([0.5, 1.25, math.nan])}
    assert describe({"caption": "a red ball", "truth": truth}) == (
        "a red ball",
        "look: core, glasses: yes, checkered: no, tilt: -7, skin: 0, strikes: 0.500 1.250",
    )
    silent = {"strikes": torch.tensor([math.nan]), "shape": "ring"}
    assert describe({"instruction": "remove the ring", "truth": silent}) == ("remove the ring", "shape: ring")


def test_sheets_show_first_middle_and_last_frame():
    samples = samples_of("text_to_video", 4)
    image = sheet(samples)
    cell = 3 * 128 + 2 * GAP + 2 * MARGIN
    assert image.width == 3 * cell
    for i, sample in enumerate(samples[:3]):
        for k, frame in enumerate((0, 8, 15)):
            assert shown(image, i * cell + MARGIN + k * (128 + GAP), MARGIN, sample["video"][:, frame])
    # The fourth begins a second row of the same height.
    assert shown(image, MARGIN, image.height // 2 + MARGIN, samples[3]["video"][:, 0])
    # Something is written below each clip.
    assert np.asarray(image)[MARGIN + 128 + GAP : image.height // 2, MARGIN : cell - MARGIN].min() < 100


def test_sheets_of_wide_and_single_frames():
    samples = samples_of("text_to_image", 2, height=96)
    image = sheet(samples)
    assert image.width == 2 * (128 + 2 * MARGIN)
    for i, sample in enumerate(samples):
        assert shown(image, MARGIN + i * (128 + 2 * MARGIN), MARGIN, sample["image"])
    (large,) = samples_of("upscale", 1, width=192, num_frames=2)
    image = sheet([large])
    assert image.width == 2 * 192 + GAP + 2 * MARGIN
    assert shown(image, MARGIN + 192 + GAP, MARGIN, large["video"][:, 1])


def test_sheets_of_persons_begin_with_the_reference():
    (sample,) = samples_of("personalize", 1)
    image = sheet([sample])
    pictures = [sample["reference_image"], *(sample["video"][:, frame] for frame in (0, 8, 15))]
    assert image.width == 4 * 128 + 3 * GAP + 2 * MARGIN
    for i, picture in enumerate(pictures):
        assert shown(image, MARGIN + i * (128 + GAP), MARGIN, picture)


def test_sheets_of_edits_show_source_target_and_mask():
    (sample,) = samples_of("edit", 1)
    image, top = sheet([sample]), MARGIN
    mask = sample["mask"].expand(3, -1, -1, -1) * torch.tensor(255, dtype=torch.uint8)
    for clip in (sample["source"], sample["target"], mask):
        # A line with its name.
        assert np.asarray(image)[top : top + 15].min() < 100
        top += 15 + GAP
        for k, frame in enumerate((0, 8, 15)):
            assert shown(image, MARGIN + k * (128 + GAP), top, clip[:, frame])
        top += 128 + GAP


def test_sheets_of_sounds_mark_the_strikes():
    dataset = toybox.dataset("audio")
    sample = next(s for s in dataset if s["truth"]["event"] == "knocks" and s["truth"]["quality"] > 4)
    image = np.asarray(sheet([sample]))
    width, top = 3 * 128 + 2 * GAP, MARGIN + 128 + GAP
    marked = (image[top : top + 2 * 56 + GAP] == (220, 40, 40)).all(-1).sum(0)
    strikes = [time for time in sample["truth"]["strikes"].tolist() if not math.isnan(time)]
    assert np.flatnonzero(marked).tolist() == [MARGIN + round(time / 2 * width) for time in strikes]
    # The wave swings just after a strike, and hardly before the first one.
    panel = image[top : top + 56, MARGIN : MARGIN + width]
    swing = (panel == (60, 60, 90)).all(-1).sum(0)
    first = round(strikes[0] / 2 * width)
    assert swing[first + 1 : first + 6].min() > 2 * swing[: first - 1].max()


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("text_to_image", "audio")])
def test_films_show_all_samples_side_by_side(task):
    samples = samples_of(task, 2, num_frames=5)
    frames, audio = film(samples)
    assert audio is None and len(frames) == 5
    assert frames.shape[1] % 2 == frames.shape[2] % 2 == 0
    names = {"personalize": ["reference_image", "video"], "edit": ["source", "target", "mask"]}.get(task, ["video"])
    cell = 128 * len(names) + GAP * (len(names) - 1) + 2 * MARGIN
    assert frames.shape[2] == 2 * cell
    for moment in (0, 4):
        for i, sample in enumerate(samples):
            for k, name in enumerate(names):
                picture = sample[name] if name == "reference_image" else sample[name][:, moment]
                if name == "mask":
                    picture = picture.expand(3, -1, -1) * torch.tensor(255, dtype=torch.uint8)
                assert shown(frames[moment], i * cell + MARGIN + k * (128 + GAP), MARGIN, picture)


def test_films_with_sound_show_one_sample_after_another():
    samples = samples_of("audio", 3)
    frames, audio = film(samples)
    assert len(frames) == 48 and frames.shape[2] == 128 + 2 * MARGIN
    assert np.array_equal(audio, np.concatenate([sample["audio"].numpy() for sample in samples], axis=1))
    for i, sample in enumerate(samples):
        for moment in (0, 15):
            assert shown(frames[16 * i + moment], MARGIN, MARGIN, sample["video"][:, moment])


def test_sounds_are_half_a_second_apart():
    samples = samples_of("audio", 3)
    audio = sound(samples)
    assert audio.dtype == np.float32 and audio.shape == (1, 3 * 96000 + 2 * 24000)
    for i, sample in enumerate(samples):
        assert np.array_equal(audio[:, 120_000 * i : 120_000 * i + 96_000], sample["audio"].numpy())
    assert not audio[:, 96_000:120_000].any()
    # Noise that goes beyond the full scale is cut off there.
    samples[0]["audio"] = samples[0]["audio"] * 2 / samples[0]["audio"].abs().max()
    assert np.abs(sound(samples)).max() == np.abs(film(samples)[1]).max() == 1


def test_long_words_are_wrapped():
    samples = samples_of("text_to_video", 1)
    samples[0]["caption"] = "pneumonoultramicroscopicsilicovolcanoconiosis " * 8
    image = sheet(samples)
    assert isinstance(image, Image.Image) and image.width == 3 * 128 + 2 * GAP + 2 * MARGIN
    assert image.height > 128 + 4 * 15
