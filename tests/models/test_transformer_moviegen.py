import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import infer_auto_device_map, init_empty_weights
from diffusers import FirstBlockCacheConfig, LayerSkipConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import apply_group_offloading, apply_layer_skip
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.modeling_utils import get_parameter_dtype
from peft import LoraConfig

import diffusers_moviegen
from diffusers_moviegen import MovieGenTransformer3DModel
from diffusers_moviegen.models.transformer_moviegen import MovieGenTransformerBlock


CONFIGS = Path(diffusers_moviegen.__file__).parent / "configs"

HEADS = 2
CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_attention_heads": HEADS,
    "attention_head_dim": 8,
    "ffn_dim": 24,
    "freq_dim": 12,
    "text_embed_dim": 10,
    "text_embed_dim_2": 9,
    "text_embed_dim_3": 7,
    "max_grid_size": (3, 4, 5),
}
GRID = (2, 2, 3)  # patches of the latents below; all three differ from one another in what matters


def make_model(**overrides) -> MovieGenTransformer3DModel:
    """A small model without the zeros of the initialisation, which would hide most mistakes."""
    torch.manual_seed(0)
    model = MovieGenTransformer3DModel(**{**CONFIG, **overrides})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_weight = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if is_norm_weight else 0))
    return model.eval()


def make_inputs(dtype: torch.dtype = torch.float32, masks: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    inputs = {
        "hidden_states": randn(2, 4, 2, 4, 6),
        "timestep": torch.tensor([987.65, 12.5]),
        "encoder_hidden_states": randn(2, 5, 10),
        "encoder_hidden_states_2": randn(2, 4, 9),
        "encoder_hidden_states_3": randn(2, 3, 7),
    }
    if masks:
        # Left and right padding, one encoder without padding, one row of an encoder with nothing but padding.
        inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
        inputs["encoder_attention_mask_3"] = torch.tensor([[1, 0, 0], [0, 0, 0]]).bool()
    return inputs


@torch.no_grad()
def run(model: MovieGenTransformer3DModel, inputs: dict[str, torch.Tensor], **overrides) -> torch.Tensor:
    return model(**{**inputs, **overrides}).sample


@torch.no_grad()
def silence_blocks(model: MovieGenTransformer3DModel) -> None:
    """Make attention and feed-forward add nothing, which leaves patches and positions."""
    for block in model.transformer_blocks:
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.down_proj):
            layer.weight.zero_()


# A plain float64 recomputation, written without looking at a tensor library's layers.


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def attention(weights, prefix, x, context):
    """Softmax attention of one sample: x (tokens, dim), context (keys, dim)."""
    query = x @ weights[f"{prefix}.to_q.weight"].T
    key = context @ weights[f"{prefix}.to_k.weight"].T
    value = context @ weights[f"{prefix}.to_v.weight"].T
    heads = []
    for q, k, v in zip(*(np.split(y, HEADS, axis=-1) for y in (query, key, value)), strict=True):
        scores = np.exp(q @ k.T / math.sqrt(q.shape[-1]))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v)
    return np.concatenate(heads, axis=-1) @ weights[f"{prefix}.to_out.0.weight"].T


def reference_block(weights, prefix, x, text, temb, positions):
    """One sample through one block: x (tokens, dim), text (keys, dim) without padding, temb (6, dim)."""
    shift1, scale1, gate1, shift3, scale3, gate3 = weights[f"{prefix}scale_shift_table"] + temb
    x = x + positions
    normed = rms_norm(x, weights[f"{prefix}norm1.weight"]) * (1 + scale1) + shift1
    x = x + gate1 * attention(weights, f"{prefix}attn1", normed, normed)
    if len(text):
        x = x + attention(weights, f"{prefix}attn2", rms_norm(x, weights[f"{prefix}norm2.weight"]), text)
    normed = rms_norm(x, weights[f"{prefix}norm3.weight"]) * (1 + scale3) + shift3
    inner = silu(normed @ weights[f"{prefix}ff.gate_proj.weight"].T) * (
        normed @ weights[f"{prefix}ff.up_proj.weight"].T
    )
    return x + gate3 * (inner @ weights[f"{prefix}ff.down_proj.weight"].T)


