"""Training checkpoints that are either complete or absent."""

import re
import shutil
from pathlib import Path

from accelerate import Accelerator


CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def _step(checkpoint: Path) -> int:
    return int(CHECKPOINT_NAME.fullmatch(checkpoint.name)[1])


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders below `output_dir` by step; others may have names that begin alike."""
    paths = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted((path for path in paths if path.is_dir()), key=_step)


def _remove_partial(output_dir: Path) -> None:
    for path in output_dir.glob("partial-checkpoint-*"):
        shutil.rmtree(path)


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The `checkpoint-{step}` folder of the highest step below `output_dir`, or None."""
    checkpoints = _checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int, keep: int = 2) -> None:
    """Writes models, optimizer, random states and everything registered with `accelerator`, after `step` steps.

    A folder named `checkpoint-{step}` is always a whole one: it is written, and removed, under a `partial-` name, so a
    run killed at any moment leaves the previous one intact. Such leftovers are removed here. To be called by all
    processes.

    Args:
        accelerator: with everything prepared and registered.
        output_dir: folder of the run.
        step: number of steps done. A checkpoint of the same step is replaced.
        keep: how many checkpoints to keep, at least 1: this one and the last before it. Those of later steps, which a
            run that was resumed from an older one finds, are left alone.

    Raises:
        ValueError: if `keep` is below 1.
    """
    if keep < 1:
        raise ValueError(f"`keep` is {keep}: at least 1 checkpoint is kept, the one just written.")
    output_dir = Path(output_dir)
    target, partial = output_dir / f"checkpoint-{step}", output_dir / f"partial-checkpoint-{step}"
    if accelerator.is_main_process:
        _remove_partial(output_dir)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if target.exists():
            target.rename(output_dir / f"{partial.name}-replaced")
        partial.rename(target)
        earlier = [path for path in _checkpoints(output_dir) if _step(path) <= step]
        for path in earlier[:-keep]:
            path.rename(output_dir / f"partial-{path.name}")
        _remove_partial(output_dir)


def restore_checkpoint(accelerator: Accelerator, output_dir: str | Path, resume_from_checkpoint: str | None) -> int:
    """Restores what `save_checkpoint` wrote and returns the number of steps done; 0 when there is nothing to resume.

    Registered objects such as an `EMAModel` come back on the CPU. They and the optimizer's state are read with pickle:
    resume only from folders you trust.

    Args:
        accelerator: with everything prepared and registered as it was when saving.
        output_dir: folder of the run.
        resume_from_checkpoint: a checkpoint folder, "latest" for the newest one of `output_dir` if any, or None.

    Raises:
        OSError: if the folder named does not exist or is not a checkpoint.
    """
    if resume_from_checkpoint is None:
        return 0
    path = latest_checkpoint(output_dir) if resume_from_checkpoint == "latest" else Path(resume_from_checkpoint)
    if path is None:
        return 0
    if not path.is_dir() or not CHECKPOINT_NAME.fullmatch(path.name):
        raise OSError(f"no checkpoint at '{path}': pass a folder named checkpoint-{{step}}, or 'latest'.")
    accelerator.load_state(str(path))
    return _step(path)
