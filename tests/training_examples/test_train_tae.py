"""Short runs of the script that trains the temporal autoencoder: stages, losses, data, resume, pushing, errors."""

import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import tarfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_moviegen import AutoencoderKLMovieGen
from diffusers_moviegen.toybox import pixels
from diffusers_moviegen.toybox.vocabulary import is_held_out
from diffusers_moviegen.training import TrainingStopped, add_latent_noise
from tests.hub_server import WRITE_TOKEN, HubServer
from tests.training.films import write_film
from tests.training_examples.scripts import (
    EXAMPLES,
    command_line,
    load_script,
    record_decoded,
    run,
    run_and_record_losses,
    run_without_av_and_datasets,
)


MODEL = {"block_out_channels": [4, 4, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}

SIZES = {
    "resolution": 36,
    "aspect_ratios": 1.25,
    "lengths": 9,
    "frame_rate": 8,
    "image_batch_size": 4,
    "video_batch_size": 2,
    "lr_warmup_steps": 2,
    "statistics_batches": 2,
}

SMALL = {"toybox": True, **MODEL, **SIZES}

ADVERSARY = {"adversarial_weight": 0.5, "adversarial_start": 2, "discriminator_channels": 4}


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
    """The folder of a run with all losses, and the tuples of each scene drawn in it and the frames of each batch.

    Both by whether validate drew them; of an edited clip the tuples before and after.
    """
    folder, validating = tmp_path_factory.mktemp("tae"), []
    drawn, frames = {True: [], False: []}, {True: [], False: []}
    with pytest.MonkeyPatch.context() as patch:
        render, validate, draw_words, draw_pixels = (
            pixels.render,
            script.validate,
            pixels.Sampler.draw_words,
            script.draw_pixels,
        )

        def record_pixels(count, num_frames, *args, **kwargs):
            frames[bool(validating)].append(num_frames)
            return draw_pixels(count, num_frames, *args, **kwargs)

        def record_render(scenes, *args):
            drawn[bool(validating)].extend(scenes.tuples(i) for i in range(len(scenes)))
            return render(scenes, *args)

        def record_words(self, index):
            caption, words = draw_words(self, index)
            source = {name: words[name] for name in ("colour", "shape", "motion", "background")}
            target = source | {name[4:]: word for name, word in words.items() if name.startswith("new_")}
            if words.get("edit") == "add":
                target["motion"] = "stays still"
            drawn[bool(validating)].append([tuple(source.values()), tuple(target.values())])
            return caption, words

        def record_validate(*args):
            validating.append(True)
            figures = validate(*args)
            validating.clear()
            return figures

        patch.setattr(pixels, "render", record_render)
        patch.setattr(pixels.Sampler, "draw_words", record_words)
        patch.setattr(script, "draw_pixels", record_pixels)
        patch.setattr(script, "validate", record_validate)
        run(
            script,
            stage="video",
            image_autoencoder=image_run / "vae",
            output_dir=folder,
            max_train_steps=12,
            validation_steps=6,
            checkpointing_steps=4,
            mse_weight=4,
            chroma_weight=8,
            colour_weight=1,
            outlier_weight=0.1,
            report_to="tensorboard",
            **ADVERSARY,
            **SMALL | {"statistics_batches": 8},
        )
    return folder, drawn, frames


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A table of four films and four pictures, no two alike, and one file that is neither."""
    folder = tmp_path_factory.mktemp("clips")
    generator = np.random.default_rng(0)
    rows = ["file_name,caption"]
    for index in range(4):
        ground = generator.integers(0, 200, 3)
        frames = [np.full((48, 64, 3), ground + 4 * frame, dtype=np.uint8) for frame in range(14)]
        write_film(folder / f"film_{index}.mp4", frames, rate=8)
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"picture_{index}.png")
        rows += [f"film_{index}.mp4,a film", f"picture_{index}.png,a picture"]
    (folder / "notes.mp4").write_text("no film")
    (folder / "metadata.csv").write_text("\n".join([*rows, "notes.mp4,none"]) + "\n")
    return folder


def printed(capsys) -> list[dict]:
    return [json.loads(line) for line in re.findall(r"^{.*}$", capsys.readouterr().out, re.M)]


def same_weights(first, second) -> None:
    torch.testing.assert_close(load_file(first), load_file(second), atol=1e-6, rtol=0)


# --- Stages -----------------------------------------------------------------------------------------------------


def test_image_stage_writes_an_image_autoencoder(image_run):
    model = AutoencoderKL.from_pretrained(image_run / "vae")
    assert model.config.latent_channels == 16 and tuple(model.config.block_out_channels) == (4, 4, 8, 8)
    assert all(parameter.isfinite().all() and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert json.loads((image_run / "arguments.json").read_text())["mixed_precision"] == "bf16"


def test_video_stage_writes_a_model_with_the_statistics_of_its_latents(script, video_run):
    model = AutoencoderKLMovieGen.from_pretrained(video_run[0] / "vae")
    mean, std = torch.tensor(model.config.latents_mean), torch.tensor(model.config.latents_std)
    assert mean.shape == std.shape == (16,)
    # Fresh draws of the world, in the script's mixture of three batches of clips to one of pictures.
    latents = []
    for seed in range(32):
        count, num_frames = (2, 9) if seed % 4 else (4, 1)
        generator = torch.Generator().manual_seed(seed)
        video = pixels.draw_pixels(count, num_frames, 32, 40, 8, generator, "cpu")
        with torch.no_grad():
            sample = model.encode(video.float() / 127.5 - 1).latent_dist.sample(generator)
        latents.append(sample.transpose(0, 1).flatten(1))
    fresh_std, fresh_mean = torch.std_mean(torch.cat(latents, dim=1), dim=1)
    torch.testing.assert_close(fresh_std, std, rtol=0.25, atol=0)
    assert ((fresh_mean - mean).abs() < 0.35 * std).all()


def test_statistics_are_those_of_draws_from_the_posteriors(script):
    """Against all the draws laid side by side, from batches of different sizes and shapes."""
    model = AutoencoderKLMovieGen(latent_channels=3, **MODEL).eval()
    with torch.no_grad():
        model.quant_conv.weight *= 5
    generator = torch.Generator().manual_seed(0)
    videos = [
        torch.randint(256, (count, 3, frames, 32, 40), generator=generator) for count, frames in [(2, 9), (3, 1)]
    ]
    batches = ({"video": video} for video in itertools.cycle(videos))
    mean, std = script.measure_latents(model, batches, 2, script.Accelerator())
    draws = []
    with torch.no_grad():
        for video in videos:
            posterior = model.encode(video.float() / 127.5 - 1).latent_dist
            for _ in range(400):
                draws.append(posterior.sample(generator).transpose(0, 1).flatten(1))
    expected_std, expected_mean = torch.std_mean(torch.cat(draws, dim=1), dim=1)
    assert std == pytest.approx(expected_std.tolist(), rel=0.02)
    assert mean == pytest.approx(expected_mean.tolist(), abs=0.02 * max(std))


def test_video_stage_writes_sheets_and_checkpoints(video_run):
    folder = video_run[0]
    names = {path.name for path in (folder / "samples").iterdir()}
    assert names == {f"step_{step:06d}_{kind}.png" for step in (6, 12) for kind in ("images", "clips")}
    # An original above its reconstruction from each of eight batches, all four pictures or nine frames.
    for kind, columns in (("images", 4), ("clips", 9)):
        sheet = np.asarray(Image.open(folder / "samples" / f"step_000012_{kind}.png"))
        assert sheet.shape == (16 * 32, columns * 40, 3)
    assert {path.name for path in folder.glob("*checkpoint*")} == {"checkpoint-8", "checkpoint-12"}
    assert not (folder / "partial-vae").exists()


def test_trackers_get_every_loss(video_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(video_run[0] / "logs" / "train_tae")).Reload()
    tags = events.Tags()["scalars"]
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in tags}
    for name in ("loss", "l1", "perceptual", "mse", "chroma", "kl", "outlier", "colour", "learning_rate"):
        assert steps[name] == list(range(1, 13)), name
    assert steps["adversarial"] == steps["discriminator"] == list(range(3, 13))
    for name in ("psnr_images", "psnr_clips", "ssim_images", "ssim_clips"):
        assert steps[name] == [6, 12]
    parts = sum(
        events.Scalars(name)[-1].value for name in set(tags) & {*"l1 mse chroma kl outlier colour perceptual".split()}
    )
    parts += events.Scalars("adversarial")[-1].value + events.Scalars("discriminator")[-1].value
    assert events.Scalars("loss")[-1].value == pytest.approx(parts, rel=1e-4)


def test_the_adversary_learns_at_the_rate_of_the_autoencoder(video_run):
    """The eighth of twelve steps, the first two of which warm up, is half-way down the cosine."""
    optimizer = torch.load(video_run[0] / "checkpoint-8" / "optimizer_1.bin", weights_only=True)
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.5 * 1e-4)


def test_held_out_scenes_are_for_validation_only(video_run):
    training, validation = video_run[1][False], video_run[1][True]
    # 12 steps and 8 batches for the statistics of the latents; 8 batches of each kind in two validations.
    assert len(training) == (12 + 8) * 2 and len(validation) == 2 * (8 + 8) * 2
    assert not any(is_held_out(*words) for objects in training for words in objects)
    assert all(is_held_out(*words) for (words,) in validation)
    assert max(len(objects) for objects in training) > 1


def test_three_batches_of_clips_follow_one_of_pictures(video_run):
    assert video_run[2][False][:12] == [1, 9, 9, 9] * 3


def test_clips_start_from_the_inflated_image_model(script, image_run, tmp_path):
    """With a learning rate of zero the result still treats one frame as the image model does."""
    run(
        script,
        stage="video",
        image_autoencoder=image_run / "vae",
        output_dir=tmp_path,
        max_train_steps=1,
        learning_rate=0.0,
        **SMALL,
    )
    image_model = AutoencoderKL.from_pretrained(image_run / "vae")
    model = AutoencoderKLMovieGen.from_pretrained(tmp_path / "vae")
    pictures = torch.rand(4, 3, 1, 32, 40) * 2 - 1
    with torch.no_grad():
        latents = model.encode(pictures).latent_dist.mode()
        expected = image_model.encode(pictures[:, :, 0]).latent_dist.mode()
        torch.testing.assert_close(latents[:, :, 0], expected, atol=1e-5, rtol=0)
        decoded, expected = model.decode(latents).sample, image_model.decode(expected).sample
        torch.testing.assert_close(decoded[:, :, 0], expected, atol=1e-5, rtol=0)


def test_decoder_stage_keeps_the_latents(script, video_run, tmp_path):
    """A backbone trained on the old latents goes on with the new decoder."""
    start = video_run[0] / "vae"
    run(
        script,
        stage="decoder",
        autoencoder=start,
        output_dir=tmp_path,
        max_train_steps=4,
        gradient_checkpointing=True,
        **ADVERSARY,
        **SMALL,
    )
    before, after = (AutoencoderKLMovieGen.from_pretrained(folder) for folder in (start, tmp_path / "vae"))
    assert after.config.latents_mean == before.config.latents_mean
    assert after.config.latents_std == before.config.latents_std
    for name, value in after.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(value, before.state_dict()[name])
    assert not torch.equal(after.decoder.conv_in.spatial.weight, before.decoder.conv_in.spatial.weight)
    assert str(start) not in (tmp_path / "vae" / "config.json").read_text()


def test_noise_in_the_latents_that_are_decoded(script, video_run, monkeypatch):
    """The latents are returned without it, and without a generator there is none."""
    model = AutoencoderKLMovieGen.from_pretrained(video_run[0] / "vae")
    model.register_to_config(latents_std=[1.0 + channel for channel in range(model.config.latent_channels)])
    seen = record_decoded(model, monkeypatch)
    reconstruct = script.Reconstruction(model, latent_noise=0.5)
    video = torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    _, posterior, latents = reconstruct(video, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(latents, posterior.sample(generator))
    assert torch.equal(seen[-1], add_latent_noise(latents, model.config.latents_std, 0.5, generator))
    _, _, latents = reconstruct(video)
    assert seen[-1] is latents


def test_noise_needs_the_deviations_of_the_latents(script, video_run, tmp_path):
    model = AutoencoderKLMovieGen.from_pretrained(video_run[0] / "vae")
    model.register_to_config(latents_std=None)
    model.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="--latent_noise: the config of '.*vae' has no latents_std; pass an auto"):
        run(
            script, stage="decoder", autoencoder=tmp_path / "vae", output_dir=tmp_path / "run", latent_noise=1, **SMALL
        )
    assert not (tmp_path / "run").exists()


# --- Steps ------------------------------------------------------------------------------------------------------


def test_the_adversary_starts_late_and_changes_the_autoencoder(script, image_run, tmp_path, monkeypatch):
    arguments = {
        **SMALL,
        "stage": "video",
        "image_autoencoder": image_run / "vae",
        "max_train_steps": 4,
        "ema_decay": 0,
        "lr_warmup_steps": 0,
    }
    without = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "without", **arguments)
    with_it = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "with", **arguments, **ADVERSARY)
    # Two steps alone, then each has a loss of the adversary behind its own.
    assert (len(without), len(with_it)) == (4, 6)
    assert with_it[:2] == without[:2]
    weights = [
        load_file(tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors") for name in ("without", "with")
    ]
    assert any(not torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_the_weight_of_the_adversary_is_fixed_or_adaptive(script, image_run, tmp_path, monkeypatch):
    """Its pull at the last layer is the weight times that of the reconstruction, or what the weight says."""
    terms = []
    total = torch.Tensor.backward

    def record(self, *args, **kwargs):
        terms.append(self.item())
        total(self, *args, **kwargs)

    ratios = []
    measured = script.adaptive_weight
    monkeypatch.setattr(
        script, "adaptive_weight", lambda *args: ratios.append(measured(*args).item()) or torch.tensor(ratios[-1])
    )
    monkeypatch.setattr(torch.Tensor, "backward", record)
    arguments = {**SMALL, "stage": "image", "max_train_steps": 1, "adversarial_start": 0, "discriminator_channels": 4}
    for name, options in {
        "alone": {"adversarial_start": 10, "adversarial_weight": 0},
        "one": {"adversarial_weight": 1, "adaptive_adversarial_weight": False},
        "three": {"adversarial_weight": 3, "adaptive_adversarial_weight": False},
        "adaptive": {"adversarial_weight": 3},
    }.items():
        run(script, output_dir=tmp_path / name, **(arguments | options))
    alone, one, _, three, _, adaptive, _ = terms
    assert abs(one - alone) > 1e-4 and len(ratios) == 1
    assert three - alone == pytest.approx(3 * (one - alone), rel=1e-3)
    assert adaptive - alone == pytest.approx(3 * ratios[0] * (one - alone), rel=1e-3)


def test_accumulated_batches_are_one_step(script, image_run, tmp_path, monkeypatch):
    """Two halves of a step that are alike give the step of one of them."""
    generator = script.step_generator
    monkeypatch.setattr(script, "step_generator", lambda seed, number, *args, **kwargs: generator(seed, 0))
    arguments = {
        **SMALL,
        **ADVERSARY,
        "stage": "video",
        "image_autoencoder": image_run / "vae",
        "images_to_videos": [0, 1],
        "max_train_steps": 4,
    }
    for count in (1, 2):
        run(script, output_dir=tmp_path / str(count), gradient_accumulation_steps=count, **arguments)
    for name in ("model.safetensors", "model_1.safetensors"):
        weights = [load_file(tmp_path / str(count) / "checkpoint-4" / name) for count in (1, 2)]
        # Estimates of spectral norms go on with every pass.
        weights = [{key: value for key, value in part.items() if "parametrizations" not in key} for part in weights]
        torch.testing.assert_close(*weights, atol=1e-4, rtol=0)


def test_a_loss_that_is_not_finite_is_skipped_and_counted(script, image_run, tmp_path, monkeypatch, capsys):
    calls = itertools.count()
    monkeypatch.setattr(
        script, "outlier_penalty", lambda latents: latents.square().mean() * (math.nan if next(calls) == 2 else 1)
    )
    run(
        script,
        output_dir=tmp_path,
        stage="video",
        image_autoencoder=image_run / "vae",
        max_train_steps=4,
        outlier_weight=1,
        **ADVERSARY,
        **SMALL,
    )
    assert printed(capsys)[-1]["skipped_steps"] == 1
    for file in (tmp_path / "checkpoint-4").glob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values()), file


@pytest.mark.parametrize("source", ["toybox", "media", "both"])
def test_a_resumed_run_is_the_uninterrupted_one(script, image_run, clips, tmp_path, monkeypatch, source):
    arguments = {
        **SMALL,
        **ADVERSARY,
        "stage": "video",
        "image_autoencoder": image_run / "vae",
        "max_train_steps": 6,
        "checkpointing_steps": 3,
    }
    if source == "media":
        arguments |= {
            "toybox": False,
            "data": clips,
            "validation_data": clips,
            "num_workers": 0,
            "video_batch_size": 1,
        }
    if source == "both":
        # Drawn and read in turns: one of the batches of files is before the checkpoint, two are after it.
        arguments |= {"data": clips, "num_workers": 0, "images_to_videos": [0, 1], "toybox_to_data": [1, 1]}
        arguments |= {"video_batch_size": 1, "toybox_frame_rates": [8, 16]}
    losses = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "whole", **arguments)
    # Two losses a step from the third on: killed between those of the sixth.
    before = run_and_record_losses(script, monkeypatch, 9, output_dir=tmp_path / "parts", **arguments)
    assert not (tmp_path / "parts" / "vae").exists()
    arguments["resume_from_checkpoint"] = "latest"
    after = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "parts", **arguments)
    assert (len(losses), len(before), len(after)) == (10, 9, 6)
    assert before == pytest.approx(losses[:9], abs=1e-6) and after == pytest.approx(losses[4:], abs=1e-6)
    assert len({round(loss, 6) for loss in losses}) == 10

    for file in ("vae/diffusion_pytorch_model.safetensors", "checkpoint-6/model_1.safetensors"):
        same_weights(tmp_path / "whole" / file, tmp_path / "parts" / file)
    whole, parts = (AutoencoderKLMovieGen.from_pretrained(tmp_path / name / "vae") for name in ("whole", "parts"))
    assert parts.config.latents_mean == pytest.approx(whole.config.latents_mean, abs=1e-6)
    assert parts.config.latents_std == pytest.approx(whole.config.latents_std, abs=1e-6)

    # A finished run has nothing left to do, and its result stays what it was.
    assert run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "parts", **arguments) == []
    file = "vae/diffusion_pytorch_model.safetensors"
    same_weights(tmp_path / "whole" / file, tmp_path / "parts" / file)


def test_sigterm_saves_and_ends_the_run(script, image_run, tmp_path, monkeypatch, capsys):
    calls = itertools.count()
    penalty = script.outlier_penalty

    def stop_in_third_step(latents):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return penalty(latents)

    monkeypatch.setattr(script, "outlier_penalty", stop_in_third_step)
    arguments = SMALL | {"stage": "video", "image_autoencoder": image_run / "vae", "outlier_weight": 1}
    arguments |= {"output_dir": tmp_path, "max_train_steps": 4, "resume_from_checkpoint": "latest"}
    run(script, **arguments)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-3"]
    assert "stopped after step 3; --resume_from_checkpoint latest goes on there" in capsys.readouterr().err
    assert not (tmp_path / "vae").exists()
    run(script, **arguments)
    assert next(calls) == 4 and (tmp_path / "vae").is_dir()


def test_a_result_that_does_not_fit_the_disk_is_left_out(script, image_run, tmp_path, monkeypatch):
    """No part of it stays behind; the run is resumed when there is room."""
    save = AutoencoderKLMovieGen.save_pretrained

    def save_with_little_room(self, folder):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        try:
            save(self, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    arguments = SMALL | {"stage": "video", "image_autoencoder": image_run / "vae", "max_train_steps": 1}
    with (
        monkeypatch.context() as patch,
        pytest.raises(TrainingStopped, match="cannot be written: .* make room"),
    ):
        patch.setattr(AutoencoderKLMovieGen, "save_pretrained", save_with_little_room)
        run(script, output_dir=tmp_path, **arguments)
    assert not list(tmp_path.glob("*vae*"))
    run(script, output_dir=tmp_path, resume_from_checkpoint="latest", **arguments)
    AutoencoderKLMovieGen.from_pretrained(tmp_path / "vae")


def test_learned_perceptual_features_come_from_a_file(script, tmp_path, monkeypatch):
    """One step with the features of a file: the loss is the formula's with them."""
    torch.manual_seed(0)
    tensors, in_channels, place = {}, 3, 0
    for level, block in enumerate(script.LearnedPerceptualLoss.blocks):
        for channels in block:
            tensors[f"features.{place}.weight"] = (
                torch.randn(channels, in_channels, 3, 3) * (2 / in_channels / 9) ** 0.5
            )
            tensors[f"features.{place}.bias"] = torch.zeros(channels)
            place, in_channels = place + 2, channels
        place += 1
        tensors[f"lin{level}.model.1.weight"] = torch.rand(1, in_channels, 1, 1) / in_channels
    save_file({name: value.half() for name, value in tensors.items()}, tmp_path / "vgg16.safetensors")
    losses = {}
    for weight in (0.5, 1):
        losses[weight] = run_and_record_losses(
            script,
            monkeypatch,
            output_dir=tmp_path / str(weight),
            stage="image",
            max_train_steps=1,
            perceptual_features=tmp_path / "vgg16.safetensors",
            perceptual_weight=weight,
            **SMALL,
        )[0]
    (without,) = run_and_record_losses(
        script,
        monkeypatch,
        output_dir=tmp_path / "0",
        stage="image",
        max_train_steps=1,
        perceptual_weight=0,
        **SMALL,
    )
    assert losses[1] - without > 1e-3
    assert losses[1] - without == pytest.approx(2 * (losses[0.5] - without), rel=1e-3)


# --- Data -------------------------------------------------------------------------------------------------------


def record_batches(script, monkeypatch) -> list:
    """What `pixels` is given in a run: the batches trained on, validated on and measured."""
    videos = []
    original = script.pixels
    monkeypatch.setattr(script, "pixels", lambda video, device: videos.append(video) or original(video, device))
    return videos


def test_films_and_pictures_of_a_table(script, image_run, clips, tmp_path, monkeypatch, capsys):
    videos = record_batches(script, monkeypatch)
    run(
        script,
        output_dir=tmp_path,
        stage="video",
        image_autoencoder=image_run / "vae",
        data=clips,
        exclude=["film_0*", "picture_0*"],
        validation_data=clips,
        num_workers=0,
        max_train_steps=4,
        **SIZES | {"image_batch_size": 3, "video_batch_size": 2, "images_to_videos": [1, 1]},
    )
    training, validation, statistics = videos[:4], videos[4:12], videos[12:]
    assert [tuple(video.shape) for video in training] == [(3, 3, 1, 32, 40), (2, 3, 9, 32, 40)] * 2
    assert len(validation) == 8 and len(statistics) == 2
    # An epoch of each kind has every sample once, and none of those left out.
    left_out = script.MediaDataset(clips, 8, script.Buckets(36, (1.25,), (9,), 8))
    left_out = [left_out.read(index)["video"] for index in range(2)]
    for video in [*training, *statistics]:
        for clip in video:
            for other in left_out:
                assert clip.shape != other.shape or (clip.float() - other.float()).abs().max() > 10
    line = printed(capsys)[-1]
    assert {"psnr_images", "ssim_images", "psnr_clips", "ssim_clips", "loss", "seconds"} <= line.keys()
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["latents_std"]


def test_figures_are_those_of_the_result(script, image_run, clips, tmp_path, capsys):
    """PSNR and SSIM of the printed line, computed again with NumPy from what was written."""
    run(
        script,
        output_dir=tmp_path,
        stage="video",
        image_autoencoder=image_run / "vae",
        data=clips,
        validation_data=clips,
        num_workers=0,
        max_train_steps=2,
        **SIZES,
    )
    line = printed(capsys)[-1]
    model = AutoencoderKLMovieGen.from_pretrained(tmp_path / "vae")
    dataset = script.MediaDataset(clips, 8, script.Buckets(36, (1.25,), (9,), 8))
    ratios = {True: [], False: []}
    for index in range(len(dataset)):
        video = dataset.read(index, 0.5)["video"][None]
        with torch.no_grad():
            latents = model.encode(video.float() / 127.5 - 1).latent_dist.mode()
            decoded = model.decode(latents, num_frames=video.shape[2]).sample
        levels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().double().numpy()
        error = ((levels - video.numpy()) ** 2).mean()
        ratios[video.shape[2] == 1].append(10 * np.log10(255**2 / error))
    assert line["psnr_images"] == pytest.approx(np.mean(ratios[True]), abs=0.02)
    assert line["psnr_clips"] == pytest.approx(np.mean(ratios[False]), abs=0.02)
    assert -1 <= line["ssim_images"] < 1 and -1 <= line["ssim_clips"] < 1


def test_the_image_stage_takes_frames_of_films(script, clips, tmp_path, monkeypatch):
    videos = record_batches(script, monkeypatch)
    options = SIZES | {"image_batch_size": 8} | MODEL
    run(script, output_dir=tmp_path, stage="image", data=clips, num_workers=0, max_train_steps=2, **options)
    assert [tuple(video.shape) for video in videos] == [(8, 3, 1, 32, 40)] * 2
    AutoencoderKL.from_pretrained(tmp_path / "vae")


def write_shard(path, clips) -> None:
    with tarfile.open(path, "w") as archive:
        for index in range(4):
            film = (clips / f"film_{index}.mp4").read_bytes()
            for name, content in ((f"{index}.mp4", film), (f"{index}.txt", b"a film")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def test_shards_are_streamed(script, image_run, clips, tmp_path, monkeypatch):
    write_shard(tmp_path / "shard.tar", clips)
    videos = record_batches(script, monkeypatch)
    run(
        script,
        output_dir=tmp_path / "run",
        stage="video",
        image_autoencoder=image_run / "vae",
        data=tmp_path / "*.tar",
        num_workers=0,
        max_train_steps=3,
        **SIZES | {"statistics_batches": 1},
    )
    assert [tuple(video.shape) for video in videos] == [(2, 3, 9, 32, 40)] * 4
    AutoencoderKLMovieGen.from_pretrained(tmp_path / "run" / "vae")


# Read by hand from "turns of two drawn to one read, a turn of one step of pictures and two of clips": capitals are
# drawn, p and c are pictures and clips of files.
SCHEDULE = "PCC PCC pcc PCC PCC pcc PCC PCC pcc PCC".replace(" ", "")


def mixed_arguments(script, clips, **options):
    sizes = {name: [value] if name in ("aspect_ratios", "lengths") else value for name, value in SIZES.items()}
    mixed = {"toybox": True, "data": str(clips), "num_workers": 0, "video_batch_size": 2, "image_batch_size": 2}
    mixed |= {"images_to_videos": [1, 2], "toybox_to_data": [2, 1], "varied_share": 0}
    return script.Arguments(output_dir="", **sizes | mixed | options)


def mixed_batches(script, args, count, start=0, states=None):
    """Batches `start` to `count`, and the positions of the loaders at each of them."""
    accelerator = script.Accelerator()
    lengths = (1,) if args.stage == "image" else (9,)
    buckets = script.Buckets(36, (1.25,), lengths, 8)
    dataset = None
    if not args.data.endswith(".tar"):
        dataset = script.MediaDataset(args.data, 8, buckets)
    loaders = script.make_loaders(args, buckets, accelerator, dataset, args.seed)
    for kind, state in (states or {}).items():
        loaders[kind].load_state_dict(state)
    batches, positions = [], []
    for batch in script.training_batches(args, buckets, accelerator, loaders, start=start):
        batches.append(batch)
        positions.append({kind: loader.state_dict() for kind, loader in loaders.items()})
        if start + len(batches) == count:
            return batches, positions


def kind_of(batch) -> str:
    letter = "p" if batch["video"].shape[2] == 1 else "c"
    return letter.upper() if batch["name"][0].startswith("Toybox") else letter


@pytest.mark.parametrize("accumulation", [1, 2])
def test_drawn_and_read_batches_take_turns(script, clips, accumulation):
    args = mixed_arguments(script, clips, gradient_accumulation_steps=accumulation)
    batches, positions = mixed_batches(script, args, 30 * accumulation)
    assert "".join(map(kind_of, batches)) == "".join(letter * accumulation for letter in SCHEDULE)
    drawn = [(number, batch["name"]) for number, batch in enumerate(batches) if kind_of(batch).isupper()]
    assert all(name == [f"Toybox batch {number}"] for number, name in drawn)
    # Turns of Toybox pass no file over: every epoch of two batches has the four films, or pictures, once.
    for letter, name in (("p", "picture"), ("c", "film")):
        names = [file for batch in batches if kind_of(batch) == letter for file in batch["name"]]
        for epoch in range(len(names) // 4):
            files = names[4 * epoch : 4 * epoch + 4]
            assert sorted(files) == [f"{name}_{i}.{'png' if letter == 'p' else 'mp4'}" for i in range(4)]
    # From any place on, with the positions of a checkpoint, the rest is what it was.
    for start in (7 * accumulation, 18 * accumulation):
        rest, _ = mixed_batches(script, args, 22 * accumulation, start, positions[start - 1])
        for batch, expected in zip(rest, batches[start:], strict=False):
            assert batch["name"] == expected["name"] and torch.equal(batch["video"], expected["video"])


def test_turns_of_the_image_stage_are_single_steps(script, clips):
    batches, _ = mixed_batches(script, mixed_arguments(script, clips, stage="image"), 9)
    assert "".join(map(kind_of, batches)) == "PPpPPpPPp"


def test_turns_of_shards(script, clips, tmp_path):
    """Which have clips only, here also where it would be the turn of pictures."""
    write_shard(tmp_path / "shard.tar", clips)
    args = mixed_arguments(script, tmp_path / "shard.tar")
    batches, positions = mixed_batches(script, args, 18)
    assert "".join(map(kind_of, batches)) == "PCCPCCcccPCCPCCccc"
    rest, _ = mixed_batches(script, args, 18, 8, positions[7])
    for batch, expected in zip(rest, batches[8:], strict=True):
        assert batch["name"] == expected["name"] and torch.equal(batch["video"], expected["video"])


def test_toybox_alone_and_files_alone_take_no_turns(script, clips):
    for options in ({"data": None}, {"toybox": False}):
        args = mixed_arguments(script, clips, **options)
        assert {args.takes_toybox(step) for step in range(40)} == {args.toybox}


def record_draws(script, monkeypatch) -> list:
    """Count, frames, height, width and frame rate of each batch that is to be drawn, and the seed of what it shows."""
    drawn = []

    def record(count, num_frames, height, width, frame_rate, generator, device, **options):
        drawn.append((count, num_frames, height, width, frame_rate, generator.initial_seed()))
        return torch.zeros(count, 3, num_frames, height, width, dtype=torch.uint8)

    monkeypatch.setattr(script, "draw_pixels", record)
    return drawn


def test_a_share_of_the_batches_is_varied(script, clips, monkeypatch):
    """The same ones on every process; statistics are those of single objects, all motions alike."""
    varied, weights = [], {}
    monkeypatch.setattr(
        script,
        "draw_pixels",
        lambda *_, **options: (varied.append(options["varied"]), weights.update({stream: options["weights"]})),
    )
    buckets = script.Buckets(36, (1.25,), (9,), 8)
    for share, fewest, most in ((0, 0, 0), (0.25, 70, 130), (1, 400, 400)):
        likely = {"shape_weights": ["ring=2"], "motion_weights": ["spins=6", "moves left=0.5"]} if share < 1 else {}
        args = mixed_arguments(script, clips, data=None, varied_share=share, **likely)
        by_rank = []
        for rank, stream in ((0, script.PIXELS), (1, script.PIXELS), (0, script.STATISTICS)):
            varied.clear()
            accelerator = SimpleNamespace(process_index=rank, device="cpu")
            for number in range(400):
                script.draw_batch(args, buckets, accelerator, stream, number)
            by_rank.append(list(varied))
        assert by_rank[0] == by_rank[1] and fewest <= sum(by_rank[0]) <= most
        assert not any(by_rank[2])
        expected = {"ring": 2, "spins": 6, "moves left": 0.5} if share < 1 else {}
        assert weights == {script.PIXELS: expected, script.STATISTICS: None}


def test_toybox_is_drawn_at_all_sizes_and_rates(script, clips, monkeypatch):
    """Batches have about the pixels of one at --resolution 128; all processes draw the same shape."""
    drawn = record_draws(script, monkeypatch)
    sizes = {"image_batch_size": 6, "video_batch_size": 3, "images_to_videos": [1, 1]}
    sizes |= {"toybox_resolutions": [64, 128], "toybox_frame_rates": [8, 16]}
    args = mixed_arguments(script, clips, data=None, **sizes)
    buckets = script.Buckets(128, (1.0,), (9,), 8)
    by_rank = []
    for rank in range(2):
        drawn.clear()
        accelerator = SimpleNamespace(process_index=rank, device="cpu")
        for number in range(480):
            script.draw_batch(args, buckets, accelerator, script.PIXELS, number)
        by_rank.append(list(drawn))
    for (*first, seed), (*second, other_seed) in zip(*by_rank, strict=True):
        assert first == second and seed != other_seed
    counts = {(64, 64): 12, (96, 64): 8, (64, 96): 8, (128, 128): 3, (192, 128): 2, (128, 192): 2}
    found = Counter()
    for number, (count, num_frames, height, width, frame_rate, _) in enumerate(drawn):
        assert num_frames == (9 if number % 2 else 1)
        assert count == counts[height, width] * (1 if number % 2 else 2)
        found[height, width, frame_rate] += 1
    assert found.keys() == {(*size, rate) for size in counts for rate in (8, 16)}
    # Of 480 batches each of the twelve shapes has 40, give or take four standard deviations.
    assert all(abs(number - 40) < 25 for number in found.values())


def test_small_batches_of_large_pictures_are_never_empty(script, clips, monkeypatch):
    drawn = record_draws(script, monkeypatch)
    args = mixed_arguments(script, clips, data=None, toybox_resolutions=[128])
    buckets = script.Buckets(36, (1.25,), (9,), 8)
    for number in range(60):
        script.draw_batch(args, buckets, SimpleNamespace(process_index=0, device="cpu"), script.PIXELS, number)
    assert {(count, num_frames) for count, num_frames, *_ in drawn} == {(2, 1), (1, 9)}


def test_one_size_and_rate_without_more(script, clips, monkeypatch):
    drawn = record_draws(script, monkeypatch)
    args = mixed_arguments(script, clips)
    buckets = script.Buckets(36, (1.25,), (9,), 8)
    for number in range(8):
        script.draw_batch(args, buckets, SimpleNamespace(process_index=0, device="cpu"), script.PIXELS, number)
    assert {shape[2:5] for shape in drawn} == {(32, 40, 8)}


@pytest.mark.parametrize("num_processes", [1, 2])
def test_validation_has_files_and_held_out_scenes_of_all_sizes(script, clips, monkeypatch, num_processes):
    drawn = record_draws(script, monkeypatch)
    sizes = {"toybox_resolutions": [64, 128], "toybox_frame_rates": [8, 16]}
    args = mixed_arguments(script, clips, validation_data=str(clips), **sizes)
    buckets = script.Buckets(36, (1.25,), (9,), 8)
    dataset = script.MediaDataset(clips, 8, buckets)
    kinds = Counter()
    for rank in range(num_processes):
        accelerator = SimpleNamespace(process_index=rank, num_processes=num_processes, device="cpu")
        for kind, video in script.validation_batches(args, buckets, dataset, accelerator):
            kinds[kind] += 1
            assert ("images" in kind) == (video.shape[2] == 1)
    assert kinds == {"images": 4, "clips": 4, "toybox_images": 8, "toybox_clips": 8}
    for num_frames in (1, 9):
        shapes = [shape for shape in drawn if shape[1] == num_frames]
        assert {shape[2:4] for shape in shapes} == set(script.SIZES)
        assert {shape[4] for shape in shapes} == {8, 16} and len({shape[5] for shape in shapes}) == 8


def test_figures_of_files_and_of_toybox_are_apart(script, clips, tmp_path, capsys):
    options = {"data": clips, "validation_data": clips, "num_workers": 0, "toybox_to_data": [1, 1]}
    run(script, output_dir=tmp_path, stage="image", max_train_steps=2, **SMALL | options)
    line = printed(capsys)[-1]
    names = {f"{figure}_{kind}" for figure in ("psnr", "ssim") for kind in ("images", "toybox_images")}
    assert {name for name in line if name.startswith(("psnr", "ssim"))} == names
    sheets = {path.name for path in (tmp_path / "samples").iterdir()}
    assert sheets == {"step_000002_images.png", "step_000002_toybox_images.png"}
    # An original above its reconstruction, of each file and of the four pictures of each of eight batches.
    shapes = {"images": (16 * 32, 40, 3), "toybox_images": (16 * 32, 4 * 40, 3)}
    for kind, shape in shapes.items():
        assert np.asarray(Image.open(tmp_path / "samples" / f"step_000002_{kind}.png")).shape == shape
    without = tmp_path / "without"
    del options["validation_data"]
    run(script, output_dir=without, stage="image", max_train_steps=1, **SMALL | options)
    assert {name for name in printed(capsys)[-1] if "_images" in name} == {"psnr_images", "ssim_images"}


def test_the_card_names_all_that_was_trained_and_measured_on(script, clips, tmp_path):
    buckets = script.Buckets(36, (1.25,), (9,), 8)
    dataset = script.MediaDataset(clips, 8, buckets)
    world = "Toybox, a procedural world of coloured shapes, drawn by the program itself."
    files, figures = f"`{clips.name}`: 4 images and 4 videos.", {"loss": 1.0, "psnr_images": 20.0}
    shards = f"The shards `{clips.name}`."
    for options, source, expected, seen in (
        (
            {"validation_data": "seen"},
            dataset,
            f"{world} {files}",
            "the data set `seen` and on held-out Toybox scenes",
        ),
        ({}, dataset, f"{world} {files}", "on held-out Toybox scenes"),
        ({}, None, f"{world} {shards}", "on held-out Toybox scenes"),
        ({"data": None}, None, world, "on held-out Toybox scenes"),
        ({"toybox": False, "validation_data": "seen"}, dataset, files, "on the data set `seen`, decoded"),
    ):
        args = mixed_arguments(script, clips, **options)
        text = script.model_card(args, "user/name", figures, source, 1).text
        assert expected in text and seen in text and str(clips.parent) not in text
        assert (world in text) == args.toybox and (files in text) == (source is not None)
        assert ("Toybox scenes" in text) == args.toybox


def test_a_mistake_found_by_the_first_step_is_one_line(script, image_run, tmp_path, capsys):
    """Behind the progress bar it would be overlooked."""
    tarfile.open(tmp_path / "empty.tar", "w").close()
    arguments = SIZES | {"image_autoencoder": image_run / "vae", "data": tmp_path / "empty.tar", "num_workers": 0}
    line = command_line(arguments | {"output_dir": tmp_path / "run"})
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as exit_:
        script.run_script(script.main, script.Arguments, line)
    assert exit_.value.code == 2
    assert re.search(r"^error: '.*empty.tar' fills no batch of 2.*\n\Z", capsys.readouterr().err, re.M)


def test_a_damaged_validation_film_is_left_out(script, clips, tmp_path, caplog):
    """Its figures go on without it, whatever happens to a file after the start."""
    shutil.copytree(clips, tmp_path / "clips")
    dataset = script.MediaDataset(tmp_path / "clips", 8, script.Buckets(36, (1.25,), (9,), 8))
    (tmp_path / "clips" / "film_1.mp4").unlink()
    args = script.Arguments(output_dir="", data="clips", lengths=[9])
    batches = list(script.validation_batches(args, None, dataset, script.Accelerator()))
    assert [kind for kind, _ in batches] == ["clips", "images", "images", "clips", "images", "clips", "images"]


def test_trains_on_two_processes_without_av_and_datasets(image_run, tmp_path):
    run_without_av_and_datasets(
        "train_tae",
        tmp_path,
        num_processes=2,
        stage="video",
        image_autoencoder=image_run / "vae",
        output_dir=tmp_path / "run",
        max_train_steps=4,
        toybox_resolutions=64,
        toybox_frame_rates=[8, 16],
        **ADVERSARY,
        **SMALL,
    )
    AutoencoderKLMovieGen.from_pretrained(tmp_path / "run" / "vae")


@pytest.mark.parametrize("config", sorted(path.name for path in (EXAMPLES / "configs").glob("*tae*.yaml")))
def test_shipped_configurations_run(script, image_run, video_run, clips, tmp_path, config):
    path = EXAMPLES / "configs" / config
    small = SIZES | MODEL | {"config": path, "max_train_steps": 2, "num_workers": 0, "discriminator_channels": 4}
    if "toybox" not in config:
        small |= {"data": clips, "validation_data": clips}
    if "adversarial" in path.read_text():
        small["adversarial_start"] = 1
    if "stage: decoder" in path.read_text():
        small["autoencoder"] = video_run[0] / "vae"
    if "stage: video" in path.read_text():
        small["image_autoencoder"] = image_run / "vae"
    run(script, output_dir=tmp_path, **small)
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    arguments = json.loads((tmp_path / "arguments.json").read_text())
    assert arguments["toybox"] == ("toybox" in config)


# --- The Hub ----------------------------------------------------------------------------------------------------


def test_the_result_is_pushed_and_inflated_from_the_hub(script, image_run, clips, tmp_path, monkeypatch, capsys):
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home", WRITE_TOKEN)
        shutil.copytree(image_run / "vae", tmp_path / "pipeline" / "vae")
        hub.add_folder("user/pictures", tmp_path / "pipeline")
        arguments = SIZES | {"stage": "video", "data": clips, "validation_data": clips, "num_workers": 0}
        arguments |= {"max_train_steps": 2, "push_to_hub": True, "hub_model_id": "films"}
        run(script, output_dir=tmp_path / "run", image_autoencoder="user/pictures/vae", **arguments)
        output = capsys.readouterr().out
        assert output.splitlines()[-1] == f"{hub.url}/user/films"
        figures = json.loads(re.search(r"^{.*}$", output, re.M)[0])
        card = ModelCard((tmp_path / "run" / "vae" / "README.md").read_text())
        for name in ("loss", "psnr_images", "psnr_clips", "ssim_images", "ssim_clips"):
            assert f"| {name} | {figures[name]:.4g} |" in card.text
        assert "`clips0`: 4 images and 4 videos." in card.text and str(tmp_path.parent) not in card.text
        assert card.data.base_model == "user/pictures"
        snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
        exec(snippet, {})
        assert capsys.readouterr().out == "torch.Size([1, 16, 2, 8, 8]) torch.Size([1, 3, 16, 64, 64])\n"

        with pytest.raises(
            OSError, match="--image_autoencoder: 'user/films' holds a AutoencoderKLMovieGen; pass a Auto"
        ):
            run(script, output_dir=tmp_path / "other", image_autoencoder="user/films", **arguments)
        with pytest.raises(
            OSError, match="--image_autoencoder: 'user/none' is no folder here, and no model of the Hub"
        ):
            run(script, output_dir=tmp_path / "other", image_autoencoder="user/none", **arguments)
    assert not (tmp_path / "other").exists()


# --- Mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": "image", "image_autoencoder": "vae"}, "--image_autoencoder is for --stage video"),
        ({"stage": "decoder"}, "--stage decoder goes on from --autoencoder"),
        ({"stage": "video", "latent_noise": 0.5}, "--latent_noise is for --stage decoder, not for video"),
        ({"image_autoencoder": "a", "autoencoder": "b"}, "both given; start from one of them"),
        ({"image_batch_size": 3}, "--image_batch_size is 3: use a multiple of 2"),
        ({"validation_steps": 0}, "--validation_steps is 0: it must be at least 1"),
        ({"toybox": False}, "pass --data, what to train on, or --toybox, or both"),
        ({"data": "missing"}, "'missing' is no file or folder here"),
        ({"varied_share": 1.5}, "--varied_share is 1.5: it must be from 0 to 1"),
        ({"motion_weights": ["spins"]}, "--motion_weights: 'spins' is no name and its weight, such as spins=6"),
        ({"motion_weights": ["jumps=2"]}, "--motion_weights: there is no 'jumps'; choose from stays still"),
        ({"motion_weights": ["spins=0"]}, "--motion_weights: 'spins=0' has a weight that is not above 0"),
        ({"shape_weights": ["heart=2"]}, "--shape_weights: there is no 'heart'; choose from circle"),
        ({"motion_weights": ["spins=6"]}, "--shape_weights and --motion_weights do nothing with --varied_share 1"),
        ({"toybox": False, "data": "clips", "motion_weights": ["spins=2"]}, "--motion_weights say how Toybox is"),
        ({"toybox": False, "data": "clips", "shape_weights": ["ring=2"]}, "--motion_weights say how Toybox is"),
        ({"toybox_to_data": [3]}, r"--toybox_to_data is \[3\]: pass two numbers of turns such as 3 1"),
        ({"toybox_to_data": [0, 1]}, r"--toybox_to_data is \[0, 1\]: pass two numbers of turns such as 3 1"),
        ({"toybox_resolutions": [64, 32]}, r"--toybox_resolutions \[64, 32\]: Toybox is drawn at 64 and 128"),
        ({"toybox_frame_rates": [8, 0]}, r"--toybox_frame_rates \[8.0, 0.0\]: they must be above 0 frames a second"),
        ({"toybox_frame_rates": "nan"}, r"--toybox_frame_rates \[nan\]: they must be above 0 frames a second"),
        (
            {"toybox": False, "data": "clips", "toybox_frame_rates": 8},
            "--toybox_frame_rates, --toybox_resolutions, --shape_weights and --motion_weights say how Toybox is drawn",
        ),
        (
            {"toybox": False, "data": "clips", "toybox_resolutions": 64},
            "--toybox_frame_rates, --toybox_resolutions, --shape_weights and --motion_weights say how Toybox is drawn",
        ),
        ({"validation_data": "clips"}, "--validation_data and --exclude are for --data"),
        ({"exclude": ["a*"]}, "--validation_data and --exclude are for --data"),
        ({"lengths": 1}, r"--lengths \[1\]: a clip has 2 frames or more"),
        ({"lengths": [8, 9]}, "--toybox draws one size and length"),
        ({"aspect_ratios": [1, 1.5]}, "--toybox draws one size and length"),
        ({"images_to_videos": [1]}, r"--images_to_videos is \[1\]: pass two numbers"),
        ({"images_to_videos": [1, 0]}, r"--images_to_videos \[1, 0\]: --stage video needs steps of clips"),
        ({"resolution": 4}, "--resolution, --aspect_ratios, --lengths: `resolution` must be at least"),
        ({"kl_weight": -1}, "--kl_weight is -1.0: it must be 0 or more"),
        ({"perceptual_features": "missing"}, "--perceptual_features: 'missing' cannot be read as a safetensors file"),
        ({"perceptual_features": "a", "perceptual_weight": 0}, "--perceptual_features does nothing"),
        ({"adversarial_weight": 1, "adversarial_start": 9}, "--adversarial_start 9 is after the last step"),
        (
            {"adversarial_weight": 1, "adversarial_start": 0, "mixed_precision": "fp16"},
            "--mixed_precision fp16 has one loss scale",
        ),
        ({"ema_decay": 1.5}, "--ema_decay is 1.5"),
        ({"kl_weight": "nan"}, "--kl_weight is nan: it must be 0 or more"),
        ({"discriminator_learning_rate": -1}, "--discriminator_learning_rate is -1.0: it must be 0 or more"),
        ({"adversarial_start": -1}, "--adversarial_start is -1: it must be 0 or more"),
        ({"discriminator_channels": 0}, "--discriminator_channels is 0: it must be at least 1"),
        ({"frame_rate": 0}, "--frame_rate is 0.0: it must be above 0"),
        ({"max_grad_norm": -1}, "--max_grad_norm is -1.0: it must be above 0"),
        ({"layers_per_block": 0}, "--layers_per_block is 0: it must be at least 1"),
        ({"norm_num_groups": 3}, r"--block_out_channels \[4, 4, 8, 8\]: use multiples of --norm_num_groups 3"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 needs a GPU"),
        (
            {"resolution": 8, "adversarial_weight": 1, "adversarial_start": 0},
            "--resolution 8 gives sides of 8 pixels, and --adversarial_weight and --perceptual_features need 16",
        ),
        ({"report_to": "paper"}, "--report_to: 'paper' is not installed, or no tracker"),
        ({"push_to_hub": True}, "--push_to_hub: pass the repository to push to"),
        ({"hub_model_id": "user/name"}, "--hub_model_id and --hub_private do nothing without --push_to_hub"),
        ({"image_autoencoder": "missing"}, "--image_autoencoder: 'missing' has no config.json"),
        ({"autoencoder": "missing"}, "--autoencoder: 'missing' has no config.json"),
        ({"resume_from_checkpoint": "missing"}, "'missing'"),
        ({"toybox": False, "data": "missing"}, "'missing' is no file or folder here"),
    ],
)
def test_mistakes_are_named(script, tmp_path, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(script, output_dir=tmp_path / "run", **(SMALL | {"max_train_steps": 4} | arguments))
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_fill_a_batch_or_has_no_films_is_refused(script, clips, tmp_path):
    arguments = SIZES | {"stage": "video", "data": clips, "num_workers": 0, "output_dir": tmp_path / "run"} | MODEL
    with pytest.raises(ValueError, match="--video_batch_size and --data: no bucket has the 5 samples of a step"):
        run(script, **(arguments | {"video_batch_size": 5}))
    with pytest.raises(ValueError, match="has no videos to train --stage video on"):
        run(script, exclude=["film_*"], **arguments)
    assert not (tmp_path / "run").exists()


def test_a_run_without_an_adversary_does_not_go_on_with_one(script, image_run, tmp_path):
    """A new run goes on from its result instead."""
    shutil.copytree(image_run / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    arguments = SMALL | ADVERSARY | {"stage": "image", "max_train_steps": 4}
    for checkpoint in ("latest", tmp_path / "run" / "checkpoint-3"):
        with pytest.raises(ValueError, match="of a run without an adversary: go on without, .* with --autoencoder"):
            run(script, output_dir=tmp_path / "run", resume_from_checkpoint=checkpoint, **arguments)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-3"]
    run(script, output_dir=tmp_path / "new", autoencoder=image_run / "vae", **arguments)
    assert (tmp_path / "new" / "checkpoint-4" / "model_1.safetensors").is_file()


def test_the_folder_of_another_run_is_refused(script, image_run):
    before = (image_run / "arguments.json").read_text()
    with pytest.raises(ValueError, match="--output_dir: .* has checkpoint-3 of another run"):
        run(script, stage="image", output_dir=image_run, max_train_steps=1, **SMALL)
    assert (image_run / "arguments.json").read_text() == before


def test_sharding_is_refused(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(ValueError, match="every process holds the whole autoencoder: launch it with --multi_gpu"):
        run(script, output_dir=tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()


def test_models_of_the_other_stage_are_refused(script, image_run, tmp_path):
    with pytest.raises(OSError, match="--autoencoder: .* holds a AutoencoderKL; .* AutoencoderKLMovieGen"):
        run(script, stage="video", autoencoder=image_run / "vae", output_dir=tmp_path, **SMALL)
