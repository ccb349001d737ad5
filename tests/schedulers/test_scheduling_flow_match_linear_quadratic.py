import json

import numpy as np
import pytest
import torch
from diffusers import SchedulerMixin
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

from diffusers_moviegen import FlowMatchLinearQuadraticScheduler


STEP_COUNTS = [1, 2, 3, 4, 7, 24, 25, 49, 50, 51, 100, 999, 1000, 1001, 1500]


def make_schedule(num_inference_steps: int, **config) -> FlowMatchLinearQuadraticScheduler:
    scheduler = FlowMatchLinearQuadraticScheduler(**config)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def test_default_schedule_is_that_of_mochi():
    sigmas = make_schedule(50).sigmas
    np.testing.assert_allclose(sigmas[:-1].numpy(), linear_quadratic_schedule(50, 0.025), rtol=0, atol=6e-8)
    assert sigmas[-1] == 0


@pytest.mark.parametrize("num_emulated_steps", [250, 1000])
@pytest.mark.parametrize(
    ("num_steps", "linear_ratio", "linear_steps"),
    [
        (10, 0.0, 0), (10, 0.5, 5), (50, 0.5, 25), (51, 0.5, 26), (51, 0.3, 16),
        (25, 0.28, 7),  # 25 * 0.28 is a little above 7 in floating point
        (2, 0.9, 1),  # one step is always left for the quadratic part
    ],
)  # fmt: skip
def test_schedule_against_the_definition(num_emulated_steps, num_steps, linear_ratio, linear_steps):
    sigmas = make_schedule(num_steps, num_emulated_steps=num_emulated_steps, linear_ratio=linear_ratio).sigmas
    assert sigmas.dtype == torch.float32 and sigmas.shape == (num_steps + 1,)
    # Solve for the parabola that continues the line with its slope and ends at 0.
    start, end = float(linear_steps), float(num_steps)
    conditions = np.array([[start**2, start, 1], [2 * start, 1, 0], [end**2, end, 1]])
    parabola = np.linalg.solve(conditions, [1 - start / num_emulated_steps, -1 / num_emulated_steps, 0])
    expected = [
        1 - step / num_emulated_steps if step < linear_steps else np.polyval(parabola, step)
        for step in range(num_steps + 1)
    ]
    np.testing.assert_allclose(sigmas.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_emulated_steps", [250, 1000])
@pytest.mark.parametrize("num_steps", STEP_COUNTS)
def test_any_step_count_decreases_strictly_between_exact_ends(num_emulated_steps, num_steps):
    scheduler = make_schedule(num_steps, num_emulated_steps=num_emulated_steps)
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == num_steps
    assert scheduler.sigmas[0] == 1 and scheduler.sigmas[-1] == 0
    assert (scheduler.sigmas.diff() < 0).all()
    assert scheduler.timesteps.dtype == torch.float32
    assert torch.equal(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    if num_steps >= num_emulated_steps:
        torch.testing.assert_close(scheduler.sigmas, torch.linspace(1, 0, num_steps + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_step_is_lost_whatever_the_dtype_of_the_model(dtype):
    scheduler = make_schedule(50)
    seen, sigmas = [], [1.0]
    sample = torch.ones(1)
    for timestep in scheduler.timesteps:
        seen.append(timestep.expand(1).item())
        sample = scheduler.step(torch.ones(1, dtype=dtype), timestep, sample).prev_sample
        assert sample.dtype == torch.float32
        sigmas.append(sample.item())
    assert len(set(seen)) == 50 and len(set(sigmas)) == 51
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), atol=2e-6)
    # What goes wrong elsewhere: the same times in bfloat16 are not fifty different ones.
    assert len(scheduler.timesteps.bfloat16().unique()) < 50


@pytest.mark.parametrize("num_steps", [1, 2, 50])
def test_euler_recovers_data_on_a_straight_path(num_steps):
    torch.manual_seed(0)
    data, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    scheduler = make_schedule(num_steps, sigma_min=0.0)
    sample = scheduler.scale_noise(data, scheduler.timesteps[:1].expand(2), noise)
    assert torch.equal(sample, noise)
    for index, timestep in enumerate(scheduler.timesteps):
        expected = (1 - scheduler.sigmas[index]) * data + scheduler.sigmas[index] * noise
        torch.testing.assert_close(sample, expected, atol=1e-5, rtol=0)
        sample = scheduler.step(scheduler.get_velocity(data, noise), timestep, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, data, atol=1e-5, rtol=0)


def test_step_computes_in_float32_and_returns_the_dtype_of_the_sample():
    scheduler = make_schedule(50)
    sample = torch.full((1,), 1.0, dtype=torch.bfloat16)
    output = scheduler.step(torch.full((1,), 8.0, dtype=torch.bfloat16), scheduler.timesteps[0], sample).prev_sample
    assert output.dtype == torch.bfloat16
    assert output.item() == torch.tensor(1 - 0.008).bfloat16().item()


def test_training_helpers_are_the_path_of_the_paper():
    torch.manual_seed(0)
    data, noise = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    timestep = torch.tensor([0.0, 12.345, 700.0, 1000.0])
    scheduler = FlowMatchLinearQuadraticScheduler()
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
    # The schedule has no part in it.
    scheduler.set_timesteps(7)
    assert torch.equal(scheduler.scale_noise(data, timestep, noise)[2], scalar[2])


def test_velocity_is_the_slope_of_the_path():
    torch.manual_seed(0)
    data, noise = torch.randn(1, 6), torch.randn(1, 6)
    scheduler = FlowMatchLinearQuadraticScheduler(sigma_min=0.1)
    ends = [scheduler.scale_noise(data, torch.tensor([timestep]), noise) for timestep in (250.0, 750.0)]
    torch.testing.assert_close((ends[1] - ends[0]) / 0.5, scheduler.get_velocity(data, noise))


def test_custom_sigmas():
    scheduler = FlowMatchLinearQuadraticScheduler()
    scheduler.set_timesteps(sigmas=[0.75, 0.5, 0.125])
    assert scheduler.sigmas.tolist() == [0.75, 0.5, 0.125, 0.0] and scheduler.sigmas.dtype == torch.float32
    assert scheduler.timesteps.tolist() == [750.0, 500.0, 125.0]
    scheduler.set_timesteps(2, sigmas=np.array([1.0, 0.5]))
    assert scheduler.num_inference_steps == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`num_inference_steps` is None"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"num_inference_steps": -3}, "`num_inference_steps` is -3"),
        ({"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "`sigmas` has 2 values but `num_inference_steps` is 3"),
        ({"sigmas": []}, "up to 1 and above 0"),
        ({"sigmas": [[1.0, 0.5]]}, "up to 1 and above 0"),
        ({"sigmas": [1.5, 0.5]}, "up to 1 and above 0"),
        ({"sigmas": [1.0, 0.5, 0.0]}, "the final 0 is appended"),
        ({"sigmas": [float("nan"), 0.5]}, "up to 1 and above 0"),
        ({"sigmas": [1.0, float("nan"), 0.5]}, "must decrease strictly"),
        ({"sigmas": [0.5, 1.0]}, "must decrease strictly"),
        ({"sigmas": [1.0, 0.5, 0.5]}, "must decrease strictly"),
        ({"sigmas": [1.0, 1.0 - 1e-12]}, "must decrease strictly"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchLinearQuadraticScheduler().set_timesteps(**arguments)


@pytest.mark.parametrize(
    "config",
    [{"num_train_timesteps": 0}, {"num_emulated_steps": 0}, {"linear_ratio": 1.0}, {"linear_ratio": -0.1},
     {"sigma_min": 1.0}, {"sigma_min": -1e-5}],
)  # fmt: skip
def test_bad_configs_are_refused(config):
    with pytest.raises(ValueError, match=f"`{next(iter(config))}`"):
        FlowMatchLinearQuadraticScheduler(**config)


def test_index_handling():
    scheduler = FlowMatchLinearQuadraticScheduler()
    with pytest.raises(ValueError, match="call `set_timesteps` first"):
        scheduler.step(torch.zeros(1), 1000.0, torch.zeros(1))

    # Without a begin index, sampling starts where the first timestep says.
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None
    sample = scheduler.step(torch.ones(1), scheduler.timesteps[2], torch.zeros(1)).prev_sample
    torch.testing.assert_close(sample, scheduler.sigmas[3:4] - scheduler.sigmas[2])
    assert scheduler.step_index == 3

    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="Timestep 123.0 is not in the schedule"):
        scheduler.step(torch.ones(1), 123.0, torch.zeros(1))

    # With one, the timestep is not looked up.
    scheduler.set_begin_index(1)
    sample = scheduler.step(torch.ones(1), None, torch.zeros(1)).prev_sample
    torch.testing.assert_close(sample, scheduler.sigmas[2:3] - scheduler.sigmas[1])
    assert scheduler.begin_index == 1 and scheduler.step_index == 2

    for _ in range(2):
        scheduler.step(torch.ones(1), None, torch.zeros(1))
    with pytest.raises(ValueError, match="All 4 steps are taken"):
        scheduler.step(torch.ones(1), None, torch.zeros(1))
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None


def test_config_is_saved(tmp_path):
    scheduler = make_schedule(20, num_emulated_steps=250, linear_ratio=0.25, sigma_min=1e-4)
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["num_emulated_steps"] == 250 and saved["linear_ratio"] == 0.25 and saved["sigma_min"] == 1e-4
    loaded = FlowMatchLinearQuadraticScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(20)
    assert torch.equal(loaded.sigmas, scheduler.sigmas)
    assert isinstance(loaded, SchedulerMixin) and loaded.order == 1 and len(loaded) == 1000
