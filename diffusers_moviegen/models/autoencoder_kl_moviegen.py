import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..loaders import MovieGenSingleFileMixin


def fold_frames(video: torch.Tensor) -> torch.Tensor:
    """`(batch, channels, frames, height, width)` to `(batch * frames, channels, height, width)`."""
    return video.transpose(1, 2).flatten(0, 1)


def unfold_frames(frames: torch.Tensor, num_frames: int) -> torch.Tensor:
    """`(batch * frames, channels, height, width)` to `(batch, channels, frames, height, width)`."""
    return frames.unflatten(0, (-1, num_frames)).transpose(1, 2)


class TileAxis(NamedTuple):
    """
    How one dimension is cut into tiles.

    Args:
        dim (`int`): The dimension.
        tile (`int`): Length of a tile, in latent positions.
        stride (`int`): Distance between the starts of neighbouring tiles, in latent positions.
        input_scale (`int`): Input positions a latent position.
        output_scale (`int`): Output positions a latent position.
        output_length (`int`): Output positions to keep in all.
    """

    dim: int
    tile: int
    stride: int
    input_scale: int
    output_scale: int
    output_length: int


def run_in_tiles(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, axes: Sequence[TileAxis]
) -> torch.Tensor:
    """
    Apply `function` to tiles of `x` and join the results, cross-fading linearly where neighbours overlap.

    Every tile is written into the output as soon as it is there, so that memory beyond input and output is that of
    the tiles of `axes[1:]`. An input of at most one tile is handed on whole.

    Args:
        function (`Callable`): Maps a tile of `x` to a tile of the output.
        x (`torch.Tensor`): The input.
        axes (`Sequence[TileAxis]`): Dimensions to cut, the outermost loop first.

    Returns:
        `torch.Tensor`: The joined output.
    """
    if not axes:
        return function(x)
    dim, tile, stride, input_scale, output_scale, output_length = axes[0]
    length = math.ceil(x.shape[dim] / input_scale)
    if length <= tile:
        return run_in_tiles(function, x, axes[1:])

    output = None
    previous_end = 0
    for start in range(0, length, stride):
        first = start * output_scale
        if first >= output_length:
            break
        stop = min((start + tile) * input_scale, x.shape[dim])
        part = x.narrow(dim, start * input_scale, stop - start * input_scale)
        part = run_in_tiles(function, part, axes[1:])
        if output is None:
            output = part.new_empty((*part.shape[:dim], output_length, *part.shape[dim + 1 :]))

        overlap = max(previous_end - first, 0)
        kept = min(part.shape[dim], output_length - first)
        faded = min(overlap, kept)
        # 1 / (n + 1) to n / (n + 1): the steps into and out of the overlap are as large as those inside it.
        ramp = torch.arange(1, faded + 1, dtype=torch.float32, device=part.device) / (overlap + 1)
        ramp = ramp.reshape(-1, *[1] * (part.ndim - dim - 1))
        seam = output.narrow(dim, first, faded)
        seam.copy_(seam + (part.narrow(dim, 0, faded) - seam) * ramp)
        output.narrow(dim, first + faded, kept - faded).copy_(part.narrow(dim, faded, kept - faded))
        previous_end = first + part.shape[dim]
        if stop == x.shape[dim]:
            break
    return output


class MovieGenVaeNorm(nn.GroupNorm):
    """Group normalisation with the statistics of one frame: frames are folded into the batch."""

    def __init__(self, num_groups: int, num_channels: int):
        super().__init__(num_groups, num_channels, eps=1e-6)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.device.type == "cpu" and hidden_states.dtype in (torch.bfloat16, torch.float16):
            # PyTorch's channels-last backward on the CPU is several times slower in half precision than in float32.
            normed = F.group_norm(
                hidden_states.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps
            )
            return normed.to(hidden_states.dtype)
        return super().forward(hidden_states)


