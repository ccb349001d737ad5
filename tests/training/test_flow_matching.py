"""The distribution of training times."""

import math
from statistics import NormalDist

import pytest
import torch

from diffusers_moviegen.training import sample_timesteps


COUNT = 40_000


def flow_times(seed: int = 0) -> torch.Tensor:
    return 1 - sample_timesteps(COUNT, torch.Generator().manual_seed(seed)).double() / 1000


def test_flow_time_is_logit_normal():
    times = flow_times()
    assert 0 < times.min() and times.max() < 1
    normal = NormalDist()
    for share in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        quantile = 1 / (1 + math.exp(-normal.inv_cdf(share)))
        below = (times < quantile).double().mean().item()
        assert below == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / COUNT))
    logits = torch.logit(times)
    assert logits.mean().item() == pytest.approx(0, abs=4 / math.sqrt(COUNT))
    assert logits.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * COUNT))


def test_timestep_counts_noise():
    """Timestep 0 is data, flow time 1: the smallest draw of the normal is the largest timestep."""
    timesteps = sample_timesteps(1000, torch.Generator().manual_seed(3))
    normals = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    assert timesteps.argmax() == normals.argmin() and timesteps.argmin() == normals.argmax()
    unit = sample_timesteps(1000, torch.Generator().manual_seed(3), num_train_timesteps=1)
    torch.testing.assert_close(timesteps, 1000 * unit)


def test_seed_decides_on_every_device():
    generator = torch.Generator().manual_seed(5)
    first, second = sample_timesteps(7, generator), sample_timesteps(7, generator)
    assert first.shape == (7,) and first.dtype == torch.float32
    assert not torch.equal(first, second)
    assert torch.equal(first, sample_timesteps(7, torch.Generator().manual_seed(5)))

    # The meta device computes nothing: what follows can only come from the CPU generator.
    generator = torch.Generator().manual_seed(5)
    assert sample_timesteps(7, generator, device="meta").device.type == "meta"
    assert torch.equal(second, sample_timesteps(7, generator))
    if torch.cuda.is_available():
        assert torch.equal(first, sample_timesteps(7, torch.Generator().manual_seed(5), device="cuda").cpu())
