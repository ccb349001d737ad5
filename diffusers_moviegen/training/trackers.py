"""Experiment trackers, through accelerate."""

from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers


def check_tracker(report_to: str) -> None:
    """Raises a `ValueError` unless `report_to` is "none" or a tracker that accelerate knows and that is installed.

    accelerate itself passes over one that is not installed without a word.
    """
    available = ["none", *(str(tracker) for tracker in get_available_trackers())]
    if report_to not in available:
        raise ValueError(
            f"--report_to: '{report_to}' is not installed, or no tracker of accelerate; install its package, or "
            f"choose one of {', '.join(available)}."
        )


def start_trackers(accelerator: Accelerator, name: str, arguments: dict[str, Any], first_step: int) -> None:
    """Starts the trackers of `accelerator`, if any, with the options of the run.

    Args:
        accelerator: made with `log_with` and, for trackers that write to a folder, `project_dir`.
        name: of the project.
        arguments: options by name.
        first_step: steps done before, in a run that is resumed. What TensorBoard has of later ones, from after the
            checkpoint, is superseded.
    """
    plain = {
        key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in arguments.items()
    }
    accelerator.init_trackers(name, plain, {"tensorboard": {"purge_step": first_step + 1}})
