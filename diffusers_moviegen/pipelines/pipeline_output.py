from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class MovieGenPipelineOutput(BaseOutput):
    """
    Output of the Movie Gen video pipelines.

    Args:
        frames (`np.ndarray`, `torch.Tensor` or `list[list[PIL.Image.Image]]`):
            The videos, one a batch entry, with values in [0, 1]. Shape for "np" `(batch, frames, height, width, 3)`,
            for "pt" `(batch, frames, 3, height, width)`, for "pil" a list of videos, each a list of images. For
            "latent" the normalised latents `(batch, channels, latent_frames, latent_height, latent_width)`, float32.
            A single image is a video of one frame.
    """

    frames: np.ndarray | torch.Tensor | list[list[PIL.Image.Image]]


@dataclass
class MovieGenAudioPipelineOutput(BaseOutput):
    """
    Output of the Movie Gen audio pipeline.

    Args:
        audios (`np.ndarray` or `torch.Tensor`):
            The sounds, one a batch entry, with values in [-1, 1]: float32 `(batch, channels, samples)`, mono. For
            "latent" the normalised latents `(batch, latent_channels, latents)`, float32.
        sampling_rate (`int`):
            Samples a second.
    """

    audios: np.ndarray | torch.Tensor
    sampling_rate: int
