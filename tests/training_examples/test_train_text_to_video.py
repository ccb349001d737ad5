"""Short runs of the script that trains the backbone: stages, resume, results, figures, errors."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import attention_backend
from diffusers.optimization import get_cosine_schedule_with_warmup
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_moviegen import FlowMatchLinearQuadraticScheduler, MovieGenPipeline, MovieGenTransformer3DModel
from diffusers_moviegen.training import (
    BucketSampler,
    LatentCache,
    TrainingStopped,
    draw_flow_batch,
    flow_loss,
    parse_arguments,
    run_script,
    save_sample_sheet,
    step_generator,
    validation_flow_loss,
)
from tests import tiny
from tests.hub_server import READ_TOKEN, WRITE_TOKEN, HubServer
from tests.training_examples.caches import make_cache
from tests.training_examples.scripts import (
    EXAMPLES,
    ROOT,
    command_line,
    load_script,
    run,
    run_and_record_losses,
    run_without_av_and_datasets,
)


CONFIGS = EXAMPLES / "configs"


@pytest.fixture(scope="module")
def script():
    return load_script("train_text_to_video")


def backbone() -> MovieGenTransformer3DModel:
    transformer = tiny.tiny_transformer()
    transformer.expand_position_tables((3, 4, 6))
    return transformer


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A pipeline folder as it comes from the Hub: with a backbone, a card, and folders that no pipeline loads."""
    folder = tmp_path_factory.mktemp("frozen") / "pipeline"
    tiny.tiny_pipeline(transformer=backbone()).save_pretrained(folder)
    (folder / "image_processor").mkdir()
    (folder / "image_processor" / "preprocessor_config.json").write_text("{}")
    (folder / "README.md").write_text("The card of another model")
    (folder / ".cache").mkdir()
    return folder


@pytest.fixture(scope="module")
def caches(frozen, tmp_path_factory):
    """Caches of pictures, of films and of held-out ones, of two shapes each."""
    folder = tmp_path_factory.mktemp("caches")
    shapes = {"resolution": 72, "aspect_ratios": [1, 1.5]}
    make_cache(folder / "images", frozen, num_images=12, num_videos=0, **shapes)
    make_cache(folder / "films", frozen, num_images=0, num_videos=16, seed=1, **shapes)
    make_cache(folder / "held_out", frozen, num_images=3, num_videos=3, split="held_out", **shapes)
    make_cache(folder / "held_out_images", frozen, num_images=2, num_videos=0, split="held_out", **shapes)
    return folder


@pytest.fixture(scope="module")
def small(frozen, caches, tmp_path_factory):
    """Options of every run: a fresh backbone of a tenth of a million parameters on films and pictures."""
    config = tmp_path_factory.mktemp("config") / "config.json"
    backbone().save_config(config.parent)
    return {
        "pipeline": str(frozen),
        "data": [str(caches / "images"), str(caches / "films")],
        "transformer_config": str(config),
        "train_batch_size": 2,
        "images_to_videos": [1, 3],
        "lr_warmup_steps": 2,
        "num_workers": 0,
        "num_validation_samples": 2,
        "num_inference_steps": 2,
        "max_train_steps": 4,
    }


@pytest.fixture(scope="module")
def validated(script, small, frozen, caches, tmp_path_factory):
    """The folder of a run with validation, and the lines it printed."""
    folder, out = tmp_path_factory.mktemp("run"), io.StringIO()
    # Not a fresh backbone, whose samples would hardly depend on the prompt.
    options = {name: value for name, value in small.items() if name != "transformer_config"}
    # The fixture that restores the attention backend is for one test; this one outlives it.
    with contextlib.redirect_stdout(out), attention_backend("native"):
        run(
            script,
            output_dir=folder,
            validation_data=caches / "held_out",
            validation_steps=3,
            checkpointing_steps=3,
            guidance_scale=4,
            transformer=frozen,
            **options | {"max_train_steps": 7},
        )
    return folder, [json.loads(line) for line in out.getvalue().splitlines()]


def transformer_of(folder: Path) -> MovieGenTransformer3DModel:
    return MovieGenTransformer3DModel.from_pretrained(folder / "pipeline" / "transformer")


