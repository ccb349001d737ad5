"""Training checkpoints that are either complete or absent."""

import shutil
from pathlib import Path

from accelerate import Accelerator


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The `checkpoint-{step}` folder of the highest step below `output_dir`, or None."""
    checkpoints = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[len("checkpoint-") :].isdigit()]
    return max(checkpoints, key=lambda path: int(path.name[len("checkpoint-") :]), default=None)


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int, keep: int = 2) -> None:
    """Writes models, optimizer, schedule, random states and everything registered with `accelerator` after `step` steps.

    The folder is written beside its final name and renamed, so a run killed while saving leaves the previous one
    intact; only the last `keep` are kept.
    """
    output_dir = Path(output_dir)
    target, partial = output_dir / f"checkpoint-{step}", output_dir / f"partial-checkpoint-{step}"
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        for path in checkpoints[:-keep]:
            shutil.rmtree(path)


def restore_checkpoint(accelerator: Accelerator, output_dir: str | Path, resume_from_checkpoint: str | None) -> int:
    """Restores what `save_checkpoint` wrote and returns the number of steps done; 0 when there is nothing to resume.

    Args:
        accelerator: with everything prepared and registered as it was when saving.
        output_dir: folder of the run.
        resume_from_checkpoint: a checkpoint folder, "latest" for the newest one of `output_dir` if any, or None.

    Raises:
        OSError: if the folder named does not exist.
    """
    if resume_from_checkpoint is None:
        return 0
    path = latest_checkpoint(output_dir) if resume_from_checkpoint == "latest" else Path(resume_from_checkpoint)
    if path is None:
        return 0
    if not path.is_dir():
        raise OSError(f"no checkpoint folder at {path}: pass an existing one or 'latest'.")
    accelerator.load_state(str(path))
    return int(path.name.split("-")[-1])
