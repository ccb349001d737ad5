import math

import numpy as np
import pytest
import torch
from accelerate import infer_auto_device_map
from diffusers import AutoencoderKL
from diffusers.hooks import apply_group_offloading
from torch import nn

from diffusers_moviegen import AutoencoderKLMovieGen
from diffusers_moviegen.models.autoencoder_kl_moviegen import (
    MovieGenTemporalConv1d,
    MovieGenVaeAttention,
    MovieGenVaeNorm,
    MovieGenVaeResnetBlock,
    MovieGenVaeUpsample,
    TileAxis,
    run_in_tiles,
)


TINY = {"latent_channels": 4, "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}


def perturb(module: nn.Module, scale: float = 0.05, seed: int = 0) -> nn.Module:
    """Adds noise to every parameter, so that none stays at a value under which mistakes would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return perturb(AutoencoderKLMovieGen(**TINY))


@pytest.fixture
def subpixel_model():
    torch.manual_seed(0)
    return perturb(AutoencoderKLMovieGen(**TINY, temporal_upsample_type="subpixel"))


def tiny_image_model(**kwargs) -> AutoencoderKL:
    torch.manual_seed(0)
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        **TINY,
        **kwargs,
    }
    return perturb(AutoencoderKL(**config))


def random_video(batch_size: int, num_frames: int, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch_size, 3, num_frames, height, width, generator=generator) * 2 - 1


def random_latents(batch_size: int, num_frames: int, height: int = 2, width: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, 4, num_frames, height, width, generator=generator)


# Shapes, configuration, saving


@pytest.mark.parametrize("num_frames", [1, 2, 7, 8, 9, 15, 16, 17, 33])
@torch.no_grad()
def test_any_length(model, num_frames):
    video = random_video(2, num_frames, 16, 24)
    latents = model.encode(video).latent_dist.mode()
    assert latents.shape == (2, 4, math.ceil(num_frames / 8), 2, 3)
    assert model.decode(latents).sample.shape == (2, 3, 8 * math.ceil(num_frames / 8), 16, 24)
    sample = model.decode(latents, num_frames=num_frames).sample
    assert sample.shape == video.shape
    assert torch.equal(sample, model.decode(latents).sample[:, :, :num_frames])
    assert torch.equal(sample, model(video).sample)


@torch.no_grad()
def test_number_of_levels_sets_compression():
    model = AutoencoderKLMovieGen(latent_channels=4, block_out_channels=(8, 8, 8), norm_num_groups=4)
    assert model.spatial_compression_ratio == model.temporal_compression_ratio == 4
    latents = model.encode(random_video(1, 5, 8, 12)).latent_dist.mode()
    assert latents.shape == (1, 4, 2, 2, 3)
    assert model.decode(latents).sample.shape == (1, 3, 8, 8, 12)


def test_default_is_full_size_model():
    with torch.device("meta"):
        model = AutoencoderKLMovieGen()
        image_model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
        )
    assert model.config.latent_channels == 16
    assert model.temporal_compression_ratio == model.spatial_compression_ratio == 8

    expected = sum(parameter.numel() for parameter in image_model.parameters())
    for module in image_model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            expected += 3 * module.out_channels**2 + module.out_channels
    # Temporal attention of encoder and decoder: four linear layers and a normalisation.
    expected += 2 * (4 * (512 * 512 + 512) + 2 * 512)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@torch.no_grad()
def test_save_and_load(model, tmp_path):
    model.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    model.save_pretrained(tmp_path)
    loaded = AutoencoderKLMovieGen.from_pretrained(tmp_path)
    assert loaded.config.latents_mean == [0.1, 0.2, 0.3, 0.4]
    assert loaded.config.latents_std == [1.0, 2.0, 3.0, 4.0]
    video = random_video(1, 9)
    assert torch.equal(loaded.encode(video).latent_dist.parameters, model.encode(video).latent_dist.parameters)
    latents = random_latents(1, 2)
    assert torch.equal(loaded.decode(latents).sample, model.decode(latents).sample)


@torch.no_grad()
def test_tuples_and_posterior(model):
    video = random_video(1, 9)
    (posterior,) = model.encode(video, return_dict=False)
    assert torch.equal(posterior.mode(), posterior.parameters[:, :4])
    (sample,) = model.decode(posterior.mode(), num_frames=9, return_dict=False)
    assert torch.equal(sample, model(video, return_dict=False)[0])

    draws = [
        model(video, sample_posterior=True, generator=torch.Generator().manual_seed(seed)).sample for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])


def test_refuses_wrong_input(model):
    with pytest.raises(ValueError, match=r"unsqueeze\(2\)"):
        model.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="20 high and 16 wide; both must be multiples of 8"):
        model.encode(torch.zeros(1, 3, 1, 20, 16))
    with pytest.raises(ValueError, match="`num_frames` is 17; 2 latent frames decode to 1 up to 16"):
        model.decode(random_latents(1, 2), num_frames=17)
    with pytest.raises(ValueError, match="`num_frames` is 0"):
        model.decode(random_latents(1, 2), num_frames=0)


# Inflation


@pytest.mark.parametrize("upsample_type", ["nearest", "subpixel"])
@pytest.mark.parametrize("use_quant_conv", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_inflated_model_is_image_model(use_quant_conv, dtype, tolerance, upsample_type):
    image_model = tiny_image_model(use_quant_conv=use_quant_conv, use_post_quant_conv=use_quant_conv).to(dtype)
    model = AutoencoderKLMovieGen.from_autoencoder_kl(image_model, upsample_type)
    assert model.dtype == dtype
    images = random_video(2, 1, 32, 24).to(dtype)
    expected = image_model.encode(images.squeeze(2)).latent_dist
    posterior = model.encode(images).latent_dist
    assert expected.mean.std() > 0.01 and expected.logvar.std() > 0.01
    torch.testing.assert_close(posterior.mean.squeeze(2), expected.mean, atol=tolerance, rtol=0)
    torch.testing.assert_close(posterior.logvar.squeeze(2), expected.logvar, atol=tolerance, rtol=0)

    latents = random_latents(2, 1, 4, 3).to(dtype)
    expected = image_model.decode(latents.squeeze(2)).sample
    assert expected.std() > 0.01
    sample = model.decode(latents, num_frames=1).sample
    torch.testing.assert_close(sample.squeeze(2), expected, atol=tolerance, rtol=0)


@torch.no_grad()
def test_inflated_model_treats_every_frame_alike():
    image_model = tiny_image_model()
    model = AutoencoderKLMovieGen.from_autoencoder_kl(image_model)
    # Frames that differ: those kept are encoded and decoded as single images, so no statistics cross frames.
    video = random_video(2, 20)
    expected = torch.stack([image_model.encode(video[:, :, t]).latent_dist.mean for t in (0, 8, 16)], dim=2)
    torch.testing.assert_close(model.encode(video).latent_dist.mean, expected, atol=1e-5, rtol=0)

    latents = random_latents(2, 3)
    expected = torch.stack([image_model.decode(latents[:, :, t // 8]).sample for t in range(20)], dim=2)
    torch.testing.assert_close(model.decode(latents, num_frames=20).sample, expected, atol=1e-5, rtol=0)


def test_inflation_leaves_source_alone():
    image_model = tiny_image_model()
    before = {name: parameter.clone() for name, parameter in image_model.named_parameters()}
    perturb(AutoencoderKLMovieGen.from_autoencoder_kl(image_model), seed=1)
    for name, parameter in image_model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_inflation_converts_latent_statistics():
    latents = random_latents(1, 1)
    config = AutoencoderKLMovieGen.from_autoencoder_kl(tiny_image_model(scaling_factor=1.5, shift_factor=0.25)).config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    torch.testing.assert_close((latents - mean) / std, (latents - 0.25) * 1.5)

    image_model = tiny_image_model(
        scaling_factor=0.5, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 1.0, 2.0, 4.0]
    )
    config = AutoencoderKLMovieGen.from_autoencoder_kl(image_model).config
    assert config.latents_mean == [1.0, 2.0, 3.0, 4.0]
    assert config.latents_std == [2.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mid_block_add_attention", False),
        ("act_fn", "gelu"),
        ("down_block_types", ("AttnDownEncoderBlock2D",) * 4),
        ("up_block_types", ("AttnUpDecoderBlock2D",) * 4),
    ],
)
def test_inflation_refuses_what_it_cannot_represent(name, value):
    with pytest.raises(ValueError, match=f"AutoencoderKL with {name} = "):
        AutoencoderKLMovieGen.from_autoencoder_kl(tiny_image_model(**{name: value}))


# Parts, against float64 NumPy


def temporal_conv_reference(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """`x` is (frames, channels, height, width); neighbours beyond the ends are the end frames themselves."""
    num_frames = len(x)
    frames = []
    for t in range(0, num_frames, stride):
        frame = bias[:, None, None] * np.ones(x.shape[1:])
        for tap in range(3):
            neighbour = min(max(t + tap - 1, 0), num_frames - 1)
            frame = frame + np.tensordot(weight[:, :, tap], x[neighbour], axes=1)
        frames.append(frame)
    return np.stack(frames)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch_size", [1, 3])
@torch.no_grad()
def test_temporal_conv(stride, num_frames, batch_size):
    conv = perturb(MovieGenTemporalConv1d(5, stride=stride), scale=0.5)
    x = torch.randn(batch_size * num_frames, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    output = conv(x, num_frames)
    assert output.shape == (batch_size * math.ceil(num_frames / stride), 5, 3, 4)
    weight, bias = conv.weight.double().numpy(), conv.bias.double().numpy()
    expected = [temporal_conv_reference(clip.double().numpy(), weight, bias, stride) for clip in x.split(num_frames)]
    np.testing.assert_allclose(output.numpy(), np.concatenate(expected), atol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 5])
@torch.no_grad()
def test_temporal_conv_starts_as_identity(num_frames):
    x = torch.randn(2 * num_frames, 4, 2, 2)
    assert torch.equal(MovieGenTemporalConv1d(4)(x, num_frames), x)
    kept = x.unflatten(0, (2, num_frames))[:, ::2].flatten(0, 1)
    assert torch.equal(MovieGenTemporalConv1d(4, stride=2)(x, num_frames), kept)


@torch.no_grad()
def test_upsample_repeats_frames_then_convolves():
    upsample = perturb(MovieGenVaeUpsample(4), scale=0.3)
    x = torch.randn(2 * 3, 4, 2, 3)
    output = upsample(x, 3)
    assert output.shape == (2 * 6, 4, 4, 6)

    pixels = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    spatial = nn.functional.conv2d(pixels, upsample.conv.spatial.weight, upsample.conv.spatial.bias, padding=1)
    weight, bias = upsample.conv.temporal.weight.double().numpy(), upsample.conv.temporal.bias.double().numpy()
    expected = [
        temporal_conv_reference(np.repeat(clip.double().numpy(), 2, axis=0), weight, bias, stride=1)
        for clip in spatial.split(3)
    ]
    np.testing.assert_allclose(output.numpy(), np.concatenate(expected), atol=1e-5)


@pytest.mark.parametrize("over_frames", [False, True])
@torch.no_grad()
def test_attention(over_frames):
    channels, groups, batch_size, num_frames, height, width = 8, 2, 2, 3, 2, 4
    attention = perturb(MovieGenVaeAttention(channels, groups, over_frames=over_frames), scale=0.5)
    x = torch.randn(batch_size * num_frames, channels, height, width, generator=torch.Generator().manual_seed(0))
    output = attention(x, num_frames).unflatten(0, (batch_size, num_frames)).numpy()

    weights = {name: value.double().numpy() for name, value in attention.state_dict().items()}
    frames = x.double().numpy().reshape(batch_size, num_frames, groups, -1)
    normed = (frames - frames.mean(-1, keepdims=True)) / np.sqrt(frames.var(-1, keepdims=True) + 1e-6)
    normed = normed.reshape(batch_size, num_frames, channels, height, width)
    normed = normed * weights["group_norm.weight"][:, None, None] + weights["group_norm.bias"][:, None, None]
    expected = x.double().numpy().reshape(normed.shape).copy()
    if over_frames:
        sequences = [
            (b, slice(None), slice(None), h, w) for b in range(2) for h in range(height) for w in range(width)
        ]
    else:
        sequences = [(b, t, slice(None), slice(None), slice(None)) for b in range(2) for t in range(num_frames)]
    for index in sequences:
        tokens = normed[index] if over_frames else normed[index].reshape(channels, -1).T
        query, key, value = (tokens @ weights[f"to_{n}.weight"].T + weights[f"to_{n}.bias"] for n in "qkv")
        scores = np.exp(query @ key.T / np.sqrt(channels))
        result = (
            scores / scores.sum(-1, keepdims=True) @ value @ weights["to_out.0.weight"].T + weights["to_out.0.bias"]
        )
        expected[index] += result if over_frames else result.T.reshape(channels, height, width)
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_temporal_attention_starts_as_identity():
    x = torch.randn(2 * 3, 8, 2, 2)
    assert torch.equal(MovieGenVaeAttention(8, 2, over_frames=True)(x, 3), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_norm_uses_statistics_of_one_frame(dtype):
    norm = perturb(MovieGenVaeNorm(2, 8), scale=0.3).to(dtype)
    x = (torch.randn(4, 8, 3, 3) * 3 + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    frames = x.double().numpy().reshape(4, 2, -1)
    expected = (frames - frames.mean(-1, keepdims=True)) / np.sqrt(frames.var(-1, keepdims=True) + 1e-6)
    expected = expected.reshape(4, 8, 3, 3) * norm.weight.double().numpy()[:, None, None]
    expected = expected + norm.bias.double().numpy()[:, None, None]
    output = norm(x)
    assert output.dtype == dtype
    np.testing.assert_allclose(output.double().numpy(), expected, atol=16 * torch.finfo(dtype).eps)


@torch.no_grad()
def test_is_not_causal(model):
    # Without attention over frames, so that what is seen is what the convolutions let through.
    for part in (model.encoder, model.decoder):
        nn.init.zeros_(part.mid_block.temporal_attentions[0].to_out[0].weight)
        nn.init.zeros_(part.mid_block.temporal_attentions[0].to_out[0].bias)
    video = random_video(1, 16)
    latents = model.encode(video).latent_dist.mode()
    for changed, seen in ((9, 0), (6, 1)):
        other = video.clone()
        other[:, :, changed] = 0
        assert (model.encode(other).latent_dist.mode()[:, :, seen] - latents[:, :, seen]).abs().max() > 1e-4

    latents = random_latents(1, 2)
    sample = model.decode(latents).sample
    for changed, seen in ((1, 7), (0, 8)):
        other = latents.clone()
        other[:, :, changed] = 0
        assert (model.decode(other).sample[:, :, seen] - sample[:, :, seen]).abs().max() > 1e-4


@torch.no_grad()
def test_attention_over_frames_reaches_the_whole_clip(model):
    # Long enough for the first frame to be out of reach of the convolutions.
    latents = random_latents(1, 40)
    other = latents.clone()
    other[:, :, -1] = 0
    difference = (model.decode(other).sample - model.decode(latents).sample)[:, :, 0].abs().max()
    assert difference > 1e-5
    for part in (model.encoder, model.decoder):
        nn.init.zeros_(part.mid_block.temporal_attentions[0].to_out[0].weight)
    assert torch.equal(model.decode(other).sample[:, :, 0], model.decode(latents).sample[:, :, 0])


@torch.no_grad()
def test_single_latent_frame_decodes_to_equal_frames(model):
    latents = random_latents(2, 1)
    sample = model.decode(latents).sample
    assert sample.shape == (2, 3, 8, 16, 16)
    # Two equal latent frames take the long way, frame by frame.
    expected = model.decode(latents.expand(-1, -1, 2, -1, -1)).sample
    torch.testing.assert_close(sample, expected[:, :, :8], atol=1e-5, rtol=0)
    torch.testing.assert_close(sample, expected[:, :, 8:], atol=1e-5, rtol=0)


# Sub-pixel convolution along time


@torch.no_grad()
def test_subpixel_upsample_has_a_kernel_for_each_of_two_frames():
    upsample = perturb(MovieGenVaeUpsample(4, subpixel=True), scale=0.3)
    x = torch.randn(2 * 3, 4, 2, 3)
    output = upsample(x, 3)
    assert output.shape == (2 * 6, 4, 4, 6)

    pixels = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    spatial = nn.functional.conv2d(pixels, upsample.conv.spatial.weight, upsample.conv.spatial.bias, padding=1)
    weight, bias = upsample.conv.temporal.weight.double().numpy(), upsample.conv.temporal.bias.double().numpy()
    assert weight.shape == (8, 4, 3)
    for clip, frames in zip(spatial.split(3), output.split(6), strict=True):
        for phase in range(2):
            half = slice(4 * phase, 4 * phase + 4)
            expected = temporal_conv_reference(clip.double().numpy(), weight[half], bias[half], stride=1)
            np.testing.assert_allclose(frames[phase::2].numpy(), expected, atol=1e-5)
    # A still picture is the first of both.
    torch.testing.assert_close(upsample(x[:1], 1, still=True), upsample(x[:1], 1)[:1])


@torch.no_grad()
def test_subpixel_starts_as_nearest_neighbour_and_keeps_every_frame():
    torch.manual_seed(0)
    nearest, subpixel = MovieGenVaeUpsample(4), MovieGenVaeUpsample(4, subpixel=True)
    subpixel.conv.spatial.load_state_dict(nearest.conv.spatial.state_dict())
    x = torch.randn(5, 4, 2, 3)
    torch.testing.assert_close(subpixel(x, 5), nearest(x, 5))

    model = AutoencoderKLMovieGen.from_autoencoder_kl(tiny_image_model(), "subpixel")
    downsample = model.encoder.down_blocks[0].downsamplers[0].conv.temporal
    x = torch.randn(6, 8, 2, 2)
    output = downsample(x, 6)
    torch.testing.assert_close(output[:, ::2], x[::2, ::2] + downsample.bias[::2, None, None])
    torch.testing.assert_close(output[:, 1::2], x[1::2, 1::2] + downsample.bias[1::2, None, None])


@torch.no_grad()
def test_only_subpixel_decodes_motion_that_repeats(model, subpixel_model):
    latents = random_latents(1, 1).expand(-1, -1, 12, -1, -1)
    frames = model.decode(latents).sample
    torch.testing.assert_close(frames, frames[:, :, :1].expand_as(frames), atol=1e-5, rtol=0)
    # Far from the ends all latent frames show the same, and in each the eight frames differ.
    frames = subpixel_model.decode(latents).sample[:, :, 40:56]
    first, second = frames.chunk(2, dim=2)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    distances = (first[:, :, :, None] - first[:, :, None]).abs().amax(dim=(0, 1, 4, 5))
    assert distances[~torch.eye(8, dtype=torch.bool)].min() > 1e-3


@torch.no_grad()
def test_subpixel_promises(subpixel_model, tmp_path):
    video = random_video(1, 13)
    latents = subpixel_model.encode(video).latent_dist.mode()
    sample = subpixel_model.decode(latents, num_frames=13).sample
    assert sample.shape == video.shape
    assert subpixel_model.decode(latents[:, :, :1], num_frames=5).sample.shape[2] == 5
    # The two latent frames fit in one tile; a single one in a tile of its own still moves.
    subpixel_model.enable_tiling()
    torch.testing.assert_close(subpixel_model.decode(latents, num_frames=13).sample, sample)
    subpixel_model.enable_tiling(tile_sample_min_num_frames=8, tile_sample_stride_num_frames=8)
    tiled = subpixel_model.decode(latents).sample
    alone = [subpixel_model.decode(part).sample for part in latents.split(1, dim=2)]
    torch.testing.assert_close(tiled, torch.cat(alone, dim=2))
    assert (tiled[:, :, 1:] - tiled[:, :, :-1]).abs().amax(dim=(0, 1, 3, 4)).min() > 1e-3

    subpixel_model.disable_tiling()
    subpixel_model.save_pretrained(tmp_path)
    loaded = AutoencoderKLMovieGen.from_pretrained(tmp_path)
    assert loaded.config.temporal_upsample_type == "subpixel"
    torch.testing.assert_close(loaded.decode(latents, num_frames=13).sample, sample)
    with pytest.raises(ValueError, match="`temporal_upsample_type` is 'cubic': use 'nearest' or 'subpixel'"):
        AutoencoderKLMovieGen(**TINY, temporal_upsample_type="cubic")


# Tiling and slicing


@torch.no_grad()
def test_one_tile_is_identical(model):
    video, latents = random_video(2, 32, 16, 24), random_latents(2, 4, 2, 3)
    moments, sample = model.encode(video).latent_dist.parameters, model.decode(latents, num_frames=29).sample
    model.enable_tiling(
        tile_sample_min_height=16,
        tile_sample_min_width=24,
        tile_sample_stride_height=8,
        tile_sample_stride_width=8,
    )
    assert torch.equal(model.encode(video).latent_dist.parameters, moments)
    assert torch.equal(model.decode(latents, num_frames=29).sample, sample)


@torch.no_grad()
def test_encoder_tiles_do_not_overlap(model):
    video = random_video(1, 75)
    model.enable_tiling()
    moments = model.encode(video).latent_dist.parameters
    model.disable_tiling()
    expected = [model.encode(video[:, :, start : start + 32]).latent_dist.parameters for start in (0, 32, 64)]
    assert [part.shape[2] for part in expected] == [4, 4, 2]
    assert torch.equal(moments, torch.cat(expected, dim=2))
    assert not torch.allclose(moments, model.encode(video).latent_dist.parameters)


def blend_reference(tiles: list[np.ndarray], starts: list[int], axis: int) -> np.ndarray:
    """In an overlap the newer tile's weight climbs in equal steps from 0 just before it to 1 just after it."""
    result = np.moveaxis(tiles[0], axis, 0)
    for tile, start in zip(tiles[1:], starts[1:], strict=True):
        tile = np.moveaxis(tile, axis, 0)
        overlap = len(result) - start
        joined = [*result[:start]]
        for i in range(overlap):
            weight = (i + 1) / (overlap + 1)
            joined.append((1 - weight) * result[start + i] + weight * tile[i])
        result = np.stack([*joined, *tile[overlap:]])
    return np.moveaxis(result, 0, axis)


@pytest.mark.parametrize(
    ("latent_frames", "starts", "num_frames"),
    [(5, [0, 2], 40), (6, [0, 2], 43), (7, [0, 2, 4], 56), (9, [0, 2, 4, 6], 70), (9, [0, 2, 4, 6], 21)],
)
@torch.no_grad()
def test_decoder_tiles_are_blended_linearly(model, latent_frames, starts, num_frames):
    latents = random_latents(1, latent_frames)
    tiles = [model.decode(latents[:, :, start : start + 4]).sample.double().numpy() for start in starts]
    expected = blend_reference(tiles, [8 * start for start in starts], axis=2)[:, :, :num_frames]
    model.enable_tiling()
    sample = model.decode(latents, num_frames=num_frames).sample
    assert sample.is_contiguous()
    np.testing.assert_allclose(sample.numpy(), expected, atol=1e-6)


@torch.no_grad()
def test_spatial_tiles_are_blended_linearly(model):
    latents = random_latents(2, 2, 5, 7)
    rows = []
    for top in (0, 2):
        tiles = [model.decode(latents[:, :, :, top : top + 3, left : left + 4]).sample.numpy() for left in (0, 2, 4)]
        rows.append(blend_reference(tiles, [0, 16, 32], axis=4))
    expected = blend_reference(rows, [0, 16], axis=3)
    model.enable_tiling(
        tile_sample_min_height=24, tile_sample_min_width=32, tile_sample_stride_height=16, tile_sample_stride_width=16
    )
    np.testing.assert_allclose(model.decode(latents).sample.numpy(), expected, atol=1e-6)

    video = random_video(2, 9, 40, 56)
    moments = model.encode(video).latent_dist.parameters.numpy()
    model.disable_tiling()
    rows = []
    for top in (0, 16):
        tiles = [
            model.encode(video[:, :, :, top : top + 24, left : left + 32]).latent_dist.parameters.numpy()
            for left in (0, 16, 32)
        ]
        rows.append(blend_reference(tiles, [0, 2, 4], axis=4))
    np.testing.assert_allclose(moments, blend_reference(rows, [0, 2], axis=3), atol=1e-6)


def test_ramp_values():
    values = iter([0.0, 1.0, 0.0])
    x = torch.zeros(1, 6)
    output = run_in_tiles(
        lambda part: torch.full((1, 4 * part.shape[1]), next(values)), x, [TileAxis(1, 3, 2, 1, 4, 24)]
    )
    ramp = [0.2, 0.4, 0.6, 0.8]
    torch.testing.assert_close(output[0], torch.tensor([0.0] * 8 + ramp + [1.0] * 4 + ramp[::-1] + [0.0] * 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_the_identity_join_to_the_input(dtype):
    x = torch.randn(2, 3, 11, 10, 13, dtype=dtype)
    axes = [
        TileAxis(2, 4, 1, 1, 1, 11),
        TileAxis(0, 1, 1, 1, 1, 2),
        TileAxis(3, 4, 3, 1, 1, 10),
        TileAxis(4, 5, 5, 1, 1, 13),
    ]
    torch.testing.assert_close(run_in_tiles(lambda part: part, x, axes), x)


def jumps_at_and_off(video: torch.Tensor, borders: range) -> tuple[float, float]:
    """The largest change from one frame to the next, into the frames `borders` and into all others."""
    jumps = video.diff(dim=2).square().mean(dim=(0, 1, 3, 4)).sqrt().tolist()
    at_borders = [jump for frame, jump in enumerate(jumps, start=1) if frame in borders]
    assert len(at_borders) == len(borders)
    return max(at_borders), max(jump for frame, jump in enumerate(jumps, start=1) if frame not in borders)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.02, 0.05])
@torch.no_grad()
def test_no_jump_at_tile_borders(seed, scale):
    model = AutoencoderKLMovieGen.from_autoencoder_kl(tiny_image_model())
    for index, module in enumerate(model.modules()):
        if isinstance(module, MovieGenTemporalConv1d):
            perturb(module, scale=scale, seed=100 * seed + index)

    # What tiling adds changes no faster at the borders than within the ramps. Without an overlap it does.
    latents = random_latents(1, 13, seed=seed)
    expected = model.decode(latents).sample
    model.enable_tiling()
    at_borders, elsewhere = jumps_at_and_off(model.decode(latents).sample - expected, range(16, 104, 16))
    assert 0 < at_borders < elsewhere
    model.enable_tiling(tile_sample_stride_num_frames=32)
    at_borders, elsewhere = jumps_at_and_off(model.decode(latents).sample - expected, range(32, 104, 32))
    assert at_borders > elsewhere

    # A video that changes at frames 8, 24, 40, ... alone gets no larger change at 16, 32, 48, ...
    model.enable_tiling(tile_sample_stride_num_frames=16)
    video = random_video(1, 8, seed=seed).repeat_interleave(16, dim=2)[:, :, 8:]
    at_borders, elsewhere = jumps_at_and_off(model(video).sample, range(16, 120, 16))
    assert at_borders < elsewhere


@torch.no_grad()
def test_spatial_tiling_is_close(model):
    # A texture with the period of the stride: all tiles see the same, but for what lies beyond their edges.
    latents = random_latents(1, 1, 4, 4).repeat(1, 1, 1, 4, 4)
    expected = model.decode(latents, num_frames=1).sample

    def relative_error(tile, stride):
        model.enable_tiling(
            tile_sample_min_height=tile,
            tile_sample_min_width=tile,
            tile_sample_stride_height=stride,
            tile_sample_stride_width=stride,
        )
        sample = model.decode(latents, num_frames=1).sample
        return (sample - expected).square().mean().sqrt() / expected.std()

    assert 0 < relative_error(96, 32) < 0.3
    assert relative_error(64, 64) > 0.6


class PeakMemory:
    """Peak of the bytes that the tensors created inside hold at the same time."""

    def __enter__(self):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *args):
        self.profile.__exit__(*args)
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
        self.bytes = int(live.max())


