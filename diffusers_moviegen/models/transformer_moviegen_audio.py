from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    PixArtAlphaTextProjection,
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
    get_1d_sincos_pos_embed_from_grid,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils import apply_lora_scale
from diffusers.utils.torch_utils import maybe_allow_in_graph

from ..loaders import MovieGenSingleFileMixin


MIN_SIGMA = 0.05
"""Noise level down to which a velocity is what a prediction of the data makes it; below, it would be all rounding."""


class MovieGenAudioRotaryEmbedding(nn.Module):
    """
    Rotary positions of the latents, whose number is not limited: they say how far apart two latents are.

    Args:
        attention_head_dim (`int`): Width of a head.
    """

    def __init__(self, attention_head_dim: int):
        super().__init__()
        self.attention_head_dim = attention_head_dim

    def forward(self, num_tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Cosines and sines, float32 of shape `(num_tokens,
            attention_head_dim)`.
        """
        positions = torch.arange(num_tokens, device=device)
        return get_1d_rotary_pos_embed(self.attention_head_dim, positions, use_real=True)


class MovieGenAudioAttnProcessor:
    """Attention through diffusers' dispatcher, which also runs it under context parallelism."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "MovieGenAudioAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if attn.is_cross_attention:
            query = attn.to_q(hidden_states)
            if attn.fused_projections:
                key, value = attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)
            else:
                key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        elif attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)

        query = query.unflatten(-1, (attn.heads, -1))
        key = key.unflatten(-1, (attn.heads, -1))
        value = value.unflatten(-1, (attn.heads, -1))

        if rotary_emb is not None:
            query = apply_rotary_emb(query, rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, rotary_emb, sequence_dim=1)
        if attention_mask is not None:
            # The four dimensions say that the mask is over keys; some backends read two as (queries, keys).
            attention_mask = attention_mask[:, None, None, :]

        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            # The text is not sharded: every rank holds all of its tokens.
            parallel_config=None if attn.is_cross_attention else self._parallel_config,
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)
        return attn.to_out[0](hidden_states)


class MovieGenAudioAttention(nn.Module, AttentionModuleMixin):
    """
    Multi-head attention with biases.

    Args:
        dim (`int`): Width of the model.
        heads (`int`): Number of heads.
        dim_head (`int`): Width of a head.
        is_cross_attention (`bool`): Whether keys and values come from `encoder_hidden_states`.
        processor (`MovieGenAudioAttnProcessor`, *optional*): How the attention is computed.
    """

    _default_processor_cls = MovieGenAudioAttnProcessor
    _available_processors = [MovieGenAudioAttnProcessor]

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        is_cross_attention: bool = False,
        processor: MovieGenAudioAttnProcessor | None = None,
    ):
        super().__init__()
        self.heads = heads
        self.is_cross_attention = is_cross_attention
        self.use_bias = True  # read by `fuse_projections`

        inner_dim = heads * dim_head
        self.to_q = nn.Linear(dim, inner_dim)
        self.to_k = nn.Linear(dim, inner_dim)
        self.to_v = nn.Linear(dim, inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, dim)])

        self.set_processor(processor if processor is not None else self._default_processor_cls())

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


