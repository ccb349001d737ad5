import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_oobleck import (
    AutoencoderOobleckOutput,
    OobleckDecoderOutput,
    OobleckDiagonalGaussianDistribution,
)
from diffusers.models.autoencoders.vae import AutoencoderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch.nn.utils.parametrizations import weight_norm
from transformers import DacConfig
from transformers.models.dac.modeling_dac import DacDecoder, DacEncoder

from ..loaders import MovieGenSingleFileMixin


@contextmanager
def reliable_convolutions(device: torch.device) -> Iterator[None]:
    """
    Keeps cuDNN away from one-dimensional convolutions on Hopper cards, where some of its versions corrupt those of DAC
    (facebookresearch/dacvae, issue 8); a backward pass needs the guard too. Elsewhere it changes nothing.

    Args:
        device (`torch.device`): Where the convolutions are computed.
    """
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = enabled and not is_hopper
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


class AutoencoderDACVAE(ModelMixin, AutoencoderMixin, ConfigMixin, MovieGenSingleFileMixin):
    r"""
    The audio autoencoder of Movie Gen: the Descript Audio Codec (Kumar et al., 2023) with a Gaussian bottleneck in
    place of its quantiser. Encoder and decoder are those of transformers' `DacModel`, weight norm and initialisation
    included. The defaults are the 48 kHz model with 25 latents a second, of 93 million parameters: Meta's
    108 million without those of its watermark.

    Movie Gen says nothing of the scale of its latents. Here `latents_mean` and `latents_std` of the training data are
    part of the configuration, and backbones see `(latents - latents_mean) / latents_std`.

    Args:
        encoder_hidden_size (`int`, defaults to 64):
            Channels after the first convolution of the encoder, doubled at every level.
        downsampling_ratios (`tuple[int, ...]`, defaults to `(2, 8, 10, 12)`):
            Strides of the encoder, all even; those of the decoder are the same in reverse order.
        decoder_hidden_size (`int`, defaults to 1536):
            Channels after the first convolution of the decoder, halved at every level.
        latent_channels (`int`, defaults to 128):
            Channels of a latent.
        sampling_rate (`int`, defaults to 48000):
            Samples a second.
        latents_mean, latents_std (`list[float]`, *optional*):
            Mean and standard deviation of each channel of the latents.
    """

    _supports_gradient_checkpointing = False
    _supports_group_offloading = False
    _no_split_modules = ["DacResidualUnit"]

    @register_to_config
    def __init__(
        self,
        encoder_hidden_size: int = 64,
        downsampling_ratios: tuple[int, ...] = (2, 8, 10, 12),
        decoder_hidden_size: int = 1536,
        latent_channels: int = 128,
        sampling_rate: int = 48000,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ):
        super().__init__()
        levels = len(downsampling_ratios)
        if not levels or any(ratio < 2 or ratio % 2 for ratio in downsampling_ratios):
            raise ValueError(f"`downsampling_ratios` {downsampling_ratios}: use one or more even numbers.")
        if decoder_hidden_size % 2**levels:
            raise ValueError(
                f"`decoder_hidden_size` {decoder_hidden_size} is halved {levels} times: use a multiple of {2**levels}."
            )
        config = DacConfig(
            encoder_hidden_size=encoder_hidden_size,
            downsampling_ratios=list(downsampling_ratios),
            decoder_hidden_size=decoder_hidden_size,
            sampling_rate=sampling_rate,
        )
        self.encoder = DacEncoder(config)
        self.quant_conv = nn.Conv1d(config.hidden_size, 2 * latent_channels, kernel_size=1)
        self.post_quant_conv = nn.Conv1d(latent_channels, config.hidden_size, kernel_size=1)
        self.decoder = DacDecoder(config)
        for module in list(self.modules()):
            # As in `DacModel`, of which transformers applies neither to the parts alone.
            if isinstance(module, nn.Conv1d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                weight_norm(module)

        self.hop_length = math.prod(downsampling_ratios)
        self.use_slicing = False
        self.use_tiling = False
        self.tile_latents = 250

    @property
    def encoder_context(self) -> int:
        """Latents on either side of one whose samples it depends on."""
        # From the end to the beginning, what latent 0 depends on: a convolution of 3, and at every level one of twice
        # its stride and residual units with dilations of 1, 3 and 9; at last a convolution of 7.
        first, last = -1, 1
        for ratio in reversed(self.config.downsampling_ratios):
            first, last = first * ratio - ratio // 2, last * ratio + 3 * ratio // 2 - 1
            first, last = first - 3 * (1 + 3 + 9), last + 3 * (1 + 3 + 9)
        return max(-((first - 3) // self.hop_length), (last + 3) // self.hop_length)

    @property
    def decoder_context(self) -> int:
        """Latents on either side of one that its samples depend on."""
        # What the samples of latent 0 depend on, in the same way.
        first, last = -3, self.hop_length + 2
        for ratio in self.config.downsampling_ratios:
            first, last = first - 3 * (1 + 3 + 9), last + 3 * (1 + 3 + 9)
            first, last = -((3 * ratio // 2 - 1 - first) // ratio), (last + ratio // 2) // ratio
        return max(-first, last) + 3

    def enable_tiling(self, tile_latents: int = 250) -> None:
        """
        Encode and decode long sounds piece by piece, in memory that does not depend on their length. A piece is
        computed with as much on both sides as its result depends on, so there are no seams: the outcome is that of
        the whole up to rounding.

        Args:
            tile_latents (`int`, defaults to 250): Latents of a piece, of 1/25 s each by default.

        Raises:
            `ValueError`: The number is below 1.
        """
        if tile_latents < 1:
            raise ValueError(f"`tile_latents` is {tile_latents}: use at least 1.")
        self.use_tiling, self.tile_latents = True, tile_latents

    def _encode(self, sample: torch.Tensor) -> torch.Tensor:
        """Parameters of the posterior, for a whole number of hops."""
        with reliable_convolutions(sample.device):
            if not self.use_tiling or sample.shape[-1] <= self.tile_latents * self.hop_length:
                return self.quant_conv(self.encoder(sample))
            pieces, context = [], self.encoder_context
            num_latents = sample.shape[-1] // self.hop_length
            for start in range(0, num_latents, self.tile_latents):
                stop = min(start + self.tile_latents, num_latents)
                first, last = max(start - context, 0), min(stop + context, num_latents)
                piece = self.encoder(sample[..., first * self.hop_length : last * self.hop_length])
                pieces.append(self.quant_conv(piece[..., start - first : stop - first]))
            return torch.cat(pieces, dim=-1)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        with reliable_convolutions(latents.device):
            if not self.use_tiling or latents.shape[-1] <= self.tile_latents:
                return self.decoder(self.post_quant_conv(latents))
            pieces, context = [], self.decoder_context
            num_latents = latents.shape[-1]
            for start in range(0, num_latents, self.tile_latents):
                stop = min(start + self.tile_latents, num_latents)
                first, last = max(start - context, 0), min(stop + context, num_latents)
                piece = self.decoder(self.post_quant_conv(latents[..., first:last]))
                pieces.append(piece[..., (start - first) * self.hop_length : (stop - first) * self.hop_length])
            return torch.cat(pieces, dim=-1)

    @apply_forward_hook
    def encode(
        self, sample: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderOobleckOutput | tuple[OobleckDiagonalGaussianDistribution]:
        """
        Encode sounds of any length; the last latent's missing samples count as silence.

        Args:
            sample (`torch.Tensor` of shape `(batch, 1, samples)`): Mono, in [-1, 1], at the model's sampling rate.
            return_dict (`bool`, defaults to `True`): Whether to return an output class instead of a tuple.

        Returns:
            [`AutoencoderOobleckOutput`] or `tuple`, with the posterior `latent_dist` of the latents, whose `mean` and
            `std` have the shape `(batch, latent_channels, ceil(samples / hop_length))`.

        Raises:
            `ValueError`: The shape is another, or there is no sample.
        """
        if sample.ndim != 3 or sample.shape[1] != 1 or sample.shape[2] < 1:
            raise ValueError(
                f"`sample` has the shape {tuple(sample.shape)}: pass (batch, 1, samples) with at least one sample; "
                "mix several channels down to one."
            )
        sample = nn.functional.pad(sample, (0, -sample.shape[-1] % self.hop_length))
        if self.use_slicing and sample.shape[0] > 1:
            moments = torch.cat([self._encode(row) for row in sample.split(1)])
        else:
            moments = self._encode(sample)
        posterior = OobleckDiagonalGaussianDistribution(moments)
        if not return_dict:
            return (posterior,)
        return AutoencoderOobleckOutput(latent_dist=posterior)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, num_samples: int | None = None, return_dict: bool = True
    ) -> OobleckDecoderOutput | tuple[torch.Tensor]:
        """
        Decode latents, in float32 or float16: bfloat16 costs about 10 dB.

        Args:
            z (`torch.Tensor` of shape `(batch, latent_channels, num_latents)`): Latents as [`encode`] has them, not
                normalised.
            num_samples (`int`, *optional*): Length of the result; by default all `num_latents * hop_length` samples.
            return_dict (`bool`, defaults to `True`): Whether to return an output class instead of a tuple.

        Returns:
            [`OobleckDecoderOutput`] or `tuple`, with the `sample` of shape `(batch, 1, num_samples)` in [-1, 1].

        Raises:
            `ValueError`: The shape is another, or the latents are too few for `num_samples`.
        """
        if z.ndim != 3 or z.shape[1] != self.config.latent_channels or z.shape[2] < 1:
            raise ValueError(
                f"`z` has the shape {tuple(z.shape)}: pass (batch, {self.config.latent_channels}, latents) with at "
                "least one latent."
            )
        available = z.shape[2] * self.hop_length
        if num_samples is not None and not 1 <= num_samples <= available:
            raise ValueError(
                f"`num_samples` is {num_samples}: {z.shape[2]} latents decode to 1 to {available} samples."
            )
        if self.use_slicing and z.shape[0] > 1:
            sample = torch.cat([self._decode(row) for row in z.split(1)])
        else:
            sample = self._decode(z)
        sample = sample[..., :num_samples]
        if not return_dict:
            return (sample,)
        return OobleckDecoderOutput(sample=sample)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> OobleckDecoderOutput | tuple[torch.Tensor]:
        """
        Encode and decode.

        Args:
            sample (`torch.Tensor` of shape `(batch, 1, samples)`): See [`encode`].
            sample_posterior (`bool`, defaults to `False`): Whether to decode a draw of the posterior instead of its
                mean.
            return_dict (`bool`, defaults to `True`): Whether to return an output class instead of a tuple.
            generator (`torch.Generator`, *optional*): Source of the draw.

        Returns:
            [`OobleckDecoderOutput`] or `tuple`, with the `sample` in the shape of the given one.
        """
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, num_samples=sample.shape[-1], return_dict=return_dict)
