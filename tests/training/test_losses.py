"""Losses of the temporal autoencoder against closed forms, plain loops and another implementation."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.lpips as reference_lpips
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file

from diffusers_moviegen.training import (
    LearnedPerceptualLoss,
    PatchDiscriminator3D,
    adaptive_weight,
    discriminator_loss,
    kl_divergence,
    multiscale_gradient_loss,
    outlier_penalty,
)


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
    # Moments of half a precision are as good as any, their sum is not.
    moments = moments.bfloat16()
    expected = kl_divergence(DiagonalGaussianDistribution(moments.float()))
    torch.testing.assert_close(kl_divergence(DiagonalGaussianDistribution(moments)), expected)


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


def vgg16_features():
    """The layers of torchvision's VGG16, with random weights that keep the scale of the activations."""
    layers, in_channels = [], 3
    for channels in (64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512, None, 512, 512, 512, None):
        if channels is None:
            layers.append(torch.nn.MaxPool2d(2, 2))
            continue
        convolution = torch.nn.Conv2d(in_channels, channels, 3, padding=1)
        torch.nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        layers += [convolution, torch.nn.ReLU()]
        in_channels = channels
    return torch.nn.Sequential(*layers)


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory):
    """The file of features and torchmetrics' network of the same weights, with LPIPS' own channel weights."""
    torch.manual_seed(0)
    features = vgg16_features()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_lpips, "_get_tv_model_features", lambda net, pretrained: features)
        reference = reference_lpips._LPIPS(net="vgg", use_dropout=True)
    published = Path(reference_lpips.__file__).with_name("lpips_models") / "vgg.pth"
    tensors = torch.load(published, map_location="cpu", weights_only=True)
    assert len(tensors) == 5
    tensors |= {f"features.{name}": value.detach() for name, value in features.state_dict().items()}
    file = tmp_path_factory.mktemp("lpips") / "vgg16.safetensors"
    save_file(tensors | {"classifier.0.bias": torch.zeros(1)}, file)
    return file, reference


def test_learned_perceptual_loss_is_lpips(perceptual):
    file, reference = perceptual
    torch.manual_seed(1)
    prediction, target = torch.rand(2, 2, 3, 2, 32, 40) * 2 - 1
    loss = LearnedPerceptualLoss(file)
    prediction.requires_grad_()
    found = loss(prediction, target)
    frames = [video.transpose(1, 2).flatten(0, 1) for video in (prediction, target)]
    expected = reference(*frames).mean()
    assert expected > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(value, prediction)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)
    assert loss(target, target) == 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_files_that_are_not_lpips_are_refused(perceptual, tmp_path):
    with pytest.raises(OSError, match="cannot be read as a safetensors file"):
        LearnedPerceptualLoss(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(OSError, match="text.safetensors' cannot be read as a safetensors file"):
        LearnedPerceptualLoss(tmp_path / "text.safetensors")
    tensors = {"features.0.weight": torch.zeros(64, 3, 3, 3)}
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="has no tensor 'features.0.bias': it needs VGG16 and the channel weights"):
        LearnedPerceptualLoss(tmp_path / "part.safetensors")
    save_file(tensors | {"features.0.bias": torch.zeros(63)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"'features.0.bias' has the shape \(63,\), not \(64,\)"):
        LearnedPerceptualLoss(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(("frames", "scores"), [(1, 1), (2, 1), (9, 2), (16, 2), (17, 3)])
def test_discriminator_scores_patches_of_pictures_and_clips(frames, scores):
    discriminator = PatchDiscriminator3D(channels=2)
    assert discriminator(torch.zeros(2, 3, frames, 32, 40)).shape == (2, 1, scores, 2, 2)


def test_a_score_sees_its_patch_only():
    discriminator = PatchDiscriminator3D(channels=1).eval()
    video = torch.rand(1, 3, 65, 176, 176, requires_grad=True)
    scores = discriminator(video)
    scores[0, 0, 4, 5, 5].backward()
    for size, dim in ((33, 2), (78, 3), (78, 4)):
        others = [other for other in range(5) if other != dim]
        seen = video.grad.abs().sum(dim=others).nonzero().flatten()
        assert 0 < seen.min() and seen.max() < video.shape[dim] - 1
        assert len(seen) == seen.max() - seen.min() + 1 == size


def test_discriminator_weights_have_unit_spectral_norm():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator3D(channels=4)
    convolutions = [*discriminator.convolutions, discriminator.conv_out]
    with torch.no_grad():
        for convolution in convolutions:
            convolution.parametrizations.weight.original *= 7
        for _ in range(100):
            discriminator(torch.zeros(1, 3, 1, 16, 16))
        for convolution in convolutions:
            norm = torch.linalg.matrix_norm(convolution.weight.flatten(1).double(), ord=2)
            assert norm.item() == pytest.approx(1, abs=0.02)


def test_discriminator_learns_to_tell_motion():
    """Single frames of the two kinds are alike: only whether they change tells them apart."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator3D(channels=8)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    losses = []
    for _ in range(60):
        still, moving = torch.rand(4, 3, 1, 32, 32).repeat_interleave(8, dim=2), torch.rand(4, 3, 8, 32, 32)
        scores = discriminator(torch.cat([still, moving]) * 2 - 1)
        loss = discriminator_loss(*scores.chunk(2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 0.9 and max(losses[-10:]) < 0.5


def test_discriminator_loss_is_the_hinge():
    real, fake = np.random.default_rng(0).normal(scale=2, size=(2, 3, 1, 2, 4, 5))
    hinges = [max(0.0, 1 - score) for score in real.flat] + [max(0.0, 1 + score) for score in fake.flat]
    loss = discriminator_loss(torch.from_numpy(real), torch.from_numpy(fake))
    assert loss.item() == pytest.approx(sum(hinges) / len(hinges), rel=1e-12)


def test_adaptive_weight_balances_the_gradients():
    """Losses with known gradients, 3 and 0.5 at each of 16 weights; afterwards both can still be differentiated."""
    weight = torch.nn.Parameter(torch.rand(4, 4))
    reconstruction, adversarial = 3 * weight.sum(), -0.5 * weight.sum()
    ratio = adaptive_weight(reconstruction, adversarial, weight)
    assert ratio.item() == pytest.approx(6, rel=1e-3) and not ratio.requires_grad
    assert adaptive_weight(reconstruction, adversarial, weight, limit=5) == 5
    (reconstruction + ratio * adversarial).backward()
    assert weight.grad.abs().max() < 1e-2
