"""Against NumPy, the closed forms of sines, and torch's own distributions."""

import math

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution

from diffusers_moviegen.training import SpectralLoss, SpectrogramDiscriminator, latent_kl
from diffusers_moviegen.training.audio_losses import magnitudes


RATE = 48000


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sine(frequency: float, samples: int = 16384, amplitude: float = 1.0) -> torch.Tensor:
    return amplitude * torch.sin(2 * math.pi * frequency / RATE * torch.arange(samples)).view(1, 1, -1)


@pytest.fixture(scope="module")
def spectral():
    return SpectralLoss(RATE)


# Spectrograms


@pytest.mark.parametrize("window", [64, 512])
def test_magnitudes_are_those_of_numpy(window):
    sound = noise(2, 1500)
    padded = np.pad(sound.double().numpy(), ((0, 0), (window // 2, window // 2)), mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    starts = range(0, 1500 + 1, window // 4)
    frames = np.stack([np.abs(np.fft.rfft(hann * padded[:, start : start + window])) for start in starts], axis=-1)
    np.testing.assert_allclose(magnitudes(sound, window).numpy(), frames, atol=2e-4)


def test_magnitudes_of_silence_have_a_derivative():
    sound = torch.zeros(1, 400, requires_grad=True)
    magnitudes(sound, 128).sum().backward()
    assert sound.grad.isfinite().all()


def test_equal_sounds_have_no_distance(spectral):
    sound = noise(2, 1, 9000)
    assert {name: value.item() for name, value in spectral(sound, sound).items()} == {"stft": 0, "mel": 0}


@pytest.mark.parametrize("factor", [0.1, 0.5, 3.0])
def test_distance_of_a_change_of_volume(factor):
    """Where nothing is at the floor, every logarithm moves by that of the factor."""
    sound, spectral = noise(2, 1, 9000), SpectralLoss(RATE, floor=1e-9)
    terms = spectral(factor * sound, sound)
    assert terms["mel"].item() == pytest.approx(abs(math.log10(factor)), rel=1e-3)
    assert terms["stft"].item() == pytest.approx(abs(math.log10(factor)), rel=1e-3)
    backward = spectral(sound, factor * sound)
    assert {name: value.item() for name, value in backward.items()} == pytest.approx(
        {name: value.item() for name, value in terms.items()}
    )


def test_what_is_below_the_floor_does_not_count():
    """A sine has half of its amplitude with any window, and the floor is about magnitudes."""
    for window in (2048, 256):
        loss = SpectralLoss(RATE, (window,), (20,), floor=1e-2)
        # Mirrored at both ends, where it has its peaks, it goes on as a sine.
        tone = torch.cos(2 * math.pi * 16 / window * torch.arange(16385)).view(1, 1, -1)
        silence = torch.zeros_like(tone)
        # The one bin of 1 + window / 2 that has its peak, and those next to it with half of that.
        for amplitude in (0.4, 2e-4):
            found = loss(amplitude * tone, silence)["stft"].item() * (1 + window // 2)
            expected = math.log10(1 + amplitude / 2e-2) + 2 * math.log10(1 + amplitude / 4e-2)
            assert found == pytest.approx(expected, rel=0.01)
        assert expected < 0.01


def test_bands_of_the_mel_scale(spectral):
    """A sine is in the bands whose centres, evenly spaced on the mel scale, it lies between."""

    def mel(frequency):
        return 2595 * math.log10(1 + frequency / 700)

    for frequency in (500.0, 3000.0, 12000.0):
        magnitude = magnitudes(sine(frequency).squeeze(1), 2048)[..., 30] / 1024
        bands = (spectral.bank_2048.T @ magnitude[0]).tolist()
        position = mel(frequency) / mel(RATE / 2) * 81 - 1
        assert abs(max(range(80), key=bands.__getitem__) - position) < 1
    # Each is a mean: a flat spectrum stays flat, however many bands there are.
    for window in spectral.windows:
        bank = getattr(spectral, f"bank_{window}")
        torch.testing.assert_close(bank.sum(0), torch.ones(bank.shape[1]))
        assert (bank >= 0).all() and bank.shape[0] == window // 2 + 1


def test_short_sounds_go_without_long_windows(spectral):
    sound, other = noise(1, 1, 1000), noise(1, 1, 1000, seed=1)
    found = spectral(sound, other)
    expected = SpectralLoss(RATE, (1024, 512, 256, 128), (80, 40, 20, 10))(sound, other)
    for name, value in found.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-6) and value > 0


def test_the_loss_leads_to_the_sound(spectral):
    """Volume and tilt of a sound are found again by its gradient."""
    target = noise(1, 1, 9000)
    kernel = torch.tensor([0.0, 0.3, 0.0]).requires_grad_()
    optimizer = torch.optim.Adam([kernel], lr=0.05)
    for _ in range(40):
        found = torch.nn.functional.conv1d(target, kernel.view(1, 1, 3), padding=1)
        loss = sum(spectral(found, target).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert kernel[1].item() == pytest.approx(1, abs=0.1) and kernel[[0, 2]].abs().max() < 0.15


# Adversary and divergence


def test_scores_of_the_discriminator():
    torch.manual_seed(0)
    network = SpectrogramDiscriminator(4, windows=(512, 256))
    sound = noise(3, 1, 4000)
    scores = network(sound)
    # Frames every quarter window; three convolutions of stride 2 over 257 and 129 frequencies.
    assert scores.shape == (3, 33 * 32 + 17 * 63)
    torch.testing.assert_close(network(sound[1:2])[0], scores[1], atol=1e-5, rtol=0)
    assert all(hasattr(layer, "parametrizations") for part in network.networks for layer in part[::2])
    scores.mean().backward()
    assert all(parameter.grad.any() for parameter in network.parameters())


def test_the_discriminator_learns_to_tell_noise_from_tones():
    torch.manual_seed(0)
    network = SpectrogramDiscriminator(4, windows=(256,))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(25):
        real = torch.cat([sine(600.0 + 100 * step, 2000, 0.5), sine(900.0 + 90 * step, 2000, 0.5)])
        real_scores, fake_scores = network(torch.cat([real, noise(2, 1, 2000, seed=step)])).chunk(2)
        loss = (1 - real_scores).relu().mean() + (1 + fake_scores).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert network(sine(2222.0, 2000, 0.5)).mean() > network(noise(1, 1, 2000, seed=99)).mean() + 0.5


def test_divergence_is_that_of_torch():
    parameters = torch.randn(2, 10, 7, generator=torch.Generator().manual_seed(0))
    posterior = OobleckDiagonalGaussianDistribution(parameters)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mean.double(), posterior.std.double()), torch.distributions.Normal(0, 1)
    )
    assert latent_kl(posterior).item() == pytest.approx(expected.sum(dim=1).mean().item(), rel=1e-5)
    # Computed in float32, also of lower types.
    low = latent_kl(OobleckDiagonalGaussianDistribution(parameters.bfloat16()))
    assert low.dtype == torch.float32 and low.item() == pytest.approx(latent_kl(posterior).item(), rel=0.02)
