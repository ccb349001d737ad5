"""Training that can be interrupted: checkpoints that are either complete or absent, and where a run stands."""

import math
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import CheckpointException

from .arguments import TrainingStopped


logger = logging.get_logger(__name__)

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")

MAX_SKIPPED_IN_A_ROW = 10


class RunState:
    """Where a run stands; to be registered with `accelerator.register_for_checkpointing`.

    Attributes:
        step (`int`): optimizer steps done, with those that were skipped.
        seconds (`float`): wall time of training, over all parts of an interrupted run.
        skipped_steps (`int`): steps whose loss or gradient was not finite.
        skipped_in_a_row (`int`): how many of them the last steps were.
    """

    def __init__(self):
        self.step, self.seconds = 0, 0.0
        self.skipped_steps, self.skipped_in_a_row = 0, 0

    def accepts(self, loss: float, grad_norm: float | None, names: list[str]) -> bool:
        """Whether the optimizer may take this step. If not, the step is counted as skipped, with a warning.

        Args:
            loss: mean over all processes, as `exchange` returns it, so that all decide alike.
            grad_norm: norm of the gradients of all processes. None if a gradient scaler is at work: in float16 an
                infinite norm is how it finds that its scale is too large, and it leaves out the step itself.
            names: of the samples of this process's batch.

        Raises:
            TrainingStopped: if this is the tenth such step in a row.
        """
        if math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm)):
            self.skipped_in_a_row = 0
            return True
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        what = (
            f"the loss is {loss}" if grad_norm is None else f"the loss is {loss}, the norm of the gradient {grad_norm}"
        )
        batch = ", ".join(f"'{name}'" for name in names)
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise TrainingStopped(
                f"{what} in step {self.step + 1}, and {MAX_SKIPPED_IN_A_ROW} steps in a row were not finite; the last "
                f"batch was {batch}. Resume from a checkpoint with a lower --learning_rate or --max_grad_norm, or "
                "without these samples if the run always stops at them."
            )
        logger.warning(f"skipped step {self.step + 1}: {what}; the batch was {batch}")
        return False

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


class StopSignal:
    """Context in which SIGTERM, which schedulers send before they kill, asks for an end instead of causing one.

    Attributes:
        requested (`bool`): whether the signal has come.
    """

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "StopSignal":
        self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        # None stands for a handler that was not installed from Python, which cannot be put back.
        signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def _request(self, signal_number: int, frame: FrameType | None) -> None:
        self.requested = True


def exchange(accelerator: Accelerator, loss: torch.Tensor, stop_requested: bool) -> tuple[float, bool]:
    """What the processes have to agree on in every step, in one small reduction.

    Args:
        accelerator: of the run.
        loss: of this process, a scalar.
        stop_requested: whether this process was asked to stop.

    Returns:
        The mean loss of all processes, and whether any of them was asked to stop.
    """
    values = torch.stack([loss.detach().float(), loss.new_tensor(stop_requested, dtype=torch.float)])
    total, stops = accelerator.reduce(values, "sum").tolist()
    return total / accelerator.num_processes, stops > 0


def _step(checkpoint: Path) -> int:
    return int(CHECKPOINT_NAME.fullmatch(checkpoint.name)[1])


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders below `output_dir` by step; others may have names that begin alike."""
    paths = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted((path for path in paths if path.is_dir()), key=_step)


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The `checkpoint-{step}` folder of the highest step below `output_dir`, or None."""
    checkpoints = _checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def _tidy(output_dir: Path) -> None:
    """Removes what a save that was killed has left, except a checkpoint whose replacement never came."""
    for path in output_dir.glob("replaced-checkpoint-*"):
        target = output_dir / path.name.removeprefix("replaced-")
        if target.exists():
            shutil.rmtree(path)
        else:
            path.rename(target)
    for path in output_dir.glob("partial-checkpoint-*"):
        shutil.rmtree(path)


