"""Short runs of the script that trains a LoRA: what its result does, resume, refusals, two processes, the Hub."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers import attention_backend
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_moviegen import (
    FlowMatchLinearQuadraticScheduler,
    MovieGenPipeline,
    MovieGenTransformer3DModel,
    bundled_checkpoint,
)
from diffusers_moviegen.training import LatentCache, TrainingStopped, run_script, validation_flow_loss
from tests import tiny
from tests.hub_server import WRITE_TOKEN, HubServer
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


FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def script():
    return load_script("train_text_to_video_lora")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    tiny.tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def caches(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    make_cache(folder / "train", base, num_images=8, num_videos=8)
    make_cache(folder / "held_out", base, num_images=2, num_videos=2, split="held_out")
    return folder


@pytest.fixture(scope="module")
def small(base, caches):
    """Options of every run."""
    return {
        "pipeline": str(base),
        "data": str(caches / "train"),
        "lora_rank": 4,
        "train_batch_size": 2,
        "images_to_videos": [1, 3],
        "learning_rate": 1e-2,
        "lr_warmup_steps": 1,
        "num_workers": 0,
        "max_train_steps": 4,
    }


@pytest.fixture(scope="module")
def trained(script, small, caches, tmp_path_factory, request):
    """The folder of a run with validation, and the lines it printed."""
    folder = tmp_path_factory.mktemp("run")
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled(), open(folder / "out.txt", "w") as file:
        # The script chooses an attention backend, which would stay that of the process.
        with pytest.MonkeyPatch.context() as patch, attention_backend("native"):
            patch.setattr(sys, "stdout", file)
            run(
                script,
                output_dir=folder / "run",
                validation_data=caches / "held_out",
                validation_steps=10,
                checkpointing_steps=10,
                lora_alpha=8,
                **small | {"max_train_steps": 25, "learning_rate": 3e-2},
            )
    return folder / "run", [json.loads(line) for line in (folder / "out.txt").read_text().splitlines()]


def generate(pipe: MovieGenPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle bounces", num_inference_steps=2, generator=generator, output_type="pt").frames


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def merged(lora: Path) -> MovieGenPipeline:
    """The pipeline with the product of the saved matrices added to its weights by hand."""
    pipe = tiny.tiny_pipeline()
    weights = load_file(lora / FILE)
    for name, down in weights.items():
        if name.endswith(".lora_A.weight"):
            up = weights[name.replace("lora_A", "lora_B")]
            layer = pipe.transformer.get_submodule(name.removeprefix("transformer.").removesuffix(".lora_A.weight"))
            # alpha / rank
            layer.weight.data += 8 / 4 * up @ down
    return pipe


def test_the_loss_on_unseen_samples_falls(trained, caches):
    _, lines = trained
    assert [line["step"] for line in lines] == [0, 10, 20, 25]
    AcceleratorState._reset_state(reset_partial_state=True)
    cache, scheduler = LatentCache([caches / "held_out"]), FlowMatchLinearQuadraticScheduler()
    for pipe, figure in (
        (tiny.tiny_pipeline(), lines[0]["base_validation_loss"]),
        (merged(trained[0] / "lora"), lines[-1]["validation_loss"]),
    ):
        loss = validation_flow_loss(pipe.transformer, scheduler, cache, Accelerator(), 3)
        assert figure == pytest.approx(loss, rel=1e-5)
    assert {line["base_validation_loss"] for line in lines} == {lines[0]["base_validation_loss"]}
    assert lines[-1]["validation_loss"] < 0.9 * lines[0]["base_validation_loss"]
    assert all(line["skipped_steps"] == 0 for line in lines[1:])


def test_the_result_loads_and_unloads(trained):
    pipe = tiny.tiny_pipeline()
    without = generate(pipe)
    pipe.load_lora_weights(trained[0] / "lora")
    frames = generate(pipe)
    assert (frames - without).abs().max() > 1e-2
    assert_close(frames, generate(merged(trained[0] / "lora")))
    pipe.disable_lora()
    assert torch.equal(generate(pipe), without)
    pipe.enable_lora()
    assert torch.equal(generate(pipe), frames)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), without)


def test_the_result_fuses_and_unfuses(trained):
    pipe = tiny.tiny_pipeline()
    without = generate(pipe)
    pipe.load_lora_weights(trained[0] / "lora")
    frames = generate(pipe)
    weight = pipe.transformer.transformer_blocks[0].attn1.to_q.base_layer.weight
    before = weight.detach().clone()
    pipe.fuse_lora()
    assert (weight - before).abs().max() > 1e-4
    assert_close(generate(pipe), frames)
    pipe.unfuse_lora()
    assert_close(weight, before)
    assert_close(generate(pipe), frames)
    pipe.unload_lora_weights()
    assert_close(generate(pipe), without)


def test_results_are_swapped_in_place(trained):
    """A checkpoint of the run is a LoRA as well: the two take turns in the same layers."""
    early = tiny.tiny_pipeline()
    early.load_lora_weights(trained[0] / "checkpoint-20")
    late = tiny.tiny_pipeline()
    late.load_lora_weights(trained[0] / "lora")
    expected = {"checkpoint-20": generate(early), "lora": generate(late)}
    assert (expected["lora"] - expected["checkpoint-20"]).abs().max() > 1e-3

    pipe = tiny.tiny_pipeline()
    pipe.load_lora_weights(trained[0] / "lora", adapter_name="mine")
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    for name in ("checkpoint-20", "lora"):
        pipe.load_lora_weights(trained[0] / name, adapter_name="mine", hotswap=True)
        assert pipe.transformer.transformer_blocks[0].attn1.to_q is layer
        assert pipe.get_list_adapters() == {"transformer": ["mine"]}
        assert torch.equal(generate(pipe), expected[name])


def test_checkpoints_and_result_hold_the_adapter_alone(trained, small):
    folder = trained[0]
    assert {path.name for path in folder.iterdir()} == {"arguments.json", "checkpoint-20", "checkpoint-25", "lora"}
    assert not list((folder / "checkpoint-25").glob("model*"))
    assert [path.name for path in (folder / "lora").iterdir()] == [FILE]
    result, last = (load_file(folder / name / FILE) for name in ("lora", "checkpoint-25"))
    # Two blocks of two attentions of four layers, each with two matrices.
    assert len(result) == 2 * 2 * 4 * 2 and result.keys() == last.keys()
    assert all(name.startswith("transformer.transformer_blocks.") and ".lora_" in name for name in result)
    for name, tensor in result.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, last[name])
    with safe_open(folder / "lora" / FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (4, 8)
    assert str(small["pipeline"]) not in json.dumps(metadata)
    size = sum(path.stat().st_size for path in (folder / "checkpoint-25").iterdir())
    assert size < (Path(small["pipeline"]) / "transformer/diffusion_pytorch_model.safetensors").stat().st_size


def test_layers_of_the_backbone_do_not_change(script, small, tmp_path, monkeypatch):
    trainable = []
    prepare = Accelerator.prepare

    def record(self, model, optimizer):
        trainable.append({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
        trainable.append({parameter for group in optimizer.param_groups for parameter in group["params"]})
        trainable.append(model)
        return prepare(self, model, optimizer)

    monkeypatch.setattr(Accelerator, "prepare", record)
    run(
        script,
        output_dir=tmp_path,
        mixed_precision="bf16",
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        lora_target_modules=["to_q", "down_proj"],
        **small,
    )
    names, optimised, model = trainable
    assert all(".lora_" in name and parameter.dtype == torch.float32 for name, parameter in names.items())
    assert {name.split(".lora_")[0].split(".")[-1] for name in names} == {"to_q", "down_proj"}
    assert optimised == set(names.values())
    assert any((parameter != 0).any() for name, parameter in names.items() if ".lora_B." in name)
    frozen = dict(tiny.tiny_transformer().named_parameters())
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            original = frozen[name.replace(".base_layer", "")]
            assert parameter.grad is None and torch.equal(parameter, original.to(parameter.dtype))
    assert model.transformer_blocks[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16


def test_accumulated_and_recomputed_gradients_are_the_same(script, small, tmp_path, monkeypatch):
    plain = small | {"gradient_accumulation_steps": 2, "max_train_steps": 3}
    losses = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "a", **plain)
    again = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "b", gradient_checkpointing=True, **plain)
    assert len(losses) == 6 and again == pytest.approx(losses, abs=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(script, small, tmp_path, monkeypatch):
    arguments = small | {"max_train_steps": 8, "checkpointing_steps": 3, "gradient_accumulation_steps": 2}
    losses = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "whole", **arguments)
    # The sixth step is never done.
    before = run_and_record_losses(script, monkeypatch, 11, output_dir=tmp_path / "parts", **arguments)
    assert not (tmp_path / "parts" / "lora").exists()
    arguments["resume_from_checkpoint"] = "latest"
    after = run_and_record_losses(script, monkeypatch, output_dir=tmp_path / "parts", **arguments)
    assert (len(losses), len(before), len(after)) == (16, 11, 10)
    assert before == pytest.approx(losses[:11], abs=1e-6) and after == pytest.approx(losses[6:], abs=1e-6)
    assert len(set(losses)) == 16
    parts, whole = (load_file(tmp_path / name / "lora" / FILE) for name in ("parts", "whole"))
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def test_sigterm_saves(script, small, tmp_path, monkeypatch, capsys):
    backward, calls = Accelerator.backward, []

    def interrupt(self, loss, **kwargs):
        calls.append(loss)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        backward(self, loss, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "backward", interrupt)
        run(script, output_dir=tmp_path, **small)
    assert {path.name for path in tmp_path.iterdir()} == {"arguments.json", "checkpoint-2"}
    assert "stopped after step 2; --resume_from_checkpoint latest goes on there" in capsys.readouterr().err
    losses = run_and_record_losses(script, monkeypatch, output_dir=tmp_path, resume_from_checkpoint="latest", **small)
    assert len(losses) == 2 and (tmp_path / "lora" / FILE).is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": 2}, r"to_k.lora_A.weight' is \(4, 32\) there, \(2, 32\) here; resume with the --lora_rank"),
        (
            {"lora_target_modules": ["to_q", "to_k", "to_v"]},
            r"to_out.0.lora_A.weight' is \(4, 32\) there, absent here",
        ),
        (
            {"lora_target_modules": ["to_q", "to_k", "to_v", "to_out.0", "up_proj"]},
            r"up_proj.* is absent there, \(4, 32\) here",
        ),
        ({"lora_alpha": 4}, "its lora_alpha is 8"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(script, small, trained, tmp_path, change, message):
    checkpoint = trained[0] / "checkpoint-20"
    options = small | {"lora_alpha": 8} | change
    with pytest.raises(ValueError, match=f"'{checkpoint}' has another adapter: .*{message}") as error:
        run(script, output_dir=tmp_path / "run", resume_from_checkpoint=checkpoint, **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_something_else_is_refused(script, small, tmp_path):
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    with pytest.raises(OSError, match=f"--resume_from_checkpoint: '{checkpoint}' has no {FILE}; pass a checkpoint of"):
        run(script, output_dir=tmp_path / "run", resume_from_checkpoint=checkpoint, **small)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_rank": 0}, "--lora_rank is 0: it must be at least 1"),
        ({"lora_alpha": 0}, "--lora_alpha is 0.0: it must be above 0"),
        ({"lora_alpha": "nan"}, "--lora_alpha is nan: it must be above 0"),
        ({"data": "a", "validation_data": "./a/"}, "--validation_data: './a/' is trained on"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 needs a GPU, .* pass bf16 or no"),
        ({"lora_target_modules": ["to_q", "query"]}, "no linear layer 'query'; it has .*to_out.0, to_q"),
        ({"train_batch_size": 50}, "--data, --train_batch_size, --images_to_videos: no bucket has the 50 samples"),
        ({"prompt_dropout": 1.5}, "--prompt_dropout is 1.5: it must be from 0 to 1"),
        ({"images_to_videos": [1]}, r"--images_to_videos is \[1\]: pass two numbers"),
        ({"learning_rate": -1.0}, "--learning_rate is -1.0: it must be at least 0"),
        ({"max_grad_norm": 0.0}, "--max_grad_norm is 0.0: it must be above 0"),
        ({"report_to": "abacus"}, "--report_to: 'abacus' is not installed, or no tracker"),
        ({"data": "missing"}, "--data: 'missing' is no latent cache"),
        ({"pipeline": "missing"}, "--pipeline: 'missing' is no folder"),
        ({"resume_from_checkpoint": "missing"}, "no checkpoint at 'missing'"),
        ({"hub_model_id": "user/tiny"}, "--hub_model_id and --hub_private do nothing without --push_to_hub"),
        ({"push_to_hub": True}, "--push_to_hub: pass the repository to push to"),
    ],
)
def test_mistakes_are_named(script, small, tmp_path, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(script, output_dir=tmp_path / "run", **small | arguments)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_earlier_result(script, small, tmp_path, monkeypatch):
    run(script, output_dir=tmp_path, **small)
    before = {path: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    save_adapter, limits = script.save_adapter, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save_adapter(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(script, "save_adapter", save_on_a_full_disk)
    with pytest.raises(TrainingStopped, match="lora' cannot be written: .*; make room and go on with --resume"):
        run(script, output_dir=tmp_path, resume_from_checkpoint="latest", **small)
    assert {path: path.read_bytes() for path in (tmp_path / "lora").iterdir()} == before
    assert not list(tmp_path.glob("partial-*"))


def test_a_run_does_not_replace_another(script, small, tmp_path):
    (tmp_path / "run" / "lora").mkdir(parents=True)
    with pytest.raises(ValueError, match="--output_dir: '.*run/lora' is there already, and would be replaced"):
        run(script, output_dir=tmp_path / "run", **small)


def test_pipelines_that_do_not_fit_are_refused(script, small, base, tmp_path):
    def refused(folder, message):
        with pytest.raises((ValueError, OSError), match=message) as error:
            run(script, output_dir=tmp_path / "run", **small | {"pipeline": folder})
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()

    other = shutil.copytree(base, tmp_path / "other")
    vae = tiny.tiny_vae()
    next(vae.encoder.parameters()).data += 1
    vae.save_pretrained(other / "vae")
    refused(other, f"--data: .* was made with vae.weights .* in '{other}': pass the --pipeline")
    without = shutil.copytree(base, tmp_path / "without", ignore=shutil.ignore_patterns("transformer"))
    refused(without, "--pipeline: '.*without/transformer' has no config.json; pass the folder of a MovieGenTransf")
    sound = shutil.copytree(base, tmp_path / "sound")
    index = json.loads((base / "model_index.json").read_text())
    (sound / "model_index.json").write_text(json.dumps(index | {"_class_name": "SoundPipeline"}))
    refused(sound, "--pipeline: '.*sound' holds a SoundPipeline; pass a MovieGenPipeline")
    short = shutil.copytree(base, tmp_path / "short")
    config = dict(tiny.tiny_transformer().config) | {"max_grid_size": (1, 4, 4)}
    MovieGenTransformer3DModel.from_config(config).save_pretrained(short / "transformer")
    refused(short, "--pipeline: its backbone has positions for a grid of 1 x 4 x 4, but .* of 9x64x64 .* 2 x 4 x 4:")


@pytest.mark.parametrize("engine", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharding_is_refused(script, small, tmp_path, monkeypatch, engine):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: engine))
    with pytest.raises(ValueError, match="launch it without FSDP and DeepSpeed; with --mixed_precision bf16"):
        run(script, output_dir=tmp_path / "run", **small)


def test_trains_in_two_processes_without_av_and_datasets(small, caches, tmp_path):
    run_without_av_and_datasets(
        "train_text_to_video_lora",
        tmp_path,
        num_processes=2,
        output_dir=tmp_path / "run",
        validation_data=caches / "held_out",
        **small,
    )
    weights = load_file(tmp_path / "run" / "lora" / FILE)
    assert all(weight.any() for weight in weights.values())


def test_the_walk_through_runs(script, tmp_path, capsys, monkeypatch):
    """Two steps of the shipped configuration on windows of examples/media, with a small model."""
    monkeypatch.chdir(ROOT)
    transformer = tiny.tiny_transformer()
    transformer.expand_position_tables((3, 4, 6))
    tiny.tiny_pipeline(transformer=transformer).save_pretrained(tmp_path / "base")
    windows = {
        "pipeline": tmp_path / "base",
        "data": "examples/media",
        "resolution": 80,
        "aspect_ratios": 1.5,
        "lengths": 16,
        "frame_rate": 16,
    }
    precompute = load_script("precompute")
    run(precompute, output_dir=tmp_path / "train", film_part=[0, 0.6], num_windows=2, **windows)
    run(precompute, output_dir=tmp_path / "validation", film_part=[0.6, 1], **windows)
    cache = LatentCache([tmp_path / "train"])
    assert {tuple(sample.bucket) for sample in cache.samples} == {(16, 64, 96)}
    assert (len(cache.samples), len(LatentCache([tmp_path / "validation"]).samples)) == (8, 4)
    capsys.readouterr()

    AcceleratorState._reset_state(reset_partial_state=True)
    options = {
        "config": EXAMPLES / "configs" / "lora_example_media.yaml",
        "pipeline": tmp_path / "base",
        "data": tmp_path / "train",
        "validation_data": tmp_path / "validation",
        "output_dir": tmp_path / "run",
        "max_train_steps": 2,
    }
    run_script(script.main, script.Arguments, command_line(options))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines] == [0, 2]
    pipe = tiny.tiny_pipeline(transformer=transformer)
    pipe.load_lora_weights(tmp_path / "run" / "lora")


def test_trackers_go_on_after_a_resume(script, small, caches, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = small | {"output_dir": tmp_path, "validation_data": caches / "held_out", "report_to": "tensorboard"}
    run(script, **arguments)
    # TensorBoard sorts the files of a run by the second that they were made in.
    time.sleep(1.1)
    run(script, **arguments | {"max_train_steps": 6, "resume_from_checkpoint": "latest"})
    events = event_accumulator.EventAccumulator(str(tmp_path / "logs" / "train_text_to_video_lora")).Reload()
    for name in ("loss", "learning_rate"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("validation_loss")] == [4, 6]


def test_from_the_hub_and_back(script, small, base, caches, tmp_path, monkeypatch):
    """The base comes from the Hub, and the LoRA goes there with a card whose snippet runs."""
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home", WRITE_TOKEN)
        hub.add_folder("user/tiny", base)
        run(
            script,
            output_dir=tmp_path / "run",
            validation_data=caches / "held_out",
            push_to_hub=True,
            hub_model_id="user/tiny-lora",
            **small | {"pipeline": "user/tiny"},
        )
        assert hub.repositories["user/tiny-lora"].files.keys() == {".gitattributes", "README.md", FILE}
        card = ModelCard.load(tmp_path / "run" / "lora" / "README.md")
        assert card.data.tags == ["diffusers", "movie-gen", "lora"] and card.data.base_model == "user/tiny"
        for text in ("A LoRA of rank 4 for the Movie Gen backbone of user/tiny.", "| base_validation_loss |"):
            assert text in card.text
        assert str(tmp_path.parent) not in card.text
        snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
        (tmp_path / "work").mkdir()
        result = subprocess.run(
            [sys.executable, "-c", snippet],
            cwd=tmp_path / "work",
            env=os.environ | hub.environment(tmp_path / "elsewhere") | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr[-4000:]
    assert (tmp_path / "work" / "film.mp4").stat().st_size > 0


def test_the_card_of_a_lora_of_the_bundled_backbone(script, caches):
    options = {"pipeline": bundled_checkpoint(), "data": [str(caches / "train")]}
    args = script.Arguments(output_dir="", **options)
    card = script.model_card(args, "user/lora", LatentCache(args.data), {"validation_loss": 1.0}, num_processes=2)
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert "from_pretrained(bundled_checkpoint())" in snippet and str(ROOT) not in card.text
    assert "8 images and 8 videos with captions" in card.text and "| processes | 2 |" in card.text
    names = {}
    exec(snippet.split("pipe.load_lora_weights")[0], names)
    assert isinstance(names["pipe"], MovieGenPipeline)
