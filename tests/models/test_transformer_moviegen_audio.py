import math
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import infer_auto_device_map, init_empty_weights
from diffusers import (
    ContextParallelConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    ParallelConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_group_offloading, apply_layer_skip
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.modeling_utils import get_parameter_dtype
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import diffusers_moviegen
from diffusers_moviegen import MovieGenAudioTransformer1DModel
from diffusers_moviegen.models.transformer_moviegen_audio import MovieGenAudioTransformerBlock
from tests.processes import run_processes


PRESET = Path(diffusers_moviegen.__file__).parent / "configs" / "audio_transformer_13b"

HEADS = 2
CONFIG = {
    "in_channels": 3,
    "out_channels": 4,
    "num_layers": 3,
    "num_attention_heads": HEADS,
    "attention_head_dim": 8,
    "ffn_dim": 24,
    "freq_dim": 12,
    "text_embed_dim": 10,
    "video_embed_dim": 9,
}
DIM, LATENTS, TOKENS = 16, 7, 5
PROCESSES = 2
TIMEOUT = 600  # in seconds; on a busy machine importing alone takes minutes


def make_model(**overrides) -> MovieGenAudioTransformer1DModel:
    """A small model without the zeros of the initialisation, which would hide most mistakes."""
    torch.manual_seed(0)
    model = MovieGenAudioTransformer1DModel(**{**CONFIG, **overrides})
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
        "hidden_states": randn(2, 3, LATENTS),
        "timestep": torch.tensor([987.65, 12.5]),
        "encoder_hidden_states": randn(2, TOKENS, 10),
        "video_hidden_states": randn(2, LATENTS, 9),
    }
    if masks:
        inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 0, 1]]).bool()
        inputs["video_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1, 1]]).bool()
        inputs["audio_context"] = randn(2, 3, LATENTS)
        inputs["audio_context_mask"] = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1, 1]]).bool()
    return inputs


@torch.no_grad()
def run(model: MovieGenAudioTransformer1DModel, inputs: dict[str, torch.Tensor], **overrides) -> torch.Tensor:
    return model(**{**inputs, **overrides}).sample


def without(inputs: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if name not in names}


@torch.no_grad()
def silence_blocks(model: MovieGenAudioTransformer1DModel) -> None:
    """Make attention and feed-forward add nothing."""
    for block in model.transformer_blocks:
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
            layer.weight.zero_()
            layer.bias.zero_()


# A plain float64 recomputation, written without looking at a tensor library's layers.


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def rotate(x):
    """Turn every pair of values of x (tokens, head dim) by an angle in proportion to the position."""
    pairs = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(
        1j * np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, x.shape[1], 2) / x.shape[1])
    )
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def attention(weights, prefix, x, context, rotary=False):
    """Softmax attention of one sample: x (tokens, dim), context (keys, dim)."""
    query, key, value = (
        linear(weights, f"{prefix}.to_{letter}", y) for letter, y in (("q", x), ("k", context), ("v", context))
    )
    heads = []
    for q, k, v in zip(*(np.split(y, HEADS, axis=-1) for y in (query, key, value)), strict=True):
        q, k = (rotate(q), rotate(k)) if rotary else (q, k)
        scores = np.exp(q @ k.T / math.sqrt(q.shape[-1]))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v)
    return linear(weights, f"{prefix}.to_out.0", np.concatenate(heads, axis=-1))


def reference_block(weights, prefix, x, text, temb):
    """One sample through one block: x (tokens, dim), text (keys, dim) without padding, temb (6, dim)."""
    shift1, scale1, gate1, shift3, scale3, gate3 = weights[f"{prefix}scale_shift_table"] + temb
    normed = layer_norm(x) * (1 + scale1) + shift1
    x = x + gate1 * attention(weights, f"{prefix}attn1", normed, normed, rotary=True)
    normed = layer_norm(x) * weights[f"{prefix}norm2.weight"] + weights[f"{prefix}norm2.bias"]
    x = x + attention(weights, f"{prefix}attn2", normed, text)
    normed = layer_norm(x) * (1 + scale3) + shift3
    return x + gate3 * linear(weights, f"{prefix}ff.net.2", gelu(linear(weights, f"{prefix}ff.net.0.proj", normed)))