class MovieGenTemporalConv1d(nn.Conv1d):
    """
    1D convolution over frames (kernel 3) with symmetric replicate padding: every frame sees the frame before and the
    one after it, and the first and the last frame see themselves in place of the missing one. It starts as the
    identity (Movie Gen, temporal autoencoder).

    Args:
        channels (`int`): Number of input channels, and of output channels for each phase.
        stride (`int`, defaults to 1): 1, or 2 to keep every other frame; `T` frames become `ceil(T / stride)`.
        phases (`int`, defaults to 1): How many outputs, each with a kernel of its own, a frame has.
    """

    def __init__(self, channels: int, stride: int = 1, phases: int = 1):
        self.phases = phases
        super().__init__(channels, phases * channels, kernel_size=3, stride=stride)

    def reset_parameters(self) -> None:
        nn.init.dirac_(self.weight, groups=self.phases)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch * num_frames, channels, height, width)`): Frames in order.
            num_frames (`int`): Frames a clip.

        Returns:
            `torch.Tensor` of shape `(batch * ceil(num_frames / stride), phases * channels, height, width)`.
        """
        if num_frames == 1:
            # All three taps read the same frame.
            return F.conv2d(hidden_states, self.weight.sum(dim=-1)[:, :, None, None], self.bias)

        # Channels-last memory, in which a stack of frames and a video are the same, so the convolution over frames
        # needs no other copy than the padding. That is spelt out because F.pad's replicate mode is forced to float32
        # under autocast on the CPU, and split because overlapping slices have a slow backward.
        video = hidden_states.permute(0, 2, 3, 1).unflatten(0, (-1, num_frames))
        first, middle, last = video.split([1, num_frames - 2, 1], dim=1)
        video = torch.cat([first, first, middle, last, last], dim=1).permute(0, 4, 1, 2, 3)
        video = F.conv3d(video, self.weight[:, :, :, None, None], self.bias, stride=(*self.stride, 1, 1))
        return fold_frames(video)


class MovieGenConv2Plus1d(nn.Module):
    """
    2D convolution (kernel 3) within each frame, then a temporal convolution of the same width across frames.

    Args:
        in_channels (`int`): Number of input channels.
        out_channels (`int`): Number of output channels.
        stride (`int`, defaults to 1):
            1 keeps the size (the 2D convolution pads by one pixel on all sides); 2 halves height and width (it
            expects an input already padded, on the right and at the bottom) and frames.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        padding = 1 if stride == 1 else 0
        self.spatial = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=padding)
        self.temporal = MovieGenTemporalConv1d(out_channels, stride=stride)

    def forward(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:
        return self.temporal(self.spatial(hidden_states), num_frames)


class MovieGenVaeAttnProcessor:
    """Single-head attention among the tokens of each sequence."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "MovieGenVaeAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        # One head as wide as the model, as in the image autoencoder: (batch, tokens, 1, channels).
        query = attn.to_q(hidden_states).unsqueeze(2)
        key = attn.to_k(hidden_states).unsqueeze(2)
        value = attn.to_v(hidden_states).unsqueeze(2)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[0](hidden_states.squeeze(2))


class MovieGenVaeAttention(nn.Module, AttentionModuleMixin):
    """
    Residual self-attention either among the pixels of each frame or, for each pixel, among the frames of its clip.

    Args:
        channels (`int`): Number of channels.
        norm_num_groups (`int`): Groups of the normalisation in front, whose statistics are those of one frame.
        over_frames (`bool`):
            `False` attends among pixels. `True` attends among frames and starts with a zero output projection, so
            that it adds nothing until it is trained.
    """

    _default_processor_cls = MovieGenVaeAttnProcessor
    _available_processors = [MovieGenVaeAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, channels: int, norm_num_groups: int, over_frames: bool):
        super().__init__()
        self.over_frames = over_frames
        self.group_norm = MovieGenVaeNorm(norm_num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        if over_frames:
            nn.init.zeros_(self.to_out[0].weight)
            nn.init.zeros_(self.to_out[0].bias)
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:
        height, width = hidden_states.shape[-2:]
        normed = self.group_norm(hidden_states)
        if self.over_frames:
            tokens = normed.unflatten(0, (-1, num_frames)).permute(0, 3, 4, 1, 2).flatten(0, 2)
            output = self.processor(self, tokens)
            output = output.unflatten(0, (-1, height, width)).permute(0, 3, 4, 1, 2).flatten(0, 1)
        else:
            tokens = normed.flatten(2).transpose(1, 2)
            output = self.processor(self, tokens)
            output = output.transpose(1, 2).unflatten(2, (height, width))
        return hidden_states + output


class MovieGenVaeResnetBlock(nn.Module):
    """
    Residual block of two normalised 2D + 1D convolutions.

    The shortcut between different widths is pointwise (kernel 1) and, unlike the kernel 3 convolutions, has no
    temporal counterpart: the residual path stays as it is in the image autoencoder.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_num_groups: int):
        super().__init__()
        self.norm1 = MovieGenVaeNorm(norm_num_groups, in_channels)
        self.conv1 = MovieGenConv2Plus1d(in_channels, out_channels)
        self.norm2 = MovieGenVaeNorm(norm_num_groups, out_channels)
        self.conv2 = MovieGenConv2Plus1d(out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:
        residual = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)), num_frames)
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)), num_frames)
        return residual + hidden_states


class MovieGenVaeDownsample(nn.Module):
    """Halves height and width, then the number of frames (rounded up)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = MovieGenConv2Plus1d(channels, channels, stride=2)

    def forward(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)), num_frames)


class MovieGenVaeUpsample(nn.Module):
    """
    Doubles height and width, then the number of frames: nearest neighbour followed by a convolution, for each.

    With `subpixel`, the two frames made of one have a temporal kernel each instead (sub-pixel convolution, Shi et al.,
    2016, along time). After nearest neighbour they share one, so that they can differ only where the frame differs
    from its neighbours: a motion that repeats from one latent frame to the next cannot be told from none.

    Args:
        channels (`int`): Number of channels.
        subpixel (`bool`, defaults to `False`): Which of the two.
    """

    def __init__(self, channels: int, subpixel: bool = False):
        super().__init__()
        self.subpixel = subpixel
        self.conv = MovieGenConv2Plus1d(channels, channels)
        if subpixel:
            self.conv.temporal = MovieGenTemporalConv1d(channels, phases=2)

    def forward(self, hidden_states: torch.Tensor, num_frames: int, still: bool = False) -> torch.Tensor:
        """With `still` the number of frames, which is 1, stays: only the first frame is computed."""
        hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        hidden_states = self.conv.spatial(hidden_states)
        if not self.subpixel:
            if still:
                return self.conv.temporal(hidden_states, num_frames)
            return self.conv.temporal(self._interleave(hidden_states, hidden_states), 2 * num_frames)
        first, second = self.conv.temporal(hidden_states, num_frames).chunk(2, dim=1)
        return first if still else self._interleave(first, second)

    @staticmethod
    def _interleave(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        # Unlike repeat_interleave or stack, this keeps the channels-last memory.
        first, second = (frames.permute(0, 2, 3, 1) for frames in (first, second))
        frames = torch.cat([first, second], dim=1).unflatten(1, (2, -1)).flatten(0, 1)
        return frames.permute(0, 3, 1, 2)


class MovieGenVaeMidBlock(nn.Module):
    """ResNet block, attention among pixels, attention among frames, ResNet block."""

    def __init__(self, channels: int, norm_num_groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([MovieGenVaeResnetBlock(channels, channels, norm_num_groups) for _ in range(2)])
        self.attentions = nn.ModuleList([MovieGenVaeAttention(channels, norm_num_groups, over_frames=False)])
        self.temporal_attentions = nn.ModuleList([MovieGenVaeAttention(channels, norm_num_groups, over_frames=True)])

    def forward(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:
        hidden_states = self.resnets[0](hidden_states, num_frames)
        hidden_states = self.attentions[0](hidden_states, num_frames)
        hidden_states = self.temporal_attentions[0](hidden_states, num_frames)
        return self.resnets[1](hidden_states, num_frames)


class MovieGenVaeDownBlock(nn.Module):
    """ResNet blocks, then (but at the last level) a down-sampling by two in time, height and width."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, norm_num_groups: int, add_downsample: bool
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            [
                MovieGenVaeResnetBlock(in_channels if i == 0 else out_channels, out_channels, norm_num_groups)
                for i in range(num_layers)
            ]
        )
        self.downsamplers = nn.ModuleList([MovieGenVaeDownsample(out_channels)]) if add_downsample else None

    def forward(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states, num_frames)
        if self.downsamplers is not None:
            hidden_states = self.downsamplers[0](hidden_states, num_frames)
        return hidden_states


class MovieGenVaeUpBlock(nn.Module):
    """ResNet blocks, then (but at the last level) an up-sampling by two in time, height and width."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        norm_num_groups: int,
        add_upsample: bool,
        subpixel: bool = False,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            [
                MovieGenVaeResnetBlock(in_channels if i == 0 else out_channels, out_channels, norm_num_groups)
                for i in range(num_layers)
            ]
        )
        self.upsamplers = nn.ModuleList([MovieGenVaeUpsample(out_channels, subpixel)]) if add_upsample else None

    def forward(self, hidden_states: torch.Tensor, num_frames: int, still: bool = False) -> torch.Tensor:
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states, num_frames)
        if self.upsamplers is not None:
            hidden_states = self.upsamplers[0](hidden_states, num_frames, still)
        return hidden_states


class MovieGenVaeEncoder(nn.Module):
    """Frames `(batch * T, in_channels, H, W)` to moments `(batch * T', 2 * latent_channels, H / 8, W / 8)`."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
    ):
        super().__init__()
        self.conv_in = MovieGenConv2Plus1d(in_channels, block_out_channels[0])
        self.down_blocks = nn.ModuleList(
            [
                MovieGenVaeDownBlock(
                    block_out_channels[max(i - 1, 0)],
                    channels,
                    num_layers=layers_per_block,
                    norm_num_groups=norm_num_groups,
                    add_downsample=i < len(block_out_channels) - 1,
                )
                for i, channels in enumerate(block_out_channels)
            ]
        )
        self.mid_block = MovieGenVaeMidBlock(block_out_channels[-1], norm_num_groups)
        self.conv_norm_out = MovieGenVaeNorm(norm_num_groups, block_out_channels[-1])
        self.conv_out = MovieGenConv2Plus1d(block_out_channels[-1], 2 * latent_channels)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:
        use_checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        hidden_states = self.conv_in(hidden_states, num_frames)
        for block in self.down_blocks:
            if use_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, num_frames)
            else:
                hidden_states = block(hidden_states, num_frames)
            if block.downsamplers is not None:
                num_frames = math.ceil(num_frames / 2)
        if use_checkpointing:
            hidden_states = self._gradient_checkpointing_func(self.mid_block, hidden_states, num_frames)
        else:
            hidden_states = self.mid_block(hidden_states, num_frames)
        return self.conv_out(F.silu(self.conv_norm_out(hidden_states)), num_frames)


