import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils import apply_lora_scale
from diffusers.utils.torch_utils import maybe_allow_in_graph

from ..loaders import MovieGenSingleFileMixin


class MovieGenRMSNorm(nn.RMSNorm):
    """RMSNorm computed in float32 whatever the dtypes of input and weight; the output is float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Equal dtypes of input and weight are also what lets PyTorch use its fused kernel.
        return F.rms_norm(hidden_states.float(), self.normalized_shape, self.weight.float(), self.eps)


class MovieGenPositionEmbedding(nn.Module):
    """
    Three learned tables, one each for frame, row and column of the patch grid; a token's position is the sum of its
    three entries (Movie Gen, backbone architecture).

    Args:
        max_grid_size (`tuple[int, int, int]`): Entries of the three tables: patches in time, height and width.
        dim (`int`): Width of the model.
    """

    def __init__(self, max_grid_size: tuple[int, int, int], dim: int):
        super().__init__()
        self.temporal_table = nn.Parameter(torch.empty(max_grid_size[0], dim))
        self.height_table = nn.Parameter(torch.empty(max_grid_size[1], dim))
        self.width_table = nn.Parameter(torch.empty(max_grid_size[2], dim))
        for table in (self.temporal_table, self.height_table, self.width_table):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, num_frames: int, height: int, width: int, num_padding: int = 0) -> torch.Tensor:
        """
        Args:
            num_frames (`int`), height (`int`), width (`int`): Size of the grid in patches.
            num_padding (`int`, defaults to 0): Tokens of zeros to add at the end.

        Returns:
            `torch.Tensor` of shape `(1, num_frames * height * width + num_padding, dim)` in the dtype of the tables.
            The column changes fastest and the frame slowest, as in the flattened output of the patch embedding.

        Raises:
            `ValueError`: The grid is larger than the tables.
        """
        grid_size = (num_frames, height, width)
        tables = (self.temporal_table, self.height_table, self.width_table)
        limits = tuple(table.shape[0] for table in tables)
        if any(size > limit for size, limit in zip(grid_size, limits, strict=True)):
            raise ValueError(
                f"A grid of {num_frames} x {height} x {width} patches (frames x height x width) exceeds the position "
                f"tables of {limits[0]} x {limits[1]} x {limits[2]}; use a smaller input or call "
                "`expand_position_tables` first."
            )
        temporal, rows, columns = (table[:size] for table, size in zip(tables, grid_size, strict=True))
        positions = temporal[:, None, None] + rows[None, :, None] + columns[None, None, :]
        positions = positions.flatten(0, 2).unsqueeze(0)
        # Padding by nothing would copy the tensor.
        return F.pad(positions, (0, 0, 0, num_padding)) if num_padding else positions


class MovieGenTextProjection(nn.Module):
    """Linear and LayerNorm from the features of one text encoder to the width of the model."""

    def __init__(self, in_features: int, dim: int, eps: float):
        super().__init__()
        self.linear = nn.Linear(in_features, dim)
        self.norm = FP32LayerNorm(dim, eps)

    def forward(self, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(encoder_hidden_states))


class MovieGenAttnProcessor:
    """Attention through diffusers' dispatcher, which also runs it under context parallelism."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "MovieGenAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
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


class MovieGenAttention(nn.Module, AttentionModuleMixin):
    """
    Multi-head attention without biases, grouping or normalisation of queries and keys.

    Args:
        dim (`int`): Width of the model.
        heads (`int`): Number of heads.
        dim_head (`int`): Width of a head.
        is_cross_attention (`bool`): Whether keys and values come from `encoder_hidden_states`.
        processor (`MovieGenAttnProcessor`, *optional*): How the attention is computed.
    """

    _default_processor_cls = MovieGenAttnProcessor
    _available_processors = [MovieGenAttnProcessor]

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        is_cross_attention: bool = False,
        processor: MovieGenAttnProcessor | None = None,
    ):
        super().__init__()
        self.heads = heads
        self.is_cross_attention = is_cross_attention
        self.use_bias = False  # read by `fuse_projections`

        inner_dim = heads * dim_head
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_k = nn.Linear(dim, inner_dim, bias=False)
        self.to_v = nn.Linear(dim, inner_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, dim, bias=False)])

        self.set_processor(processor if processor is not None else self._default_processor_cls())

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask)


class MovieGenFeedForward(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, dim: int, inner_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner_dim, bias=False)
        self.up_proj = nn.Linear(dim, inner_dim, bias=False)
        self.down_proj = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


