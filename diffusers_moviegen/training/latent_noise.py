"""Noise in the latents that a decoder learns from: those of a backbone are never quite the encoder's."""

import torch
from diffusers import ModelMixin
from diffusers.utils.torch_utils import randn_tensor


def add_latent_noise(
    latents: torch.Tensor, std: list[float], strength: float, generator: torch.Generator
) -> torch.Tensor:
    """Latents with Gaussian noise in them, of another deviation for each sample.

    Args:
        latents (`torch.Tensor` of shape `(batch, channels, ...)`): what is to be decoded.
        std: deviation of each channel of the latents.
        strength: the largest deviation of the noise in those of the channels; a sample's is uniform from 0 to it.
        generator: decides how much noise there is, and which.
    """
    shape = (1, -1, *(1,) * (latents.ndim - 2))
    share = torch.rand(len(latents), *shape[2:], 1, generator=generator).to(latents)
    noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    return latents + strength * share * latents.new_tensor(std).view(shape) * noise


def check_latent_noise(model: ModelMixin, folder: str | None) -> None:
    """Raises a `ValueError` if `--latent_noise` is asked for and the autoencoder's latents were never measured."""
    if model.config.latents_std is None:
        raise ValueError(
            f"--latent_noise: the config of '{folder}' has no latents_std; pass an autoencoder that its training "
            "measured them for, or leave the option out."
        )
