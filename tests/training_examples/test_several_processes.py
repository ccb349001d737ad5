"""Backbones of films and of sound on two processes of the CPU (gloo): weights whole (DDP) and sharded (FSDP2)."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor

from diffusers_moviegen import MovieGenAudioTransformer1DModel, MovieGenPipeline
from diffusers_moviegen.training import parse_arguments
from tests.processes import run_processes
from tests.tiny import full_rate_audio_vae, tiny_audio_pipeline, tiny_audio_transformer, tiny_pipeline
from tests.training.fsdp_on_cpu import enable_fsdp_on_cpu
from tests.training_examples.accelerate_configs import launch_arguments
from tests.training_examples.caches import make_audio_cache, make_cache
from tests.training_examples.scripts import EXAMPLES, command_line, load_script, run


PROCESSES = 2
TIMEOUT = 300  # in seconds; on a busy machine importing alone takes a minute
LAYOUTS = ("whole", "sharded")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a pipeline and caches of training and validation samples, of films and of sounds."""
    folder = tmp_path_factory.mktemp("several_processes")
    tiny_pipeline().save_pretrained(folder / "pipeline")
    make_cache(folder / "cache", folder / "pipeline")
    # An odd number of batches: one process has nothing of its own to do in the last one.
    make_cache(folder / "held_out", folder / "pipeline", num_images=1, num_videos=2, split="held_out")
    tiny_audio_pipeline(vae=full_rate_audio_vae()).save_pretrained(folder / "audio_pipeline")
    make_audio_cache(folder / "audio_cache", folder / "audio_pipeline")
    make_audio_cache(folder / "audio_held_out", folder / "audio_pipeline", num_samples=3, split="held_out")
    return folder


COMMON = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "max_train_steps": 4,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 1,
    "ema_decay": 0.5,
    "num_workers": 0,
    "validation_steps": 2,
    "checkpointing_steps": 2,
}


def options(folder: Path, **changes) -> dict:
    films = {
        "pipeline": folder / "pipeline",
        "transformer": folder / "pipeline" / "transformer",
        "data": folder / "cache",
        "validation_data": folder / "held_out",
        "images_to_videos": [1, 1],
        "num_validation_samples": 1,
        "num_inference_steps": 2,
    }
    return COMMON | films | changes


def audio_options(folder: Path) -> dict:
    return COMMON | {
        "pipeline": folder / "audio_pipeline",
        "transformer": folder / "audio_pipeline",
        "data": folder / "audio_cache",
        "validation_data": folder / "audio_held_out",
    }


def train(rank: int, folder: Path, name: str, sharded: bool, script_name: str, arguments: dict) -> dict:
    """Runs a script as this process's part of a launch; what it printed, and what every backward pass saw."""
    AcceleratorState._reset_state(reset_partial_state=True)
    # The script ends the group, so each run has its own.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / name}-rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()
    if sharded:
        enable_fsdp_on_cpu()
    losses, shards = [], []
    backward = Accelerator.backward

    def record(self, loss, **kwargs):
        losses.append(loss.item())
        backward(self, loss, **kwargs)
        shards.append({isinstance(weight, DTensor) for weight in self._models[0].parameters()})

    Accelerator.backward = record
    output = io.StringIO()
    script = load_script(script_name)
    try:
        with contextlib.redirect_stdout(output):
            script.main(parse_arguments(script.Arguments, command_line({"output_dir": folder / name} | arguments)))
    finally:
        Accelerator.backward = backward
    assert all(kinds == {sharded} for kinds in shards)
    figures = [json.loads(line) for line in output.getvalue().splitlines() if line.startswith("{")]
    return {"losses": losses, "figures": figures}


