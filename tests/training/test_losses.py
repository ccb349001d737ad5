"""Losses of the temporal autoencoder against closed forms and plain loops."""

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from diffusers_moviegen.training import kl_divergence, multiscale_gradient_loss, outlier_penalty


def test_kl_divergence_is_the_closed_form():
    torch.manual_seed(0)
    moments = torch.randn(2, 8, 3, 4, 5)
    mean, logvar = moments.chunk(2, dim=1)
    reference = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean.double(), (0.5 * logvar.double()).exp()),
        torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double()),
    ).mean()
    kl = kl_divergence(DiagonalGaussianDistribution(moments))
    torch.testing.assert_close(kl.double(), reference, rtol=1e-6, atol=0)
    assert kl_divergence(DiagonalGaussianDistribution(torch.zeros(1, 8, 1, 2, 2))) == 0


def outlier_penalty_loop(latents, threshold):
    """The formula position by position in float64."""
    batch, channels, frames, height, width = latents.shape
    excess = []
    for b in range(batch):
        for t in range(frames):
            positions = [latents[b, :, t, i, j] for i in range(height) for j in range(width)]
            mean = sum(positions) / len(positions)
            std = np.sqrt(sum((position - mean) ** 2 for position in positions) / len(positions))
            excess += [
                max(np.sqrt(((position - mean) ** 2).sum()) - threshold * np.sqrt((std**2).sum()), 0.0)
                for position in positions
            ]
    return sum(excess) / len(excess)


@pytest.mark.parametrize("threshold", [0.5, 1.0, 3.0])
def test_outlier_penalty_is_the_formula(threshold):
    latents = np.random.default_rng(0).standard_normal((2, 4, 3, 6, 5))
    latents[1, :, 2, 3, 4] += 12
    expected = outlier_penalty_loop(latents, threshold)
    assert expected > 0
    penalty = outlier_penalty(torch.tensor(latents, dtype=torch.float32), threshold)
    assert penalty.item() == pytest.approx(expected, rel=1e-5)


def test_outlier_penalty_sees_spots_only():
    """Nothing for flat frames, however they differ from one another; a single spot costs and is pushed back."""
    flat = torch.arange(6.0).reshape(1, 2, 3, 1, 1).expand(1, 2, 3, 8, 8)
    assert outlier_penalty(flat) == 0
    spot = flat.clone()
    spot[0, :, 1, 2, 3] = 20
    spot.requires_grad_()
    penalty = outlier_penalty(spot)
    penalty.backward()
    assert penalty > 0
    assert (spot.grad[0, :, 1, 2, 3] > 0).all()
    assert spot.grad[:, :, [0, 2]].abs().max() == 0


def multiscale_gradient_loss_loop(prediction, target, num_scales):
    difference = np.moveaxis(prediction - target, 2, 1)
    total = 0.0
    for scale in range(num_scales):
        if scale:
            height, width = (size // 2 * 2 for size in difference.shape[-2:])
            corners = [difference[..., i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]
            difference = sum(corners) / 4
        across = np.abs(difference[..., 1:] - difference[..., :-1])
        down = np.abs(difference[..., 1:, :] - difference[..., :-1, :])
        total += across.mean() + down.mean()
    return total / num_scales


@pytest.mark.parametrize(("height", "width"), [(16, 24), (17, 22)])
@pytest.mark.parametrize("num_scales", [1, 3])
def test_multiscale_gradient_loss_is_the_formula(height, width, num_scales):
    prediction, target = np.random.default_rng(1).standard_normal((2, 2, 3, 4, height, width))
    loss = multiscale_gradient_loss(
        torch.tensor(prediction, dtype=torch.float32), torch.tensor(target, dtype=torch.float32), num_scales
    )
    assert loss.item() == pytest.approx(multiscale_gradient_loss_loop(prediction, target, num_scales), rel=1e-5)


def test_multiscale_gradient_loss_ignores_brightness_and_time():
    """An offset has no gradient in space, even one that changes from frame to frame."""
    target = torch.rand(1, 3, 4, 16, 16)
    offset = torch.arange(4.0).reshape(1, 1, 4, 1, 1)
    assert multiscale_gradient_loss(target + offset, target).item() == pytest.approx(0, abs=1e-6)
    assert multiscale_gradient_loss(target.flip(-1), target) > 0.1
