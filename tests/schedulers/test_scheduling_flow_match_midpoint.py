import json
import math

import numpy as np
import pytest
import torch
from diffusers import SchedulerMixin

from diffusers_moviegen import FlowMatchMidpointScheduler


def make_schedule(num_inference_steps: int, **config) -> FlowMatchMidpointScheduler:
    scheduler = FlowMatchMidpointScheduler(**config)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def solve(scheduler: FlowMatchMidpointScheduler, velocity, sample: torch.Tensor) -> torch.Tensor:
    """Sample at sigma 0 of a flow whose velocity is a function of the sample and sigma."""
    for timestep in scheduler.timesteps:
        sample = scheduler.step(velocity(sample, timestep / 1000), timestep, sample).prev_sample
    return sample


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 64, 500])
def test_schedule_is_linear_with_midpoints(num_steps):
    scheduler = make_schedule(num_steps)
    expected = [1 - half / (2 * num_steps) for half in range(2 * num_steps + 1)]
    assert scheduler.sigmas.dtype == scheduler.timesteps.dtype == torch.float32
    np.testing.assert_allclose(scheduler.sigmas.numpy(), expected, rtol=0, atol=6e-8)
    assert scheduler.sigmas[0] == 1 and scheduler.sigmas[-1] == 0 and (scheduler.sigmas.diff() < 0).all()
    assert scheduler.num_inference_steps == num_steps and len(scheduler.timesteps) == 2 * num_steps
    assert torch.equal(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])


def test_order_is_two_on_a_closed_form():
    # dx/ds = a x + b s with x(1) given has x(0) = c - b / a^2, where x(s) = c e^(a s) - b s / a - b / a^2.
    a, b, start = torch.tensor([-2.0, 1.5]), 3.0, torch.tensor([1.0, -0.5])
    constant = (start.double() + b / a.double() + b / a.double() ** 2) / torch.exp(a.double())
    exact = constant - b / a.double() ** 2

    def error(num_steps):
        return (solve(make_schedule(num_steps), lambda x, sigma: a * x + b * sigma, start) - exact).abs()

    errors = [error(num_steps) for num_steps in (8, 16, 32, 64)]
    orders = torch.stack([torch.log2(coarse / fine) for coarse, fine in zip(errors[:-1], errors[1:], strict=True)])
    assert ((orders > 1.8) & (orders < 2.2)).all(), orders
    assert (errors[-1] < 2e-3).all()


def test_order_is_two_on_a_nonlinear_flow_with_uneven_steps():
    # dx/ds = 0.8 x^2 with x(1) = -1 is x(s) = -1 / (0.2 + 0.8 s), which ends at -5.
    def error(num_steps):
        sigmas = (np.linspace(1, 0, num_steps + 1) ** 1.5)[:-1]
        scheduler = FlowMatchMidpointScheduler()
        scheduler.set_timesteps(sigmas=sigmas)
        return abs(solve(scheduler, lambda x, sigma: 0.8 * x**2, torch.tensor(-1.0)).item() + 5)

    errors = [error(num_steps) for num_steps in (16, 32, 64)]
    orders = [math.log2(coarse / fine) for coarse, fine in zip(errors[:-1], errors[1:], strict=True)]
    assert all(1.8 < order < 2.2 for order in orders), orders


def test_every_step_is_that_of_the_midpoint_method():
    torch.manual_seed(0)
    scheduler = FlowMatchMidpointScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.1])
    nodes = [0.9, 0.5, 0.1, 0.0]
    sample = torch.randn(2, 3, 4)
    for step in range(3):
        size = nodes[step + 1] - nodes[step]
        first, second = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        halfway = scheduler.step(first, scheduler.timesteps[2 * step], sample).prev_sample
        torch.testing.assert_close(halfway, sample + size / 2 * first)
        # What is returned halfway may be changed, even in place, without an effect on the step.
        end = scheduler.step(second, scheduler.timesteps[2 * step + 1], halfway.fill_(7.0), return_dict=False)[0]
        torch.testing.assert_close(end, sample + size * second)
        sample = end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_step_is_lost_whatever_the_dtype_of_the_model(dtype):
    scheduler = make_schedule(400)
    sample, samples = torch.ones(1), []
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.ones(1, dtype=dtype), timestep, sample).prev_sample
        assert sample.dtype == torch.float32
        samples.append(sample.item())
    np.testing.assert_allclose(samples, scheduler.sigmas[1:].numpy(), atol=1e-5)
    # What goes wrong elsewhere: the same times in bfloat16 are not eight hundred different ones.
    assert len(scheduler.timesteps.unique()) == 800 and len(scheduler.timesteps.bfloat16().unique()) < 500