def _flush(folder: Path) -> None:
    """Puts a folder's files on the disk, so that a later renaming cannot get there before them."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Calls `action`; where it cannot write, all processes raise a `TrainingStopped` with the reason."""
    failure, reason = None, None
    try:
        action()
    # A full disk is an OSError to Python, but torch.save and safetensors have errors of their own for it, and sharded
    # checkpoints pass on those of all processes as one that is no `Exception`.
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        failure = error
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        reason = str(error)
    reasons = [reason for reason in gather_object([reason]) if reason is not None]
    if reasons:
        raise TrainingStopped(reasons[0]) from failure


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int, keep: int = 2) -> None:
    """Writes models, optimizers, random states and everything registered with `accelerator`, after `step` steps.

    A folder named `checkpoint-{step}` is always a whole one: it is written, and removed, under another name, so a run
    killed at any moment leaves the previous one intact. Leftovers of that are removed here. Weights are saved by the
    names they have without wrappers, for any number of processes to resume. To be called by all processes.

    Args:
        accelerator: with everything prepared and registered.
        output_dir: folder of the run, the same for all processes.
        step: number of steps done. A checkpoint of the same step is replaced.
        keep: how many checkpoints to keep, at least 1: this one and the last before it. Those of later steps, which a
            run that was resumed from an older one finds, are left alone.

    Raises:
        ValueError: if `keep` is below 1.
        TrainingStopped: in all processes, if one of them could not write, such as to a full disk. What it wrote is
            removed, and the previous checkpoints are left alone.
    """
    if keep < 1:
        raise ValueError(f"`keep` is {keep}: at least 1 checkpoint is kept, the one just written.")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    target, partial = output_dir / f"checkpoint-{step}", output_dir / f"partial-checkpoint-{step}"

    def prepare() -> None:
        if accelerator.is_main_process:
            _tidy(output_dir)
            partial.mkdir()

    def unwrap(models: list[torch.nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        # Hooks that save a model in a way of their own take its weights out of the list.
        if len(weights) == len(models):
            weights[:] = [_unwrapped(accelerator, model).state_dict() for model in models]

    def save() -> None:
        handle = accelerator.register_save_state_pre_hook(unwrap)
        try:
            accelerator.save_state(str(partial))
        finally:
            handle.remove()

    def publish() -> None:
        if accelerator.is_main_process:
            _flush(partial)
            if target.exists():
                target.rename(output_dir / f"replaced-{target.name}")
            partial.rename(target)
            earlier = [path for path in _checkpoints(output_dir) if _step(path) <= step]
            for path in earlier[:-keep]:
                path.rename(output_dir / f"partial-{path.name}")
            _tidy(output_dir)

    try:
        for action in (prepare, save, publish):
            _write(accelerator, action)
    except TrainingStopped as error:
        # torch.save's message does not say that the disk is full.
        free = shutil.disk_usage(output_dir).free / 1e6
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        previous = latest_checkpoint(output_dir)
        kept = "there is no earlier one" if previous is None else f"the last one there, {previous.name}, is whole"
        raise TrainingStopped(
            f"cannot write {target.name} to '{output_dir}' ({free:.1f} MB are free there): {error}; {kept}. Make "
            "room and go on with --resume_from_checkpoint latest."
        ) from error


def _unwrapped(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def _check_weights(model: torch.nn.Module, path: Path) -> None:
    """Raises a `ValueError` unless the file `path` has a weight of the right shape for each one of `model`."""
    if not path.is_file():
        raise OSError(f"'{path.parent}' has no {path.name}: resume with the accelerate configuration that wrote it.")
    with safe_open(path, "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    present = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*present, *saved]:
        if saved.get(name) != present.get(name):
            raise ValueError(
                f"'{path}' is of another model: '{name}' is {saved.get(name, 'absent')} there, "
                f"{present.get(name, 'absent')} here; resume with the model options of that run, or start a new one."
            )


def restore_checkpoint(accelerator: Accelerator, output_dir: str | Path, resume_from_checkpoint: str | None) -> int:
    """Restores what `save_checkpoint` wrote and returns the number of steps done; 0 when there is nothing to resume.

    Registered objects and the optimizer's state are read with pickle: resume only from folders you trust. To be called
    by all processes.

    Args:
        accelerator: with everything prepared and registered as it was when saving.
        output_dir: folder of the run.
        resume_from_checkpoint: a checkpoint folder, "latest" for the newest one of `output_dir` if any, or None.

    Raises:
        OSError: if the folder named does not exist, is not a checkpoint or cannot be read.
        ValueError: if the checkpoint is of another model.
    """
    if resume_from_checkpoint is None:
        return 0
    if accelerator.is_main_process:
        _tidy(Path(output_dir))
    accelerator.wait_for_everyone()
    path = latest_checkpoint(output_dir) if resume_from_checkpoint == "latest" else Path(resume_from_checkpoint)
    if path is None:
        return 0
    if not path.is_dir() or not CHECKPOINT_NAME.fullmatch(path.name):
        raise OSError(
            f"--resume_from_checkpoint: no checkpoint at '{path}': pass a folder named checkpoint-{{step}}, or "
            "'latest'."
        )
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded and not any(path.glob("pytorch_model_fsdp*")):
        raise OSError(f"--resume_from_checkpoint: '{path}' was not written with FSDP: resume without it.")

    def check(models: list[torch.nn.Module], folder: str) -> None:
        for index, model in enumerate(models):
            # In the list, the weights are loaded into the model that is in it.
            models[index] = _unwrapped(accelerator, model)
            _check_weights(models[index], path / f"model{f'_{index}' if index else ''}.safetensors")

    handle = accelerator.register_load_state_pre_hook(check)
    try:
        accelerator.load_state(str(path))
    except (RuntimeError, SafetensorError, CheckpointException, EOFError, pickle.UnpicklingError) as error:
        raise OSError(f"--resume_from_checkpoint: '{path}' cannot be restored: {error}") from error
    finally:
        handle.remove()
    if not (path / f"random_states_{accelerator.process_index}.pkl").is_file():
        logger.warning(
            f"'{path}' was written by fewer processes: what the global random generators of process "
            f"{accelerator.process_index} draw begins anew."
        )
    return _step(path)