def test_the_result_is_a_whole_pipeline(validated, frozen, caches):
    folder = validated[0] / "pipeline"
    pipe = MovieGenPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("a red circle bounces", num_inference_steps=2, output_type="np").frames
    # Of both shapes there are as many films.
    assert frames.shape[1] == 9 and frames.shape[2:4] in {(64, 64), (64, 96)}
    assert np.isfinite(frames).all()
    assert (pipe.config.default_frame_rate, pipe.config.default_guidance_scale) == (8, 4)
    assert pipe.config.default_num_inference_steps == 2

    def files(folder):
        paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {path: (folder / path).read_bytes() for path in paths if path.parts[0] != "transformer"}

    copied, original = files(folder), files(frozen)
    for name in ("README.md", "model_index.json"):
        del original[Path(name)]
    del copied[Path("model_index.json")]
    assert copied == original
    for file in (folder / "model_index.json", folder / "transformer" / "config.json"):
        assert str(validated[0]) not in file.read_text() and str(frozen) not in file.read_text()
    assert not list(validated[0].glob("partial-*"))


def test_the_weights_are_the_averages_in_bfloat16(validated):
    folder = validated[0]
    result = load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    averages = load_file(folder / "checkpoint-7" / "ema.safetensors")
    assert result.keys() == averages.keys()
    for name, tensor in result.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, averages[name].bfloat16()), name
    assert not torch.equal(
        averages["proj_out.weight"], load_file(folder / "checkpoint-7/model.safetensors")["proj_out.weight"]
    )


def test_lines_of_figures(validated, script, small, caches):
    folder, lines = validated
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert all(line["skipped_steps"] == 0 for line in lines)
    assert 0 < lines[0]["seconds"] <= lines[1]["seconds"] <= lines[2]["seconds"]
    # The averaged weights of a checkpoint give the figure that was printed at its step.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator()
    transformer = MovieGenTransformer3DModel.from_config(
        MovieGenTransformer3DModel.load_config(small["transformer_config"])
    )
    cache = LatentCache([caches / "held_out"])
    for step, line in ((6, lines[1]), (7, lines[2])):
        transformer.load_state_dict(load_file(folder / f"checkpoint-{step}" / "ema.safetensors"))
        loss = validation_flow_loss(transformer, FlowMatchLinearQuadraticScheduler(), cache, accelerator, 3)
        assert line["validation_loss"] == pytest.approx(loss, rel=1e-5)


def test_sheets_and_checkpoints(validated):
    folder = validated[0]
    assert {path.name for path in folder.glob("*checkpoint*")} == {"checkpoint-6", "checkpoint-7"}
    assert {path.name for path in (folder / "samples").iterdir()} == {f"step_{step:06d}.png" for step in (3, 6, 7)}
    config = MovieGenPipeline.load_config(folder / "pipeline")
    size = (9 * config["default_width"], 2 * config["default_height"])
    assert Image.open(folder / "samples" / "step_000007.png").size == size
    assert json.loads((folder / "arguments.json").read_text())["num_frames"] == 9


