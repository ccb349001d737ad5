"""Losses of the temporal autoencoder (Movie Gen, section 3.1.1)."""

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


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


def kl_divergence(posterior: DiagonalGaussianDistribution) -> torch.Tensor:
    """Kullback-Leibler divergence to the unit Gaussian in nats, averaged over all latent elements."""
    return 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()


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