@maybe_allow_in_graph
class MovieGenTransformerBlock(nn.Module):
    """
    LLaMa3 block with full attention, cross-attention to the text and modulation by the flow time (Movie Gen, backbone
    architecture).

    Args:
        dim (`int`): Width of the model.
        ffn_dim (`int`): Width inside the feed-forward network.
        num_attention_heads (`int`): Number of heads of both attentions.
        attention_head_dim (`int`): Width of a head.
        eps (`float`): Epsilon of the norms.
    """

    def __init__(self, dim: int, ffn_dim: int, num_attention_heads: int, attention_head_dim: int, eps: float):
        super().__init__()
        self.norm1 = MovieGenRMSNorm(dim, eps)
        self.attn1 = MovieGenAttention(dim, num_attention_heads, attention_head_dim)
        self.norm2 = MovieGenRMSNorm(dim, eps)
        self.attn2 = MovieGenAttention(dim, num_attention_heads, attention_head_dim, is_cross_attention=True)
        self.norm3 = MovieGenRMSNorm(dim, eps)
        self.ff = MovieGenFeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        temb: torch.Tensor,
        pos_embed: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, dim)`): The residual stream.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, text tokens, dim)`, *optional*): Projected text;
                without it there is no cross-attention.
            temb (`torch.Tensor` of shape `(batch, 6, dim)`): Shift, scale and gate of the self-attention, then of the
                feed-forward, as far as all blocks share them.
            pos_embed (`torch.Tensor` of shape `(1, tokens, dim)`): Added to the input.
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

        hidden_states = hidden_states + pos_embed

        # 1. Self-attention
        norm_hidden_states = torch.addcmul(shift_msa, self.norm1(hidden_states), 1 + scale_msa).to(dtype)
        attn_output = self.attn1(norm_hidden_states, attention_mask=attention_mask)
        hidden_states = torch.addcmul(hidden_states, attn_output, gate_msa).to(dtype)

        # 2. Cross-attention
        if encoder_hidden_states is not None:
            norm_hidden_states = self.norm2(hidden_states).to(dtype)
            hidden_states = hidden_states + self.attn2(
                norm_hidden_states, encoder_hidden_states, encoder_attention_mask
            )

        # 3. Feed-forward
        norm_hidden_states = torch.addcmul(shift_mlp, self.norm3(hidden_states), 1 + scale_mlp).to(dtype)
        return torch.addcmul(hidden_states, self.ff(norm_hidden_states), gate_mlp).to(dtype)