def test_sheets_show_what_the_pipeline_makes_of_the_prompts(validated, caches, frozen, tmp_path):
    folder = validated[0]
    pipe = MovieGenPipeline.from_pretrained(folder / "pipeline", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.load_state_dict(load_file(folder / "checkpoint-7" / "ema.safetensors"))
    samples = [sample for sample in LatentCache([caches / "held_out"]).samples if sample.bucket.num_frames == 9]
    frames = pipe(
        [sample.captions[0] for sample in samples[:2]],
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    save_sample_sheet(frames.transpose(1, 2) * 2 - 1, tmp_path / "sheet.png")
    sheets = [
        np.asarray(Image.open(path), int) for path in (folder / "samples/step_000007.png", tmp_path / "sheet.png")
    ]
    # The features are cached in float16.
    assert np.abs(sheets[0] - sheets[1]).mean() < 0.2 and sheets[1].std() > 5


def test_trains_as_a_loop_written_out_does(script, small, caches, tmp_path):
    """Against PyTorch alone: order of batches, accumulation, clipping, schedule, and the average of the weights."""
    options = {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "max_grad_norm": 0.5, "weight_decay": 0.1}
    run(script, output_dir=tmp_path, ema_decay=0.5, seed=3, prompt_dropout=0.3, logit_mean=-1, **small, **options)

    torch.manual_seed(3)
    transformer = MovieGenTransformer3DModel.from_config(
        MovieGenTransformer3DModel.load_config(small["transformer_config"])
    )
    scheduler, cache = FlowMatchLinearQuadraticScheduler(), LatentCache(small["data"])
    sampler = BucketSampler([sample.bucket for sample in cache.samples], 2, seed=3, images_to_videos=(1, 3))
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    rates = get_cosine_schedule_with_warmup(optimizer, 2, 4)
    averages = {name: weight.detach().double() for name, weight in transformer.named_parameters()}
    kinds = []
    for step in range(4):
        for number in (2 * step, 2 * step + 1):
            bucket, requests = sampler.batch(number)
            kinds.append(bucket.num_frames)
            batch = cache.collate([cache.read(*request) for request in requests])
            inputs = draw_flow_batch(batch, cache.unconditional, 0.3, step_generator(3, number + 1), "cpu", -1)
            (flow_loss(transformer, scheduler, *inputs) / 2).backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 0.5)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        decay = min(1 - (1 + step) ** -0.75, 0.5)
        for name, weight in transformer.named_parameters():
            averages[name] = decay * averages[name] + (1 - decay) * weight.detach().double()
    assert kinds.count(1) == 2

    trained = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    saved_averages = load_file(tmp_path / "checkpoint-4" / "ema.safetensors")
    for name, weight in transformer.named_parameters():
        torch.testing.assert_close(trained[name], weight.detach(), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(saved_averages[name].double(), averages[name], atol=2e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing_else(script, small, tmp_path, monkeypatch):
    losses = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "a", **small)
    with monkeypatch.context() as patch:
        calls = []
        enable = MovieGenTransformer3DModel.enable_gradient_checkpointing
        patch.setattr(
            MovieGenTransformer3DModel,
            "enable_gradient_checkpointing",
            lambda self: (calls.append(self), enable(self)),
        )
        again = run_and_record_losses(
            script, monkeypatch, output_dir=tmp_path / "b", gradient_checkpointing=True, **small
        )
    assert len(calls) == 1 and again == pytest.approx(losses, abs=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_uninterrupted_one(script, small, caches, tmp_path, monkeypatch, optimizer):
    arguments = small | {
        "optimizer": optimizer,
        "max_train_steps": 8,
        "validation_data": caches / "held_out",
        "validation_steps": 1,
        "checkpointing_steps": 3,
        "lr_scheduler": "halve_on_plateau",
        "lr_patience": 2,
        "num_validation_samples": 0,
        "learning_rate": 0.05,
    }
    losses = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "whole", **arguments)
    before = run_and_record_losses(script, monkeypatch, 5, output_dir=tmp_path / "parts", **arguments)
    assert not (tmp_path / "parts" / "pipeline").exists()
    arguments["resume_from_checkpoint"] = "latest"
    after = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "parts", **arguments)
    assert (len(losses), len(before), len(after)) == (8, 5, 5)
    assert before == pytest.approx(losses[:5], abs=1e-6) and after == pytest.approx(losses[3:], abs=1e-6)
    parts, whole = (transformer_of(tmp_path / name).state_dict() for name in ("parts", "whole"))
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def test_a_resumed_run_may_accumulate_otherwise(script, small, tmp_path):
    arguments = small | {"output_dir": tmp_path, "lr_scheduler": "constant_with_warmup"}
    run(script, gradient_accumulation_steps=3, **arguments | {"max_train_steps": 3})
    run(script, gradient_accumulation_steps=2, resume_from_checkpoint="latest", **arguments)
    before, after = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (3, 4))
    assert not torch.equal(before["proj_out.weight"], after["proj_out.weight"])


def test_the_rate_halves_on_a_plateau(script, small, caches, tmp_path, capsys):
    # The rate is too small to change weights in float32, so no loss is below the first.
    run(
        script,
        output_dir=tmp_path,
        validation_data=caches / "held_out",
        lr_scheduler="halve_on_plateau",
        learning_rate=1e-20,
        min_learning_rate=3e-21,
        weight_decay=0,
        lr_patience=1,
        validation_steps=1,
        **small | {"max_train_steps": 6, "lr_warmup_steps": 0, "num_validation_samples": 0},
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({line["validation_loss"] for line in lines}) == 1
    # The schedule has set the rate of the next step when a validation lowers it.
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-20, 1e-20, 1e-20, 5e-21, 3e-21, 3e-21])
    assert not (tmp_path / "samples").exists()


