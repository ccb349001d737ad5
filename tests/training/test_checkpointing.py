"""Checkpoints of a real Accelerator: complete, in order, and enough to go on as if nothing had happened."""

import json
import math
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from diffusers_moviegen.training import (
    RunState,
    StopSignal,
    TrainingStopped,
    end_training,
    exchange,
    latest_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)
from tests.training.interruptions import finish, join_group, start


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    """A small training whose every step draws from the three global generators."""

    def __init__(self, seed: int = 0, width: int = 8):
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))
        self.ema = EMAModel(self.model.parameters(), decay=0.99, use_ema_warmup=True, power=0.75)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=8)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.accelerator.register_for_checkpointing(self.lr_scheduler, self.ema)

    def step(self) -> float:
        inputs = torch.randn(3, 4) + random.random() + torch.tensor(np.random.rand(4), dtype=torch.float32)
        loss = self.wrapped(inputs).square().mean()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        return loss.item()


def steps_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_restored_run_goes_on_as_if_nothing_had_happened(tmp_path):
    run = Run(seed=0)
    for _ in range(3):
        run.step()
    save_checkpoint(run.accelerator, tmp_path, 3)
    losses = [run.step() for _ in range(4)]

    other = Run(seed=1)
    other.step()
    assert restore_checkpoint(other.accelerator, tmp_path, "latest") == 3
    assert other.ema.optimization_step == 3
    assert other.lr_scheduler.last_epoch == 3
    assert [other.step() for _ in range(4)] == losses
    for parameter, expected in zip(other.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    for average, expected, parameter in zip(
        other.ema.shadow_params, run.ema.shadow_params, run.model.parameters(), strict=True
    ):
        assert torch.equal(average, expected) and not torch.equal(average, parameter)
    assert other.lr_scheduler.get_last_lr() == run.lr_scheduler.get_last_lr()


def test_restoring_from_a_named_folder(tmp_path):
    run = Run()
    save_checkpoint(run.accelerator, tmp_path, 1)
    run.step()
    save_checkpoint(run.accelerator, tmp_path, 2)
    other = Run(seed=1)
    assert restore_checkpoint(other.accelerator, tmp_path / "elsewhere", f"{tmp_path}/checkpoint-1/") == 1
    assert other.lr_scheduler.last_epoch == 0
    assert restore_checkpoint(other.accelerator, tmp_path, None) == 0
    assert restore_checkpoint(other.accelerator, tmp_path / "elsewhere", "latest") == 0


@pytest.mark.parametrize("name", ["checkpoint-7", "partial-checkpoint-3", "run", "run/arguments.json"])
def test_a_folder_that_is_no_checkpoint_is_named(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "arguments.json").write_text("{}")
    (tmp_path / "partial-checkpoint-3").mkdir()
    with pytest.raises(OSError, match=f"no checkpoint at '.*{name}'.*'latest'"):
        restore_checkpoint(Accelerator(cpu=True), tmp_path, str(tmp_path / name))


def test_latest_is_the_highest_number(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11-backup", "checkpoint-best", "partial-checkpoint-12"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_only_the_last_are_kept(tmp_path):
    run = Run()
    mine = {"checkpoint-3-backup", "checkpoint-best", "samples"}
    for name in mine:
        (tmp_path / name).mkdir()
    for step in (5, 9, 10, 100):
        save_checkpoint(run.accelerator, tmp_path, step, keep=2)
    assert steps_in(tmp_path) == {"checkpoint-10", "checkpoint-100"} | mine
    # A run that was resumed from step 9, say, finds checkpoints of later steps.
    save_checkpoint(run.accelerator, tmp_path, 11, keep=1)
    assert steps_in(tmp_path) == {"checkpoint-11", "checkpoint-100"} | mine
    with pytest.raises(ValueError, match="`keep` is 0: at least 1"):
        save_checkpoint(run.accelerator, tmp_path, 12, keep=0)
    assert steps_in(tmp_path) == {"checkpoint-11", "checkpoint-100"} | mine


def test_a_save_that_dies_leaves_the_previous_checkpoint(tmp_path):
    class DiesOnce:
        dead = False

        def state_dict(self):
            if not self.dead:
                self.dead = True
                raise KeyboardInterrupt
            return {}

        def load_state_dict(self, state_dict):
            pass

    run = Run()
    run.step()
    save_checkpoint(run.accelerator, tmp_path, 1)
    run.accelerator.register_for_checkpointing(DiesOnce())
    run.step()
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(run.accelerator, tmp_path, 2)
    assert steps_in(tmp_path) == {"checkpoint-1", "partial-checkpoint-2"}
    other = Run(seed=1)
    assert restore_checkpoint(other.accelerator, tmp_path, "latest") == 1

    save_checkpoint(run.accelerator, tmp_path, 3)
    assert steps_in(tmp_path) == {"checkpoint-1", "checkpoint-3"}


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    run = Run()
    save_checkpoint(run.accelerator, tmp_path, 4)
    (tmp_path / "checkpoint-4" / "old").write_text("")
    run.step()
    save_checkpoint(run.accelerator, tmp_path, 4)
    assert steps_in(tmp_path) == {"checkpoint-4"}
    assert not (tmp_path / "checkpoint-4" / "old").exists()
    other = Run(seed=1)
    restore_checkpoint(other.accelerator, tmp_path, "latest")
    assert torch.equal(other.model[0].weight, run.model[0].weight)


def weights_of(run: Run) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


@pytest.mark.parametrize("step", [2, 1], ids=["next", "replacement"])
def test_no_moment_of_a_save_leaves_less_than_a_checkpoint(step, tmp_path, monkeypatch):
    """Looks at the folder as a kill would leave it before each thing that a save does to the disk."""
    folder, moments = tmp_path / "run", tmp_path / "moments"
    run = Run()
    weights = [weights_of(run)]
    save_checkpoint(run.accelerator, folder, 1)
    # The warm-up begins with a learning rate of 0.
    run.step()
    run.step()
    weights.append(weights_of(run))
    assert not torch.equal(*weights)

    count, copying = 0, False

    def watched(function):
        def call(*args, **kwargs):
            nonlocal count, copying
            if not copying:
                copying = True
                shutil.copytree(folder, moments / str(count))
                count, copying = count + 1, False
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "open", "fsync", "unlink", "rmdir"):
            patch.setattr(os, name, watched(getattr(os, name)))
        patch.setattr(torch, "save", watched(torch.save))
        save_checkpoint(run.accelerator, folder, step, keep=1)
    assert steps_in(folder) == {f"checkpoint-{step}"}

    found = []
    for moment in range(count):
        left = moments / str(moment)
        other = Run(seed=1)
        restored = restore_checkpoint(other.accelerator, left, "latest")
        new = torch.equal(weights_of(other), weights[1])
        assert new or torch.equal(weights_of(other), weights[0])
        assert restored == (step if new else 1)
        found.append(new)
    # The old one up to a moment, the new one from then on.
    assert found == sorted(found) and not found[0] and found[-1]
    # The next save clears up.
    save_checkpoint(other.accelerator, left, 3, keep=1)
    assert steps_in(left) == {"checkpoint-3"}


def fill_the_disk(rank: int, num_processes: int, folder: Path, full_for: int, limit: int) -> None:
    if num_processes > 1:
        join_group(rank, num_processes, folder / "rendezvous")
    run = Run(width=512)
    weights = weights_of(run)
    save_checkpoint(run.accelerator, folder / "run", 1)
    run.step()
    run.step()
    message, before = None, resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == full_for:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        save_checkpoint(run.accelerator, folder / "run", 2)
    except TrainingStopped as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run.accelerator.wait_for_everyone()
    left = sorted(steps_in(folder / "run"))
    # With room again the same run can save.
    run.accelerator.wait_for_everyone()
    save_checkpoint(run.accelerator, folder / "run", 3)
    after = sorted(steps_in(folder / "run"))
    restore_checkpoint(run.accelerator, folder / "run", str(folder / "run" / "checkpoint-1"))
    result = {
        "message": message,
        "left": left,
        "after": after,
        "whole": torch.equal(weights_of(run), weights),
        "exchanged": exchange(run.accelerator, torch.tensor(1.0 + rank, dtype=torch.bfloat16), rank == 1),
    }
    (folder / f"{rank}.json").write_text(json.dumps(result))
    end_training(run.accelerator)


@pytest.mark.parametrize(
    ("num_processes", "full_for", "limit", "reason"),
    [
        (1, 0, 8_000, "File too large"),
        # torch.save's own words
        (1, 0, 20_000, "inline_container"),
        (2, 0, 8_000, "File too large"),
        (2, 1, 8_000, "inline_container"),
    ],
    ids=["weights", "optimizer", "the main process", "the other process"],
)
def test_a_full_disk_stops_all_processes_and_leaves_the_previous_checkpoint(
    num_processes, full_for, limit, reason, tmp_path
):
    processes = [
        start(fill_the_disk, tmp_path / f"{rank}.log", rank, num_processes, tmp_path, full_for, limit)
        for rank in range(num_processes)
    ]
    assert [finish(process) for process in processes] == [0] * num_processes
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(num_processes)]
    for result in results:
        assert f"cannot write checkpoint-2 to '{tmp_path / 'run'}'" in result["message"]
        assert reason in result["message"] and "MB are free there" in result["message"]
        assert "checkpoint-1, is whole" in result["message"] and "--resume_from_checkpoint" in result["message"]
        assert result["left"] == ["checkpoint-1"] and result["after"] == ["checkpoint-1", "checkpoint-3"]
        assert result["whole"]
        assert result["exchanged"] == ([1.0, False] if num_processes == 1 else [1.5, True])
    if num_processes == 2:
        # One process goes on with what two have saved.
        run = Run(seed=1, width=512)
        assert restore_checkpoint(run.accelerator, tmp_path / "run", "latest") == 3
        saved = load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors")
        assert torch.equal(saved["0.weight"], run.model[0].weight)