@pytest.mark.parametrize("use_slicing", [False, True])
@torch.no_grad()
def test_memory_does_not_grow_with_length(model, use_slicing):
    model.enable_tiling(
        tile_sample_min_height=16,
        tile_sample_min_width=16,
        tile_sample_min_num_frames=16,
        tile_sample_stride_height=8,
        tile_sample_stride_width=8,
        tile_sample_stride_num_frames=8,
    )
    if use_slicing:
        model.enable_slicing()
    batch_size = 2

    def beyond_output(function, *args, **kwargs):
        with PeakMemory() as memory:
            output = function(*args, **kwargs)
        return memory.bytes - output.nbytes

    def encode(video):
        return model._encode(video)

    def decode(latents):
        return model._decode(latents, latents.shape[2] * 8 - 3).contiguous()

    encoded = [beyond_output(encode, random_video(batch_size, n, 16, 24)) for n in (32, 64)]
    decoded = [beyond_output(decode, random_latents(batch_size, n, 2, 3)) for n in (4, 8)]
    # The measure does see a list of tiles: without tiling memory grows with length.
    model.disable_tiling()
    model.disable_slicing()
    assert beyond_output(encode, random_video(batch_size, 32, 16, 24)) > 1.5 * encoded[0]
    assert encoded[0] == pytest.approx(encoded[1], rel=0.02)
    assert decoded[0] == pytest.approx(decoded[1], rel=0.02)