def reference_model(model, inputs, sample):
    """One sample through the model, token by token where that is clearer."""
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    latents = inputs["hidden_states"][sample].double().numpy()

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    cells = [(t, h, w) for t in range(GRID[0]) for h in range(GRID[1]) for w in range(GRID[2])]
    kernel, bias = weights["patch_embed.weight"], weights["patch_embed.bias"]
    x = np.stack([(kernel[:, :, 0] * latents[:, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]).sum((1, 2, 3)) + bias
                  for t, h, w in cells])  # fmt: skip
    tables = [weights[f"pos_embed.{axis}_table"] for axis in ("temporal", "height", "width")]
    positions = np.stack([tables[0][t] + tables[1][h] + tables[2][w] for t, h, w in cells])

    frequencies = np.exp(-math.log(10000) * np.arange(6) / 6)
    angles = inputs["timestep"][sample].double().numpy() * frequencies
    temb = linear(np.concatenate([np.cos(angles), np.sin(angles)]), "time_embed.linear_1")
    temb = linear(silu(temb), "time_embed.linear_2")
    block_temb = linear(silu(temb), "time_modulation").reshape(6, -1)

    texts = []
    for suffix in ("", "_2", "_3"):
        text = inputs[f"encoder_hidden_states{suffix}"][sample]
        mask = inputs.get(f"encoder_attention_mask{suffix}")
        text = (text if mask is None else text[mask[sample]]).double().numpy()
        text = linear(text, f"text_proj{suffix}.linear")
        text = (text - text.mean(-1, keepdims=True)) / np.sqrt(text.var(-1, keepdims=True) + 1e-5)
        texts.append(text * weights[f"text_proj{suffix}.norm.weight"] + weights[f"text_proj{suffix}.norm.bias"])
    text = np.concatenate(texts)

    for index in range(model.config.num_layers):
        x = reference_block(weights, f"transformer_blocks.{index}.", x, text, block_temb, positions)

    shift, scale = weights["scale_shift_table"] + temb
    x = linear(rms_norm(x, weights["norm_out.weight"]) * (1 + scale) + shift, "proj_out")
    output = np.empty_like(latents)
    for token, (t, h, w) in zip(x, cells, strict=True):
        output[:, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2] = token.reshape(4, 2, 2)
    return output