def reference_model(model, inputs, sample):
    """One sample through the model, token by token where that is clearer."""
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    values = {name: tensor[sample].double().numpy() for name, tensor in inputs.items()}

    def project(name, x):
        return linear(weights, f"{name}.linear_2", gelu(linear(weights, f"{name}.linear_1", x)))

    tokens = []
    for i in range(values["hidden_states"].shape[1]):
        given = values["audio_context_mask"][i] if "audio_context" in values else 0
        context = values["audio_context"][:, i] if given else np.zeros(3)
        x = linear(weights, "proj_in", np.concatenate([values["hidden_states"][:, i], context, [given]]))
        known = "video_hidden_states" in values and ("video_mask" not in values or values["video_mask"][i])
        tokens.append(x + (project("video_proj", values["video_hidden_states"][i]) if known
                           else weights["null_video"][0]))  # fmt: skip
    x = np.stack(tokens)
    angles = np.outer(np.arange(len(x)), 10000.0 ** (-np.arange(DIM // 2) / (DIM // 2)))
    x = x + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    text = [weights["null_text"][0]]
    for i in range(len(values.get("encoder_hidden_states", []))):
        if "encoder_attention_mask" not in values or values["encoder_attention_mask"][i]:
            text.append(project("text_proj", values["encoder_hidden_states"][i]))
    text = np.stack(text)

    frequencies = np.exp(-math.log(10000) * np.arange(6) / 6)
    angles = values["timestep"] * frequencies
    temb = linear(weights, "time_embed.linear_1", np.concatenate([np.cos(angles), np.sin(angles)]))
    temb = linear(weights, "time_embed.linear_2", silu(temb))
    block_temb = linear(weights, "time_modulation", silu(temb)).reshape(6, -1)

    for index in range(model.config.num_layers):
        x = reference_block(weights, f"transformer_blocks.{index}.", x, text, block_temb)

    shift, scale = weights["scale_shift_table"] + temb
    return linear(weights, "proj_out", layer_norm(x) * (1 + scale) + shift).T


CONDITIONS = {
    "all": (),
    "no text": ("encoder_hidden_states", "encoder_attention_mask"),
    "no video": ("video_hidden_states", "video_mask"),
    "no sound": ("audio_context", "audio_context_mask"),
    "no masks": ("encoder_attention_mask", "video_mask", "audio_context", "audio_context_mask"),
    "none": ("encoder_hidden_states", "encoder_attention_mask", "video_hidden_states", "video_mask", "audio_context",
             "audio_context_mask"),
}  # fmt: skip


@pytest.mark.parametrize("conditions", CONDITIONS)
def test_model_matches_float64_recomputation(conditions):
    model, inputs = make_model(), without(make_inputs(), *CONDITIONS[conditions])
    output = run(model, inputs)
    assert output.shape == (2, 4, LATENTS)
    for sample in range(2):
        np.testing.assert_allclose(output[sample], reference_model(model, inputs, sample), atol=1e-4, rtol=1e-4)


def test_prediction_of_the_data_becomes_a_velocity():
    """On the straight path from data to noise, whose velocity is known; near its end it is damped, but finite."""
    model, inputs = make_model(out_channels=3), make_inputs()
    for sigma in (1.0, 0.4, 0.05, 0.01):
        inputs["timestep"] = torch.full((2,), 1000 * sigma)
        model.register_to_config(prediction_type="velocity")
        data = run(model, inputs)
        model.register_to_config(prediction_type="sample")
        velocity = run(model, inputs)
        expected = (inputs["hidden_states"] - data) / max(sigma, 0.05)
        torch.testing.assert_close(velocity, expected)
    with pytest.raises(ValueError, match="`prediction_type` is 'epsilon'; pass 'velocity' or 'sample'"):
        make_model(prediction_type="epsilon")
    with pytest.raises(ValueError, match="`in_channels` 3 and `out_channels` 4 differ"):
        make_model(prediction_type="sample")


def test_untrained_model_predicts_zero():
    torch.manual_seed(0)
    model = MovieGenAudioTransformer1DModel(**CONFIG)
    assert run(model, make_inputs()).abs().max() == 0
    assert model.time_modulation.weight.abs().max() == 0
    assert model.transformer_blocks[0].scale_shift_table.std().item() == pytest.approx(0.25, rel=0.2)  # 16 ** -0.5


def test_every_parameter_is_used():
    model = make_model()
    model(**make_inputs()).sample.square().mean().backward()
    # A bias of keys moves all scores of a softmax equally, which changes nothing. Turned by its position, it does.
    unused = [name for name, p in model.named_parameters() if not p.grad.abs().max() > 1e-5]
    assert unused == [f"transformer_blocks.{index}.attn2.to_k.bias" for index in range(3)]


# Tokens and positions


def test_one_latent_moves_itself_and_through_attention_all_others():
    inputs = make_inputs()
    latents = inputs["hidden_states"].clone()
    latents[0, 1, 4] += 1
    model = make_model()
    moved = run(model, inputs, hidden_states=latents) != run(model, inputs)
    assert moved[0].all() and not moved[1].any()
    silence_blocks(model)
    moved = run(model, inputs, hidden_states=latents) != run(model, inputs)
    assert moved[0, :, 4].all() and moved.sum() == 4


def test_rotary_positions_say_distances_and_have_no_end():
    model = make_model()
    cos, sin = model.rope(3000, torch.device("cpu"))
    assert cos.shape == sin.shape == (3000, 8) and cos.dtype == sin.dtype == torch.float32

    # What a latent sees of another depends on their distance, not on their place.
    attn = model.transformer_blocks[0].attn1
    torch.manual_seed(4)
    stream = torch.randn(1, 6, DIM)
    with torch.no_grad():
        expected = attn(stream, rotary_emb=(cos[:6], sin[:6]))
        shifted = attn(stream, rotary_emb=(cos[1000:1006], sin[1000:1006]))
        spread = attn(stream, rotary_emb=(cos[:12:2], sin[:12:2]))
    torch.testing.assert_close(shifted, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(spread, expected, atol=1e-2)


def test_equal_latents_differ_by_their_place():
    model = make_model()
    output = run(model, {"hidden_states": torch.ones(1, 3, 2000), "timestep": torch.tensor([300.0])})
    assert output.isfinite().all()
    # Without attention only what is added to a latent tells it from the others.
    silence_blocks(model)
    alone = run(model, {"hidden_states": torch.ones(1, 3, 50), "timestep": torch.tensor([300.0])})[0]
    distances = (alone[:, :, None] - alone[:, None]).abs().amax(0) + torch.eye(50)
    assert distances.min() > 1e-3
    # No matter how many follow.
    longer = run(model, {"hidden_states": torch.ones(1, 3, 60), "timestep": torch.tensor([300.0])})[0]
    torch.testing.assert_close(longer[:, :50], alone)


# Conditions


@pytest.mark.parametrize("garbage", [1e4, float("inf"), float("nan")])
def test_what_masks_rule_out_has_no_influence(garbage):
    model, inputs = make_model(), make_inputs()
    spoiled = {name: value.clone() for name, value in inputs.items()}
    spoiled["encoder_hidden_states"][~inputs["encoder_attention_mask"]] = garbage
    spoiled["video_hidden_states"][~inputs["video_mask"]] = garbage
    spoiled["audio_context"].transpose(1, 2)[~inputs["audio_context_mask"]] = garbage
    output = model(**spoiled).sample
    assert torch.equal(output, run(model, inputs))
    output.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("condition", ["no text", "no video", "no sound", "none"])
def test_masks_that_are_false_in_a_sample_drop_the_condition_there(condition):
    model, inputs = make_model(), make_inputs()
    masked = {name: value.clone() for name, value in inputs.items()}
    for name in CONDITIONS[condition]:
        if name.endswith("mask"):
            masked[name][1] = False
    output = run(model, masked)
    torch.testing.assert_close(output[0], run(model, inputs)[0])
    torch.testing.assert_close(output[1], run(model, without(inputs, *CONDITIONS[condition]))[1])
    assert not torch.allclose(output[1], run(model, inputs)[1])


def test_masks_of_any_dtype():
    model, inputs = make_model(), make_inputs()
    integers = {name: value.long() if name.endswith("mask") else value for name, value in inputs.items()}
    assert torch.equal(run(model, integers), run(model, inputs))


def test_padding_of_text_is_a_matter_of_keys_not_queries():
    # As many samples as latents and as many text tokens: a mask over the wrong axis would fit.
    model = make_model(num_layers=1)
    torch.manual_seed(3)
    latents, text, timestep = torch.randn(4, 3, 5), torch.randn(4, 4, 10), torch.full((4,), 300.0)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 0]]).bool()
    inputs = {"hidden_states": latents, "timestep": timestep, "encoder_attention_mask": mask}
    output = run(model, inputs, encoder_hidden_states=text)
    for i in range(4):
        alone = run(model, {}, hidden_states=latents[i : i + 1], timestep=timestep[:1],
                    encoder_hidden_states=text[i : i + 1, mask[i]])  # fmt: skip
        torch.testing.assert_close(output[i : i + 1], alone, atol=1e-5, rtol=1e-5)
        for token in range(4):
            changed = text.clone()
            changed[i, token] += 1
            moved = run(model, inputs, encoder_hidden_states=changed) != output
            assert moved[i].any() == mask[i, token] and not moved[torch.arange(4) != i].any()


@pytest.mark.parametrize("name", ["video_hidden_states", "audio_context"])
def test_video_and_sound_act_where_they_are(name):
    model, inputs = make_model(), make_inputs()
    silence_blocks(model)
    changed = inputs[name].clone()
    if name == "audio_context":
        changed[1, :, 1] += 1
        place = 1
    else:
        changed[1, 3] += 1
        place = 3
    moved = run(model, inputs, **{name: changed}) != run(model, inputs)
    assert moved[1, :, place].all() and moved.sum() == 4


def test_attention_backends_agree():
    model, inputs = make_model(), make_inputs()
    expected = run(model, inputs)
    with attention_backend("_native_math"):
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"encoder_attention_mask": torch.ones(2, 4)}, r"`encoder_attention_mask` has shape \(2, 4\) but `encoder_h"),
        ({"encoder_attention_mask": torch.ones(1, 5)}, r"`encoder_attention_mask` has shape \(1, 5\)"),
        ({"encoder_hidden_states": None}, "`encoder_attention_mask` is given but `encoder_hidden_states` is None"),
        ({"video_mask": torch.ones(2, 6)}, r"`video_mask` has shape \(2, 6\) but `video_hidden_states` has"),
        ({"video_hidden_states": None}, "`video_mask` is given but `video_hidden_states` is None"),
        ({"video_hidden_states": torch.ones(2, 8, 9)}, "there are 2 x 7 latents .* resample the features"),
        ({"audio_context_mask": torch.ones(2, 3)}, r"`audio_context_mask` has shape \(2, 3\)"),
        ({"audio_context_mask": None}, "comes without `audio_context_mask`"),
        ({"audio_context": None}, "`audio_context_mask` is given but `audio_context` is None"),
        ({"audio_context": torch.ones(2, 3, 6)}, r"`audio_context` has shape \(2, 3, 6\) but `hidden_states` has"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        run(make_model(), make_inputs(), **overrides)


def test_odd_head_widths_are_refused():
    with pytest.raises(ValueError, match="`attention_head_dim` 7 is odd"):
        make_model(attention_head_dim=7)


# What the class promises


def test_saving_and_loading_give_the_same_model(tmp_path):
    model, inputs = make_model(), make_inputs()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = MovieGenAudioTransformer1DModel.from_pretrained(tmp_path)
    assert dict(loaded.config)["num_layers"] == 3
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    assert torch.equal(loaded(**inputs, return_dict=False)[0], loaded(**inputs).sample)


def test_single_file(tmp_path):
    model, inputs = make_model(), make_inputs()
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    assert torch.equal(run(MovieGenAudioTransformer1DModel.from_single_file(file), inputs), run(model, inputs))
    half = MovieGenAudioTransformer1DModel.from_single_file(file, dtype=torch.bfloat16)
    assert half.proj_in.weight.dtype == torch.bfloat16 and half.scale_shift_table.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    model = make_model()
    expected = run(model, make_inputs())
    model.save_pretrained(tmp_path)
    loaded = MovieGenAudioTransformer1DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    for name, parameter in loaded.named_parameters():
        kept = any(part in name for part in ("norm", "scale_shift_table"))
        assert parameter.dtype == (torch.float32 if kept else dtype), name
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
    assert split_blocks(MovieGenAudioTransformer1DModel._no_split_modules) == []


def test_layerwise_casting_stores_low_and_computes_high():
    model, inputs = make_model(), make_inputs()
    rounded = make_model()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)

    low = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    layers = [f"{kind}_proj.linear_{n}" for kind in ("text", "video") for n in (1, 2)]
    for index in range(3):
        for layer in (*(f"attn{n}.{p}" for n in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0")),
                      "ff.net.0.proj", "ff.net.2"):  # fmt: skip
            layers.append(f"transformer_blocks.{index}.{layer}")
    assert low == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}

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


