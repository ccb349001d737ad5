import time

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from diffusers_moviegen.training import check_tracker, start_trackers


def test_what_is_not_installed_is_refused():
    check_tracker("none")
    with pytest.raises(ValueError, match="--report_to: 'abacus' is not installed, or no tracker .*one of none"):
        check_tracker("abacus")


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first_step, losses in ((0, [1.0, 2.0, 3.0, 4.0, 5.0]), (3, [40.0, 50.0, 60.0])):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(log_with="tensorboard", project_dir=str(tmp_path))
        # Trackers take plain values only.
        start_trackers(accelerator, "run", {"data": ["a", "b"], "transformer": None, "rate": 0.1}, first_step)
        for step, loss in enumerate(losses, start=first_step + 1):
            accelerator.log({"loss": loss}, step=step)
        accelerator.end_training()
        # TensorBoard sorts the files of a run by the second that they were made in.
        time.sleep(1.1)
    events = event_accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == list(
        enumerate([1.0, 2.0, 3.0, 40.0, 50.0, 60.0], start=1)
    )