class MovieGenTransformer3DModel(
    ModelMixin, ConfigMixin, AttentionMixin, MovieGenSingleFileMixin, PeftAdapterMixin, CacheMixin
):
    r"""
    The backbone of Movie Gen Video: a LLaMa3-style transformer over patches of video latents with full attention,
    cross-attention to three text encoders, learned factorised positions added before every block, and modulation by
    the flow time. The defaults are the 30B model.

    The modulation is one projection of the time shared by all blocks plus a learned table in every block.
    The output projection and the shared time projection start at zero and the tables at a standard deviation of
    `dim ** -0.5`, so an untrained model predicts zero.

    Args:
        patch_size (`tuple[int, int, int]`, defaults to `(1, 2, 2)`):
            Size of a patch of latents in time, height and width.
        in_channels (`int`, defaults to 16):
            Channels of the input.
        out_channels (`int`, defaults to 16):
            Channels of the output.
        num_layers (`int`, defaults to 48):
            Number of transformer blocks.
        num_attention_heads (`int`, defaults to 48):
            Number of attention heads.
        attention_head_dim (`int`, defaults to 128):
            Width of a head; the width of the model is `num_attention_heads * attention_head_dim`.
        ffn_dim (`int`, defaults to 16384):
            Width inside the feed-forward network.
        freq_dim (`int`, defaults to 256):
            Number of sinusoidal features of the time.
        text_embed_dim (`int`, defaults to 4096):
            Width of the features of the first text encoder (UL2).
        text_embed_dim_2 (`int`, defaults to 1280):
            Width of the features of the second text encoder (MetaCLIP).
        text_embed_dim_3 (`int`, defaults to 1472):
            Width of the features of the third text encoder (ByT5).
        max_grid_size (`tuple[int, int, int]`, defaults to `(32, 96, 96)`):
            Entries of the position tables: patches in time, height and width. See [`expand_position_tables`].
        eps (`float`, defaults to 1e-5):
            Epsilon of all norms.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MovieGenTransformerBlock"]
    _repeated_blocks = ["MovieGenTransformerBlock"]
    _keep_in_fp32_modules = ["norm", "norm1", "norm2", "norm3", "norm_out", "scale_shift_table", "pos_embed"]
    _skip_layerwise_casting_patterns = ["patch_embed", "pos_embed", "time_embed", "time_modulation", "norm"]
    _cp_plan = {
        "pos_embed": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        in_channels: int = 16,
        out_channels: int = 16,
        num_layers: int = 48,
        num_attention_heads: int = 48,
        attention_head_dim: int = 128,
        ffn_dim: int = 16384,
        freq_dim: int = 256,
        text_embed_dim: int = 4096,
        text_embed_dim_2: int = 1280,
        text_embed_dim_3: int = 1472,
        max_grid_size: tuple[int, int, int] = (32, 96, 96),
        eps: float = 1e-5,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim

        # 1. Patches and their positions
        self.patch_embed = nn.Conv3d(in_channels, dim, kernel_size=tuple(patch_size), stride=tuple(patch_size))
        self.pos_embed = MovieGenPositionEmbedding(max_grid_size, dim)

        # 2. Time
        self.time_proj = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(freq_dim, dim)
        self.time_modulation = nn.Linear(dim, 6 * dim)

        # 3. Text
        self.text_proj = MovieGenTextProjection(text_embed_dim, dim, eps)
        self.text_proj_2 = MovieGenTextProjection(text_embed_dim_2, dim, eps)
        self.text_proj_3 = MovieGenTextProjection(text_embed_dim_3, dim, eps)

        # 4. Blocks
        self.transformer_blocks = nn.ModuleList(
            [
                MovieGenTransformerBlock(dim, ffn_dim, num_attention_heads, attention_head_dim, eps)
                for _ in range(num_layers)
            ]
        )

        # 5. Output
        self.norm_out = MovieGenRMSNorm(dim, eps)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, out_channels * math.prod(patch_size))

        for layer in (self.time_modulation, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

        self.gradient_checkpointing = False

    @torch.no_grad()
    def expand_position_tables(self, max_grid_size: tuple[int, int, int]) -> None:
        """
        Grow the position tables for larger inputs by linear interpolation that keeps the first and last entry of each
        table in place (Movie Gen expands its spatial tables so, from one training resolution to the next). Updates
        `config.max_grid_size`. The tables become new parameters: call this before creating an optimizer and before
        applying hooks such as offloading.

        Args:
            max_grid_size (`tuple[int, int, int]`): Wanted entries in time, height and width, in patches.

        Raises:
            `ValueError`: A table would shrink.
        """
        if any(new < old for new, old in zip(max_grid_size, self.config.max_grid_size, strict=True)):
            raise ValueError(
                f"`max_grid_size` {tuple(max_grid_size)} is smaller than the present "
                f"{tuple(self.config.max_grid_size)}; position tables only grow, and smaller inputs work as they are."
            )
        for name, size in zip(("temporal_table", "height_table", "width_table"), max_grid_size, strict=True):
            table = getattr(self.pos_embed, name)
            if size == table.shape[0]:
                continue
            expanded = F.interpolate(table.float().t()[None], size=size, mode="linear", align_corners=True)[0].t()
            expanded = expanded.to(table.dtype).contiguous()
            setattr(self.pos_embed, name, nn.Parameter(expanded, requires_grad=table.requires_grad))
        self.register_to_config(max_grid_size=tuple(max_grid_size))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_hidden_states_2: torch.Tensor | None = None,
        encoder_attention_mask_2: torch.Tensor | None = None,
        encoder_hidden_states_3: torch.Tensor | None = None,
        encoder_attention_mask_3: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        r"""
        Predict the velocity, in diffusers' direction from data to noise.

        Any text encoder may be left out, and all of them: the cross-attention then adds nothing. Padded text has no
        influence on the output.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, frames, height, width)`):
                Noisy latents. Their dtype is the dtype of the computation.
            timestep (`torch.Tensor` of shape `(batch,)`, float32):
                Flow time from 0 (data) to 1000 (noise), that is 1000 times sigma.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, tokens, text_embed_dim)`, *optional*):
                Features of the first text encoder (UL2).
            encoder_attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
                Boolean, true for real tokens and false for padding. `None` if nothing is padding.
            encoder_hidden_states_2 (`torch.Tensor` of shape `(batch, tokens, text_embed_dim_2)`, *optional*):
                Features of the second text encoder (MetaCLIP).
            encoder_attention_mask_2 (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
                Its mask.
            encoder_hidden_states_3 (`torch.Tensor` of shape `(batch, tokens, text_embed_dim_3)`, *optional*):
                Features of the third text encoder (ByT5).
            encoder_attention_mask_3 (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
                Its mask.
            attention_kwargs (`dict`, *optional*):
                `scale`: strength of the loaded LoRA adapters, a float.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`~diffusers.models.modeling_outputs.Transformer2DModelOutput`] instead of a tuple.

        Returns:
            [`~diffusers.models.modeling_outputs.Transformer2DModelOutput`] or `tuple`, with the sample of shape
            `(batch, out_channels, frames, height, width)`.

        Raises:
            `ValueError`: Frames, height or width are no multiple of the patch size or exceed the position tables, or
            a mask does not fit its text features.
        """
        dtype = hidden_states.dtype
        num_frames, height, width = hidden_states.shape[2:]
        patch_t, patch_h, patch_w = self.config.patch_size
        if num_frames % patch_t or height % patch_h or width % patch_w:
            raise ValueError(
                f"Latents of {num_frames} x {height} x {width} (frames x height x width) do not divide into patches "
                f"of {patch_t} x {patch_h} x {patch_w}; crop or pad them to multiples."
            )
        grid_size = (num_frames // patch_t, height // patch_h, width // patch_w)

        # 1. Patches and their positions
        num_tokens, num_padding = math.prod(grid_size), 0
        cp_config = getattr(self._parallel_config, "context_parallel_config", None)
        if cp_config is not None and cp_config.ring_degree == 1 and not cp_config.ulysses_anything:
            # Ulysses exchanges equal parts. Its mode for any length has neither a backward pass nor a CPU path.
            num_padding = -num_tokens % cp_config.ulysses_degree
        pos_embed = self.pos_embed(*grid_size, num_padding).to(dtype)
        # Casting back matters under autocast, where it keeps the residual stream in the dtype of the input.
        hidden_states = self.patch_embed(hidden_states).flatten(2).transpose(1, 2).to(dtype).contiguous()
        attention_mask = None
        if num_padding:
            hidden_states = F.pad(hidden_states, (0, 0, 0, num_padding))
            attention_mask = torch.arange(num_tokens + num_padding, device=hidden_states.device)[None] < num_tokens

        # 2. Time
        temb = self.time_embed(self.time_proj(timestep).to(dtype))
        block_temb = self.time_modulation(F.silu(temb)).unflatten(1, (6, -1))

        # 3. Text
        text_inputs = (
            ("", self.text_proj, encoder_hidden_states, encoder_attention_mask),
            ("_2", self.text_proj_2, encoder_hidden_states_2, encoder_attention_mask_2),
            ("_3", self.text_proj_3, encoder_hidden_states_3, encoder_attention_mask_3),
        )
        has_padding = any(mask is not None for *_, mask in text_inputs)
        texts, masks = [], []
        for suffix, projection, text, mask in text_inputs:
            if mask is not None and (text is None or mask.shape != text.shape[:2]):
                expected = "is None" if text is None else f"has (batch, tokens) of {tuple(text.shape[:2])}"
                raise ValueError(
                    f"`encoder_attention_mask{suffix}` has shape {tuple(mask.shape)} but "
                    f"`encoder_hidden_states{suffix}` {expected}; pass one mask value per text token."
                )
            if text is None:
                continue
            if mask is not None:
                # Padding may hold anything, NaN included, and a NaN that is only masked later still spoils gradients.
                mask = mask.bool()
                text = text.masked_fill(~mask[..., None], 0)
            elif has_padding:
                mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
            texts.append(projection(text))
            masks.append(mask)

        text = torch.cat(texts, dim=1) if texts else None
        text_mask = None
        if has_padding:
            # Softmax over no token at all is undefined. Such a row attends to all its padding instead, whose keys and
            # values are zero, as their projections have no bias: its cross-attention is exactly zero.
            text_mask = torch.cat(masks, dim=1)
            text = text.masked_fill(~text_mask[..., None], 0)
            text_mask = text_mask | ~text_mask.any(dim=1, keepdim=True)

        # 4. Blocks
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, text, block_temb, pos_embed, text_mask, attention_mask
                )
            else:
                hidden_states = block(hidden_states, text, block_temb, pos_embed, text_mask, attention_mask)

        # 5. Output
        shift, scale = (self.scale_shift_table.float() + temb.float().unsqueeze(1)).chunk(2, dim=1)
        hidden_states = torch.addcmul(shift, self.norm_out(hidden_states), 1 + scale).to(dtype)
        hidden_states = self.proj_out(hidden_states)[:, :num_tokens]
        # Inside a patch the order is (channels, time, height, width), that of the patch embedding's weight.
        hidden_states = hidden_states.unflatten(2, (-1, patch_t, patch_h, patch_w)).unflatten(1, grid_size)
        sample = hidden_states.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(
            hidden_states.shape[0], -1, num_frames, height, width
        )

        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)
