"""Losses of the audio autoencoder: the recipe of the Descript Audio Codec (Kumar et al., 2023), section 3.4."""

import math

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution
from torch import nn
from transformers.audio_utils import mel_filter_bank


def magnitudes(sound: torch.Tensor, window: int) -> torch.Tensor:
    """Magnitudes `(batch, window // 2 + 1, frames)` of a Hann-windowed spectrogram, a frame every quarter window.

    Args:
        sound (`torch.Tensor` of shape `(batch, samples)`): longer than half a window.
        window: samples of the window.
    """
    hann = torch.hann_window(window, device=sound.device)
    spectrum = torch.stft(sound, window, window // 4, window=hann, return_complex=True)
    # The square root has no derivative at zero.
    return (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()


class SpectralLoss(nn.Module):
    """Distances of spectrograms with several windows, linear and in the bands of the mel scale.

    Args:
        sampling_rate: samples a second.
        windows: samples of the windows.
        mel_bins: bands of the mel scale for each window.
        floor: magnitude added to all before their logarithms, so that what is far below it does not count, for a sound
            of full scale 1 and any window: magnitudes are taken over the sum of the window, so that a sine has half of
            its amplitude.
    """

    def __init__(
        self,
        sampling_rate: int,
        windows: tuple[int, ...] = (8192, 2048, 1024, 512, 256, 128),
        mel_bins: tuple[int, ...] = (160, 80, 80, 40, 20, 10),
        floor: float = 1e-4,
    ):
        super().__init__()
        self.windows, self.floor = windows, floor
        for window, bins in zip(windows, mel_bins, strict=True):
            bank = mel_filter_bank(window // 2 + 1, bins, 0.0, sampling_rate / 2, sampling_rate, norm=None)
            # A band narrower than the distance of two bins has none.
            bank = torch.from_numpy(bank).float()[:, bank.any(axis=0)]
            self.register_buffer(f"bank_{window}", bank / bank.sum(0))

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean absolute differences of decimal logarithms, averaged over the windows.

        Args:
            prediction, target (`torch.Tensor` of shape `(batch, 1, samples)`): longer than half of the longest
                window; shorter ones go without it.

        Returns:
            "stft", of the magnitudes of all frequencies, and "mel", of those of the bands.
        """
        terms = {"stft": prediction.new_zeros(()), "mel": prediction.new_zeros(())}
        windows = [window for window in self.windows if window // 2 < target.shape[-1]]
        for window in windows:
            # One transform for both; the sum of a Hann window is half its length.
            pair = magnitudes(torch.cat([prediction, target]).squeeze(1), window) / (window / 2)
            bands = torch.matmul(getattr(self, f"bank_{window}").T, pair)
            for name, values in (("stft", pair), ("mel", bands)):
                # Added rather than clamped at: what is missing in the prediction has to have a gradient.
                found, wanted = (values + self.floor).log10().chunk(2)
                terms[name] = terms[name] + (found - wanted).abs().mean() / len(windows)
        return terms


class SpectrogramDiscriminator(nn.Module):
    """Tells real sounds from decoded ones by their complex spectrograms with several windows.

    Args:
        channels: of the convolutions.
        windows: samples of the windows.
    """

    def __init__(self, channels: int = 32, windows: tuple[int, ...] = (2048, 1024, 512)):
        super().__init__()
        self.windows = windows
        self.networks = nn.ModuleList()
        for _ in windows:
            layers = [nn.utils.parametrizations.weight_norm(nn.Conv2d(2, channels, (9, 3), padding=(4, 1)))]
            for dilation in (1, 2, 4):
                convolution = nn.Conv2d(
                    channels, channels, (9, 3), stride=(2, 1), dilation=(1, dilation), padding=(4, dilation)
                )
                layers += [nn.LeakyReLU(0.2), nn.utils.parametrizations.weight_norm(convolution)]
            layers += [
                nn.LeakyReLU(0.2),
                nn.utils.parametrizations.weight_norm(nn.Conv2d(channels, 1, 3, padding=1)),
            ]
            self.networks.append(nn.Sequential(*layers))

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        """Scores `(batch, patches)`, higher for what sounds real.

        Args:
            sound (`torch.Tensor` of shape `(batch, 1, samples)`): longer than half of the longest window.
        """
        scores = []
        for window, network in zip(self.windows, self.networks, strict=True):
            hann = torch.hann_window(window, device=sound.device)
            spectrum = torch.stft(sound.squeeze(1), window, window // 4, window=hann, return_complex=True)
            spectrum = torch.view_as_real(spectrum).permute(0, 3, 1, 2) / math.sqrt(window)
            scores.append(network(spectrum).flatten(1))
        return torch.cat(scores, dim=1)


def latent_kl(posterior: OobleckDiagonalGaussianDistribution) -> torch.Tensor:
    """Kullback-Leibler divergence to the unit Gaussian in nats a latent: summed over channels, averaged over time."""
    mean, std = posterior.mean.float(), posterior.std.float()
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum(1).mean()
