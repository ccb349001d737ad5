"""Against DAC-VAE written out with torch.nn.functional, from its description and under its own names."""

import pickle
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from diffusers_moviegen import AutoencoderDACVAE


SCRIPT = Path(__file__).parents[2] / "conversion" / "convert_dac_vae.py"

RATIOS, ENCODER_WIDTH, DECODER_WIDTH, LATENTS = (2, 6, 4), 3, 24, 5


@pytest.fixture(scope="module")
def convert():
    return runpy.run_path(str(SCRIPT))["main"]


def make_checkpoint() -> dict[str, torch.Tensor]:
    generator, weights = torch.Generator().manual_seed(0), {}

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def convolution(name, before, after, kernel, transposed=False):
        rows, columns = (before, after) if transposed else (after, before)
        weights[f"{name}.weight_v"] = draw(rows, columns, kernel)
        # Lengths that keep the size of what passes through, and are not those of the directions.
        weights[f"{name}.weight_g"] = 0.7 + 0.3 * draw(rows, 1, 1)
        weights[f"{name}.bias"] = 0.1 * draw(after)

    def snake(name, width):
        weights[f"{name}.alpha"] = 1 + 0.3 * draw(1, width, 1)

    def unit(name, width):
        snake(f"{name}.block.0", width)
        convolution(f"{name}.block.1", width, width, 7)
        snake(f"{name}.block.2", width)
        convolution(f"{name}.block.3", width, width, 1)

    width = ENCODER_WIDTH
    convolution("encoder.block.0", 1, width, 7)
    for number, ratio in enumerate(RATIOS, start=1):
        for place in (0, 1, 2):
            unit(f"encoder.block.{number}.block.{place}", width)
        snake(f"encoder.block.{number}.block.3", width)
        convolution(f"encoder.block.{number}.block.4", width, 2 * width, 2 * ratio)
        width *= 2
    snake("encoder.block.4", width)
    convolution("encoder.block.5", width, width, 3)
    convolution("quantizer.in_proj", width, 2 * LATENTS, 1)
    convolution("quantizer.out_proj", LATENTS, width, 1)
    convolution("decoder.model.0", width, DECODER_WIDTH, 7)
    width = DECODER_WIDTH
    for number, ratio in enumerate(reversed(RATIOS), start=1):
        snake(f"decoder.model.{number}.block.0", width)
        convolution(f"decoder.model.{number}.block.1", width, width // 2, 2 * ratio, transposed=True)
        width //= 2
        for place in (4, 5, 8):
            unit(f"decoder.model.{number}.block.{place}", width)
        # Of the watermark.
        for place in (3, 6, 7, 11):
            weights[f"decoder.model.{number}.block.{place}.conv.conv.bias"] = draw(4)
    snake("decoder.wm_model.encoder_block.pre.0", width)
    convolution("decoder.wm_model.encoder_block.pre.1", width, 1, 7)
    weights["decoder.wm_model.encoder_block.post.1.weight_ih_l0"] = draw(8, 8)
    weights["decoder.wm_model.msg_processor.msg_processor.weight"] = draw(32, 4)
    return weights


class Reference:
    def __init__(self, weights):
        self.weights = weights

    def conv(self, name, x, transposed=False, **options):
        g, v = self.weights[f"{name}.weight_g"], self.weights[f"{name}.weight_v"]
        weight = g * v / v.square().sum(dim=(1, 2), keepdim=True).sqrt()
        function = F.conv_transpose1d if transposed else F.conv1d
        return function(x, weight, self.weights[f"{name}.bias"], **options)

    def snake(self, name, x):
        alpha = self.weights[f"{name}.alpha"]
        return x + torch.sin(alpha * x) ** 2 / (alpha + 1e-9)

    def unit(self, name, x, dilation):
        y = self.conv(f"{name}.block.1", self.snake(f"{name}.block.0", x), padding=3 * dilation, dilation=dilation)
        return x + self.conv(f"{name}.block.3", self.snake(f"{name}.block.2", y))

    def encode(self, x):
        x = self.conv("encoder.block.0", x, padding=3)
        for number, ratio in enumerate(RATIOS, start=1):
            name = f"encoder.block.{number}.block"
            for place, dilation in ((0, 1), (1, 3), (2, 9)):
                x = self.unit(f"{name}.{place}", x, dilation)
            x = self.conv(f"{name}.4", self.snake(f"{name}.3", x), stride=ratio, padding=ratio // 2)
        x = self.conv("encoder.block.5", self.snake("encoder.block.4", x), padding=1)
        mean, scale = self.conv("quantizer.in_proj", x).split(LATENTS, dim=1)
        return mean, torch.log1p(scale.exp()) + 1e-4

    def decode(self, z):
        x = self.conv("decoder.model.0", self.conv("quantizer.out_proj", z), padding=3)
        for number, ratio in enumerate(reversed(RATIOS), start=1):
            name = f"decoder.model.{number}.block"
            x = self.conv(f"{name}.1", self.snake(f"{name}.0", x), transposed=True, stride=ratio, padding=ratio // 2)
            for place, dilation in ((4, 1), (5, 3), (8, 9)):
                x = self.unit(f"{name}.{place}", x, dilation)
        name = "decoder.wm_model.encoder_block.pre"
        return torch.tanh(self.conv(f"{name}.1", self.snake(f"{name}.0", x), padding=3))


@pytest.fixture
def checkpoint():
    return make_checkpoint()


@pytest.fixture
def source(checkpoint, tmp_path):
    save_file(checkpoint, tmp_path / "dacvae.safetensors")
    return tmp_path / "dacvae.safetensors"


def check_refused(convert, capsys, source, output, *words):
    assert convert([str(source), str(output)]) == 2
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("convert_dac_vae: error: ")
    for word in words:
        assert word in error
    assert captured.out == ""


@torch.no_grad()
def test_converts_a_checkpoint(convert, checkpoint, source, tmp_path, capsys):
    output = tmp_path / "new" / "dac-vae"
    assert convert([str(source), str(output), "--sampling_rate", "1200"]) == 0
    text = capsys.readouterr().out
    assert "5 latent channels, 25 latents a second" in text and "left out 14 tensors of the watermark" in text

    model = AutoencoderDACVAE.from_pretrained(output)
    assert model.config.encoder_hidden_size == ENCODER_WIDTH and model.config.decoder_hidden_size == DECODER_WIDTH
    assert tuple(model.config.downsampling_ratios) == RATIOS and model.config.sampling_rate == 1200
    assert model.config.latents_mean is model.config.latents_std is None
    reference = Reference({name: value.double() for name, value in checkpoint.items()})
    sound = torch.rand(2, 1, 20 * 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    posterior, (mean, std) = model.encode(sound).latent_dist, reference.encode(sound.double())
    assert mean.std() > 0.2 and std.std() > 0.05
    torch.testing.assert_close(posterior.mean.double(), mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(posterior.std.double(), std, atol=1e-4, rtol=1e-4)
    expected = reference.decode(mean)
    assert expected.std() > 0.2
    torch.testing.assert_close(model.decode(mean.float()).sample.double(), expected, atol=1e-4, rtol=1e-4)


def test_the_names_of_the_release_are_all_known(convert):
    """The release has 317 tensors and 107.67 M parameters, of the watermark 73 and 14.68 M."""
    names = convert.__globals__["layer_names"](4)
    with torch.device("meta"):
        tensors = AutoencoderDACVAE().state_dict()
    layers = {re.sub(r"\.(alpha|bias|parametrizations.*)$", "", name) for name in tensors}
    assert layers == names.keys() and len(set(names.values())) == len(names)
    assert len(tensors) == 317 - 73
    assert sum(tensor.numel() for tensor in tensors.values()) / 1e6 == pytest.approx(107.67 - 14.68, abs=0.02)


def test_refuses_a_missing_file(convert, tmp_path, capsys):
    check_refused(convert, capsys, tmp_path / "none.safetensors", tmp_path / "out", "there is no file", "none.safet")
    check_refused(convert, capsys, tmp_path, tmp_path / "out", "there is no file", str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_never_unpickles(convert, tmp_path, capsys):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"state_dict": Harm()}))
    check_refused(convert, capsys, tmp_path / "weights.pth", tmp_path / "out", "run code", "save_file(")
    check_refused(convert, capsys, tmp_path / "weights.safetensors", tmp_path / "out", "no safetensors file")
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists()


def test_refuses_a_truncated_file(convert, source, tmp_path, capsys):
    content = source.read_bytes()
    source.write_bytes(content[: len(content) // 2])
    check_refused(convert, capsys, source, tmp_path / "out", str(source), "cut off")


@pytest.mark.parametrize(
    "name",
    [
        "encoder.block.0.weight_v",
        "encoder.block.3.block.2.block.1.weight_g",
        "encoder.block.1.block.4.weight_v",
        "quantizer.out_proj.weight_v",
        "decoder.model.2.block.8.block.0.alpha",
        "decoder.wm_model.encoder_block.pre.1.bias",
    ],
)
def test_names_what_is_missing(convert, checkpoint, source, tmp_path, capsys, name):
    del checkpoint[name]
    save_file(checkpoint, source)
    check_refused(convert, capsys, source, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_names_what_is_odd(convert, checkpoint, source, tmp_path, capsys):
    save_file(checkpoint | {"decoder.model.1.block.2.weight": torch.zeros(2)}, source)
    check_refused(convert, capsys, source, tmp_path / "out", "such as 'decoder.model.1.block.2.weight'")
    name = "decoder.model.0.weight_g"
    save_file(checkpoint | {name: torch.zeros(7, 1, 1)}, source)
    check_refused(convert, capsys, source, tmp_path / "out", f"'{name}' has the shape (7, 1, 1)", "(24, 1, 1)")
    # Folded weights, and those of another model.
    save_file({"encoder.block.0.weight": torch.zeros(4, 1, 7)}, source)
    check_refused(convert, capsys, source, tmp_path / "out", "'encoder.block.0.weight'", "weight_g, weight_v")
    save_file({}, source)
    check_refused(convert, capsys, source, tmp_path / "out", "it has no convolution")
    assert not (tmp_path / "out").exists()


def test_refuses_existing_output_and_a_rate_of_zero(convert, source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    check_refused(convert, capsys, source, tmp_path / "out", "exists already")
    assert convert([str(source), str(tmp_path / "new"), "--sampling_rate", "0"]) == 2
    assert "--sampling_rate is 0: it must be at least 1" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "new").exists()
