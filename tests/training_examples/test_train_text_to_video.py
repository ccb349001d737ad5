"""Short runs of the script that trains the backbone: both stages, caches, resume, two processes, errors."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from diffusers_moviegen import AutoencoderKLMovieGen, MovieGenPipeline, MovieGenTransformer3DModel
from diffusers_moviegen.toybox.captions import core_caption
from diffusers_moviegen.toybox.scenes import draw_scenes, render, sample_tuples
from diffusers_moviegen.toybox.vocabulary import is_held_out
from tests import tiny
from tests.hub_server import READ_TOKEN, WRITE_TOKEN, HubServer
from tests.training_examples.scripts import (
    ROOT,
    load_script,
    run,
    run_and_record_losses,
    run_without_av_and_datasets,
)


@pytest.fixture(scope="module")
def script():
    return load_script("train_text_to_video")


@pytest.fixture(scope="module")
def text_encoders(tmp_path_factory):
    """A folder laid out as train_text_encoders.py leaves it."""
    folder = tmp_path_factory.mktemp("text_encoders")
    for suffix in ("", "_2", "_3"):
        getattr(tiny, f"tiny_tokenizer{suffix}")().save_pretrained(folder / f"tokenizer{suffix}")
        getattr(tiny, f"tiny_text_encoder{suffix}")().save_pretrained(folder / f"text_encoder{suffix}")
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    CLIPImageProcessor().save_pretrained(folder / "image_processor")
    return folder


@pytest.fixture(scope="module")
def small(text_encoders, tmp_path_factory):
    """Arguments of every run."""
    vae = tmp_path_factory.mktemp("tae") / "vae"
    tiny.tiny_vae().save_pretrained(vae)
    return {
        "vae": str(vae),
        "text_encoders": str(text_encoders),
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "ffn_dim": 32,
        "max_grid_size": [2, 2, 3],
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "num_cached_clips": 12,
        "num_cached_images": 12,
        "train_batch_size": 4,
        "num_validation_prompts": 2,
        "lr_warmup_steps": 2,
    }


@pytest.fixture(scope="module")
def image_run(script, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t2i")
    run(script, stage="image", output_dir=folder, max_train_steps=3, **small)
    return folder


@pytest.fixture(scope="module")
def joint_run(script, small, image_run, tmp_path_factory):
    """The folder of a joint run, and the caches that batches were drawn from as (drawn by validate, cache)."""
    folder, drawn, validating = tmp_path_factory.mktemp("t2v"), [], []
    with pytest.MonkeyPatch.context() as patch:
        draw_batch, validate = script.draw_batch, script.validate

        def record_batch(args, cache, seed):
            drawn.append((bool(validating), cache))
            return draw_batch(args, cache, seed)

        def record_validate(*args):
            validating.append(True)
            figures = validate(*args)
            validating.clear()
            return figures

        patch.setattr(script, "draw_batch", record_batch)
        patch.setattr(script, "validate", record_validate)
        run(
            script,
            stage="joint",
            transformer=image_run / "pipeline" / "transformer",
            output_dir=folder,
            max_train_steps=12,
            validation_steps=6,
            checkpointing_steps=4,
            mixed_precision="bf16",
            **small,
        )
    return folder, drawn


@pytest.fixture(scope="module")
def pipe(script, small):
    args = script.Arguments(output_dir="", **small)
    pipe = script.load_pipeline(args)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=[True, False], ids=["pictures", "clips"])
def cache(request, script, small, pipe):
    args = script.Arguments(output_dir="", **small)
    return script.Cache(args, pipe, 40, images=request.param, seed=5, held_out=False)


def test_the_result_is_a_pipeline(joint_run, small):
    folder = joint_run[0] / "pipeline"
    pipe = MovieGenPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("a red circle bounces on a grey background", num_inference_steps=2, output_type="np").frames
    assert frames.shape == (1, 9, 32, 48, 3) and np.isfinite(frames).all()
    image = pipe("a red circle on a grey background", num_frames=1, num_inference_steps=2, output_type="np").frames
    assert image.shape == (1, 1, 32, 48, 3)

    defaults = {name: pipe.config[name] for name in pipe.config if name.startswith("default_")}
    assert defaults == {
        "default_height": 32,
        "default_width": 48,
        "default_num_frames": 9,
        "default_frame_rate": 8,
        "default_guidance_scale": 5,
    }
    assert pipe.transformer.config.text_embed_dim_2 == tiny.TEXT_WIDTH_2
    assert CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").config.hidden_size == 16
    CLIPImageProcessor.from_pretrained(folder / "image_processor")
    trained_vae = AutoencoderKLMovieGen.from_pretrained(small["vae"])
    assert pipe.vae.config.latents_std == trained_vae.config.latents_std
    assert pipe.vae.config.latents_mean == trained_vae.config.latents_mean


def test_the_pipeline_is_stored_in_bfloat16_and_names_no_folder(joint_run, small):
    folder = joint_run[0] / "pipeline"
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        (file,) = (folder / name).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    for file in folder.rglob("*.json"):
        for path in (joint_run[0], small["vae"], small["text_encoders"], "pipeline/transformer"):
            assert str(path) not in file.read_text()


def test_sheets_and_checkpoints(joint_run, image_run):
    folder = joint_run[0]
    assert {path.name for path in (folder / "samples").iterdir()} == {"step_000006.png", "step_000012.png"}
    assert Image.open(folder / "samples" / "step_000012.png").size == (9 * 48, 2 * 32)
    assert Image.open(image_run / "samples" / "step_000003.png").size == (48, 2 * 32)
    assert {path.name for path in folder.glob("*checkpoint*")} == {"checkpoint-8", "checkpoint-12"}
    assert json.loads((folder / "arguments.json").read_text())["stage"] == "joint"


def test_held_out_scenes_are_for_validation_only(joint_run):
    training = [cache for in_validation, cache in joint_run[1] if not in_validation]
    validation = [cache for in_validation, cache in joint_run[1] if in_validation]
    assert len(training) == 12 and len(validation) == 2 * 4
    assert not any(is_held_out(*words) for cache in training for words in cache.tuples)
    assert all(is_held_out(*words) for cache in validation for words in cache.tuples)
    # A picture batch, then five of clips; validation sees clips.
    assert [cache.means.shape[2] for cache in training] == [1, 2, 2, 2, 2, 2] * 2
    assert {cache.means.shape[2] for cache in validation} == {2}


def test_joint_stage_starts_from_the_image_stage(script, small, image_run, tmp_path):
    """With a learning rate of zero the result is where it started, rounded to bfloat16 at the end of both stages."""
    start = image_run / "pipeline" / "transformer"
    run(script, output_dir=tmp_path, transformer=start, max_train_steps=2, learning_rate=0.0, **small)
    result = MovieGenTransformer3DModel.from_pretrained(tmp_path / "pipeline" / "transformer").state_dict()
    expected = MovieGenTransformer3DModel.from_pretrained(start).state_dict()
    torch.testing.assert_close(result, expected, atol=0, rtol=0)


def test_captions_say_what_is_cached(cache):
    """The core caption and another phrasing of each scene; no motion is said of a picture."""
    images = cache.means.shape[2] == 1
    assert len(cache) == len(cache.tuples) == len(cache.captions) == 40
    for (colour, shape, motion, background), (core, other) in zip(cache.tuples, cache.captions, strict=True):
        assert core == core_caption(colour, shape, None if images else motion, background)
        assert other != core and colour in other and background in other
    if images:
        assert {words[2] for words in cache.tuples} == {"stays still"}


def test_latents_are_normalised_draws_from_the_posterior(script, small, pipe, cache):
    num_frames = 1 if cache.means.shape[2] == 1 else 9
    generator = torch.Generator().manual_seed(5)
    tuples = sample_tuples(40, generator, False, *([("stays still",)] if num_frames == 1 else []))
    assert tuples == cache.tuples
    video = render(draw_scenes(tuples, generator), num_frames, 8, 32, 48)
    with torch.no_grad():
        posterior = pipe.vae.encode(video.float() / 127.5 - 1).latent_dist
    mean = torch.tensor([0.1 * channel for channel in range(16)]).view(16, 1, 1, 1)
    std = torch.tensor([1 + 0.1 * channel for channel in range(16)]).view(16, 1, 1, 1)

    index = torch.tensor([3, 0, 39, 3])
    latents = cache.latents(index, torch.Generator().manual_seed(8))
    assert latents.dtype == torch.float32
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(8))
    expected = (posterior.mean[index] + posterior.std[index] * noise - mean) / std
    torch.testing.assert_close(latents, expected, atol=1e-2, rtol=2e-3)
    assert not torch.allclose(latents[0], latents[3], atol=0.1)


def test_text_features_are_the_pipelines(pipe, cache):
    """With the frame rate in front for clips, without for pictures, and of the empty caption never."""
    num_frames = 1 if cache.means.shape[2] == 1 else 9
    captions = [cache.captions[0][0], "", cache.captions[1][1]]
    embeds = pipe.encode_prompt(captions, num_frames=num_frames, frame_rate=8, dtype=torch.float32)
    unconditional = {
        name.removeprefix("negative_"): value for name, value in pipe.encode_prompt(num_frames=num_frames).items()
    }
    close = {"atol": 2e-3, "rtol": 2e-3}
    # What the third caption has in front, spelled out for an image, whose prompts are taken as they are.
    spelled = captions[2] if num_frames == 1 else f"FPS-8: {captions[2]}"
    literal = pipe.encode_prompt(spelled, num_frames=1)
    inputs = cache.text.inputs(captions)
    for suffix in ("", "_2"):
        features, mask = inputs[f"encoder_hidden_states{suffix}"], inputs[f"encoder_attention_mask{suffix}"]
        expected, expected_mask = embeds[f"prompt_embeds{suffix}"], embeds[f"prompt_attention_mask{suffix}"]
        assert features.dtype == torch.float32 and torch.equal(mask, expected_mask)
        torch.testing.assert_close(features[mask], expected[mask], **close)
        torch.testing.assert_close(features[1][mask[1]], unconditional[f"prompt_embeds{suffix}"][0], **close)
        torch.testing.assert_close(features[2][mask[2]], literal[f"prompt_embeds{suffix}"][0], **close)
    # Nothing is in double quotes.
    assert "encoder_hidden_states_3" not in inputs and embeds["prompt_attention_mask_3"].sum() == 0


def test_written_words_reach_the_third_encoder(script, pipe):
    captions = ['a red circle with the word "CAT"', "a red circle"]
    inputs = script.TextCache(pipe, captions, 1, 8).inputs(captions)
    embeds = pipe.encode_prompt(captions, num_frames=1, dtype=torch.float32)
    mask = inputs["encoder_attention_mask_3"]
    assert torch.equal(mask, embeds["prompt_attention_mask_3"]) and mask.sum(1).tolist() == [4, 0]
    torch.testing.assert_close(
        inputs["encoder_hidden_states_3"][mask], embeds["prompt_embeds_3"][mask], atol=2e-3, rtol=2e-3
    )
    # No mask where there is no padding.
    assert script.TextCache(pipe, captions, 1, 8).inputs(captions[:1])["encoder_attention_mask_3"] is None


def test_batches_depend_on_the_seed_alone(script, small, cache):
    args = script.Arguments(output_dir="", **small)
    first = script.draw_batch(args, cache, 3)
    torch.manual_seed(123)
    torch.testing.assert_close(script.draw_batch(args, cache, 3), first, atol=0, rtol=0)
    assert not torch.equal(script.draw_batch(args, cache, 4)[0], first[0])
    latents, noise, timesteps, _ = first
    assert latents.shape == noise.shape and timesteps.shape == (4,) and timesteps.dtype == torch.float32


def test_one_prompt_in_ten_is_dropped(script, small, cache, monkeypatch):
    args = script.Arguments(output_dir="", **(small | {"train_batch_size": 500}))
    drawn = []
    monkeypatch.setattr(cache.text, "inputs", lambda captions: drawn.extend(captions))
    for seed in range(4):
        script.draw_batch(args, cache, seed)
    assert drawn.count("") / len(drawn) == pytest.approx(0.1, abs=4 * (0.09 / 2000) ** 0.5)
    core = {captions[0] for captions in cache.captions}
    other = {captions[1] for captions in cache.captions}
    assert set(drawn) == {""} | core | other
    assert sum(caption in core for caption in drawn) / 2000 == pytest.approx(0.45, abs=0.045)


def test_the_loss_is_the_flow_matching_loss(script, pipe):
    """Against the formulas of the spec in float64: time runs from noise to data, the model predicts -V."""
    torch.manual_seed(0)
    data, noise = torch.randn(2, 2, 16, 2, 4, 6)
    timesteps = torch.tensor([250.0, 900.0])
    text = {"encoder_hidden_states": torch.randn(2, 3, tiny.TEXT_WIDTH)}
    with torch.no_grad():
        loss = script.flow_loss(pipe.transformer, pipe.scheduler, data, noise, timesteps, text)
        time = (1 - timesteps.double() / 1000).view(2, 1, 1, 1, 1)
        noisy = time * data.double() + (1 - (1 - 1e-5) * time) * noise.double()
        prediction = pipe.transformer(noisy.float(), timesteps, **text).sample
    velocity = data.double() - (1 - 1e-5) * noise.double()
    assert loss.item() == pytest.approx((-prediction.double() - velocity).square().mean().item(), rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(script, small, tmp_path, monkeypatch):
    arguments = {"max_train_steps": 8, "validation_steps": 4, "checkpointing_steps": 3, **small}
    losses = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "whole", **arguments)
    before = run_and_record_losses(script, monkeypatch, 5, output_dir=tmp_path / "parts", **arguments)
    assert not (tmp_path / "parts" / "pipeline").exists()
    arguments["resume_from_checkpoint"] = "latest"
    after = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "parts", **arguments)
    assert (len(losses), len(before), len(after)) == (8, 5, 5)
    assert before == pytest.approx(losses[:5], abs=1e-6) and after == pytest.approx(losses[3:], abs=1e-6)

    whole, parts = (
        MovieGenTransformer3DModel.from_pretrained(tmp_path / name / "pipeline" / "transformer").state_dict()
        for name in ("whole", "parts")
    )
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def test_trains_in_two_processes_without_av_and_datasets(small, tmp_path):
    run_without_av_and_datasets(
        "train_text_to_video",
        tmp_path,
        num_processes=2,
        output_dir=tmp_path / "run",
        max_train_steps=3,
        validation_steps=2,
        checkpointing_steps=2,
        **small,
    )
    # Both saved their random states, one the rest.
    assert len(list((tmp_path / "run" / "checkpoint-3").glob("random_states_*"))) == 2
    MovieGenPipeline.from_pretrained(tmp_path / "run" / "pipeline")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vae": "missing"}, "--vae: 'missing' has no config.json; pass the folder of a AutoencoderKLMovieGen"),
        ({"transformer": "missing"}, "--transformer: 'missing' has no config.json"),
        ({"text_encoders": "missing"}, "--text_encoders: 'missing' lacks tokenizer, text_encoder, .*image_processor"),
        ({"videos_per_image_batch": 0}, "--videos_per_image_batch is 0: it must be at least 1"),
        ({"num_frames": 17}, "`num_frames` is 17, but the transformer has positions for at most 16 frames"),
        ({"height": 40}, "`height` must be a multiple of 16, got 40"),
        ({"resume_from_checkpoint": "missing"}, "no checkpoint at 'missing'"),
    ],
)
def test_mistakes_are_named(script, small, tmp_path, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(script, output_dir=tmp_path, **(small | arguments))


def test_an_autoencoder_without_statistics_is_refused(script, small, tmp_path):
    vae = tiny.tiny_vae()
    vae.register_to_config(latents_mean=None, latents_std=None)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="--vae: .* no latents_mean and latents_std; .* --stage video"):
        run(script, output_dir=tmp_path / "run", **(small | {"vae": tmp_path / "vae"}))


def test_text_encoders_without_the_vision_half_are_refused(script, small, tmp_path):
    shutil.copytree(small["text_encoders"], tmp_path / "text_encoders")
    shutil.rmtree(tmp_path / "text_encoders" / "image_encoder")
    with pytest.raises(OSError, match="--text_encoders: .* lacks image_encoder; .* train_text_encoders.py wrote"):
        run(script, output_dir=tmp_path / "run", **(small | {"text_encoders": tmp_path / "text_encoders"}))


def test_the_result_is_pushed_with_a_card_whose_snippet_runs(script, small, tmp_path, monkeypatch, capsys):
    arguments = small | {
        "output_dir": tmp_path / "run",
        "max_train_steps": 2,
        "push_to_hub": True,
        "hub_model_id": "tiny-toybox",
        "hub_private": False,
    }
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home", WRITE_TOKEN)
        hub.broken = "/commit/"
        with pytest.raises(SystemExit, match="error: cannot push to 'user/tiny-toybox': the Hub answered 500 "):
            run(script, **arguments)
        MovieGenPipeline.from_pretrained(tmp_path / "run" / "pipeline")
        figures = json.loads(re.search(r"^{.*}$", capsys.readouterr().out, re.M)[0])
        repository = hub.repositories["user/tiny-toybox"]
        assert repository.files.keys() == {".gitattributes"}

        # The next try has no step left to do, and measures again what the card says.
        hub.broken = None
        run(script, resume_from_checkpoint="latest", **arguments)
        assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/user/tiny-toybox"
        folder = tmp_path / "run" / "pipeline"
        pushed = {path: file.content for path, file in repository.files.items() if path != ".gitattributes"}
        assert pushed == {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        card = ModelCard((folder / "README.md").read_text())
        for name in ("validation_loss", "colour", "shape", "motion", "background", "all"):
            assert f"| {name} | {figures[name]:.4g} |" in card.text
        assert "Toybox alone: 12 pictures and 12 clips, 48 x 32 pixels" in card.text
        assert "| learning_rate | 0.0006 |" in card.text and "| vae | .../vae |" in card.text
        assert str(tmp_path.parent) not in card.text
        assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "text-to-video")

        snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
        environment = hub.environment(tmp_path / "elsewhere") | {"PYTHONPATH": str(ROOT)}
        (tmp_path / "work").mkdir()
        result = subprocess.run(
            [sys.executable, "-c", snippet],
            cwd=tmp_path / "work",
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr[-4000:]
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["film.mp4"]


def test_the_card_of_an_image_run_draws_a_picture(script, small, pipe, tmp_path, monkeypatch):
    args = script.Arguments(output_dir="", stage="image", transformer="runs/t2i/transformer", **small)
    card = script.model_card(args, "user/tiny", {"validation_loss": 1.0}, num_processes=2)
    assert card.data.pipeline_tag == "text-to-image"
    assert "| processes | 2 |" in card.text and "Training started from `runs/t2i/transformer`" in card.text
    pipe.save_pretrained(tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    exec(snippet.replace("user/tiny", "./pipeline"), {})
    assert Image.open("picture.png").size == (48, 32)


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (
            {"push_to_hub": True},
            WRITE_TOKEN,
            "--push_to_hub: pass the repository to push to, --hub_model_id user/name",
        ),
        (
            {"hub_model_id": "user/tiny"},
            WRITE_TOKEN,
            "--hub_model_id and --hub_private do nothing without --push_to_hub",
        ),
        ({"hub_private": True}, WRITE_TOKEN, "--hub_model_id and --hub_private do nothing without --push_to_hub"),
        ({"push_to_hub": True, "hub_model_id": "a b"}, WRITE_TOKEN, "'a b' is not the name of a Hub repository"),
        ({"push_to_hub": True, "hub_model_id": "user/tiny"}, None, "there is no Hub token"),
        ({"push_to_hub": True, "hub_model_id": "user/tiny"}, READ_TOKEN, "the token may not write there"),
    ],
)
def test_pushing_is_checked_before_anything_is_done(script, small, tmp_path, monkeypatch, arguments, token, message):
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home", token)
        with pytest.raises((ValueError, OSError), match=message):
            run(script, output_dir=tmp_path / "run", **(small | arguments))
    assert not (tmp_path / "run").exists()
