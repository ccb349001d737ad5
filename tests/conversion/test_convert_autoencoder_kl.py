import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from diffusers_moviegen import AutoencoderKLMovieGen


SCRIPT = Path(__file__).parents[2] / "conversion" / "convert_autoencoder_kl.py"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def convert():
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "vae"
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.25,
        shift_factor=0.5,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def copied_folder(image_folder, tmp_path):
    return Path(shutil.copytree(image_folder, tmp_path / "copy"))


def check_refused(convert, capsys, source, output, *words):
    assert convert([str(source), str(output)]) == 2
    captured = capsys.readouterr()
    # Libraries may warn before it, but the error itself is the last line and a single one.
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("convert_autoencoder_kl: error: ")
    for word in words:
        assert word in error
    assert captured.out == ""


def test_converts_folder(convert, image_folder, tmp_path, capsys):
    output = tmp_path / "new" / "vae"
    assert convert([str(image_folder), str(output)]) == 0
    assert "compresses 4 times" in capsys.readouterr().out

    image_model = AutoencoderKL.from_pretrained(image_folder)
    model = AutoencoderKLMovieGen.from_pretrained(output)
    assert model.config.latents_mean == [0.5] * 4
    assert model.config.latents_std == [0.8] * 4
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = image_model.encode(image).latent_dist.mean
        latents = model.encode(image.unsqueeze(2)).latent_dist.mean
        torch.testing.assert_close(latents.squeeze(2), expected, atol=1e-5, rtol=0)
        expected = image_model.decode(expected).sample
        frames = model.decode(latents, num_frames=1).sample
        torch.testing.assert_close(frames.squeeze(2), expected, atol=1e-5, rtol=0)


def test_refuses_missing_source(convert, tmp_path, capsys):
    check_refused(convert, capsys, tmp_path / "none", tmp_path / "out", "there is no folder", str(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


def test_refuses_folder_without_config(convert, image_folder, tmp_path, capsys):
    check_refused(convert, capsys, image_folder.parent, tmp_path / "out", "no config.json", "vae/")


def test_refuses_broken_config(convert, copied_folder, tmp_path, capsys):
    (copied_folder / "config.json").write_text("{")
    check_refused(convert, capsys, copied_folder, tmp_path / "out", "config.json", "no valid JSON")


def test_refuses_other_class(convert, image_folder, tmp_path, capsys):
    assert convert([str(image_folder), str(tmp_path / "video")]) == 0
    capsys.readouterr()
    check_refused(convert, capsys, tmp_path / "video", tmp_path / "out", "AutoencoderKLMovieGen")


def test_refuses_other_blocks(convert, tmp_path, capsys):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, mid_block_add_attention=False).save_pretrained(
        tmp_path / "no_attention"
    )
    check_refused(convert, capsys, tmp_path / "no_attention", tmp_path / "out", "mid_block_add_attention")
    assert not (tmp_path / "out").exists()


def test_refuses_existing_output(convert, image_folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("kept")
    check_refused(convert, capsys, image_folder, tmp_path / "out", "exists already")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_refuses_output_below_a_file(convert, image_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    check_refused(convert, capsys, image_folder, tmp_path / "file" / "out", str(tmp_path / "file"))


def test_refuses_missing_weights(convert, copied_folder, tmp_path, capsys):
    (copied_folder / WEIGHTS).unlink()
    check_refused(convert, capsys, copied_folder, tmp_path / "out", WEIGHTS)


def test_refuses_truncated_weights(convert, copied_folder, tmp_path, capsys):
    content = (copied_folder / WEIGHTS).read_bytes()
    (copied_folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    check_refused(convert, capsys, copied_folder, tmp_path / "out", WEIGHTS)


def test_refuses_incomplete_weights(convert, copied_folder, tmp_path, capsys):
    weights = load_file(copied_folder / WEIGHTS)
    del weights["decoder.conv_in.weight"]
    save_file(weights, copied_folder / WEIGHTS, metadata={"format": "pt"})
    check_refused(convert, capsys, copied_folder, tmp_path / "out", "1 missing keys", "decoder.conv_in.weight")


def test_refuses_mismatched_weights(convert, copied_folder, tmp_path, capsys):
    config = json.loads((copied_folder / "config.json").read_text())
    config["latent_channels"] = 8
    (copied_folder / "config.json").write_text(json.dumps(config))
    check_refused(convert, capsys, copied_folder, tmp_path / "out", "decoder.conv_in.weight")