@maybe_allow_in_graph
class MovieGenAudioTransformerBlock(nn.Module):
    """
    Plain DiT block with full attention, cross-attention to the text and modulation by the flow time (Movie Gen Audio,
    backbone architecture).

    Args:
        dim (`int`): Width of the model.
        ffn_dim (`int`): Width inside the feed-forward network.
        num_attention_heads (`int`): Number of heads of both attentions.
        attention_head_dim (`int`): Width of a head.
        eps (`float`): Epsilon of the norms.
    """

    def __init__(self, dim: int, ffn_dim: int, num_attention_heads: int, attention_head_dim: int, eps: float):
        super().__init__()
        self.norm1 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = MovieGenAudioAttention(dim, num_attention_heads, attention_head_dim)
        self.norm2 = FP32LayerNorm(dim, eps)
        self.attn2 = MovieGenAudioAttention(dim, num_attention_heads, attention_head_dim, is_cross_attention=True)
        self.norm3 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.ff = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
        encoder_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, dim)`): The residual stream.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, text tokens, dim)`): Projected text.
            temb (`torch.Tensor` of shape `(batch, 6, dim)`): Shift, scale and gate of the self-attention, then of the
                feed-forward, as far as all blocks share them.
            rotary_emb (`tuple[torch.Tensor, torch.Tensor]`, each of shape `(tokens, attention_head_dim)`): Cosines
                and sines of the positions.
            encoder_attention_mask (`torch.Tensor` of shape `(batch, text tokens)`, *optional*): Boolean, true for the
                tokens to attend to.
            attention_mask (`torch.Tensor` of shape `(1, tokens)`, *optional*): The same for the self-attention. Under
                context parallelism it covers the tokens of all processes.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, dim)` in the dtype of `hidden_states`.
        """
        dtype = hidden_states.dtype
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            self.scale_shift_table.float() + temb.float()
        ).chunk(6, dim=1)

        # 1. Self-attention. The norms return the dtype of their input, here float32 for the modulation.
        norm_hidden_states = torch.addcmul(shift_msa, self.norm1(hidden_states.float()), 1 + scale_msa).to(dtype)
        attn_output = self.attn1(norm_hidden_states, attention_mask=attention_mask, rotary_emb=rotary_emb)
        hidden_states = torch.addcmul(hidden_states, attn_output, gate_msa).to(dtype)

        # 2. Cross-attention
        attn_output = self.attn2(self.norm2(hidden_states), encoder_hidden_states, encoder_attention_mask)
        hidden_states = (hidden_states + attn_output).to(dtype)

        # 3. Feed-forward
        norm_hidden_states = torch.addcmul(shift_mlp, self.norm3(hidden_states.float()), 1 + scale_mlp).to(dtype)
        return torch.addcmul(hidden_states, self.ff(norm_hidden_states), gate_mlp).to(dtype)


class MovieGenAudioTransformer1DModel(
    ModelMixin, ConfigMixin, AttentionMixin, MovieGenSingleFileMixin, PeftAdapterMixin, CacheMixin
):
    r"""
    The backbone of Movie Gen Audio: a plain DiT over audio latents, one token each. Video features are added token by
    token, a sound to continue or to fill is concatenated along the channels, and the text comes by cross-attention.
    The defaults are the 13B model.

    Movie Gen leaves open how the backbone knows positions. Here sines and cosines are added to the latents, as in the
    plain DiT (Peebles and Xie, 2023), which say where in the sound a latent is, and rotary ones in the self-attention
    say how far apart two are. Neither limits the length.

    The modulation is one projection of the time shared by all blocks plus a learned bias in every block. The output
    projection and the shared time projection start at zero and the biases at a standard deviation of `dim ** -0.5`,
    so an untrained model predicts zero.

    Args:
        in_channels (`int`, defaults to 128):
            Channels of the latents.
        out_channels (`int`, defaults to 128):
            Channels of the output.
        num_layers (`int`, defaults to 36):
            Number of transformer blocks.
        num_attention_heads (`int`, defaults to 36):
            Number of attention heads.
        attention_head_dim (`int`, defaults to 128):
            Width of a head, an even number; the width of the model is `num_attention_heads * attention_head_dim`.
        ffn_dim (`int`, defaults to 18432):
            Width inside the feed-forward network.
        freq_dim (`int`, defaults to 256):
            Number of sinusoidal features of the time.
        text_embed_dim (`int`, defaults to 768):
            Width of the features of the text encoder (T5-base).
        video_embed_dim (`int`, defaults to 1024):
            Width of the features of a video frame (MetaCLIP).
        eps (`float`, defaults to 1e-6):
            Epsilon of all norms.
        prediction_type (`str`, defaults to `"velocity"`):
            What the last layer predicts: `"velocity"`, or `"sample"`, the clean latents, from which the velocity
            follows. The output is the velocity either way. A velocity holds all of the noise, which a model not much
            wider than the latents has no room to carry from its input to its output beside everything else (Li and
            He, 2025, Back to Basics: Let Denoising Generative Models Denoise).

    Raises:
        `ValueError`: `attention_head_dim` is odd, there is no such `prediction_type`, or `"sample"` is asked for with
            another number of channels out than in.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MovieGenAudioTransformerBlock"]
    _repeated_blocks = ["MovieGenAudioTransformerBlock"]
    _keep_in_fp32_modules = ["norm2", "scale_shift_table"]
    _skip_layerwise_casting_patterns = ["proj_in", "time_embed", "time_modulation", "norm"]
    _cp_plan = {
        "rope": {
            0: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        in_channels: int = 128,
        out_channels: int = 128,
        num_layers: int = 36,
        num_attention_heads: int = 36,
        attention_head_dim: int = 128,
        ffn_dim: int = 18432,
        freq_dim: int = 256,
        text_embed_dim: int = 768,
        video_embed_dim: int = 1024,
        eps: float = 1e-6,
        prediction_type: str = "velocity",
    ):
        super().__init__()
        if prediction_type not in ("velocity", "sample"):
            raise ValueError(f"`prediction_type` is '{prediction_type}'; pass 'velocity' or 'sample'.")
        if prediction_type == "sample" and in_channels != out_channels:
            raise ValueError(
                f"`in_channels` {in_channels} and `out_channels` {out_channels} differ; with `prediction_type` "
                "'sample' they must be equal."
            )
        if attention_head_dim % 2:
            raise ValueError(
                f"`attention_head_dim` {attention_head_dim} is odd; rotary positions turn pairs of values."
            )
        dim = num_attention_heads * attention_head_dim

        # 1. Latents, the given sound and its mask, and their positions
        self.proj_in = nn.Linear(2 * in_channels + 1, dim)
        self.rope = MovieGenAudioRotaryEmbedding(attention_head_dim)

        # 2. Time
        self.time_proj = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(freq_dim, dim)
        self.time_modulation = nn.Linear(dim, 6 * dim)

        # 3. Text and video, and what stands for their absence
        self.text_proj = PixArtAlphaTextProjection(text_embed_dim, dim)
        self.video_proj = PixArtAlphaTextProjection(video_embed_dim, dim)
        self.null_text = nn.Parameter(torch.randn(1, dim) / dim**0.5)
        self.null_video = nn.Parameter(torch.randn(1, dim) / dim**0.5)

        # 4. Blocks
        self.transformer_blocks = nn.ModuleList(
            [
                MovieGenAudioTransformerBlock(dim, ffn_dim, num_attention_heads, attention_head_dim, eps)
                for _ in range(num_layers)
            ]
        )

        # 5. Output
        self.norm_out = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, out_channels)

        for layer in (self.time_modulation, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

        self.gradient_checkpointing = False

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        video_hidden_states: torch.Tensor | None = None,
        video_mask: torch.Tensor | None = None,
        audio_context: torch.Tensor | None = None,
        audio_context_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        r"""
        Predict the velocity, in diffusers' direction from data to noise.

        Text, video and a given sound may each be left out. What their masks rule out has no influence on the output,
        and a sample whose masks are all false is one without that condition.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, latents)`):
                Noisy latents. Their dtype is the dtype of the computation.
            timestep (`torch.Tensor` of shape `(batch,)`, float32):
                Flow time from 0 (data) to 1000 (noise), that is 1000 times sigma.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, tokens, text_embed_dim)`, *optional*):
                Features of the text.
            encoder_attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
                Boolean, true for real tokens and false for padding. `None` if nothing is padding.
            video_hidden_states (`torch.Tensor` of shape `(batch, latents, video_embed_dim)`, *optional*):
                Features of what is seen at the time of each latent.
            video_mask (`torch.Tensor` of shape `(batch, latents)`, *optional*):
                Boolean, true where the features are known. `None` if all are.
            audio_context (`torch.Tensor` of shape `(batch, in_channels, latents)`, *optional*):
                Latents of the sound to continue or to fill.
            audio_context_mask (`torch.Tensor` of shape `(batch, latents)`, *optional*):
                Boolean, true where the sound is given. Goes with `audio_context`.
            attention_kwargs (`dict`, *optional*):
                `scale`: strength of the loaded LoRA adapters, a float.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`~diffusers.models.modeling_outputs.Transformer2DModelOutput`] instead of a tuple.

        Returns:
            [`~diffusers.models.modeling_outputs.Transformer2DModelOutput`] or `tuple`, with the sample of shape
            `(batch, out_channels, latents)`.

        Raises:
            `ValueError`: A mask does not fit its features, the video or the given sound does not fit the latents, or
            the sound comes without its mask.
        """
        dtype = hidden_states.dtype
        batch_size, _, num_tokens = hidden_states.shape
        if video_hidden_states is not None and video_hidden_states.shape[:2] != (batch_size, num_tokens):
            raise ValueError(
                f"`video_hidden_states` has shape {tuple(video_hidden_states.shape)} but there are {batch_size} x "
                f"{num_tokens} latents (batch x time); resample the features to one per latent."
            )
        if audio_context is not None:
            if audio_context.shape != hidden_states.shape:
                raise ValueError(
                    f"`audio_context` has shape {tuple(audio_context.shape)} but `hidden_states` has "
                    f"{tuple(hidden_states.shape)}; they must be equal."
                )
            if audio_context_mask is None:
                raise ValueError("`audio_context` comes without `audio_context_mask`; pass where the sound is given.")
        for name, features, time_dim, mask_name, mask in (
            ("encoder_hidden_states", encoder_hidden_states, 1, "encoder_attention_mask", encoder_attention_mask),
            ("video_hidden_states", video_hidden_states, 1, "video_mask", video_mask),
            ("audio_context", audio_context, 2, "audio_context_mask", audio_context_mask),
        ):
            if mask is not None and features is None:
                raise ValueError(f"`{mask_name}` is given but `{name}` is None; pass both or neither.")
            if mask is not None and mask.shape != (features.shape[0], features.shape[time_dim]):
                raise ValueError(
                    f"`{mask_name}` has shape {tuple(mask.shape)} but `{name}` has {tuple(features.shape)}; pass one "
                    "mask value per token."
                )

        # 1. Latents, with the given sound and its mask as further channels
        latents = hidden_states
        hidden_states = hidden_states.transpose(1, 2)
        if audio_context is None:
            hidden_states = F.pad(hidden_states, (0, self.config.in_channels + 1))
        else:
            # What is not given may hold anything, NaN included.
            given = audio_context_mask.bool()[..., None]
            context = audio_context.transpose(1, 2).masked_fill(~given, 0)
            hidden_states = torch.cat([hidden_states, context.to(dtype), given.to(dtype)], dim=-1)
        hidden_states = self.proj_in(hidden_states)

        # 2. Video
        if video_hidden_states is None:
            video = self.null_video
        elif video_mask is None:
            video = self.video_proj(video_hidden_states)
        else:
            # A NaN that is only replaced after the projection still spoils gradients.
            unknown = ~video_mask.bool()[..., None]
            video = self.video_proj(video_hidden_states.masked_fill(unknown, 0))
            video = torch.where(unknown, self.null_video.to(video.dtype), video)
        # Casting back matters under autocast, where it keeps the residual stream in the dtype of the input.
        hidden_states = (hidden_states + video).to(dtype)

        # 3. Positions
        positions = torch.arange(num_tokens, device=hidden_states.device)
        hidden_states = hidden_states + get_1d_sincos_pos_embed_from_grid(hidden_states.shape[-1], positions).to(dtype)
        num_padding = 0
        cp_config = getattr(self._parallel_config, "context_parallel_config", None)
        if cp_config is not None and cp_config.ring_degree == 1 and not cp_config.ulysses_anything:
            # Ulysses exchanges equal parts. Its mode for any length has neither a backward pass nor a CPU path.
            num_padding = -num_tokens % cp_config.ulysses_degree
        rotary_emb = self.rope(num_tokens + num_padding, hidden_states.device)
        attention_mask = None
        if num_padding:
            hidden_states = F.pad(hidden_states, (0, 0, 0, num_padding))
            attention_mask = torch.arange(num_tokens + num_padding, device=hidden_states.device)[None] < num_tokens

        # 4. Time
        temb = self.time_embed(self.time_proj(timestep).to(dtype))
        block_temb = self.time_modulation(F.silu(temb)).unflatten(1, (6, -1))

        # 5. Text, after one token that is always there, so that there is something to attend to without text
        text, text_mask = self.null_text.to(dtype).expand(batch_size, 1, -1), None
        if encoder_hidden_states is not None:
            if encoder_attention_mask is not None:
                text_mask = encoder_attention_mask.bool()
                encoder_hidden_states = encoder_hidden_states.masked_fill(~text_mask[..., None], 0)
                text_mask = F.pad(text_mask, (1, 0), value=True)
            text = torch.cat([text, self.text_proj(encoder_hidden_states).to(dtype)], dim=1)

        # 6. Blocks
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, text, block_temb, rotary_emb, text_mask, attention_mask
                )
            else:
                hidden_states = block(hidden_states, text, block_temb, rotary_emb, text_mask, attention_mask)

        # 7. Output
        shift, scale = (self.scale_shift_table.float() + temb.float().unsqueeze(1)).chunk(2, dim=1)
        hidden_states = torch.addcmul(shift, self.norm_out(hidden_states.float()), 1 + scale).to(dtype)
        sample = self.proj_out(hidden_states)[:, :num_tokens].transpose(1, 2)
        if self.config.prediction_type == "sample":
            sigma = (timestep.float() / 1000).clamp(min=MIN_SIGMA)[:, None, None]
            sample = ((latents.float() - sample.float()) / sigma).to(dtype)

        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)