def test_block_matches_float64_recomputation():
    model = make_model()
    block = model.transformer_blocks[1]
    torch.manual_seed(2)
    x, text, temb = torch.randn(2, 12, 16), torch.randn(2, 6, 16), torch.randn(2, 6, 16)
    positions = torch.randn(1, 12, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 0, 1]]).bool()
    with torch.no_grad():
        output = block(x, text, temb, positions, mask)

    weights = {name: tensor.double().numpy() for name, tensor in block.state_dict().items()}
    for sample in range(2):
        expected = reference_block(
            weights,
            "",
            x[sample].double().numpy(),
            text[sample][mask[sample]].double().numpy(),
            temb[sample].double().numpy(),
            positions[0].double().numpy(),
        )
        np.testing.assert_allclose(output[sample].numpy(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("masks", [True, False])
def test_model_matches_float64_recomputation(masks):
    model, inputs = make_model(), make_inputs(masks=masks)
    output = run(model, inputs)
    for sample in range(2):
        np.testing.assert_allclose(output[sample], reference_model(model, inputs, sample), atol=1e-4, rtol=1e-4)


def test_untrained_model_predicts_zero():
    torch.manual_seed(0)
    model = MovieGenTransformer3DModel(**CONFIG)
    assert run(model, make_inputs()).abs().max() == 0
    assert model.time_modulation.weight.abs().max() == 0
    assert model.transformer_blocks[0].scale_shift_table.std().item() == pytest.approx(0.25, rel=0.2)  # 16 ** -0.5
    assert model.pos_embed.width_table.std().item() == pytest.approx(0.02, rel=0.3)


def test_every_parameter_is_used():
    model = make_model()
    model(**make_inputs()).sample.square().mean().backward()
    # The grid of the input covers part of each position table; its other entries rightly stay without gradient.
    unused = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
    assert unused == []


# Tokens and positions


@torch.no_grad()
def test_patches_come_back_where_they_were():
    model = make_model()
    silence_blocks(model)
    for parameter in (*model.pos_embed.parameters(), *model.time_embed.parameters(), model.scale_shift_table):
        parameter.zero_()
    model.norm_out.weight.fill_(1)
    # 16 values a patch and a model 16 wide: both projections can be the identity.
    model.patch_embed.weight.copy_(torch.eye(16).reshape(16, 4, 1, 2, 2))
    model.proj_out.weight.copy_(torch.eye(16))
    model.patch_embed.bias.zero_()
    model.proj_out.bias.zero_()

    inputs = make_inputs()
    latents = inputs["hidden_states"]
    # All that is left is the final norm: each value divided by the root mean square of its patch.
    mean_square = torch.nn.functional.avg_pool2d(latents.square().mean(1), 2)
    mean_square = mean_square.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(run(model, inputs), latents / (mean_square + 1e-5).sqrt().unsqueeze(1))


@pytest.mark.parametrize("cell", [(0, 0, 0), (0, 1, 2), (1, 0, 1), (1, 1, 0)])
def test_one_token_moves_itself_and_through_attention_all_others(cell):
    t, h, w = cell
    inputs = make_inputs()
    latents = inputs["hidden_states"].clone()
    latents[0, 2, t, 2 * h + 1, 2 * w] += 1
    patch = torch.zeros(2, 4, 2, 4, 6, dtype=torch.bool)
    patch[0, :, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2] = True

    model = make_model()
    moved = run(model, inputs, hidden_states=latents) != run(model, inputs)
    assert moved[0].flatten(2).any(-1).all() and not moved[1].any()
    assert moved[0].float().mean() > 0.9  # every frame, row and column, later and earlier ones

    silence_blocks(model)
    moved = run(model, inputs, hidden_states=latents) != run(model, inputs)
    assert moved[patch].all() and not moved[~patch].any()


def test_positions_follow_the_tokens_and_enter_every_block():
    model, inputs = make_model(), make_inputs()
    positions = model.pos_embed(*GRID)
    token = 0
    for t in range(GRID[0]):
        for h in range(GRID[1]):
            for w in range(GRID[2]):
                tables = model.pos_embed
                expected = tables.temporal_table[t] + tables.height_table[h] + tables.width_table[w]
                torch.testing.assert_close(positions[0, token], expected)
                token += 1
    assert positions.shape == (1, token, 16)

    silence_blocks(model)
    streams = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda module, args, output: streams.append(output))
    run(model, inputs)
    patches = model.patch_embed(inputs["hidden_states"]).flatten(2).transpose(1, 2)
    for index, stream in enumerate(streams, start=1):
        torch.testing.assert_close(stream, patches + index * positions)


def test_expand_position_tables(tmp_path):
    model = make_model()
    before = {name: table.clone() for name, table in model.pos_embed.named_parameters()}
    model.expand_position_tables((3, 7, 8))
    after = dict(model.pos_embed.named_parameters())

    assert torch.equal(after["temporal_table"], before["temporal_table"])
    # 4 entries become 7: the old ones lie at every other place, the new ones halfway between.
    torch.testing.assert_close(after["height_table"][::2], before["height_table"])
    halfway = (before["height_table"][:-1] + before["height_table"][1:]) / 2
    torch.testing.assert_close(after["height_table"][1::2], halfway)
    grid = np.linspace(0, 4, 8)
    for channel in range(16):
        expected = np.interp(grid, np.arange(5), before["width_table"][:, channel].detach().numpy())
        np.testing.assert_allclose(after["width_table"][:, channel].detach().numpy(), expected, atol=1e-6)

    latents = torch.randn(1, 4, 3, 14, 16)
    output = run(model, {"hidden_states": latents, "timestep": torch.tensor([500.0])})
    assert output.shape == latents.shape
    model.save_pretrained(tmp_path)
    loaded = MovieGenTransformer3DModel.from_pretrained(tmp_path)
    assert tuple(loaded.config.max_grid_size) == (3, 7, 8)
    assert torch.equal(run(loaded, {"hidden_states": latents, "timestep": torch.tensor([500.0])}), output)
    assert all(parameter.requires_grad for parameter in model.pos_embed.parameters())

    with pytest.raises(ValueError, match=r"\(3, 6, 8\) is smaller than the present \(3, 7, 8\)"):
        model.expand_position_tables((3, 6, 8))


def test_expanding_a_table_of_one_entry_repeats_it():
    model = make_model(max_grid_size=(1, 4, 5))
    model.expand_position_tables((4, 4, 5))
    assert torch.equal(model.pos_embed.temporal_table, model.pos_embed.temporal_table[:1].expand(4, -1))


# Text


def test_padded_text_has_no_influence():
    model, inputs = make_model(), make_inputs()
    expected = run(model, inputs)
    for suffix in ("", "_3"):
        padding = ~inputs[f"encoder_attention_mask{suffix}"]
        for garbage in (1e4, float("inf"), float("nan")):
            text = inputs[f"encoder_hidden_states{suffix}"].clone()
            text[padding] = garbage
            assert torch.equal(run(model, inputs, **{f"encoder_hidden_states{suffix}": text}), expected)


def test_padding_is_a_matter_of_keys_not_queries():
    # As many samples as tokens and as many text tokens: a mask over the wrong axis would fit.
    model = make_model(num_layers=1, max_grid_size=(1, 2, 2))
    torch.manual_seed(3)
    latents, text, timestep = torch.randn(4, 4, 1, 4, 4), torch.randn(4, 4, 10), torch.full((4,), 300.0)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 0]]).bool()
    output = run(model, {}, hidden_states=latents, timestep=timestep, encoder_hidden_states=text,
                 encoder_attention_mask=mask)  # fmt: skip
    for i in range(4):
        alone = run(model, {}, hidden_states=latents[i : i + 1], timestep=timestep[:1],
                    encoder_hidden_states=text[i : i + 1, mask[i]])  # fmt: skip
        torch.testing.assert_close(output[i : i + 1], alone, atol=1e-5, rtol=1e-5)
        for token in range(4):
            changed = text.clone()
            changed[i, token] += 1
            moved = run(model, {}, hidden_states=latents, timestep=timestep, encoder_hidden_states=changed,
                        encoder_attention_mask=mask) != output  # fmt: skip
            assert moved[i].any() == mask[i, token] and not moved[torch.arange(4) != i].any()