def test_a_first_checkpoint_that_cannot_be_written(tmp_path):
    run = Run()

    class Full:
        def state_dict(self):
            raise OSError("[Errno 28] No space left on device")

        def load_state_dict(self, state_dict):
            pass

    run.accelerator.register_for_checkpointing(Full())
    with pytest.raises(TrainingStopped, match="No space left on device; there is no earlier one"):
        save_checkpoint(run.accelerator, tmp_path, 2)
    assert steps_in(tmp_path) == set()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_checkpoint(Run().accelerator, tmp_path, 1)
    with pytest.raises(ValueError) as error:
        restore_checkpoint(Run(width=16).accelerator, tmp_path, "latest")
    assert "checkpoint-1/model.safetensors' is of another model: '0.weight' is (8, 4) there, (16, 4) here" in str(
        error.value
    )

    run = Run()
    run.model.append(torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"'3.weight' is absent there, \(3, 2\) here"):
        restore_checkpoint(run.accelerator, tmp_path, "latest")
    run = Run()
    del run.model[2]
    with pytest.raises(ValueError, match=r"'2.bias' is \(2,\) there, absent here"):
        restore_checkpoint(run.accelerator, tmp_path, "latest")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"])
@pytest.mark.parametrize("damage", ["missing", "cut off", "empty"])
def test_a_damaged_checkpoint_is_named(name, damage, tmp_path):
    save_checkpoint(Run().accelerator, tmp_path, 1)
    path = tmp_path / "checkpoint-1" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 100 if damage == "cut off" else 0])
    with pytest.raises(OSError, match="checkpoint-1"):
        restore_checkpoint(Run(seed=1).accelerator, tmp_path, "latest")


