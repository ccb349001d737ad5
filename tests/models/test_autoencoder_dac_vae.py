import math
from contextlib import contextmanager

import pytest
import torch
from accelerate import cpu_offload, infer_auto_device_map
from torch import nn
from transformers import DacConfig, DacModel

from diffusers_moviegen import AutoencoderDACVAE
from diffusers_moviegen.models import autoencoder_dac_vae
from diffusers_moviegen.models.autoencoder_dac_vae import reliable_convolutions


TINY = {
    "encoder_hidden_size": 4,
    "downsampling_ratios": (2, 4),
    "decoder_hidden_size": 16,
    "latent_channels": 6,
    "sampling_rate": 200,
}
HOP = 8


@torch.no_grad()
def enliven(model: AutoencoderDACVAE, seed: int = 0) -> AutoencoderDACVAE:
    """Weights under which latents and sounds are of the order of one, and every parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("original0"):
            parameter.copy_(1 + 0.2 * noise)
            if "res_unit" in name and "conv2" in name:
                parameter.mul_(0.3)
        elif name.endswith("original1"):
            parameter.copy_(noise)
        elif name.endswith("alpha"):
            parameter.copy_(1 + 0.3 * noise)
        else:
            parameter.copy_(0.1 * noise)
    # Quiet enough for tanh to be linear, then as loud as asked for.
    length = model.decoder.conv2.parametrizations.weight.original0
    length.mul_(1e-3)
    latents = torch.randn(1, model.config.latent_channels, 40, generator=generator)
    length.mul_(0.4 / model.decode(latents).sample.std())
    sound = torch.rand(1, 1, 40 * model.hop_length, generator=generator) * 2 - 1
    length = model.quant_conv.parametrizations.weight.original0
    length.div_(model.encode(sound).latent_dist.parameters.std())
    return model.eval()


@pytest.fixture(scope="module")
def shared_model():
    return enliven(AutoencoderDACVAE(**TINY))


@pytest.fixture
def model():
    return enliven(AutoencoderDACVAE(**TINY))


def random_sound(batch_size: int, samples: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch_size, 1, samples, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_latents(batch_size: int, num_latents: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, 6, num_latents, generator=torch.Generator().manual_seed(seed))


def reference_model(**kwargs) -> DacModel:
    config = DacConfig(
        **{name: TINY[name] for name in ("encoder_hidden_size", "decoder_hidden_size", "sampling_rate")},
        downsampling_ratios=list(TINY["downsampling_ratios"]),
        n_codebooks=1,
        codebook_size=16,
    )
    config.update(kwargs)
    model = DacModel(config)
    model.apply_weight_norm()
    return model.eval()


# The network


@torch.no_grad()
def test_encoder_and_decoder_are_those_of_transformers(shared_model):
    """The same names of the same weights, weight norm included, give the same outputs."""
    reference = reference_model()
    for part in ("encoder", "decoder"):
        getattr(reference, part).load_state_dict(getattr(shared_model, part).state_dict(), strict=True)
    sound, latents = random_sound(2, 20 * HOP), random_latents(2, 20)
    hidden = reference.encoder(sound)
    moments = nn.functional.conv1d(hidden, shared_model.quant_conv.weight, shared_model.quant_conv.bias)
    mean, scale = moments[:, :6], moments[:, 6:]
    posterior = shared_model.encode(sound).latent_dist
    assert mean.std() > 0.3 and scale.std() > 0.3
    torch.testing.assert_close(posterior.mean, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(posterior.std, scale.exp().log1p() + 1e-4, atol=1e-5, rtol=0)

    hidden = nn.functional.conv1d(latents, shared_model.post_quant_conv.weight, shared_model.post_quant_conv.bias)
    expected = reference.decode(hidden).audio_values.unsqueeze(1)
    assert expected.std() > 0.2
    torch.testing.assert_close(shared_model.decode(latents).sample, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_initialisation_is_that_of_transformers():
    sizes = {"encoder_hidden_size": 16, "decoder_hidden_size": 64}
    model, reference = AutoencoderDACVAE(**TINY | sizes | {"latent_channels": 64}), reference_model(**sizes)
    drawn = 0
    for part in ("encoder", "decoder"):
        ours, theirs = getattr(model, part), getattr(reference, part)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, module in ours.named_modules():
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                expected = theirs.get_submodule(name)
                assert module.parametrizations.keys() == expected.parametrizations.keys() == {"weight"}
                if module.weight.numel() >= 4000:
                    assert module.weight.std() == pytest.approx(expected.weight.std().item(), rel=0.06)
                    drawn += 1
                assert bool(module.bias.any()) == bool(expected.bias.any())
            elif name.endswith(("snake1", "snake2")):
                assert torch.equal(module.alpha, theirs.get_submodule(name).alpha)
    assert drawn >= 10
    # Of the bottleneck, as of the layers of the quantiser in whose place it is.
    projection = reference.quantizer.quantizers[0].in_proj
    for layer in (model.quant_conv, model.post_quant_conv):
        assert layer.parametrizations.keys() == projection.parametrizations.keys()
        assert layer.weight.std() == pytest.approx(0.02, rel=0.06) and not layer.bias.any()


def test_defaults_are_the_full_size_model():
    """27.29 M of the encoder, 0.40 M of the bottleneck and 65.31 M of the decoder."""
    with torch.device("meta"):
        model = AutoencoderDACVAE()
    counts = [
        sum(parameter.numel() for part in parts for parameter in part.parameters()) / 1e6
        for parts in ([model.encoder], [model.quant_conv, model.post_quant_conv], [model.decoder])
    ]
    assert counts == pytest.approx([27.29, 0.40, 65.31], abs=0.005)
    assert model.config.latent_channels == 128
    assert model.hop_length == 1920 and model.config.sampling_rate / model.hop_length == 25


# Any length


@pytest.mark.parametrize("samples", [1, 2, 7, 8, 9, 15, 16, 17, 160, 163])
@torch.no_grad()
def test_any_length(shared_model, samples):
    sound = random_sound(2, samples)
    latents = shared_model.encode(sound).latent_dist.mode()
    num_latents = math.ceil(samples / HOP)
    assert latents.shape == (2, 6, num_latents)
    # What is missing in the last latent is silence.
    silence = torch.zeros(2, 1, num_latents * HOP - samples)
    assert torch.equal(latents, shared_model.encode(torch.cat([sound, silence], dim=-1)).latent_dist.mode())
    whole = shared_model.decode(latents).sample
    assert whole.shape == (2, 1, num_latents * HOP) and whole.abs().max() <= 1
    trimmed = shared_model.decode(latents, num_samples=samples).sample
    assert torch.equal(trimmed, whole[..., :samples])
    assert torch.equal(shared_model(sound).sample, trimmed)


@torch.no_grad()
def test_tuples_and_posterior(shared_model):
    sound = random_sound(1, 50)
    (posterior,) = shared_model.encode(sound, return_dict=False)
    assert torch.equal(posterior.mode(), posterior.mean) and (posterior.std > 0).all()
    (sample,) = shared_model.decode(posterior.mode(), num_samples=50, return_dict=False)
    assert torch.equal(sample, shared_model(sound, return_dict=False)[0])
    draws = [
        shared_model(sound, sample_posterior=True, generator=torch.Generator().manual_seed(seed)).sample
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.allclose(draws[0], draws[2])
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    drawn = posterior.sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, posterior.mean + posterior.std * noise)


@torch.no_grad()
def test_slicing(model):
    sound, latents = random_sound(3, 100), random_latents(3, 9)
    moments, sample = model.encode(sound).latent_dist.parameters, model.decode(latents).sample
    model.enable_slicing()
    sizes = []
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    torch.testing.assert_close(model.encode(sound).latent_dist.parameters, moments, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(latents).sample, sample, atol=1e-5, rtol=0)
    assert sizes == [1] * 6
    model.disable_slicing()
    model.decode(latents)
    assert sizes[-1] == 3


# Tiling


@pytest.mark.parametrize("tile_latents", [1, 3, 16, 70])
@torch.no_grad()
def test_tiling_equals_the_whole(model, tile_latents):
    sound, latents = random_sound(2, 70 * HOP - 3), random_latents(2, 70)
    moments, sample = model.encode(sound).latent_dist.parameters, model.decode(latents).sample
    assert moments.std() > 0.3 and sample.std() > 0.2
    model.enable_tiling(tile_latents)
    lengths = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[-1] // HOP))
    model.decoder.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[-1]))
    # Rounding: about -100 dB, where a seam of -60 dB would be 1e-3.
    torch.testing.assert_close(model.encode(sound).latent_dist.parameters, moments, atol=3e-5, rtol=0)
    torch.testing.assert_close(model.decode(latents).sample, sample, atol=3e-5, rtol=0)
    torch.testing.assert_close(model.decode(latents, num_samples=99).sample, sample[..., :99], atol=3e-5, rtol=0)
    longest = tile_latents + 2 * max(model.encoder_context, model.decoder_context)
    assert max(lengths) <= min(longest, 70)
    model.enable_slicing()
    torch.testing.assert_close(model.decode(latents).sample, sample, atol=3e-5, rtol=0)
    model.disable_tiling()
    torch.testing.assert_close(model.decode(latents).sample, sample, atol=3e-5, rtol=0)
    assert lengths[-1] == 70


@pytest.mark.parametrize("ratios", [(2, 4), (8,), (4, 8, 10, 6), (2, 8, 10, 12)])
@torch.no_grad()
def test_contexts_are_what_results_depend_on(ratios):
    """NaN spreads as far as a latent reaches, and no further."""
    model = AutoencoderDACVAE(
        encoder_hidden_size=1, downsampling_ratios=ratios, decoder_hidden_size=2 ** len(ratios), latent_channels=1
    )
    count = 2 * max(model.encoder_context, model.decoder_context) + 5
    middle = count // 2
    spoilt = torch.zeros(1, 1, count, model.hop_length)
    spoilt[:, :, middle] = math.nan
    found = model.encode(spoilt.flatten(2)).latent_dist.mean.isnan()[0, 0].nonzero()
    assert (found - middle).abs().max() == model.encoder_context
    spoilt = torch.zeros(1, 1, count)
    spoilt[..., middle] = math.nan
    found = model.decode(spoilt).sample.view(count, -1).isnan().any(dim=1).nonzero()
    assert (found - middle).abs().max() == model.decoder_context


# Types, saving, loading


def decibels(found: torch.Tensor, expected: torch.Tensor) -> float:
    return 10 * math.log10(expected.square().mean() / (found.float() - expected).square().mean())


@torch.no_grad()
def test_half_precision(shared_model, tmp_path):
    shared_model.save_pretrained(tmp_path)
    latents = random_latents(2, 40)
    expected, ratios = shared_model.decode(latents).sample, {}
    for dtype in (torch.float16, torch.bfloat16):
        model = AutoencoderDACVAE.from_pretrained(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        sample = model.decode(latents.to(dtype)).sample
        assert sample.dtype == dtype and sample.isfinite().all()
        ratios[dtype] = decibels(sample, expected)
    assert ratios[torch.float16] > 40
    assert 10 < ratios[torch.bfloat16] < ratios[torch.float16] - 10


@torch.no_grad()
def test_save_and_load(shared_model, tmp_path):
    model = enliven(AutoencoderDACVAE(**TINY, latents_mean=[0.5] * 6, latents_std=[2.0] * 6))
    model.save_pretrained(tmp_path)
    sound, latents = random_sound(1, 100), random_latents(1, 9)
    loaded = [
        AutoencoderDACVAE.from_pretrained(tmp_path),
        AutoencoderDACVAE.from_single_file(tmp_path / "diffusion_pytorch_model.safetensors"),
        AutoencoderDACVAE.from_single_file(model.state_dict(), config=tmp_path),
    ]
    for other in loaded:
        assert not other.training and other.hop_length == HOP
        assert other.config.latents_mean == [0.5] * 6 and other.config.latents_std == [2.0] * 6
        assert other.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(other.encode(sound).latent_dist.parameters, model.encode(sound).latent_dist.parameters)
        assert torch.equal(other.decode(latents).sample, model.decode(latents).sample)
        # Still under weight norm: the length of a row alone changes the output.
        other.decoder.conv2.parametrizations.weight.original0.zero_()
        bias = other.decoder.conv2.bias.tanh().item()
        assert other.decode(latents).sample.tolist()[0][0] == pytest.approx([bias] * 9 * HOP)


def test_single_file_of_another_shape_is_refused(shared_model, tmp_path):
    shared_model.save_pretrained(tmp_path)
    weights = shared_model.state_dict()
    name = "decoder.conv1.parametrizations.weight.original0"
    with pytest.raises(ValueError, match=f"lacks `{name}`"):
        AutoencoderDACVAE.from_single_file({key: weights[key] for key in weights if key != name}, config=tmp_path)
    with pytest.raises(ValueError, match="instead of"):
        AutoencoderDACVAE.from_single_file(weights, config=tmp_path, latent_channels=4)


@torch.no_grad()
def test_weights_on_another_device_than_the_computation(model):
    """As with `enable_sequential_cpu_offload`: also those under weight norm come and go."""
    sound = random_sound(1, 100)
    expected = model(sound).sample
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(sound).sample, expected)


def test_no_split_modules(model):
    units = [name for name, module in model.named_modules() if type(module).__name__ == "DacResidualUnit"]
    assert len(units) == 12
    placements = set()
    for share in (3, 4, 6):
        budget = sum(parameter.nbytes for parameter in model.parameters()) // share
        device_map = infer_auto_device_map(
            model, max_memory={0: budget, 1: budget, "cpu": "1GB"}, no_split_module_classes=model._no_split_modules
        )
        placements.add(len(set(device_map.values())))
        assert not any(placed.startswith(f"{name}.") for name in units for placed in device_map)
    assert max(placements) > 1


def test_unsupported_features_say_so(model):
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="does not support group offloading"):
        model.enable_group_offload(onload_device=torch.device("cpu"))


# cuDNN


def test_cudnn_is_kept_away_on_hopper_only(monkeypatch):
    capability = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    flag = torch.backends.cudnn
    for enabled in (True, False):
        monkeypatch.setattr(flag, "enabled", enabled)
        with pytest.raises(KeyError), reliable_convolutions(torch.device("cuda", 1)):
            assert not flag.enabled
            with reliable_convolutions(torch.device("cuda")):
                assert not flag.enabled
            assert not flag.enabled
            raise KeyError
        assert flag.enabled == enabled
        with reliable_convolutions(torch.device("cpu")):
            assert flag.enabled == enabled
        for other in ([8, 0], [10, 0]):
            capability[:] = other
            with reliable_convolutions(torch.device("cuda")):
                assert flag.enabled == enabled
        capability[:] = [9, 0]
        assert flag.enabled == enabled


@torch.no_grad()
def test_all_convolutions_are_guarded(model, monkeypatch):
    inside, calls = [], []

    @contextmanager
    def record(device):
        inside.append(device)
        yield
        inside.pop()

    monkeypatch.setattr(autoencoder_dac_vae, "reliable_convolutions", record)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            module.register_forward_hook(lambda *args, name=name: calls.append((name, list(inside))))
    for _ in range(2):
        model(random_sound(1, 100))
        assert calls and all(devices == [torch.device("cpu")] for _, devices in calls)
        names = {name for name, _ in calls}
        assert {"encoder.conv1", "quant_conv", "post_quant_conv", "decoder.conv2"} <= names
        calls.clear()
        model.enable_tiling(2)


# Mistakes


def test_refuses_wrong_input(shared_model):
    for shape in ((1, 2, 100), (1, 100), (1, 1, 0)):
        with pytest.raises(ValueError, match=r"`sample` has the shape \(.*\): pass \(batch, 1, samples\)"):
            shared_model.encode(torch.zeros(shape))
    for shape in ((1, 5, 10), (6, 10), (1, 6, 0)):
        with pytest.raises(ValueError, match=r"`z` has the shape \(.*\): pass \(batch, 6, latents\)"):
            shared_model.decode(torch.zeros(shape))
    for num_samples in (0, -1, 81):
        with pytest.raises(ValueError, match=f"`num_samples` is {num_samples}: 10 latents decode to 1 to 80 samples"):
            shared_model.decode(random_latents(1, 10), num_samples=num_samples)
    with pytest.raises(ValueError, match="`tile_latents` is 0: use at least 1"):
        shared_model.enable_tiling(0)
    assert not shared_model.use_tiling


def test_refuses_wrong_configurations():
    for ratios in ((), (2, 3), (0, 2), (1,)):
        with pytest.raises(ValueError, match="`downsampling_ratios` .*: use one or more even numbers"):
            AutoencoderDACVAE(**TINY | {"downsampling_ratios": ratios})
    with pytest.raises(ValueError, match="`decoder_hidden_size` 10 is halved 2 times: use a multiple of 4"):
        AutoencoderDACVAE(**TINY | {"decoder_hidden_size": 10})