def test_step_computes_in_float32_and_returns_the_dtype_of_the_sample():
    scheduler = make_schedule(64)
    sample = torch.full((1,), 1.0, dtype=torch.bfloat16)
    velocity = torch.full((1,), 3.0, dtype=torch.bfloat16)
    halfway = scheduler.step(velocity, scheduler.timesteps[0], sample).prev_sample
    end = scheduler.step(velocity, scheduler.timesteps[1], halfway).prev_sample
    assert halfway.dtype == end.dtype == torch.bfloat16
    assert halfway.item() == torch.tensor(1 - 3 / 128).bfloat16().item()
    assert end.item() == torch.tensor(1 - 3 / 64).bfloat16().item()


@pytest.mark.parametrize("num_steps", [1, 2, 25])
def test_a_straight_path_is_recovered(num_steps):
    torch.manual_seed(0)
    data, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    scheduler = make_schedule(num_steps, sigma_min=0.0)
    sample = scheduler.scale_noise(data, scheduler.timesteps[:1].expand(2), noise)
    assert torch.equal(sample, noise)
    sample = solve(scheduler, lambda x, sigma: scheduler.get_velocity(data, noise), sample)
    torch.testing.assert_close(sample, data, atol=1e-5, rtol=0)


def test_training_helpers_are_the_path_of_the_paper():
    torch.manual_seed(0)
    data, noise = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    timestep = torch.tensor([0.0, 12.345, 700.0, 1000.0])
    scheduler = FlowMatchMidpointScheduler()
    sigma_min = 1e-5
    # The paper counts t from noise X_0 to data X_1 and its velocity is the derivative by t.
    t = 1 - timestep.double().numpy()[:, None, None] / 1000
    expected = t * data.double().numpy() + (1 - (1 - sigma_min) * t) * noise.double().numpy()
    np.testing.assert_allclose(scheduler.scale_noise(data, timestep, noise).numpy(), expected, atol=1e-6)
    expected = -(data.double().numpy() - (1 - sigma_min) * noise.double().numpy())
    np.testing.assert_allclose(scheduler.get_velocity(data, noise).numpy(), expected, atol=1e-6)

    scalar = scheduler.scale_noise(data, torch.tensor(700.0), noise)
    assert torch.equal(scalar[2], scheduler.scale_noise(data, timestep, noise)[2])
    assert scheduler.scale_noise(data.half(), timestep, noise.half()).dtype == torch.float16
    assert scheduler.get_velocity(data.half(), noise.half()).dtype == torch.float16


def test_velocity_is_the_slope_of_the_path():
    torch.manual_seed(0)
    data, noise = torch.randn(1, 6), torch.randn(1, 6)
    scheduler = FlowMatchMidpointScheduler(sigma_min=0.1)
    ends = [scheduler.scale_noise(data, torch.tensor([timestep]), noise) for timestep in (250.0, 750.0)]
    torch.testing.assert_close((ends[1] - ends[0]) / 0.5, scheduler.get_velocity(data, noise))