def count_feed_forwards(model: MovieGenAudioTransformer1DModel) -> list[int]:
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
        run(model, inputs, hidden_states=-3 * inputs["hidden_states"])
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
        attn = getattr(model.transformer_blocks[0], name)
        attn.to_q.register_forward_hook(lambda *args, name=name: ran.append(name))
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
    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    layers = {name.rsplit(".lora_A", 1)[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(layers) == 3 * 10

    adapted = run(model, inputs)
    assert (adapted - expected).norm() / expected.norm() > 0.01
    half = run(model, inputs, attention_kwargs={"scale": 0.5})
    assert not torch.allclose(half, adapted) and not torch.allclose(half, expected)
    torch.testing.assert_close(run(model, inputs, attention_kwargs={"scale": 0.0}), expected)
    assert torch.equal(run(model, inputs), adapted)  # the scale does not outlive its call
    model.disable_adapters()
    assert torch.equal(run(model, inputs), expected)
    model.delete_adapters("default")
    assert {type(block) for block in model.transformer_blocks} == {MovieGenAudioTransformerBlock}
    assert torch.equal(run(model, inputs), expected)


# Preset


def test_constructor_defaults_are_the_13b_preset():
    preset = MovieGenAudioTransformer1DModel.load_config(PRESET)
    with init_empty_weights():
        model = MovieGenAudioTransformer1DModel()
        from_preset = MovieGenAudioTransformer1DModel.from_config(preset)
    for candidate in (model, from_preset):
        assert 12.0 <= sum(parameter.numel() for parameter in candidate.parameters()) / 1e9 <= 13.5
    assert {k: v for k, v in model.config.items() if not k.startswith("_")} == {
        k: v for k, v in preset.items() if not k.startswith("_")
    }
    blocks = sum(parameter.numel() for parameter in model.transformer_blocks.parameters())
    assert blocks / 1e9 == pytest.approx(12.2, abs=0.05)  # as the paper's sizes say


# Two processes on the CPU (gloo) compute what one does: split sequences (Ulysses) and sharded weights (FSDP2)


def predict_and_learn(
    model: MovieGenAudioTransformer1DModel, num_latents: int = LATENTS, samples: slice = slice(None)
) -> dict[str, torch.Tensor]:
    """Output and gradients; with a split sequence the gradients of one process are those of its own tokens."""
    inputs = {
        name: value[:, :num_latents] if name in ("video_hidden_states", "video_mask", "audio_context_mask")
        else value[..., :num_latents] if name in ("hidden_states", "audio_context") else value
        for name, value in make_inputs().items()
    }  # fmt: skip
    output = model(**{name: value[samples] for name, value in inputs.items()}).sample
    output.square().mean().backward()
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return {"output": output.detach(), "gradients": torch.cat([gradient.flatten() for gradient in gradients])}


def split_sequence(rank: int, num_latents: int, checkpointing: bool) -> dict[str, torch.Tensor]:
    model = make_model().train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    # As `enable_parallelism` does, which needs an accelerator.
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=PROCESSES))
    mesh = init_device_mesh("cpu", (1, PROCESSES), mesh_dim_names=("ring", "ulysses"))
    config.setup(rank, PROCESSES, torch.device("cpu"), mesh=mesh)
    model._parallel_config = config
    for processor in model.attn_processors.values():
        processor._parallel_config = config
    apply_context_parallel(model, config.context_parallel_config, model._cp_plan)
    local_tokens = []
    model.norm_out.register_forward_pre_hook(lambda module, args: local_tokens.append(args[0].shape[1]))
    results = predict_and_learn(model, num_latents)
    dist.all_reduce(results["gradients"])
    return {**results, "local_tokens": torch.tensor(local_tokens)}


