"""The script that trains the backbone, killed, stopped, out of disk and out of luck, in processes of its own."""

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_moviegen.training import LatentCache, latest_checkpoint, run_script
from tests.tiny import tiny_pipeline, tiny_transformer
from tests.training.interruptions import TIMEOUT, finish, start
from tests.training_examples.caches import make_cache
from tests.training_examples.scripts import command_line, load_script, run


STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a pipeline and a cache of training samples."""
    folder = tmp_path_factory.mktemp("interruptions")
    tiny_pipeline().save_pretrained(folder / "pipeline")
    make_cache(folder / "cache", folder / "pipeline")
    return folder


def options(folder: Path, output_dir: Path, **changes) -> dict:
    return {
        "output_dir": output_dir,
        "pipeline": folder / "pipeline",
        "transformer": folder / "pipeline" / "transformer",
        "data": folder / "cache",
        "images_to_videos": [1, 1],
        "train_batch_size": 1,
        "max_train_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 1,
        "ema_decay": 0.5,
        "num_workers": 0,
        "validation_steps": 1,
        "checkpointing_steps": 1,
        "resume_from_checkpoint": "latest",
    } | changes


def train(arguments: dict, largest_file: int = -1) -> None:
    """Runs the script, as the leader of a process group, on a disk that has room for files of this size only."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    script = load_script("train_text_to_video")
    run_script(script.main, script.Arguments, command_line(arguments))