def test_a_process_without_random_states_says_so(tmp_path, caplog):
    save_checkpoint(Run().accelerator, tmp_path, 1)
    (tmp_path / "checkpoint-1" / "random_states_0.pkl").unlink()
    logger = "diffusers_moviegen.training.checkpointing"
    with caplog.at_level("WARNING", logger=logger):
        assert restore_checkpoint(Run().accelerator, tmp_path, "latest") == 1
    assert "random generators of process 0" in caplog.text


def test_steps_that_are_not_finite_are_skipped_and_counted(caplog):
    state = RunState()
    assert state.accepts(0.5, 1.0, ["a"]) and state.accepts(0.5, None, ["a"])
    with caplog.at_level("WARNING", logger="diffusers_moviegen.training.checkpointing"):
        for loss, grad_norm in [(math.nan, 1.0), (math.inf, None), (0.5, math.inf), (0.5, math.nan)]:
            assert not state.accepts(loss, grad_norm, ["dog", "cat"])
            state.step += 1
    assert "skipped step 1: the loss is nan, the norm of the gradient 1.0; the batch was 'dog', 'cat'" in caplog.text
    assert "skipped step 2: the loss is inf; the batch" in caplog.text
    assert (state.skipped_steps, state.skipped_in_a_row) == (4, 4)
    assert state.accepts(0.5, 1.0, ["a"])
    assert (state.skipped_steps, state.skipped_in_a_row) == (4, 0)
    for _ in range(9):
        assert not state.accepts(math.nan, 1.0, ["dog"])
    # A run that is interrupted meanwhile does not begin to count anew.
    state.seconds = 1.5
    resumed = RunState()
    resumed.load_state_dict(state.state_dict())
    assert vars(resumed) == {"step": 4, "seconds": 1.5, "skipped_steps": 13, "skipped_in_a_row": 9}
    with pytest.raises(TrainingStopped, match="10 steps in a row.*the last batch was 'dog', 'cat'"):
        resumed.accepts(math.nan, 1.0, ["dog", "cat"])


def test_a_signal_to_stop_is_a_request():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_one_process_exchanges_with_itself():
    accelerator = Accelerator(cpu=True)
    loss, stopping = exchange(accelerator, torch.tensor(0.25, requires_grad=True), True)
    assert (loss, stopping) == (0.25, True)
    loss, stopping = exchange(accelerator, torch.tensor(math.nan), False)
    assert math.isnan(loss) and stopping is False
