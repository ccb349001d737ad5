"""What the training scripts do before, in and after their steps, whatever a step is."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from .checkpointing import RunState, StopSignal, exchange, restore_checkpoint, save_checkpoint
from .ema import ShardedEMA
from .hub import prepare_hub_repository
from .lr_schedules import HalveOnPlateau
from .sharding import end_training
from .trackers import start_trackers


def begin_run(
    accelerator: Accelerator, args: Any, name: str, class_name: str | None, state: RunState, *others: Any
) -> str | None:
    """Restores a checkpoint, if the run goes on with one, and prepares its folder, its repository and its trackers.

    To be called by all processes after `accelerator.prepare`.

    Args:
        accelerator: of the run.
        args: dataclass with the options of the script.
        name: of the script, for trackers.
        class_name: of the result, for the message about a repository that holds something else; None for an adapter.
        state: where the run stands.
        others: what else checkpoints have to hold beside models and optimizers.

    Returns:
        The whole name of the Hub repository that the result goes to, on the main process with `--push_to_hub`.
    """
    output_dir = Path(args.output_dir)
    accelerator.register_for_checkpointing(state, *others)
    restore_checkpoint(accelerator, output_dir, args.resume_from_checkpoint)
    # accelerate would count passes on, and end a step in the middle if it had another number of them before.
    accelerator.step = 0
    repo_id = None
    if accelerator.is_main_process:
        if args.push_to_hub:
            # A missing token or a name that is taken is better known now than after the last step.
            repo_id = prepare_hub_repository(args.hub_model_id, class_name, args.hub_private)
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "arguments.json").write_text(json.dumps(asdict(args), indent=2))
    accelerator.wait_for_everyone()
    start_trackers(accelerator, name, asdict(args), state.step)
    return repo_id


class TrainingSteps:
    """The steps of a run, as `training_steps` gives them.

    Attributes:
        figures (`dict` or None): of the last validation.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: Any,
        state: RunState,
        optimizer: AcceleratedOptimizer,
        lr_scheduler: LambdaLR,
        measure: Callable[[], dict[str, float]],
        ema: ShardedEMA | None,
        plateau: HalveOnPlateau | None,
        stop: StopSignal,
        progress: tqdm,
    ):
        self.accelerator, self.args, self.state = accelerator, args, state
        self.optimizer, self.lr_scheduler, self.ema, self.plateau = optimizer, lr_scheduler, ema, plateau
        self.figures = None
        self._measure, self._stop, self._progress = measure, stop, progress
        self._losses, self._stopping, self._mark = [], False, time.perf_counter()
        self._loss = self._learning_rate = None

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.state.step >= self.args.max_train_steps

    @property
    def go_on(self) -> bool:
        """Whether there is another step to do."""
        return not self.finished and not self._stopping

    def update(self, loss: torch.Tensor, grad_norm: torch.Tensor, names: list[str]) -> bool:
        """Updates the weights, unless loss or gradients are not finite, and clears the gradients.

        Args:
            loss: of this process, a scalar.
            grad_norm: norm of the gradients of all processes.
            names: of the samples of this process.

        Returns:
            Whether they were finite.

        Raises:
            TrainingStopped: if this happens too often in a row.
        """
        self._loss, self._stopping = exchange(self.accelerator, loss, self._stop.requested)
        # In float16 an infinite norm is how the scaler finds that its scale is too large.
        scaled = self.accelerator.scaler is not None
        accepted = self.state.accepts(self._loss, None if scaled else float(grad_norm), names)
        if accepted or scaled:
            self.optimizer.step()
        if accepted:
            self._losses.append(self._loss)
            if self.ema is not None:
                self.ema.step()
        self._learning_rate = self.lr_scheduler.get_last_lr()[0]
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return accepted

    def end(self, terms: dict[str, torch.Tensor] | None = None) -> None:
        """Counts the step after `update`, and logs, measures and saves what is due.

        Args:
            terms: parts of the loss by name, scalars, to be shown with it.
        """
        accelerator, args, state = self.accelerator, self.args, self.state
        state.step += 1
        now = time.perf_counter()
        state.seconds, self._mark = state.seconds + now - self._mark, now
        terms = {name: value.item() for name, value in (terms or {}).items()}
        accelerator.log({"loss": self._loss, **terms, "learning_rate": self._learning_rate}, step=state.step)
        self._progress.update()
        shown = terms or {"loss": self._loss}
        self._progress.set_postfix({name: f"{value:.4f}" for name, value in shown.items()}, refresh=False)

        if (state.step % args.validation_steps == 0 and not self._stopping) or self.finished:
            figures = self._take_figures()
            if self.plateau is not None:
                self.plateau.update(figures["validation_loss"])
            line = {
                "step": state.step,
                **figures,
                "learning_rate": self._learning_rate,
                "skipped_steps": state.skipped_steps,
                "seconds": state.seconds,
            }
            accelerator.print(json.dumps(line), flush=True)
            logged = ("step", "loss", "learning_rate")
            accelerator.log({name: value for name, value in line.items() if name not in logged}, step=state.step)
        if state.step % args.checkpointing_steps == 0 or self._stopping or self.finished:
            save_checkpoint(accelerator, args.output_dir, state.step, args.checkpoints_total_limit)

    def final_figures(self) -> dict[str, float]:
        """The figures of the last step, for the model card; to be called by all processes.

        A run that is resumed after its last step has them still to measure.
        """
        return self._take_figures() if self.figures is None else self.figures

    def _take_figures(self) -> dict[str, float]:
        loss = {"loss": sum(self._losses) / len(self._losses)} if self._losses else {}
        self.figures, self._losses = loss | self._measure(), []
        return self.figures


@contextmanager
def training_steps(
    accelerator: Accelerator,
    args: Any,
    state: RunState,
    optimizer: AcceleratedOptimizer,
    lr_scheduler: LambdaLR,
    measure: Callable[[], dict[str, float]],
    ema: ShardedEMA | None = None,
    plateau: HalveOnPlateau | None = None,
) -> Iterator[TrainingSteps]:
    """Context of the steps of a run, each of which goes like this:

        with training_steps(accelerator, args, state, optimizer, lr_scheduler, measure, ema) as steps:
            while steps.go_on:
                ...  # a loss and its gradients
                steps.update(loss, grad_norm, names)
                steps.end()
        if not steps.finished:
            return

    A run that SIGTERM ends before its last step has written a checkpoint, says so, and has ended its trackers and its
    process group when the context ends.

    Args:
        accelerator: of the run.
        args: dataclass with the options that all scripts have.
        state: where the run stands.
        optimizer, lr_scheduler: of the weights; the optimizer prepared by `accelerator`.
        measure: called by all processes every `--validation_steps` and after the last step; returns figures by name.
        ema: moving average of the weights.
        plateau: what `lr_scheduler` calls, if it is to be told validation losses.
    """
    progress = tqdm(
        initial=state.step, total=args.max_train_steps, disable=not accelerator.is_main_process, mininterval=10
    )
    # Closed on the way out, so that a message of what went wrong begins a line.
    with StopSignal() as stop, progress:
        steps = TrainingSteps(accelerator, args, state, optimizer, lr_scheduler, measure, ema, plateau, stop, progress)
        yield steps
        if not steps.finished:
            # Still within the context: launchers send the signal more than once.
            progress.close()
            accelerator.print(
                f"stopped after step {state.step}; --resume_from_checkpoint latest goes on there", file=sys.stderr
            )
            end_training(accelerator)