def run_process(rank: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(PROCESSES),
        LOCAL_WORLD_SIZE=str(PROCESSES),
        ACCELERATE_USE_CPU="true",
    )
    # What the launcher would say to FSDP.
    configured = prepare_multi_gpu_env(launch_arguments("fsdp2", "--main_process_port", "0")[0])
    os.environ.update({name: value for name, value in configured.items() if name.startswith("FSDP_")})
    results = {}

    def train_films(name: str, sharded: bool, **changes) -> None:
        results[name] = train(rank, folder, name, sharded, "train_text_to_video", options(folder, **changes))

    for layout in LAYOUTS:
        sharded = layout == "sharded"
        train_films(layout, sharded)
        if rank == 0:
            shutil.copytree(folder / layout / "checkpoint-2", folder / f"{layout}-resumed" / "checkpoint-2")
        train_films(f"{layout}-resumed", sharded, resume_from_checkpoint="latest", num_validation_samples=0)
        for precision in ("no", "bf16"):
            train_films(
                f"{layout}-still-{precision}",
                sharded,
                learning_rate=0,
                max_train_steps=1,
                num_validation_samples=0,
                mixed_precision=precision,
            )
    # What the guide says to the launcher of a backbone of sound.
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "MovieGenAudioTransformerBlock"
    for layout in LAYOUTS:
        name = f"{layout}-audio"
        results[name] = train(rank, folder, name, layout == "sharded", "train_audio", audio_options(folder))
    (folder / f"{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def two_processes(folder) -> list[dict]:
    """What both processes saw in every run; they start once, since starting them is what takes time."""
    run_processes(run_process, folder, num_processes=PROCESSES, timeout=TIMEOUT)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


def test_sharded_weights_train_as_whole_ones_do(two_processes, folder):
    for results in two_processes:
        assert len(results["whole"]["losses"]) == 8
        assert results["sharded"]["losses"] == pytest.approx(results["whole"]["losses"], rel=0, abs=1e-5)
    # Each process has samples of its own.
    assert not set(two_processes[0]["whole"]["losses"]) & set(two_processes[1]["whole"]["losses"])
    whole, sharded = (two_processes[0][layout]["figures"] for layout in LAYOUTS)
    assert [line["step"] for line in whole] == [line["step"] for line in sharded] == [2, 4]
    for first, second in zip(whole, sharded, strict=True):
        for name in ("loss", "validation_loss"):
            assert second[name] == pytest.approx(first[name], rel=0, abs=1e-5)
    assert two_processes[1]["whole"]["figures"] == []
    whole, sharded = (
        MovieGenPipeline.from_pretrained(folder / layout / "pipeline").transformer.state_dict() for layout in LAYOUTS
    )
    started = tiny_pipeline().transformer.state_dict()
    for name in started:
        torch.testing.assert_close(sharded[name], whole[name], rtol=1e-2, atol=1e-3)
    assert any((started[name] - whole[name]).abs().max() > 1e-3 for name in started)


def test_sharded_weights_of_sound_train_as_whole_ones_do(two_processes, folder):
    for results in two_processes:
        whole, sharded = (results[f"{layout}-audio"] for layout in LAYOUTS)
        assert len(whole["losses"]) == 8
        assert sharded["losses"] == pytest.approx(whole["losses"], rel=0, abs=1e-5)
        for first, second in zip(whole["figures"], sharded["figures"], strict=True):
            assert second["validation_loss"] == pytest.approx(first["validation_loss"], rel=0, abs=1e-5)
    whole, sharded = (
        MovieGenAudioTransformer1DModel.from_pretrained(folder / f"{layout}-audio/pipeline/transformer").state_dict()
        for layout in LAYOUTS
    )
    started = tiny_audio_transformer().state_dict()
    for name in started:
        torch.testing.assert_close(sharded[name], whole[name], rtol=1e-2, atol=1e-3)
    assert any((started[name] - whole[name]).abs().max() > 1e-3 for name in started)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(layout, two_processes):
    for results in two_processes:
        assert results[f"{layout}-resumed"]["losses"] == results[layout]["losses"][4:]
    first, resumed = (two_processes[0][name]["figures"][-1] for name in (layout, f"{layout}-resumed"))
    for name in ("step", "loss", "validation_loss"):
        assert resumed[name] == first[name]


def test_validation_is_that_of_one_process(two_processes, folder, capsys):
    run(
        load_script("train_text_to_video"),
        output_dir=folder / "one",
        **options(folder, learning_rate=0, max_train_steps=1),
    )
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])["validation_loss"]
    for layout in LAYOUTS:
        exact, rounded = (
            two_processes[0][f"{layout}-still-{precision}"]["figures"][-1]["validation_loss"]
            for precision in ("no", "bf16")
        )
        assert exact == pytest.approx(expected, rel=0, abs=1e-5)
        assert rounded == pytest.approx(expected, rel=0, abs=1e-3) and rounded != exact


def test_a_launcher_that_is_told_to_stop(folder):
    output_dir = folder / "stopped"
    launcher = folder / "launch.py"
    launcher.write_text(
        "import os, runpy, sys\n"
        "from pathlib import Path\n"
        f"sys.argv[0] = {str(EXAMPLES / 'train_text_to_video.py')!r}\n"
        "code = 0\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        f"Path({str(folder)!r}, f\"exit-{{os.environ['RANK']}}\").write_text(str(code))\n"
    )
    arguments = {"output_dir": output_dir, **options(folder, max_train_steps=100_000, checkpointing_steps=3)}
    del arguments["validation_data"]
    with open(folder / "stopped.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
            + [str(launcher), *command_line(arguments)],
            env=os.environ
            | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + TIMEOUT
            while not list(output_dir.glob("checkpoint-*")):
                assert process.poll() is None and time.monotonic() < deadline, (folder / "stopped.log").read_text()
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            process.wait(TIMEOUT)
        finally:
            process.kill()
    log = (folder / "stopped.log").read_text()
    assert [(folder / f"exit-{rank}").read_text() for rank in range(PROCESSES)] == ["0", "0"], log
    names = {path.name for path in output_dir.iterdir()}
    assert not any(name.startswith("partial-") for name in names) and "pipeline" not in names
    last = max(int(name.removeprefix("checkpoint-")) for name in names if name.startswith("checkpoint-"))
    assert f"stopped after step {last};" in log
    saved = {path.name for path in (output_dir / f"checkpoint-{last}").iterdir()}
    assert {"model.safetensors", "ema.safetensors", "random_states_0.pkl", "random_states_1.pkl"} <= saved