def shard_weights(rank: int) -> dict[str, torch.Tensor]:
    model = make_model().train()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in list(model.modules()):
        if type(module).__name__ in MovieGenAudioTransformer1DModel._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    results = predict_and_learn(model, samples=slice(rank, rank + 1))
    results["local_weights"] = torch.tensor(sum(p.to_local().numel() for p in model.parameters()))
    return results


def run_process(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    results = {f"sharded.{key}": value for key, value in shard_weights(rank).items()}
    for num_latents in (6, 7):
        for checkpointing in (False, True):
            for key, value in split_sequence(rank, num_latents, checkpointing).items():
                results[f"{num_latents}.{checkpointing}.{key}"] = value
    save_file({name: value.contiguous() for name, value in results.items()}, folder / f"{rank}.safetensors")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The results of both processes, which start once for all tests, since starting them is what takes time."""
    folder = tmp_path_factory.mktemp("two_processes")
    run_processes(run_process, folder, num_processes=PROCESSES, timeout=TIMEOUT)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(PROCESSES)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_latents", [6, 7])
def test_split_sequence_equals_one_process(num_latents, checkpointing, two_processes):
    expected = predict_and_learn(make_model().train(), num_latents)
    for results in two_processes:
        for key in ("output", "gradients"):
            actual = results[f"{num_latents}.{checkpointing}.{key}"]
            torch.testing.assert_close(actual, expected[key], rtol=1e-4, atol=1e-4)
        # Each process has its half of the tokens.
        local_tokens = results[f"{num_latents}.{checkpointing}.local_tokens"]
        assert set(local_tokens.tolist()) == {-(-num_latents // PROCESSES)}


def test_sharded_weights_equal_one_process(two_processes):
    expected = predict_and_learn(make_model().train())
    for rank, results in enumerate(two_processes):
        torch.testing.assert_close(results["sharded.output"], expected["output"][rank : rank + 1])
        torch.testing.assert_close(results["sharded.gradients"], expected["gradients"], rtol=1e-4, atol=1e-4)
        # Rows are sharded, and what has an odd number of them is not cut evenly.
        assert results["sharded.local_weights"] < 0.55 * len(expected["gradients"])
    assert sum(results["sharded.local_weights"] for results in two_processes) == len(expected["gradients"])
