"""Checkpoints of a real Accelerator: complete, in order, and enough to go on as if nothing had happened."""

import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from diffusers_moviegen.training import latest_checkpoint, restore_checkpoint, save_checkpoint


class Run:
    """A small training whose every step draws from the three global generators."""

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
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