@torch.no_grad()
def test_slicing(model):
    video, latents = random_video(3, 9), random_latents(3, 2)
    moments, sample = model.encode(video).latent_dist.parameters, model.decode(latents).sample
    frames_seen = []
    model.encoder.register_forward_hook(lambda module, args, output: frames_seen.append(len(args[0])))
    model.decoder.register_forward_hook(lambda module, args, output: frames_seen.append(len(args[0])))
    model.enable_slicing()
    torch.testing.assert_close(model.encode(video).latent_dist.parameters, moments, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(latents).sample, sample, atol=1e-5, rtol=0)
    assert frames_seen == [9] * 3 + [2] * 3
    model.disable_slicing()
    model.encode(video)
    assert frames_seen[6:] == [27]


@torch.no_grad()
def test_slicing_with_tiling(model):
    video, latents = random_video(2, 40, 24, 16), random_latents(2, 6, 3, 2)
    model.enable_tiling(tile_sample_min_height=16, tile_sample_stride_height=8)
    moments, sample = model.encode(video).latent_dist.parameters, model.decode(latents).sample
    model.enable_slicing()
    torch.testing.assert_close(model.encode(video).latent_dist.parameters, moments, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(latents).sample, sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        ({"tile_sample_min_height": 20}, "`tile_sample_min_height` is 20; it must be a positive multiple of 8"),
        ({"tile_sample_stride_num_frames": 0}, "`tile_sample_stride_num_frames` is 0"),
        ({"tile_sample_min_width": 64}, "`tile_sample_stride_width` is 192, above `tile_sample_min_width`, 64"),
    ],
)
def test_refuses_impossible_tiles(model, tiling, message):
    with pytest.raises(ValueError, match=message):
        model.enable_tiling(**tiling)
    assert not model.use_tiling
    assert (model.tile_sample_min_height, model.tile_sample_min_width) == (256, 256)
    assert model.tile_sample_stride_num_frames == 16


