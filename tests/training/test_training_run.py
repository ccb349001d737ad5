"""What happens around the steps of a run, whatever a step is: of a model of one weight."""

import json
import os
import signal
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.optim.lr_scheduler import LambdaLR

from diffusers_moviegen.training import HalveOnPlateau, RunState, begin_run, training_steps


TARGETS = [1.0, -2.0, 3.0, 5.0, 0.5]


@dataclass
class Arguments:
    output_dir: str
    max_train_steps: int = len(TARGETS)
    validation_steps: int = 2
    checkpointing_steps: int = 2
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    push_to_hub: bool = False


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)


def train(folder, targets=TARGETS, stop_at=None, plateau=None, **options):
    """Draws a weight to one target a step; returns it, the run's state and its steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    args = Arguments(str(folder), **options)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lr_scheduler = LambdaLR(optimizer, plateau or (lambda step: 1 / (step + 1)))
    model, optimizer = accelerator.prepare(model, optimizer)
    state = RunState()
    repo_id = begin_run(accelerator, args, "test", None, state, lr_scheduler)
    assert repo_id is None

    def measure():
        return {"validation_loss": model.weight.item()}

    with training_steps(accelerator, args, state, optimizer, lr_scheduler, measure, plateau=plateau) as steps:
        while steps.go_on:
            loss = (model(torch.ones(1, 1)) - targets[state.step]).square().mean()
            accelerator.backward(loss)
            if state.step + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            steps.update(loss.detach(), torch.tensor(1.0), [f"sample {state.step}"])
            steps.end({"distance": loss.detach().sqrt()})
    return model.weight.item(), state, steps


def by_hand(targets):
    """The weight after each step, and its loss."""
    weight, weights, losses = 0.0, [], []
    for step, target in enumerate(targets):
        loss = (weight - target) ** 2
        if loss == loss:
            weight -= 0.1 / (step + 1) * 2 * (weight - target)
        weights.append(weight)
        losses.append(loss)
    return weights, losses


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_steps_lines_and_checkpoints(tmp_path, capsys):
    weight, state, steps = train(tmp_path)
    weights, losses = by_hand(TARGETS)
    assert weight == pytest.approx(weights[-1], rel=1e-5)
    assert steps.finished and not steps.go_on and state.step == 5
    printed = lines(capsys)
    assert [line["step"] for line in printed] == [2, 4, 5]
    means = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert [line["loss"] for line in printed] == pytest.approx(means, rel=1e-5)
    assert [line["validation_loss"] for line in printed] == pytest.approx([weights[n] for n in (1, 3, 4)], rel=1e-5)
    assert [line["learning_rate"] for line in printed] == pytest.approx([0.1 / 2, 0.1 / 4, 0.1 / 5])
    assert [line["skipped_steps"] for line in printed] == [0, 0, 0]
    assert steps.final_figures() == {name: printed[-1][name] for name in ("loss", "validation_loss")}
    assert {path.name for path in tmp_path.iterdir()} == {"arguments.json", "checkpoint-4", "checkpoint-5"}
    assert json.loads((tmp_path / "arguments.json").read_text())["max_train_steps"] == 5


def test_a_loss_that_is_no_number_changes_nothing(tmp_path, capsys):
    targets = [TARGETS[0], float("nan"), *TARGETS[2:]]
    weight, state, _ = train(tmp_path, targets)
    weights, losses = by_hand(targets)
    assert weight == pytest.approx(weights[-1], rel=1e-5) and state.skipped_steps == 1
    assert lines(capsys)[0]["loss"] == pytest.approx(losses[0])


def test_a_signal_ends_the_run_and_the_next_goes_on(tmp_path, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    _, state, steps = train(tmp_path, stop_at=3)
    assert state.step == 3 and not steps.finished and not steps.go_on
    output = capsys.readouterr()
    assert "stopped after step 3; --resume_from_checkpoint latest goes on there" in output.err
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-3"]
    assert signal.getsignal(signal.SIGTERM) == handler
    weight, state, steps = train(tmp_path, resume_from_checkpoint="latest")
    assert weight == pytest.approx(by_hand(TARGETS)[0][-1], rel=1e-5) and steps.finished
    assert [line["step"] for line in lines(capsys)] == [4, 5]


def test_figures_of_a_run_resumed_after_its_last_step(tmp_path, capsys):
    weight, _, _ = train(tmp_path)
    capsys.readouterr()
    _, state, steps = train(tmp_path, resume_from_checkpoint="latest")
    assert state.step == 5 and lines(capsys) == [] and steps.figures is None
    assert steps.final_figures() == {"validation_loss": pytest.approx(weight)}


def test_a_plateau_hears_of_validation_losses(tmp_path):
    """The weight, which stands for the loss, rises: no validation after the first is a new lowest."""
    plateau = HalveOnPlateau(0, patience=1)
    train(tmp_path, targets=[10.0] * 5, plateau=plateau, validation_steps=1)
    assert plateau.factor == 0.5**4
