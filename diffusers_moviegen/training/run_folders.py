"""The folder of a run: what others left there is not overwritten, and a result in it is whole or absent."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .arguments import TrainingStopped
from .checkpointing import latest_checkpoint


def check_output_dir(output_dir: str | Path, result: str, resume_from_checkpoint: str | None) -> None:
    """Raises a `ValueError` if a run would overwrite what another one has left in its folder, or if that is a file.

    To be called before the first collective operation, after which other processes may have written there.

    Args:
        output_dir: folder of the run.
        result: name of the folder in it that the run writes its result to.
        resume_from_checkpoint: as for `restore_checkpoint`.
    """
    output_dir = Path(output_dir)
    if output_dir.is_file():
        raise ValueError(f"--output_dir: '{output_dir}' is a file; pass a folder.")
    latest = latest_checkpoint(output_dir)
    if latest is None:
        if (output_dir / result).exists():
            raise ValueError(
                f"--output_dir: '{output_dir / result}' is there already, and would be replaced; pass another folder."
            )
        return
    goes_on = resume_from_checkpoint == "latest" or (
        resume_from_checkpoint is not None and Path(resume_from_checkpoint).resolve().parent == output_dir.resolve()
    )
    if not goes_on:
        raise ValueError(
            f"--output_dir: '{output_dir}' has {latest.name} of another run; go on with that one by "
            "--resume_from_checkpoint latest, or pass another folder."
        )


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A new folder beside `target` to write to, which takes its place when the context ends without an error.

    So what `target` holds, before and afterwards, is whole. After an error nothing is left beside it.

    Raises:
        TrainingStopped: if something cannot be written, such as to a full disk.
    """
    partial, replaced = target.with_name(f"partial-{target.name}"), target.with_name(f"partial-{target.name}-replaced")
    try:
        for folder in (partial, replaced):
            if folder.exists():
                shutil.rmtree(folder)
        partial.mkdir()
        yield partial
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    # Of a full disk safetensors has an error of its own.
    except (OSError, SafetensorError) as error:
        raise TrainingStopped(
            f"'{target}' cannot be written: {error}; make room and go on with --resume_from_checkpoint latest."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
