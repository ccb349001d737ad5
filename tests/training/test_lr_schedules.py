import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from diffusers_moviegen.training import HalveOnPlateau


LOSSES = [1.0, 0.9, 0.95, 0.9, 0.8, 0.81, 0.85, 0.9, 0.82, 0.79, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.7, math.nan, 0.7]


def make(patience=2, num_warmup_steps=0, min_factor=0.0):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = HalveOnPlateau(num_warmup_steps, patience, min_factor)
    return optimizer, schedule, LambdaLR(optimizer, schedule)


def rate_after_steps(optimizer, lr_scheduler, count):
    for _ in range(count):
        optimizer.step()
        lr_scheduler.step()
    return optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("minimum", [0.0, 0.02])
def test_halves_when_torchs_own_schedule_does(patience, minimum):
    optimizer, schedule, lr_scheduler = make(patience, min_factor=minimum / 0.1)
    reference_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    # PyTorch counts the validations that are let pass, one less than those without a new best.
    reference = ReduceLROnPlateau(
        reference_optimizer, factor=0.5, patience=patience - 1, threshold=0, min_lr=minimum, eps=0
    )
    rates = []
    for loss in LOSSES:
        before = optimizer.param_groups[0]["lr"]
        halved = schedule.update(loss)
        reference.step(loss)
        rates.append(rate_after_steps(optimizer, lr_scheduler, 5))
        assert rates[-1] == pytest.approx(reference_optimizer.param_groups[0]["lr"], rel=1e-12)
        assert halved == (rates[-1] < before)
    assert len(set(rates)) > 1
    assert rates[-1] >= minimum


def test_warms_up():
    optimizer, schedule, lr_scheduler = make(num_warmup_steps=4)
    assert optimizer.param_groups[0]["lr"] == 0
    assert [rate_after_steps(optimizer, lr_scheduler, 1) for _ in range(6)] == pytest.approx(
        [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
    )


def test_goes_on_from_a_saved_state():
    optimizer, schedule, lr_scheduler = make(patience=3)
    for loss in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5):
        schedule.update(loss)
    rate_after_steps(optimizer, lr_scheduler, 7)
    other_optimizer, other_schedule, other = make(patience=3)
    other.load_state_dict(lr_scheduler.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    assert rate_after_steps(other_optimizer, other, 1) == pytest.approx(0.05)
    # Two of the three validations had passed.
    assert (other_schedule.best, other_schedule.validations_since) == (1.0, 2)
    assert other_schedule.update(1.1)
    assert rate_after_steps(other_optimizer, other, 1) == pytest.approx(0.025)


@pytest.mark.parametrize("numbers", [(-1, 1, 0.0), (0, 0, 0.0), (0, 1, -0.1), (0, 1, 1.1)])
def test_numbers_out_of_range(numbers):
    with pytest.raises(ValueError, match="`patience` at least 1"):
        HalveOnPlateau(*numbers)