def test_starts_from_another_backbone_with_larger_tables(script, small, frozen, tmp_path):
    """With a rate of zero the result is where the run started, whether a model or a pipeline is named."""
    start = backbone()
    options = {name: value for name, value in small.items() if name != "transformer_config"} | {"learning_rate": 0.0}
    run(script, output_dir=tmp_path / "a", transformer=frozen, max_grid_size=[4, 6, 6], **options)
    run(script, output_dir=tmp_path / "b", transformer=tmp_path / "a" / "pipeline" / "transformer", **options)
    start.expand_position_tables((4, 6, 6))
    expected = {name: tensor.bfloat16() for name, tensor in start.state_dict().items()}
    for name in "ab":
        result = transformer_of(tmp_path / name)
        assert tuple(result.config.max_grid_size) == (4, 6, 6)
        for key, tensor in result.state_dict().items():
            torch.testing.assert_close(tensor.bfloat16(), expected[key], atol=0, rtol=0)


@pytest.mark.parametrize("mixed_precision", ["no", "fp16"])
def test_a_step_that_is_not_finite_is_left_out(script, small, tmp_path, monkeypatch, capsys, mixed_precision):
    calls = []

    def loss_of(*arguments):
        calls.append(arguments)
        return flow_loss(*arguments) * (float("nan") if len(calls) == 2 else 1)

    class ScalingAccelerator(Accelerator):
        """What accelerate does for float16 on a GPU, which it leaves out on a CPU."""

        def __init__(self, **options):
            super().__init__(**options)
            if self.mixed_precision == "fp16":
                self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0)

    monkeypatch.setattr(script, "Accelerator", ScalingAccelerator)
    monkeypatch.setattr(script, "flow_loss", loss_of)
    options = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0, "checkpointing_steps": 1}
    run(
        script,
        output_dir=tmp_path,
        mixed_precision=mixed_precision,
        checkpoints_total_limit=4,
        validation_steps=1,
        **small | options,
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]
    assert ["loss" in line for line in lines] == [True, False, True, True]
    for name in ("model.safetensors", "ema.safetensors"):
        weights = [load_file(tmp_path / f"checkpoint-{step}" / name)["proj_out.weight"] for step in (1, 2, 3)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_a_full_disk_leaves_the_earlier_result(script, small, tmp_path, monkeypatch):
    run(script, output_dir=tmp_path, **small)
    before = {path: path.read_bytes() for path in (tmp_path / "pipeline").rglob("*") if path.is_file()}
    save_result, limits = script.save_result, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(*arguments):
        # The folders of the frozen models are still written, the weights no longer.
        resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, limits[1]))
        try:
            save_result(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(script, "save_result", save_on_a_full_disk)
    with pytest.raises(TrainingStopped, match="pipeline' cannot be written: .*; make room and go on with --resume"):
        run(script, output_dir=tmp_path, resume_from_checkpoint="latest", **small)
    assert {path: path.read_bytes() for path in (tmp_path / "pipeline").rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob("partial-*"))


def test_a_fresh_backbone_fits_the_caches_and_is_saved_in_parts(script, small, tmp_path):
    config = json.loads(Path(small["transformer_config"]).read_text()) | {"text_embed_dim": 7, "in_channels": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run(
        script,
        output_dir=tmp_path,
        max_shard_size="20KB",
        **small | {"transformer_config": tmp_path / "config.json"},
    )
    transformer = transformer_of(tmp_path)
    assert (transformer.config.in_channels, transformer.config.text_embed_dim) == (16, tiny.TEXT_WIDTH)
    assert len(list((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("size", ["1b", "5b", "30b"])
def test_shipped_sizes(script, small, caches, size, monkeypatch):
    args = script.Arguments(output_dir="", **small | {"transformer_config": size, "max_grid_size": [4, 8, 8]})
    with torch.device("meta"):
        transformer = script.load_backbone(args, LatentCache(small["data"]))
    shipped = json.loads((ROOT / f"diffusers_moviegen/configs/transformer_{size}/config.json").read_text())
    assert transformer.config.num_layers == shipped["num_layers"]
    assert tuple(transformer.config.max_grid_size) == (4, 8, 8)
    assert transformer.text_proj.linear.in_features == tiny.TEXT_WIDTH


STAGES = (
    *("t2i_256px", "t2iv_256px", "t2iv_768px", "sft"),
    *("toybox_t2i", "toybox_t2iv", "toybox_t2iv_128", "toybox_sft"),
)


@pytest.mark.parametrize("name", STAGES)
def test_shipped_stages_run(script, small, frozen, caches, tmp_path, capsys, monkeypatch, name):
    """Two steps of every configuration with a small model; what it leaves out is given as its comment says."""
    monkeypatch.chdir(ROOT)
    config = CONFIGS / f"{name}.yaml"
    fresh = "transformer_config" in config.read_text()
    options = {name: small[name] for name in ("pipeline", "num_workers", "num_inference_steps")}
    options |= {
        "data": [str(caches / "images")] if fresh else small["data"],
        "validation_data": caches / ("held_out_images" if fresh else "held_out"),
        "output_dir": tmp_path / "run",
        "max_train_steps": 2,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "num_validation_samples": 1,
    }
    if fresh:
        options["transformer_config"] = small["transformer_config"]
    else:
        options["transformer"] = frozen
    AcceleratorState._reset_state(reset_partial_state=True)
    run_script(script.main, script.Arguments, ["--config", str(config), *command_line(options)])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["step"] == 2
    arguments = json.loads((tmp_path / "run" / "arguments.json").read_text())
    result = transformer_of(tmp_path / "run").config.max_grid_size
    if arguments["max_grid_size"] is not None:
        assert list(result) == arguments["max_grid_size"]
    MovieGenPipeline.from_pretrained(tmp_path / "run" / "pipeline")


def test_all_shipped_stages_are_tested():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert {name for name in names if name.startswith(("t2i", "sft", "toybox_t2i", "toybox_sft"))} == set(STAGES)


def test_trackers_go_on_after_a_resume(script, small, caches, tmp_path, capsys):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = small | {
        "output_dir": tmp_path,
        "validation_data": caches / "held_out",
        "validation_steps": 2,
        "num_validation_samples": 0,
        "report_to": "tensorboard",
        "lr_scheduler": "constant_with_warmup",
    }
    run(script, **arguments)
    # TensorBoard sorts the files of a run by the second that they were made in.
    time.sleep(1.1)
    run(script, **arguments | {"max_train_steps": 6, "resume_from_checkpoint": "latest"})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    events = event_accumulator.EventAccumulator(str(tmp_path / "logs" / "train_text_to_video")).Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("learning_rate")] == [1, 2, 3, 4, 5, 6]
    means = [(first.value + second.value) / 2 for first, second in zip(losses[::2], losses[1::2], strict=True)]
    assert means == pytest.approx([line["loss"] for line in lines])
    for name in ("validation_loss", "skipped_steps", "seconds"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (line["step"], pytest.approx(line[name])) for line in lines
        ]


def test_trains_without_av_and_datasets(small, caches, tmp_path):
    run_without_av_and_datasets(
        "train_text_to_video",
        tmp_path,
        output_dir=tmp_path / "run",
        validation_data=caches / "held_out",
        **small,
    )
    MovieGenPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert (tmp_path / "run" / "samples" / "step_000004.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transformer": "x"}, "pass either --transformer, .* or --transformer_config"),
        ({"transformer_config": None}, "pass either --transformer, .* or --transformer_config"),
        ({"transformer_config": "2b"}, "--transformer_config: '2b' is not 1b, 5b, 30b or a config.json"),
        ({"transformer_config": None, "transformer": "missing"}, "--transformer: 'missing' is no folder, and cannot"),
        ({"max_grid_size": [2, 4]}, r"--max_grid_size is \[2, 4\]: pass three numbers"),
        ({"max_grid_size": [1, 4, 6]}, "grid of 1 x 4 x 6, but .* of 9x64x64 .* a larger --max_grid_size"),
        ({"images_to_videos": [0, 0]}, r"--images_to_videos is \[0, 0\]: pass two numbers"),
        ({"train_batch_size": 0}, "--train_batch_size is 0: it must be at least 1"),
        ({"train_batch_size": 50}, "--data, --train_batch_size, --images_to_videos: no bucket has the 50 samples"),
        ({"prompt_dropout": 1.5}, "--prompt_dropout is 1.5: it must be from 0 to 1"),
        ({"logit_mean": float("nan")}, "--logit_mean is nan: it must be finite"),
        ({"ema_decay": 1.0}, "--ema_decay is 1.0: it must be at least 0 and below 1"),
        ({"learning_rate": -1.0}, "--learning_rate is -1.0: it must be at least 0"),
        ({"learning_rate": "nan"}, "--learning_rate is nan: it must be at least 0 and finite"),
        ({"min_learning_rate": 1.0}, "--min_learning_rate is 1.0: it must be from 0 to --learning_rate, 0.0001"),
        ({"min_learning_rate": 1e-5}, "--min_learning_rate does nothing without --lr_scheduler halve_on_plateau"),
        ({"max_shard_size": "large"}, "--max_shard_size is 'large': pass a size such as 10GB"),
        ({"guidance_scale": "nan"}, "--guidance_scale is nan: pass a number"),
        ({"frame_rate": "inf"}, "--frame_rate is inf: it must be above 0"),
        ({"max_grad_norm": 0.0}, "--max_grad_norm is 0.0: it must be above 0"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 needs a GPU, .* pass bf16 or no"),
        ({"num_validation_samples": -1}, "--num_validation_samples is -1: pass 0"),
        ({"lr_scheduler": "halve_on_plateau"}, "--lr_scheduler halve_on_plateau .* add --validation_data"),
        ({"report_to": "abacus"}, "--report_to: 'abacus' is not installed, or no tracker"),
        ({"frame_rate": 0.0}, "--frame_rate is 0.0: it must be above 0"),
        ({"validation_data": ["b", "./a/"], "data": ["a"]}, "--validation_data: './a/' is trained on"),
        ({"height": 40}, "`height` must be a multiple of 16, got 40"),
        ({"num_frames": 17, "max_grid_size": [2, 4, 6]}, "`num_frames` is 17, but .* at most 16 frames"),
        ({"data": ["missing"]}, "--data: 'missing' is no latent cache"),
        ({"resume_from_checkpoint": "missing"}, "no checkpoint at 'missing'"),
    ],
)
def test_mistakes_are_named(script, small, tmp_path, arguments, message):
    arguments = {name: value for name, value in (small | arguments).items() if value is not None}
    with pytest.raises((ValueError, OSError), match=message):
        run(script, output_dir=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_mistakes_end_with_one_line_and_code_2(script, small, tmp_path, capfd):
    AcceleratorState._reset_state(reset_partial_state=True)
    options = command_line(small | {"output_dir": tmp_path / "run", "data": ["missing"]})
    with pytest.raises(SystemExit) as exit_:
        run_script(script.main, script.Arguments, options)
    assert exit_.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line == "error: --data: 'missing' is no latent cache; precompute.py makes one."


def test_a_run_does_not_replace_another(script, small, tmp_path):
    run(script, output_dir=tmp_path, **small)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"--output_dir: '{tmp_path}' has checkpoint-4 of another run; go on with"):
        run(script, output_dir=tmp_path, **small | {"max_train_steps": 5})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    shutil.rmtree(tmp_path / "checkpoint-4")
    # The result would take the place of the very folder that the frozen models come from.
    with pytest.raises(ValueError, match=f"--output_dir: '{tmp_path / 'pipeline'}' is there already, and would be"):
        run(script, output_dir=tmp_path, **small | {"pipeline": tmp_path / "pipeline"})


def test_a_backbone_that_does_not_fit_is_refused(script, small, frozen, tmp_path):
    options = {name: value for name, value in small.items() if name != "transformer_config"}
    folder = tmp_path / "transformer"
    MovieGenTransformer3DModel.from_config(dict(backbone().config) | {"text_embed_dim": 7}).save_pretrained(folder)
    with pytest.raises(ValueError, match="--transformer: .* has text_embed_dim 7, the caches need 32; .* --pipeline"):
        run(script, output_dir=tmp_path / "run", transformer=folder, **options)
    with pytest.raises(ValueError, match=r"--max_grid_size is \[2, 4, 6\], smaller than the \[3, 4, 6\] of '"):
        run(script, output_dir=tmp_path / "run", transformer=frozen, max_grid_size=[2, 4, 6], **options)

    shutil.copytree(frozen / "transformer", tmp_path / "incomplete")
    file = tmp_path / "incomplete" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["norm_out.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(OSError, match="--transformer: the weights in .* lack 'norm_out.weight'"):
        run(script, output_dir=tmp_path / "run", transformer=tmp_path / "incomplete", **options)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match="--transformer: '.*incomplete' cannot be loaded: "):
        run(script, output_dir=tmp_path / "run", transformer=tmp_path / "incomplete", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"_class_name": "AutoencoderKL"}', "its _class_name is AutoencoderKL"),
        ('{"_class_name": "MovieGenTransformer3DModel", "patch_size": 2}', "'int' object is not iterable"),
        ('{"num_layers": 2}', "its _class_name is None"),
        ("{", "Expecting property name"),
    ],
)
def test_configurations_of_something_else_are_refused(script, small, tmp_path, text, reason):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"--transformer_config: .* does not describe a MovieGen.*: {reason}"):
        run(script, output_dir=tmp_path / "run", **small | {"transformer_config": tmp_path / "config.json"})