class MovieGenVaeDecoder(nn.Module):
    """
    Latent frames `(batch * T', latent_channels, H', W')` to frames `(batch * T, out_channels, 8 H', 8 W')`.

    `T = 8 T'`; a single latent frame can also be decoded to its first frame alone, a still picture.
    """

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        subpixel: bool = False,
    ):
        super().__init__()
        reversed_channels = block_out_channels[::-1]
        self.conv_in = MovieGenConv2Plus1d(latent_channels, reversed_channels[0])
        self.mid_block = MovieGenVaeMidBlock(reversed_channels[0], norm_num_groups)
        self.up_blocks = nn.ModuleList(
            [
                MovieGenVaeUpBlock(
                    reversed_channels[max(i - 1, 0)],
                    channels,
                    num_layers=layers_per_block + 1,
                    norm_num_groups=norm_num_groups,
                    add_upsample=i < len(block_out_channels) - 1,
                    subpixel=subpixel,
                )
                for i, channels in enumerate(reversed_channels)
            ]
        )
        self.conv_norm_out = MovieGenVaeNorm(norm_num_groups, block_out_channels[0])
        self.conv_out = MovieGenConv2Plus1d(block_out_channels[0], out_channels)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor, num_frames: int, still: bool = False) -> torch.Tensor:
        use_checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        hidden_states = self.conv_in(hidden_states, num_frames)
        if use_checkpointing:
            hidden_states = self._gradient_checkpointing_func(self.mid_block, hidden_states, num_frames)
        else:
            hidden_states = self.mid_block(hidden_states, num_frames)
        for block in self.up_blocks:
            if use_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, num_frames, still)
            else:
                hidden_states = block(hidden_states, num_frames, still)
            if block.upsamplers is not None and not still:
                num_frames = 2 * num_frames
        return self.conv_out(F.silu(self.conv_norm_out(hidden_states)), num_frames)


