"""Losses of the temporal autoencoder (Movie Gen, section 3.1.1)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


def multiscale_gradient_loss(prediction: torch.Tensor, target: torch.Tensor, num_scales: int = 3) -> torch.Tensor:
    """Mean absolute difference of the spatial gradients, over pictures halved `num_scales - 1` times.

    A fixed stand-in for a perceptual network: what decides how sharp an outline looks is counted on its own, at the
    scale of a pixel and at coarser ones.

    Args:
        prediction, target (`torch.Tensor` of shape `(batch, channels, frames, height, width)`): videos of one range.
    """
    difference = (prediction - target).transpose(1, 2).flatten(0, 1)
    loss = difference.new_zeros(())
    for scale in range(num_scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        loss = loss + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return loss / num_scales


class LearnedPerceptualLoss(nn.Module):
    """LPIPS (Zhang et al., 2018) with the features of VGG16, frame by frame.

    Features of two pictures after five of the network's activations, each scaled to unit length over its channels;
    their squared differences, weighted by channel, are averaged over positions and summed over the five. The weights
    are frozen, gradients pass through.

    Args:
        path: safetensors file with the 13 convolutions of VGG16 under torchvision's names (`features.0.weight`,
            `features.0.bias`, `features.2.weight`, ... `features.28.bias`) and the channel weights under those of
            LPIPS version 0.1 (`lin0.model.1.weight` ... `lin4.model.1.weight`). Other tensors are passed over.

    Raises:
        OSError: if there is no such file, or it is no safetensors file.
        ValueError: if a tensor is missing or of another shape.
    """

    # Channels of the convolutions between two poolings; the features are those before each pooling and at the end.
    blocks = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, path: str | Path):
        super().__init__()
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise OSError(f"'{path}' cannot be read as a safetensors file: {error}") from error
        self.convolutions, self.channel_weights = nn.ModuleList(), nn.ParameterList()
        place, in_channels = 0, 3
        for level, block in enumerate(self.blocks):
            convolutions = nn.ModuleList()
            for channels in block:
                convolution = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1)
                for name, parameter in convolution.named_parameters():
                    parameter.data = self._take(tensors, path, f"features.{place}.{name}", tuple(parameter.shape))
                convolutions.append(convolution)
                # A convolution and its activation have a number each, and so has the pooling after the block.
                place, in_channels = place + 2, channels
            place += 1
            self.convolutions.append(convolutions)
            weight = self._take(tensors, path, f"lin{level}.model.1.weight", (1, in_channels, 1, 1))
            self.channel_weights.append(weight)
        # What LPIPS takes off pictures in [-1, 1], and divides them by.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False)

    @staticmethod
    def _take(tensors: dict[str, torch.Tensor], path: str | Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in tensors:
            raise ValueError(f"'{path}' has no tensor '{name}': it needs VGG16 and the channel weights of LPIPS.")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"'{path}': '{name}' has the shape {tuple(tensors[name].shape)}, not {shape}.")
        return tensors[name].float()

    def _features(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        hidden_states, features = (hidden_states - self.shift) / self.scale, []
        for level, convolutions in enumerate(self.convolutions):
            if level:
                hidden_states = F.max_pool2d(hidden_states, 2)
            for convolution in convolutions:
                hidden_states = F.relu(convolution(hidden_states))
            norm = (hidden_states.float().square().sum(dim=1, keepdim=True) + 1e-8).sqrt()
            features.append(hidden_states.float() / norm)
        return features

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The mean over batch and frames.

        Args:
            prediction, target (`torch.Tensor` of shape `(batch, 3, frames, height, width)`): videos in [-1, 1], at
                least 16 pixels high and wide.
        """
        prediction, target = (video.transpose(1, 2).flatten(0, 1) for video in (prediction, target))
        with torch.no_grad():
            expected = self._features(target)
        loss = prediction.new_zeros(())
        for found, wanted, weight in zip(self._features(prediction), expected, self.channel_weights, strict=True):
            loss = loss + ((found - wanted).square() * weight).sum(dim=1).mean()
        return loss


class PatchDiscriminator3D(nn.Module):
    """Tells real patches of a video from reconstructed ones (PatchGAN, Isola et al., 2017, with 3D convolutions).

    Four convolutions of stride 2 and one on top, each with spectral normalisation (Miyato et al., 2018) instead of a
    normalisation over the batch, which is small for videos. The first of them keeps all frames, so that a picture, a
    video of one frame, passes through the same weights. A score sees 78 x 78 pixels of 33 frames.

    Args:
        in_channels: of the videos.
        channels: of the first convolution; the next ones have 2, 4 and 8 times as many.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64):
        super().__init__()
        widths = (in_channels, channels, 2 * channels, 4 * channels, 8 * channels)
        self.convolutions = nn.ModuleList()
        for level, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            convolution = nn.Conv3d(before, after, (3, 4, 4), stride=(2 if level else 1, 2, 2), padding=1)
            self.convolutions.append(spectral_norm(convolution))
        self.conv_out = spectral_norm(nn.Conv3d(widths[-1], 1, 3, padding=1))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """Scores of patches, higher for what looks real.

        Args:
            video (`torch.Tensor` of shape `(batch, in_channels, frames, height, width)`): at least 16 pixels high and
                wide.

        Returns:
            `torch.Tensor` of shape `(batch, 1, ceil(frames / 8), height // 16, width // 16)`.
        """
        for convolution in self.convolutions:
            video = F.leaky_relu(convolution(video), 0.2)
        return self.conv_out(video)


def discriminator_loss(real_scores: torch.Tensor, fake_scores: torch.Tensor) -> torch.Tensor:
    """Hinge loss of a discriminator: real scores are pushed above 1, those of reconstructions below -1."""
    return 0.5 * (F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean())


def adaptive_weight(
    reconstruction_loss: torch.Tensor, adversarial_loss: torch.Tensor, weight: torch.Tensor, limit: float = 1e4
) -> torch.Tensor:
    """What to multiply the adversarial loss by, so that both losses pull equally hard (VQGAN, Esser et al., 2021).

    The ratio of the norms of their gradients by `weight`, the last layer of the decoder. Both graphs are kept.

    Args:
        reconstruction_loss, adversarial_loss: scalars.
        weight: a parameter that both depend on.
        limit: upper bound of the ratio.
    """
    norms = [
        torch.autograd.grad(loss, weight, retain_graph=True)[0].float().norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=limit)


def kl_divergence(posterior: DiagonalGaussianDistribution) -> torch.Tensor:
    """Kullback-Leibler divergence to the unit Gaussian in nats, averaged over all latent elements, in float32."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def outlier_penalty(latents: torch.Tensor, threshold: float = 3.0) -> torch.Tensor:
    """Outlier penalty loss against "spot" artefacts (Movie Gen, section 3.1.1).

    `max(||X_ij - mean(X)|| - r ||std(X)||, 0)`, with mean and standard deviation over the positions of one latent
    frame and the norm over its channels, averaged over positions, frames and batch.

    Args:
        latents (`torch.Tensor` of shape `(batch, channels, frames, height, width)`): sampled latents.
        threshold: `r`.
    """
    spread, mean = torch.std_mean(latents, dim=(3, 4), keepdim=True, correction=0)
    excess = (latents - mean).norm(dim=1) - threshold * spread.norm(dim=1)
    return excess.clamp(min=0).mean()