def test_custom_sigmas():
    scheduler = FlowMatchMidpointScheduler()
    scheduler.set_timesteps(sigmas=[0.75, 0.5, 0.125])
    assert scheduler.sigmas.tolist() == [0.75, 0.625, 0.5, 0.3125, 0.125, 0.0625, 0.0]
    assert scheduler.sigmas.dtype == torch.float32 and scheduler.num_inference_steps == 3
    assert scheduler.timesteps.tolist() == [750.0, 625.0, 500.0, 312.5, 125.0, 62.5]
    scheduler.set_timesteps(2, sigmas=np.array([1.0, 0.5]))
    assert scheduler.num_inference_steps == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`num_inference_steps` is None"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"num_inference_steps": -3}, "`num_inference_steps` is -3"),
        ({"num_inference_steps": 4, "sigmas": [1.0, 0.5]}, "`sigmas` has 2 values but `num_inference_steps` is 4"),
        ({"sigmas": []}, "up to 1 and above 0"),
        ({"sigmas": [[1.0, 0.5]]}, "up to 1 and above 0"),
        ({"sigmas": [1.5, 0.5]}, "up to 1 and above 0"),
        ({"sigmas": [1.0, 0.5, 0.0]}, "the final 0 is appended"),
        ({"sigmas": [float("nan"), 0.5]}, "up to 1 and above 0"),
        ({"sigmas": [1.0, float("nan"), 0.5]}, "must decrease strictly"),
        ({"sigmas": [0.5, 1.0]}, "must decrease strictly"),
        ({"sigmas": [1.0, 0.5, 0.5]}, "must decrease strictly"),
        ({"sigmas": [1.0, float(np.nextafter(np.float32(1), np.float32(0)))]}, "with room for midpoints"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchMidpointScheduler().set_timesteps(**arguments)


@pytest.mark.parametrize("config", [{"num_train_timesteps": 0}, {"sigma_min": 1.0}, {"sigma_min": -1e-5}])
def test_bad_configs_are_refused(config):
    with pytest.raises(ValueError, match=f"`{next(iter(config))}`"):
        FlowMatchMidpointScheduler(**config)


def test_index_handling():
    scheduler = FlowMatchMidpointScheduler()
    with pytest.raises(ValueError, match="call `set_timesteps` first"):
        scheduler.step(torch.zeros(1), 1000.0, torch.zeros(1))

    # Without a begin index, sampling starts where the first timestep says.
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None
    halfway = scheduler.step(torch.ones(1), scheduler.timesteps[4], torch.zeros(1)).prev_sample
    torch.testing.assert_close(halfway, torch.tensor([-0.125]))
    assert scheduler.step_index == 5
    end = scheduler.step(torch.ones(1), scheduler.timesteps[5], halfway).prev_sample
    torch.testing.assert_close(end, torch.tensor([-0.25]))

    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="Timestep 123.0 is not in the schedule"):
        scheduler.step(torch.ones(1), 123.0, torch.zeros(1))
    with pytest.raises(ValueError, match="Index 3 of the schedule is a midpoint"):
        scheduler.step(torch.ones(1), scheduler.timesteps[3], torch.zeros(1))

    # With one, the timestep is not looked up.
    scheduler.set_begin_index(5)
    with pytest.raises(ValueError, match="Index 5 of the schedule is a midpoint"):
        scheduler.step(torch.ones(1), None, torch.zeros(1))
    scheduler.set_begin_index(6)
    sample = scheduler.step(torch.ones(1), None, torch.zeros(1)).prev_sample
    torch.testing.assert_close(sample, torch.tensor([-0.125]))
    assert scheduler.begin_index == 6 and scheduler.step_index == 7

    scheduler.step(torch.ones(1), None, sample)
    with pytest.raises(ValueError, match="All 4 steps are taken"):
        scheduler.step(torch.ones(1), None, torch.zeros(1))
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None


def test_a_new_schedule_forgets_a_step_left_halfway():
    scheduler = make_schedule(4)
    scheduler.step(torch.ones(1), scheduler.timesteps[0], torch.full((1,), 9.0))
    scheduler.set_timesteps(2)
    sample = solve(scheduler, lambda x, sigma: torch.ones(1), torch.zeros(1))
    torch.testing.assert_close(sample, torch.tensor([-1.0]))


def test_config_is_saved(tmp_path):
    scheduler = make_schedule(20, num_train_timesteps=500, sigma_min=1e-4)
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["num_train_timesteps"] == 500 and saved["sigma_min"] == 1e-4
    loaded = FlowMatchMidpointScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(20)
    assert torch.equal(loaded.timesteps, scheduler.timesteps) and loaded.timesteps[0] == 500
    assert isinstance(loaded, SchedulerMixin) and loaded.order == 2 and len(loaded) == 500