# Promises


@pytest.mark.parametrize("upsample_type", ["nearest", "subpixel"])
def test_gradient_checkpointing(upsample_type):
    torch.manual_seed(0)
    model = perturb(AutoencoderKLMovieGen(**TINY, temporal_upsample_type=upsample_type)).train()
    calls = []
    for block in (*model.encoder.down_blocks, *model.decoder.up_blocks):
        block.register_forward_pre_hook(lambda *args: calls.append(1))

    def gradients():
        model.zero_grad()
        calls.clear()
        model(random_video(1, 9)).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    assert len(calls) == 8
    model.enable_gradient_checkpointing()
    actual = gradients()
    assert len(calls) == 16
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if not name.endswith("to_k.bias"))
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_pass_through_tiles(model):
    latents = random_latents(1, 6).requires_grad_()
    model.enable_tiling()
    model.decode(latents).sample.square().mean().backward()
    assert (latents.grad.abs().amax(dim=(0, 1, 3, 4)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(model, dtype):
    video, latents = random_video(1, 9), random_latents(1, 2)
    moments, sample = model.encode(video).latent_dist.parameters, model.decode(latents).sample
    with torch.autocast("cpu", dtype):
        autocast = model.decode(latents).sample
    model.type(dtype)
    for actual, expected in (
        (model.encode(video.to(dtype)).latent_dist.parameters, moments),
        (model.decode(latents.to(dtype)).sample, sample),
        (autocast, sample),
    ):
        assert actual.dtype == dtype
        assert actual.isfinite().all()
        assert (actual.float() - expected).abs().max() < 40 * torch.finfo(dtype).eps * expected.abs().max()


@torch.no_grad()
def test_layerwise_casting(model):
    latents = random_latents(1, 2)
    expected = model.decode(latents).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.decoder.conv_in.temporal.weight.dtype == torch.float8_e4m3fn
    assert model.decoder.conv_norm_out.weight.dtype == torch.float32
    sample = model.decode(latents).sample
    assert (sample - expected).square().mean().sqrt() < 0.3 * expected.std()


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@torch.no_grad()
def test_group_offloading(model, offload_type):
    video, latents = random_video(1, 9), random_latents(1, 2)
    moments, sample = model.encode(video).latent_dist.parameters, model.decode(latents).sample
    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1 if offload_type == "block_level" else None,
    )
    assert torch.equal(model.encode(video).latent_dist.parameters, moments)
    assert torch.equal(model.decode(latents).sample, sample)


def test_no_split_modules(model):
    # Those that add their input to their output, which must then be on one device, and the one that enters a child's
    # children by itself.
    whole = (MovieGenVaeResnetBlock, MovieGenVaeAttention, MovieGenVaeUpsample)
    indivisible = [name for name, module in model.named_modules() if isinstance(module, whole)]
    placements = set()
    for share in (3, 4, 5, 6):
        budget = sum(parameter.nbytes for parameter in model.parameters()) // share
        device_map = infer_auto_device_map(
            model, max_memory={0: budget, 1: budget, "cpu": "1GB"}, no_split_module_classes=model._no_split_modules
        )
        placements.add(len(set(device_map.values())))
        for placed in device_map:
            assert not any(placed.startswith(f"{name}.") for name in indivisible)
    assert max(placements) > 1


@torch.no_grad()
def test_attention_processors(model):
    assert set(model.attn_processors) == {
        f"{part}.mid_block.{kind}.0.processor"
        for part in ("encoder", "decoder")
        for kind in ("attentions", "temporal_attentions")
    }
    latents = random_latents(1, 2)
    expected = model.decode(latents).sample
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(model.decode(latents).sample, expected, atol=1e-5, rtol=0)
