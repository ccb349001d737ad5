"""Short runs of the script that trains the temporal autoencoder: both stages, resume, data, errors."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_moviegen import AutoencoderKLMovieGen
from diffusers_moviegen.toybox.scenes import sample_tuples
from diffusers_moviegen.toybox.vocabulary import BACKGROUNDS, COLOURS, is_held_out
from tests.training_examples.scripts import (
    load_script,
    run,
    run_and_record_losses,
    run_without_av_and_datasets,
)


SMALL = {
    "block_out_channels": [4, 4, 8, 8],
    "norm_num_groups": 4,
    "height": 32,
    "width": 40,
    "num_frames": 9,
    "image_batch_size": 4,
    "video_batch_size": 2,
    "lr_warmup_steps": 2,
}


@pytest.fixture(scope="module")
def script():
    return load_script("train_tae")


@pytest.fixture(scope="module")
def image_run(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tae_image")
    run(script, stage="image", output_dir=folder, max_train_steps=3, mixed_precision="bf16", **SMALL)
    return folder


@pytest.fixture(scope="module")
def video_run(script, image_run, tmp_path_factory):
    """The folder of a run over clips, and all scenes drawn in it as (drawn by validate, scenes, number of frames)."""
    folder, drawn, validating = tmp_path_factory.mktemp("tae"), [], []
    with pytest.MonkeyPatch.context() as patch:
        render, validate = script.render, script.validate

        def record_render(scenes, num_frames, *args):
            drawn.append((bool(validating), scenes, num_frames))
            return render(scenes, num_frames, *args)

        def record_validate(*args):
            validating.append(True)
            figures = validate(*args)
            validating.clear()
            return figures

        patch.setattr(script, "render", record_render)
        patch.setattr(script, "validate", record_validate)
        run(
            script,
            stage="video",
            image_autoencoder=image_run / "vae",
            output_dir=folder,
            max_train_steps=12,
            validation_steps=6,
            checkpointing_steps=4,
            outlier_weight=0.1,
            mixed_precision="bf16",
            **SMALL,
        )
    return folder, drawn


def test_image_stage_writes_an_image_autoencoder(image_run):
    model = AutoencoderKL.from_pretrained(image_run / "vae")
    assert model.config.latent_channels == 16 and tuple(model.config.block_out_channels) == (4, 4, 8, 8)
    assert all(parameter.isfinite().all() and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert json.loads((image_run / "arguments.json").read_text())["mixed_precision"] == "bf16"


def test_video_stage_writes_a_model_with_the_statistics_of_its_latents(script, video_run):
    model = AutoencoderKLMovieGen.from_pretrained(video_run[0] / "vae")
    mean, std = torch.tensor(model.config.latents_mean), torch.tensor(model.config.latents_std)
    assert mean.shape == std.shape == (16,)
    # Fresh draws of the world, in the script's mixture of two batches of clips to one of pictures.
    args = script.Arguments(output_dir="", **SMALL)
    latents = []
    for seed in range(30):
        video = script.draw_pixels(args, seed % 3 == 0, seed, "cpu")
        with torch.no_grad():
            latents.append(model.encode(video).latent_dist.sample().transpose(0, 1).flatten(1))
    fresh_std, fresh_mean = torch.std_mean(torch.cat(latents, dim=1), dim=1)
    torch.testing.assert_close(fresh_std, std, rtol=0.2, atol=0)
    assert ((fresh_mean - mean).abs() < 0.25 * std).all()


def test_video_stage_writes_sheets_and_checkpoints(video_run):
    folder = video_run[0]
    names = {path.name for path in (folder / "samples").iterdir()}
    assert names == {f"step_{step:06d}_{kind}.png" for step in (6, 12) for kind in ("images", "clips")}
    # An original above its reconstruction from each of eight batches, all four pictures or nine frames.
    for kind, columns in (("images", 4), ("clips", 9)):
        sheet = np.asarray(Image.open(folder / "samples" / f"step_000012_{kind}.png"))
        assert sheet.shape == (16 * 32, columns * 40, 3)
    assert {path.name for path in folder.glob("*checkpoint*")} == {"checkpoint-8", "checkpoint-12"}


def test_held_out_scenes_are_for_validation_only(video_run):
    training, validation = [], []
    for in_validation, scenes, _ in video_run[1]:
        (validation if in_validation else training).extend(scenes.tuples(i) for i in range(len(scenes)))
    # 12 steps and 48 batches for the statistics of the latents; 8 batches of each kind in two validations.
    assert len(training) == (12 + 48) * 2 and len(validation) == 2 * (8 + 8) * 2
    assert not any(is_held_out(*words) for objects in training for words in objects)
    assert all(is_held_out(*words) for (words,) in validation)
    assert max(len(objects) for objects in training) > 1


def test_three_batches_of_clips_follow_one_of_pictures(video_run):
    """A picture batch is made of two frames of each scene, at some moments of its motion."""
    frames = [num_frames for in_validation, _, num_frames in video_run[1] if not in_validation]
    assert frames[:12] == [2, 9, 9, 9] * 3


def test_clips_start_from_the_inflated_image_model(script, image_run, tmp_path):
    """With a learning rate of zero the result still treats one frame as the image model does."""
    run(
        script,
        stage="video",
        image_autoencoder=image_run / "vae",
        output_dir=tmp_path,
        max_train_steps=2,
        learning_rate=0.0,
        **SMALL,
    )
    image_model = AutoencoderKL.from_pretrained(image_run / "vae")
    model = AutoencoderKLMovieGen.from_pretrained(tmp_path / "vae")
    pictures = script.draw_pixels(script.Arguments(output_dir="", **SMALL), True, 0, "cpu")
    with torch.no_grad():
        latents = model.encode(pictures).latent_dist.mode()
        expected = image_model.encode(pictures[:, :, 0]).latent_dist.mode()
        torch.testing.assert_close(latents[:, :, 0], expected, atol=1e-5, rtol=0)
        decoded, expected = model.decode(latents).sample, image_model.decode(expected).sample
        torch.testing.assert_close(decoded[:, :, 0], expected, atol=1e-5, rtol=0)


def test_decoder_stage_keeps_the_latents(script, video_run, tmp_path):
    """A backbone trained on the old latents goes on with the new decoder."""
    start = video_run[0] / "vae"
    run(script, stage="decoder", autoencoder=start, output_dir=tmp_path, max_train_steps=2, **SMALL)
    before, after = (AutoencoderKLMovieGen.from_pretrained(folder) for folder in (start, tmp_path / "vae"))
    assert after.config.latents_mean == before.config.latents_mean
    assert after.config.latents_std == before.config.latents_std
    for name, value in after.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(value, before.state_dict()[name])
    assert not torch.equal(after.decoder.conv_in.spatial.weight, before.decoder.conv_in.spatial.weight)
    assert str(start) not in (tmp_path / "vae" / "config.json").read_text()


def test_a_resumed_run_is_the_uninterrupted_one(script, image_run, tmp_path, monkeypatch):
    arguments = {
        "stage": "video",
        "image_autoencoder": image_run / "vae",
        "max_train_steps": 8,
        "validation_steps": 4,
        "checkpointing_steps": 3,
        **SMALL,
    }
    losses = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "whole", **arguments)
    before = run_and_record_losses(script, monkeypatch, 5, output_dir=tmp_path / "parts", **arguments)
    assert not (tmp_path / "parts" / "vae").exists()
    arguments["resume_from_checkpoint"] = "latest"
    after = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "parts", **arguments)
    assert (len(losses), len(before), len(after)) == (8, 5, 5)
    assert before == pytest.approx(losses[:5], abs=1e-6) and after == pytest.approx(losses[3:], abs=1e-6)

    whole, parts = (AutoencoderKLMovieGen.from_pretrained(tmp_path / name / "vae") for name in ("whole", "parts"))
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), atol=1e-6, rtol=0)
    assert parts.config.latents_mean == pytest.approx(whole.config.latents_mean, abs=1e-6)
    assert parts.config.latents_std == pytest.approx(whole.config.latents_std, abs=1e-6)

    # A finished run has nothing left to do, and its result stays what it was.
    assert run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "parts", **arguments) == []
    again = AutoencoderKLMovieGen.from_pretrained(tmp_path / "parts" / "vae")
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), atol=1e-6, rtol=0)


def test_batches_depend_on_the_seed_alone(script):
    args = script.Arguments(output_dir="", **SMALL)
    for images, shape in ((True, (4, 3, 1, 32, 40)), (False, (2, 3, 9, 32, 40))):
        video = script.draw_pixels(args, images, 7, "cpu")
        assert video.shape == shape and video.dtype == torch.float32
        assert video.min() >= -1 and video.max() <= 1 and video.max() - video.min() > 0.2
        torch.manual_seed(123)
        assert torch.equal(video, script.draw_pixels(args, images, 7, "cpu"))
        assert not torch.equal(video, script.draw_pixels(args, images, 8, "cpu"))


def test_trains_without_av_and_datasets(tmp_path):
    run_without_av_and_datasets(
        "train_tae", tmp_path, stage="image", output_dir=tmp_path / "run", max_train_steps=1, **SMALL
    )
    AutoencoderKL.from_pretrained(tmp_path / "run" / "vae")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": "image", "image_autoencoder": "vae"}, "--image_autoencoder is for --stage video"),
        ({"stage": "decoder"}, "--stage decoder goes on from --autoencoder"),
        ({"stage": "video", "image_autoencoder": "a", "autoencoder": "b"}, "both given; start from one of them"),
        ({"image_batch_size": 3}, "--image_batch_size is 3: use a multiple of 2"),
        ({"validation_steps": 0}, "--validation_steps is 0: it must be at least 1"),
        ({"height": 36}, "--height 36 and --width 40 must be multiples of 8"),
        ({"stage": "video", "image_autoencoder": "missing"}, "--image_autoencoder: 'missing' has no config.json"),
        ({"autoencoder": "missing"}, "--autoencoder: 'missing' has no config.json"),
        ({"resume_from_checkpoint": "missing"}, "no checkpoint at 'missing'"),
    ],
)
def test_mistakes_are_named(script, tmp_path, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(script, output_dir=tmp_path, **(SMALL | arguments))
    assert not (tmp_path / "vae").exists()


def test_models_of_the_other_stage_are_refused(script, image_run, tmp_path):
    with pytest.raises(OSError, match="--autoencoder: .* holds a AutoencoderKL; .* AutoencoderKLMovieGen"):
        run(script, stage="video", autoencoder=image_run / "vae", output_dir=tmp_path, **SMALL)


def test_recolouring_never_makes_a_held_out_tuple(script):
    generator = torch.Generator().manual_seed(0)
    tuples = sample_tuples(400, generator)
    # Object colour in the upper half, ground in the lower, of one pixel each.
    pixels = torch.tensor([[COLOURS[words[0]], BACKGROUNDS[words[3]]] for words in tuples], dtype=torch.uint8)
    video = pixels.permute(0, 2, 1)[:, :, None, :, None]
    varied = script.vary_colours(video, [[words] for words in tuples], generator)
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