def test_a_row_of_padding_alone_is_a_row_without_text():
    model, inputs = make_model(), make_inputs()
    without_text = {name: inputs[name] for name in ("hidden_states", "timestep")}
    masks = {
        "encoder_attention_mask": torch.tensor([[1] * 5, [0] * 5]).bool(),
        "encoder_attention_mask_2": torch.tensor([[1] * 4, [0] * 4]).bool(),
        "encoder_attention_mask_3": torch.tensor([[1] * 3, [0] * 3]).bool(),
    }
    inputs["encoder_hidden_states_2"][1] = float("nan")
    block_masks = []
    hook = model.transformer_blocks[0].register_forward_pre_hook(lambda module, args: block_masks.append(args[4]))
    output = model(**{**inputs, **masks}).sample
    hook.remove()
    # Not every attention kernel survives a row without any key.
    assert block_masks[0].any(dim=1).all()
    torch.testing.assert_close(output[1], run(model, without_text)[1])
    torch.testing.assert_close(output[0], run(model, make_inputs(masks=False))[0])

    output.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_any_text_encoder_may_be_absent():
    model, inputs = make_model(), make_inputs()
    full = run(model, inputs)
    for suffix in ("", "_2", "_3"):
        dropped = {f"encoder_hidden_states{suffix}": None, f"encoder_attention_mask{suffix}": None}
        masked = {f"encoder_attention_mask{suffix}": torch.zeros(inputs[f"encoder_hidden_states{suffix}"].shape[:2])}
        output = run(model, inputs, **dropped)
        assert not torch.allclose(output, full)
        torch.testing.assert_close(output, run(model, inputs, **masked), atol=1e-5, rtol=1e-5)

    without_text = {name: inputs[name] for name in ("hidden_states", "timestep")}
    output = run(model, without_text)
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn2.to_out[0].weight.zero_()
    torch.testing.assert_close(output, run(model, inputs))


def test_attention_backends_agree():
    model, inputs = make_model(), make_inputs()
    expected = run(model, inputs)
    for backend in ("_native_math", "flex"):
        with attention_backend(backend):
            torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 2, 5, 6), "2 x 5 x 6 .* do not divide into patches of 1 x 2 x 2"),
        ((2, 4, 2, 4, 7), "2 x 4 x 7 .* do not divide into patches of 1 x 2 x 2"),
        ((2, 4, 4, 4, 6), "4 x 2 x 3 patches .* exceeds the position tables of 3 x 4 x 5"),
        ((2, 4, 2, 10, 6), "2 x 5 x 3 patches .* exceeds the position tables of 3 x 4 x 5"),
        ((2, 4, 2, 4, 12), "2 x 2 x 6 patches .* exceeds the position tables of 3 x 4 x 5"),
    ],
)
def test_latents_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        run(make_model(), make_inputs(), hidden_states=torch.zeros(shape))