def figures(log: Path) -> list[dict]:
    """What a run has printed so far about its steps; a killed process may have left half a line."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def stderr(log: Path) -> str:
    return log.with_suffix(".errors").read_text()


def errors(log: Path) -> list[str]:
    return [line for line in stderr(log).splitlines() if line.startswith("error:")]


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def uninterrupted(folder) -> Path:
    """The output folder of a run that nothing disturbed; its log is beside it."""
    process = start(train, folder / "uninterrupted.log", options(folder, folder / "uninterrupted"))
    assert finish(process) == 0, stderr(folder / "uninterrupted.log")
    assert [line["step"] for line in figures(folder / "uninterrupted.log")] == list(range(1, STEPS + 1))
    return folder / "uninterrupted"


def assert_same_run(output_dir: Path, uninterrupted: Path) -> None:
    """Asserts equal losses in every step, done twice or not, and equal weights in the end."""
    expected = {line["step"]: line for line in figures(uninterrupted.with_suffix(".log"))}
    lines = figures(output_dir.with_suffix(".log"))
    assert {line["step"] for line in lines} <= set(expected) and lines[-1]["step"] == STEPS
    for line in lines:
        for name in ("loss", "learning_rate"):
            assert line[name] == pytest.approx(expected[line["step"]][name], rel=0, abs=1e-6)
    for name in (
        f"checkpoint-{STEPS}/model",
        f"checkpoint-{STEPS}/ema",
        "pipeline/transformer/diffusion_pytorch_model",
    ):
        weights, others = (load_file(root / f"{name}.safetensors") for root in (output_dir, uninterrupted))
        assert weights.keys() == others.keys()
        for key in weights:
            torch.testing.assert_close(weights[key], others[key], rtol=0, atol=1e-6)


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(folder, uninterrupted):
    output_dir, log, rng = folder / "killed", folder / "killed.log", random.Random(0)
    # Batches that were read ahead are lost with the process, and read again.
    arguments = options(folder, output_dir, num_workers=1)
    during_saves = kills = 0
    for attempt in range(8):
        process, before = start(train, log, arguments), len(figures(log))
        if attempt % 2:
            wait_for(lambda: any(output_dir.glob("partial-checkpoint-*")), process)
        else:
            wait_for(lambda: len(figures(log)) > before, process)  # noqa: B023
            time.sleep(rng.uniform(0, 0.1))
        process.kill()
        kills += finish(process) == -signal.SIGKILL
        during_saves += any(output_dir.glob("partial-checkpoint-*"))
    assert kills >= 4 and during_saves >= 1
    assert finish(start(train, log, arguments)) == 0, stderr(log)
    assert_same_run(output_dir, uninterrupted)
    assert {path.name for path in output_dir.glob("*checkpoint-*")} == {
        f"checkpoint-{STEPS - 1}",
        f"checkpoint-{STEPS}",
    }
    # What was lost was done again: the wall time goes on from what was saved.
    seconds = {line["step"]: line["seconds"] for line in figures(log)}
    assert [seconds[step] for step in sorted(seconds)] == sorted(seconds.values())


@pytest.mark.parametrize("everyone", [False, True], ids=["the process", "its group"])
def test_a_run_that_is_told_to_stop_saves_and_succeeds(everyone, folder, uninterrupted):
    output_dir, log = folder / f"stopped-{everyone}", folder / f"stopped-{everyone}.log"
    arguments = options(folder, output_dir, num_workers=2, checkpointing_steps=1000)
    process = start(train, log, arguments)
    wait_for(lambda: len(figures(log)) > 1, process)
    # Schedulers send the signal to the workers that read batches, too.
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGTERM)
    assert finish(process) == 0 and not errors(log), stderr(log)
    stopped_after = int(latest_checkpoint(output_dir).name.removeprefix("checkpoint-"))
    assert 1 < stopped_after < STEPS and not (output_dir / "pipeline").exists()
    assert finish(start(train, log, arguments)) == 0, stderr(log)
    assert_same_run(output_dir, uninterrupted)


def test_a_full_disk_ends_the_run_with_one_line(folder, uninterrupted):
    output_dir, log = folder / "full", folder / "full.log"
    arguments = options(folder, output_dir, checkpointing_steps=2)
    assert finish(start(train, log, arguments | {"max_train_steps": 2, "lr_scheduler": "constant_with_warmup"})) == 0
    assert finish(start(train, log, arguments, 50_000)) == 1, stderr(log)
    (error,) = errors(log)
    assert f"cannot write checkpoint-4 to '{output_dir}'" in error and "checkpoint-2, is whole" in error
    assert [path.name for path in output_dir.glob("*checkpoint-*")] == ["checkpoint-2"]
    assert finish(start(train, log, arguments)) == 0, stderr(log)
    assert [line["step"] for line in figures(log)] == [1, 2, 3, 4, *range(3, STEPS + 1)]


def test_a_loss_that_is_not_finite_costs_one_step(folder, monkeypatch, capsys):
    script = load_script("train_text_to_video")
    flow_loss, calls = script.flow_loss, []

    def third_is_not_a_number(*args):
        calls.append(args)
        return flow_loss(*args) * (torch.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(script, "flow_loss", third_is_not_a_number)
    output_dir = folder / "skipped"
    run(script, **options(folder, output_dir, max_train_steps=4, checkpoints_total_limit=4))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1]
    for name in ("model", "ema"):
        before, skipped, after = (
            load_file(output_dir / f"checkpoint-{step}" / f"{name}.safetensors") for step in (2, 3, 4)
        )
        assert all(torch.equal(before[key], skipped[key]) for key in before)
        assert any(not torch.equal(before[key], after[key]) for key in before)


def test_ten_losses_in_a_row_that_are_not_finite_end_the_run(folder):
    log = folder / "diverged.log"
    # The workers that read batches end with the run.
    arguments = options(folder, folder / "diverged", learning_rate=1e30, max_train_steps=30, num_workers=2)
    assert finish(start(train, log, arguments)) == 1, stderr(log)
    (error,) = errors(log)
    assert "10 steps in a row were not finite" in error and "--learning_rate" in error
    assert stderr(log).count("skipped step") == 9
    assert any(f"'{sample.name}'" in error for sample in LatentCache([folder / "cache"]).samples)


def test_a_checkpoint_of_another_model_is_refused(folder, uninterrupted):
    transformer = tiny_transformer()
    other = type(transformer).from_config({**transformer.config, "ffn_dim": 64})
    other.save_pretrained(folder / "other")
    log = folder / "refused.log"
    arguments = options(
        folder,
        folder / "refused",
        transformer=folder / "other",
        resume_from_checkpoint=latest_checkpoint(uninterrupted),
    )
    assert finish(start(train, log, arguments)) == 2, stderr(log)
    (error,) = errors(log)
    assert "of another model: 'transformer_blocks.0.ff.gate_proj.weight' is (48, 32) there, (64, 32) here" in error
    assert not (folder / "refused").exists()
