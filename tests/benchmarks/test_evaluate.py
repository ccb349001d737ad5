"""The evaluation script: its intervals against closed forms, and a tiny run."""

import json

import pytest
import torch

from tests.tiny import tiny_pipeline
from tests.training_examples.scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("evaluate", folder="benchmarks")


def test_interval_of_independent_values_is_that_of_the_binomial(script):
    values = [i % 4 == 0 for i in range(400)]
    mean, low, high = script.interval(values, list(range(400)), seed=0)
    assert mean == 0.25
    # 1.96 standard errors of sqrt(0.25 * 0.75 / 400) = 0.0217
    assert low == pytest.approx(0.25 - 0.0424, abs=0.006) and high == pytest.approx(0.25 + 0.0424, abs=0.006)


def test_interval_counts_a_repeated_prompt_as_one(script):
    values, groups = [i % 4 == 0 for i in range(100)] * 4, list(range(100)) * 4
    mean, low, high = script.interval(values, groups, seed=0)
    assert mean == 0.25 and high - low == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 100) ** 0.5, rel=0.15)


def test_a_second_run_prints_the_same_figures(script, tmp_path, capsys):
    pipe = tiny_pipeline()
    channels = pipe.vae.config.latent_channels
    pipe.vae.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    pipe.save_pretrained(tmp_path / "model")
    tables = []
    for run in ("first", "second"):
        script.main(
            script.Arguments(
                model=str(tmp_path / "model"),
                num_prompts=3,
                num_reconstructions=2,
                batch_size=2,
                num_inference_steps=2,
                sheet=str(tmp_path / "sheet.png"),
                output=str(tmp_path / f"{run}.json"),
            )
        )
        tables.append(json.loads((tmp_path / f"{run}.json").read_text()))
    assert tables[0] == tables[1] and len(tables[0]) == 11
    assert (tmp_path / "sheet.png").is_file()
    printed = capsys.readouterr().out
    assert "| text to video: all at once |" in printed and printed.count("seed 2: a ") == 2


def test_psnr_is_that_of_the_pixels(script):
    """Against the definition, on a model whose reconstruction is known: it paints everything mid-grey."""
    pipe = tiny_pipeline()
    with torch.no_grad():
        for parameter in pipe.vae.decoder.parameters():
            parameter.zero_()
    args = script.Arguments(model="")
    tuples = [("red", "circle", "stays still", "grey")]
    (ratio,) = script.reconstruction_psnr(args, pipe, tuples, 1)
    scenes = script.draw_scenes(tuples, torch.Generator().manual_seed(args.seed))
    video = script.render(scenes, 1, 8, pipe.config.default_height, pipe.config.default_width)
    error = (video.double() - 128).square().mean()
    assert ratio == pytest.approx((10 * torch.log10(255**2 / error)).item(), abs=1e-3)