def test_masks_that_do_not_fit_are_refused():
    model, inputs = make_model(), make_inputs()
    with pytest.raises(ValueError, match="`encoder_attention_mask_2` has shape .2, 5. .* of .2, 4."):
        run(model, inputs, encoder_attention_mask_2=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="`encoder_hidden_states` is None"):
        run(model, inputs, encoder_hidden_states=None)


# What the class promises


def test_saving_and_loading_give_the_same_model(tmp_path):
    model, inputs = make_model(), make_inputs()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = MovieGenTransformer3DModel.from_pretrained(tmp_path)
    assert dict(loaded.config)["num_layers"] == 3
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    assert torch.equal(loaded(**inputs, return_dict=False)[0], loaded(**inputs).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    model = make_model()
    expected = run(model, make_inputs())
    model.save_pretrained(tmp_path)
    loaded = MovieGenTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    kept = ("norm", "scale_shift_table", "pos_embed")
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if any(part in name for part in kept) else dtype), name
    assert loaded.dtype == get_parameter_dtype(loaded) == dtype

    for candidate in (loaded, make_model().to(dtype)):  # with float32 norms and tables, and with everything cast
        output = run(candidate, make_inputs(dtype))
        assert output.dtype == dtype
        error = (output.float() - expected).norm() / expected.norm()
        assert error < (0.03 if dtype == torch.bfloat16 else 0.005)


def test_autocast_keeps_the_residual_stream_in_the_dtype_of_the_latents():
    model, inputs = make_model(), make_inputs()
    expected = run(model, inputs)
    dtypes = set()
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda module, args, output: dtypes.update((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, inputs)
    assert dtypes == {torch.float32}
    assert (output.float() - expected).norm() / expected.norm() < 0.03


def test_time_features_stay_float32_in_a_bfloat16_model():
    model, inputs = make_model().to(torch.bfloat16), make_inputs(torch.bfloat16)
    features = []
    model.time_proj.register_forward_hook(lambda module, args, output: features.append(output))
    # bfloat16 holds no number between 984 and 988.
    outputs = [run(model, inputs, timestep=torch.full((2,), timestep)) for timestep in (986.9, 986.0)]
    assert not torch.equal(*outputs)
    angles = 986.9 * np.exp(-math.log(10000) * np.arange(6) / 6)
    np.testing.assert_allclose(features[0][0].numpy(), np.concatenate([np.cos(angles), np.sin(angles)]), atol=1e-4)


def test_gradient_checkpointing_recomputes_blocks_and_keeps_gradients():
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        count = [0]
        for block in model.transformer_blocks:
            block.norm1.register_forward_hook(lambda *args, count=count: count.__setitem__(0, count[0] + 1))
        model(**make_inputs()).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        calls.append(count[0])
    assert calls == [3, 6]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_no_split_modules_keeps_blocks_whole():
    model = make_model()
    block_bytes = sum(p.numel() * 4 for p in model.transformer_blocks[0].parameters())
    memory = {0: int(block_bytes * 3.5), "cpu": 10**9}

    def split_blocks(no_split):
        device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=no_split)
        assert len(set(device_map.values())) == 2
        return [name for name in device_map if name.startswith("transformer_blocks.") and name.count(".") > 1]

    assert split_blocks([]) != []
    assert split_blocks(MovieGenTransformer3DModel._no_split_modules) == []