class AutoencoderKLMovieGen(ModelMixin, AttentionMixin, AutoencoderMixin, ConfigMixin, MovieGenSingleFileMixin):
    r"""
    Temporal autoencoder (TAE) of Movie Gen: an image autoencoder inflated to video. Every 2D convolution of kernel 3
    is followed by a 1D convolution over frames, every attention among pixels by one among frames. Compresses eight
    times in time, height and width. An image is a video of one frame.

    The model is not causal, and its normalisation statistics are those of single frames. The latents it returns and
    takes are unscaled: pipelines and trainers apply `(latents - latents_mean) / latents_std`.

    With `temporal_upsample_type="nearest"`, as in the paper, all frames decoded from a single latent frame are equal,
    so a clip needs more than eight frames to show motion.

    Args:
        in_channels (`int`, defaults to 3): Number of channels of the input.
        out_channels (`int`, defaults to 3): Number of channels of the output.
        latent_channels (`int`, defaults to 16): Number of channels of the latents.
        block_out_channels (`tuple[int, ...]`, defaults to `(128, 256, 512, 512)`):
            Number of channels of each level. All levels but the last halve time, height and width, so four levels
            compress eight times.
        layers_per_block (`int`, defaults to 2): ResNet blocks a level in the encoder; the decoder has one more.
        norm_num_groups (`int`, defaults to 32): Groups of the normalisations; divides every entry of
            `block_out_channels`.
        temporal_upsample_type (`str`, defaults to `"nearest"`):
            How the decoder doubles the number of frames: `"nearest"` repeats each one before a temporal convolution,
            as in the paper; `"subpixel"` has a temporal kernel for each of the two frames. Only the latter can decode
            a motion that is the same in all latent frames, such as a wheel that turns as far in each.
        latents_mean (`list[float]`, *optional*): Mean of each latent channel over the training set; `None` is 0.
        latents_std (`list[float]`, *optional*): Standard deviation of each latent channel; `None` is 1.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MovieGenVaeResnetBlock", "MovieGenVaeAttention", "MovieGenVaeUpsample"]
    _group_offload_block_modules = ["quant_conv", "post_quant_conv", "encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 16,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        temporal_upsample_type: str = "nearest",
    ):
        super().__init__()
        if temporal_upsample_type not in ("nearest", "subpixel"):
            raise ValueError(f"`temporal_upsample_type` is {temporal_upsample_type!r}: use 'nearest' or 'subpixel'.")
        subpixel = temporal_upsample_type == "subpixel"
        self.encoder = MovieGenVaeEncoder(
            in_channels, latent_channels, block_out_channels, layers_per_block, norm_num_groups
        )
        self.decoder = MovieGenVaeDecoder(
            latent_channels, out_channels, block_out_channels, layers_per_block, norm_num_groups, subpixel
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

        self.temporal_compression_ratio = 2 ** (len(block_out_channels) - 1)
        self.spatial_compression_ratio = 2 ** (len(block_out_channels) - 1)

        self.use_slicing = False
        self.use_tiling = False

        # In pixels and frames. Overlaps are what is left of a tile after the stride; along time only the decoder's
        # tiles overlap.
        self.tile_sample_min_height = 256
        self.tile_sample_min_width = 256
        self.tile_sample_min_num_frames = 32
        self.tile_sample_stride_height = 192
        self.tile_sample_stride_width = 192
        self.tile_sample_stride_num_frames = 16

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_min_num_frames: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
        tile_sample_stride_num_frames: int | None = None,
    ) -> None:
        r"""
        Encode and decode in tiles, so that memory beyond input, latents and output does not grow with the length or
        the size of a video. What fits in one tile is computed as without tiling.

        Overlapping tiles are blended with linear weights. Along time the encoder's tiles do not overlap (Movie Gen,
        temporal autoencoder), so there the stride is the decoder's.

        Args:
            tile_sample_min_height (`int`, *optional*): Height of a tile in pixels, at first 256.
            tile_sample_min_width (`int`, *optional*): Width of a tile in pixels, at first 256.
            tile_sample_min_num_frames (`int`, *optional*): Length of a tile in frames, at first 32.
            tile_sample_stride_height (`int`, *optional*):
                Distance between the tops of neighbouring tiles in pixels, at first 192.
            tile_sample_stride_width (`int`, *optional*):
                Distance between the left sides of neighbouring tiles in pixels, at first 192.
            tile_sample_stride_num_frames (`int`, *optional*):
                Distance between the first frames of neighbouring tiles of the decoder, at first 16.

        What is not given keeps its value.

        Raises:
            ValueError: If a value is no positive multiple of the compression ratio or a stride is above its tile.
        """
        tiling = {
            "tile_sample_min_height": tile_sample_min_height,
            "tile_sample_min_width": tile_sample_min_width,
            "tile_sample_min_num_frames": tile_sample_min_num_frames,
            "tile_sample_stride_height": tile_sample_stride_height,
            "tile_sample_stride_width": tile_sample_stride_width,
            "tile_sample_stride_num_frames": tile_sample_stride_num_frames,
        }
        tiling = {name: getattr(self, name) if value is None else value for name, value in tiling.items()}
        for name, value in tiling.items():
            ratio = self.temporal_compression_ratio if "frames" in name else self.spatial_compression_ratio
            if value < 1 or value % ratio:
                raise ValueError(f"`{name}` is {value}; it must be a positive multiple of {ratio}.")
        for size in ("height", "width", "num_frames"):
            tile, stride = tiling[f"tile_sample_min_{size}"], tiling[f"tile_sample_stride_{size}"]
            if stride > tile:
                raise ValueError(
                    f"`tile_sample_stride_{size}` is {stride}, above `tile_sample_min_{size}`, {tile}: "
                    "tiles would leave gaps. Lower the stride or raise the tile."
                )
        for name, value in tiling.items():
            setattr(self, name, value)
        self.use_tiling = True

    def _encode_tile(self, x: torch.Tensor) -> torch.Tensor:
        latent_frames = math.ceil(x.shape[2] / self.temporal_compression_ratio)
        # Channels-last memory serves the 2D and the 1D convolutions alike, without copies between them.
        hidden_states = fold_frames(x).contiguous(memory_format=torch.channels_last)
        moments = self.quant_conv(self.encoder(hidden_states, x.shape[2]))
        return unfold_frames(moments, latent_frames)

    def _decode_tile(self, z: torch.Tensor, is_image: bool) -> torch.Tensor:
        latent_frames = z.shape[2]
        hidden_states = fold_frames(z).contiguous(memory_format=torch.channels_last)
        # After nearest neighbour nothing tells the frames of one latent frame apart: convolutions replicate at the
        # ends and attention has no positions. So they are equal and are computed once.
        still = latent_frames == 1 and (is_image or self.config.temporal_upsample_type == "nearest")
        sample = self.decoder(self.post_quant_conv(hidden_states), latent_frames, still)
        if still:
            return sample.unsqueeze(2).expand(-1, -1, self.temporal_compression_ratio, -1, -1)
        return unfold_frames(sample, latent_frames * self.temporal_compression_ratio)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        batch_size, _, num_frames, height, width = x.shape
        ratio_t, ratio = self.temporal_compression_ratio, self.spatial_compression_ratio
        axes = []
        if self.use_tiling:
            tile = self.tile_sample_min_num_frames // ratio_t
            axes.append(TileAxis(2, tile, tile, ratio_t, 1, math.ceil(num_frames / ratio_t)))
        if self.use_slicing:
            axes.append(TileAxis(0, 1, 1, 1, 1, batch_size))
        if self.use_tiling:
            tile, stride = self.tile_sample_min_height // ratio, self.tile_sample_stride_height // ratio
            axes.append(TileAxis(3, tile, stride, ratio, 1, height // ratio))
            tile, stride = self.tile_sample_min_width // ratio, self.tile_sample_stride_width // ratio
            axes.append(TileAxis(4, tile, stride, ratio, 1, width // ratio))
        return run_in_tiles(self._encode_tile, x, axes)

    def _decode(self, z: torch.Tensor, num_frames: int) -> torch.Tensor:
        batch_size, _, _, height, width = z.shape
        ratio_t, ratio = self.temporal_compression_ratio, self.spatial_compression_ratio
        axes = []
        if self.use_tiling:
            tile, stride = self.tile_sample_min_num_frames // ratio_t, self.tile_sample_stride_num_frames // ratio_t
            axes.append(TileAxis(2, tile, stride, 1, ratio_t, num_frames))
        if self.use_slicing:
            axes.append(TileAxis(0, 1, 1, 1, 1, batch_size))
        if self.use_tiling:
            tile, stride = self.tile_sample_min_height // ratio, self.tile_sample_stride_height // ratio
            axes.append(TileAxis(3, tile, stride, 1, ratio, height * ratio))
            tile, stride = self.tile_sample_min_width // ratio, self.tile_sample_stride_width // ratio
            axes.append(TileAxis(4, tile, stride, 1, ratio, width * ratio))
        decode_tile = partial(self._decode_tile, is_image=num_frames == 1)
        return run_in_tiles(decode_tile, z, axes)[:, :, :num_frames]

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        r"""
        Encode a batch of clips.

        Args:
            x (`torch.Tensor` of shape `(batch, in_channels, frames, height, width)`):
                Clips with values in [-1, 1] and any number of frames; height and width are multiples of
                `spatial_compression_ratio`.
            return_dict (`bool`, defaults to `True`): Whether to return an `AutoencoderKLOutput` or a tuple.

        Returns:
            `AutoencoderKLOutput` whose `latent_dist` is the posterior over latents of shape
            `(batch, latent_channels, ceil(frames / 8), height / 8, width / 8)`, or a tuple with it.

        Raises:
            ValueError: If `x` is not a video or its size is no multiple of `spatial_compression_ratio`.
        """
        ratio = self.spatial_compression_ratio
        if x.ndim != 5:
            raise ValueError(
                f"`x` has shape {tuple(x.shape)}; expected (batch, channels, frames, height, width). "
                "An image is a video of one frame: use `x.unsqueeze(2)`."
            )
        if x.shape[3] % ratio or x.shape[4] % ratio:
            raise ValueError(
                f"`x` is {x.shape[3]} high and {x.shape[4]} wide; both must be multiples of {ratio}. Resize or crop."
            )
        moments = self._encode(x).contiguous()
        posterior = DiagonalGaussianDistribution(moments)
        if not return_dict:
            return (posterior,)
        return AutoencoderKLOutput(latent_dist=posterior)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, num_frames: int | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor]:
        r"""
        Decode a batch of latents.

        Args:
            z (`torch.Tensor` of shape `(batch, latent_channels, latent_frames, latent_height, latent_width)`):
                Unscaled latents.
            num_frames (`int`, *optional*):
                How many of the `8 * latent_frames` decoded frames to keep, from the first; all by default. Pass the
                length of the clip that was encoded to get that length back.
            return_dict (`bool`, defaults to `True`): Whether to return a `DecoderOutput` or a tuple.

        Returns:
            `DecoderOutput` whose `sample` has shape
            `(batch, out_channels, num_frames, 8 * latent_height, 8 * latent_width)`, or a tuple with it. Values are
            near [-1, 1] and not clamped.

        Raises:
            ValueError: If `num_frames` is below 1 or above `8 * latent_frames`.
        """
        max_frames = z.shape[2] * self.temporal_compression_ratio
        num_frames = max_frames if num_frames is None else num_frames
        if not 1 <= num_frames <= max_frames:
            raise ValueError(
                f"`num_frames` is {num_frames}; {z.shape[2]} latent frames decode to 1 up to {max_frames} frames."
            )
        sample = self._decode(z, num_frames).contiguous()
        if not return_dict:
            return (sample,)
        return DecoderOutput(sample=sample)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        r"""
        Encode and decode a batch of clips.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, frames, height, width)`): As in `encode`.
            sample_posterior (`bool`, defaults to `False`): Draw from the posterior instead of taking its mean.
            return_dict (`bool`, defaults to `True`): Whether to return a `DecoderOutput` or a tuple.
            generator (`torch.Generator`, *optional*): For the draw from the posterior.

        Returns:
            `DecoderOutput` whose `sample` has the shape of the input, or a tuple with it.
        """
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, num_frames=sample.shape[2], return_dict=return_dict)

    @classmethod
    def from_autoencoder_kl(
        cls, autoencoder_kl: AutoencoderKL, temporal_upsample_type: str = "nearest"
    ) -> "AutoencoderKLMovieGen":
        r"""
        Inflate an image autoencoder: the 2D weights are copied, the temporal convolutions start as the identity and
        the temporal attentions add nothing. Until it is trained, the result treats every frame as the image
        autoencoder does, but for keeping only every eighth.

        A model with `n` levels compresses `2 ** (n - 1)` times in height and width, and once inflated in time too.
        `scaling_factor` and `shift_factor` (or `latents_mean` and `latents_std`) of the image model become
        `latents_mean` and `latents_std`. Missing `quant_conv` and `post_quant_conv` become the identity.

        Args:
            autoencoder_kl (`AutoencoderKL`): The image autoencoder. It is left as it is.
            temporal_upsample_type (`str`, defaults to `"nearest"`):
                Of the result. With `"subpixel"`, every other channel keeps the later of two frames instead of the
                earlier one when their number is halved; single frames are treated the same.

        Returns:
            `AutoencoderKLMovieGen` with the dtype and on the device of `autoencoder_kl`, in evaluation mode.

        Raises:
            ValueError: If `autoencoder_kl` is built of blocks that this model lacks.
        """
        source = autoencoder_kl.config
        for name, expected in (
            ("down_block_types", {"DownEncoderBlock2D"}),
            ("up_block_types", {"UpDecoderBlock2D"}),
            ("act_fn", {"silu"}),
            ("mid_block_add_attention", {True}),
        ):
            values = source[name] if isinstance(source[name], (list, tuple)) else [source[name]]
            if set(values) != expected:
                raise ValueError(
                    f"Cannot inflate an AutoencoderKL with {name} = {source[name]}: only {expected.pop()!r} can be "
                    "represented. Choose an autoencoder of the latent diffusion family."
                )

        channels = source.latent_channels
        shift = source.shift_factor if source.shift_factor is not None else 0.0
        latents_mean = source.latents_mean if source.latents_mean is not None else [shift] * channels
        latents_std = source.latents_std if source.latents_std is not None else [1.0] * channels
        model = cls(
            in_channels=source.in_channels,
            out_channels=source.out_channels,
            latent_channels=channels,
            block_out_channels=tuple(source.block_out_channels),
            layers_per_block=source.layers_per_block,
            norm_num_groups=source.norm_num_groups,
            latents_mean=list(latents_mean),
            latents_std=[std / source.scaling_factor for std in latents_std],
            temporal_upsample_type=temporal_upsample_type,
        )

        state_dict = model.state_dict()
        for name in ("quant_conv", "post_quant_conv"):
            nn.init.dirac_(state_dict[f"{name}.weight"])
            nn.init.zeros_(state_dict[f"{name}.bias"])
        for key, weight in autoencoder_kl.state_dict().items():
            module_name, parameter_name = key.rsplit(".", 1)
            if isinstance(model.get_submodule(module_name), MovieGenConv2Plus1d):
                key = f"{module_name}.spatial.{parameter_name}"
            state_dict[key] = weight
        model.load_state_dict(state_dict)
        if temporal_upsample_type == "subpixel":
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, MovieGenVaeDownsample):
                        # The middle tap is the earlier frame, the last one the later.
                        weight = module.conv.temporal.weight
                        weight[1::2] = weight[1::2].roll(1, dims=2)
        return model.to(autoencoder_kl.device).type(autoencoder_kl.dtype).eval()