def test_caches_of_other_models_are_refused(script, small, frozen, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(frozen, other)
    tiny.tiny_t5_encoder(258, tiny.TEXT_WIDTH, seed=9).save_pretrained(other / "text_encoder")
    with pytest.raises(ValueError, match="--data: .*images' was made with text_encoder.weights .* in '.*other'"):
        run(script, output_dir=tmp_path / "run", **small | {"pipeline": other})
    (other / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(OSError, match="--pipeline: .* holds a WanPipeline; pass a MovieGenPipeline"):
        run(script, output_dir=tmp_path / "run", **small | {"pipeline": other})
    assert not (tmp_path / "run").exists()


def test_sheets_need_prompts_of_their_kind(script, small, caches, tmp_path):
    pictures = caches / "held_out_images"
    with pytest.raises(ValueError, match="--num_frames is 9, but --validation_data has no video .*_samples 0"):
        run(script, output_dir=tmp_path / "run", validation_data=pictures, **small)


def test_the_result_is_pushed_with_a_card_whose_snippet_runs(script, small, caches, tmp_path, monkeypatch, capsys):
    arguments = small | {
        "output_dir": tmp_path / "run",
        "validation_data": caches / "held_out",
        "num_validation_samples": 0,
        "max_train_steps": 2,
        "push_to_hub": True,
        "hub_model_id": "tiny-toybox",
        "hub_private": False,
    }
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home", WRITE_TOKEN)
        hub.broken = "/commit/"
        with pytest.raises(OSError, match="cannot push to 'user/tiny-toybox': the Hub answered 500 "):
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
        assert f"| validation_loss | {figures['validation_loss']:.4g} |" in card.text
        assert "12 images and 16 videos with captions, from latent caches of the names images films." in card.text
        assert "| learning_rate | 0.0001 |" in card.text and "| data | images films |" in card.text
        assert str(tmp_path.parent) not in card.text and str(caches) not in card.text
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

        # What was pushed is a backbone to start from.
        options = {name: value for name, value in small.items() if name != "transformer_config"}
        run(script, output_dir=tmp_path / "next", transformer="user/tiny-toybox", **options)


def test_the_card_of_a_picture_run_draws_a_picture(script, small, caches, tmp_path, monkeypatch):
    args = script.Arguments(output_dir="", num_frames=1, frame_rate=8, height=32, width=48, **small)
    card = script.model_card(args, "user/tiny", LatentCache([caches / "images"]), {"loss": 1.0}, num_processes=2)
    assert card.data.pipeline_tag == "text-to-image"
    assert "| processes | 2 |" in card.text and "training started from fresh weights" in card.text
    tiny.tiny_pipeline().save_pretrained(tmp_path / "pipeline")
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


def test_options_come_from_a_file_too(script, small, tmp_path):
    (tmp_path / "stage.yaml").write_text("learning_rate: 3.0e-4\nmax_grid_size: [2, 3, 4]\n")
    options = command_line(small | {"output_dir": tmp_path, "learning_rate": 2e-4})
    args = parse_arguments(script.Arguments, ["--config", str(tmp_path / "stage.yaml"), *options])
    assert (args.learning_rate, args.max_grid_size) == (2e-4, [2, 3, 4])