def test_layerwise_casting_stores_low_and_computes_high():
    model, inputs = make_model(), make_inputs()
    rounded = make_model()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)

    low = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    expected = {f"text_proj{suffix}.linear.{kind}" for suffix in ("", "_2", "_3") for kind in ("weight", "bias")}
    for index in range(3):
        for layer in (*(f"attn{n}.{p}" for n in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")),
                      "ff.gate_proj", "ff.up_proj", "ff.down_proj"):  # fmt: skip
            expected.add(f"transformer_blocks.{index}.{layer}.weight")
    assert low == expected

    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if name in low:
                parameter.copy_(parameter.bfloat16())
    assert torch.equal(run(model, inputs), run(rounded, inputs))


def test_layerwise_casting_to_float8():
    model, inputs = make_model().to(torch.bfloat16), make_inputs(torch.bfloat16)
    expected = run(model, inputs).float()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert (run(model, inputs).float() - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize(
    "options", [{"offload_type": "block_level", "num_blocks_per_group": 2}, {"offload_type": "leaf_level"}]
)
def test_group_offloading_gives_identical_output(options):
    model, inputs = make_model(), make_inputs()
    expected = run(model, inputs)
    apply_group_offloading(model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **options)
    assert torch.equal(run(model, inputs), expected)


def test_repeated_blocks_compile_without_graph_breaks():
    model, inputs = make_model(), make_inputs()
    expected = run(model, inputs)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)
    torch.testing.assert_close(run(model, inputs), expected)
    without_masks = make_inputs(masks=False)
    torch.testing.assert_close(run(model, without_masks), run(make_model(), without_masks))


def test_context_parallel_plan_splits_what_it_must():
    # Every rank's part is computed in turn. Self-attention is the one operation across tokens and is switched off
    # here; its exchange between ranks belongs to diffusers' dispatcher.
    model, inputs = make_model(), make_inputs()
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn1.to_out[0].weight.zero_()
    expected = []
    handle = model.proj_out.register_forward_hook(lambda module, args, output: expected.append(output))
    run(model, inputs)
    handle.remove()

    plan = MovieGenTransformer3DModel._cp_plan
    positions, blocks, gather = plan["pos_embed"][0], plan["transformer_blocks.0"]["hidden_states"], plan["proj_out"]
    assert positions.split_output and not blocks.split_output

    parts = []
    for rank in range(2):

        def split(tensor, spec, rank=rank):
            assert tensor.ndim == spec.expected_dims
            return tensor.chunk(2, dim=spec.split_dim)[rank]

        def keep_part(module, args, output):
            parts.append(output)
            return torch.cat([output, output], dim=gather.gather_dim)

        handles = [
            model.get_submodule("pos_embed").register_forward_hook(lambda m, args, out, s=split: s(out, positions)),
            model.get_submodule("transformer_blocks.0").register_forward_pre_hook(
                lambda m, args, s=split: (s(args[0], blocks), *args[1:])
            ),
            model.get_submodule("proj_out").register_forward_hook(keep_part),
        ]
        run(model, inputs)
        for handle in handles:
            handle.remove()
    assert parts[0].ndim == gather.expected_dims and parts[0].shape[1] == math.prod(GRID) // 2
    torch.testing.assert_close(torch.cat(parts, dim=gather.gather_dim), expected[0])


def count_feed_forwards(model: MovieGenTransformer3DModel) -> list[int]:
    """Indices of the blocks whose feed-forward ran, in order, filled in as the model runs."""
    ran = []
    for index, block in enumerate(model.transformer_blocks):
        block.ff.register_forward_hook(lambda module, args, output, index=index: ran.append(index))
    return ran


def test_first_block_cache_skips_blocks():
    model, inputs = make_model(num_layers=4), make_inputs()
    ran = count_feed_forwards(model)
    expected = run(model, inputs)
    ran.clear()

    model.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    nearby = inputs["hidden_states"] + 1e-3
    with model.cache_context("cond"):
        torch.testing.assert_close(run(model, inputs), expected)
        assert ran == [0, 1, 2, 3]
        ran.clear()
        cached = run(model, inputs, hidden_states=nearby)
        assert ran == [0]
        ran.clear()
        run(model, inputs, hidden_states=-inputs["hidden_states"])
        assert ran == [0, 1, 2, 3]
    ran.clear()
    with model.cache_context("uncond"):
        run(model, inputs, hidden_states=nearby)
    assert ran == [0, 1, 2, 3]  # contexts do not see one another

    model.disable_cache()
    exact = run(model, inputs, hidden_states=nearby)
    assert not torch.equal(cached, exact)
    assert (cached - exact).norm() / exact.norm() < 0.02


def test_no_attention_is_called_self_attn():
    # accelerate's context parallelism takes the mask away from modules of this name.
    assert not [name for name, _ in make_model().named_modules() if name.endswith("self_attn")]


def test_pyramid_attention_broadcast_skips_attention():
    model, inputs = make_model(), make_inputs()
    calls = {"attn1": 0, "attn2": 0}
    for block in model.transformer_blocks:
        for name in calls:
            getattr(block, name).to_q.register_forward_hook(
                lambda *args, name=name: calls.__setitem__(name, calls[name] + 1)
            )
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=4,
            spatial_attention_timestep_skip_range=(-1, 1001),
            cross_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: 500,
        )
    )
    for _ in range(4):
        run(model, inputs)
    assert calls == {"attn1": 3 * 2, "attn2": 3 * 1}


def test_taylorseer_cache_predicts_attention():
    model, inputs = make_model(), make_inputs()
    ran = []
    for name in ("attn1", "attn2"):
        attention = getattr(model.transformer_blocks[0], name)
        attention.to_q.register_forward_hook(lambda *args, name=name: ran.append(name))
    model.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=3,
            disable_cache_before_step=2,
            taylor_factors_dtype=torch.float32,
            # The patterns it defaults to know only attentions called `attn`.
            cache_identifiers=[r"transformer_blocks\.\d+\.attn[12]"],
        )
    )
    with model.cache_context("cond"):
        outputs = [run(model, inputs) for _ in range(6)]
    # The first two steps and every third one after the next are computed, the others predicted.
    assert ran == ["attn1", "attn2"] * 3
    torch.testing.assert_close(outputs[-1], outputs[0], atol=1e-4, rtol=1e-4)


def test_layer_skip():
    inputs = make_inputs()
    model, shorter = make_model(), make_model()
    del shorter.transformer_blocks[1]
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="transformer_blocks"))
    assert torch.equal(run(model, inputs), run(shorter, inputs))

    # Skipping the attention alone passes its input through.
    model = make_model()
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="transformer_blocks", skip_ff=False))
    passed = {}
    block = model.transformer_blocks[1]
    block.attn1.register_forward_hook(lambda module, args, output: passed.update(through=(args[0], output)))
    run(model, inputs)
    assert torch.equal(*passed["through"])


def test_fused_projections_change_nothing():
    model, inputs = make_model(), make_inputs()
    expected = run(model, inputs)
    model.fuse_qkv_projections()
    calls = []
    for block in model.transformer_blocks:
        block.attn1.to_qkv.register_forward_hook(lambda *args: calls.append(1))
        block.attn2.to_kv.register_forward_hook(lambda *args: calls.append(2))
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert calls == [1, 2] * 3
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), expected)


def test_lora():
    model, inputs = make_model(), make_inputs()
    expected = run(model, inputs)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "down_proj"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    layers = {name.rsplit(".lora_A", 1)[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(layers) == 3 * 11

    adapted = run(model, inputs)
    assert (adapted - expected).norm() / expected.norm() > 0.01
    half = run(model, inputs, attention_kwargs={"scale": 0.5})
    assert not torch.allclose(half, adapted) and not torch.allclose(half, expected)
    torch.testing.assert_close(run(model, inputs, attention_kwargs={"scale": 0.0}), expected)
    assert torch.equal(run(model, inputs), adapted)  # the scale does not outlive its call
    model.disable_adapters()
    assert torch.equal(run(model, inputs), expected)
    model.delete_adapters("default")
    assert {type(block) for block in model.transformer_blocks} == {MovieGenTransformerBlock}
    assert torch.equal(run(model, inputs), expected)


# Presets


@pytest.mark.parametrize(("preset", "low", "high"), [("1b", 0.88, 1.05), ("5b", 4.8, 5.05), ("30b", 28.9, 30.2)])
def test_preset_parameter_counts(preset, low, high):
    config = MovieGenTransformer3DModel.load_config(CONFIGS / f"transformer_{preset}")
    with init_empty_weights():
        model = MovieGenTransformer3DModel.from_config(config)
    assert low <= sum(parameter.numel() for parameter in model.parameters()) / 1e9 <= high


def test_constructor_defaults_are_the_30b_preset():
    preset = MovieGenTransformer3DModel.load_config(CONFIGS / "transformer_30b")
    with init_empty_weights():
        model = MovieGenTransformer3DModel()
    defaults = {name: list(v) if isinstance(v, tuple) else v for name, v in model.config.items()}
    assert {k: v for k, v in defaults.items() if not k.startswith("_")} == {
        k: v for k, v in preset.items() if not k.startswith("_")
    }
