"""The measuring parts of the script that probes text encoders and the image encoder."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusers_moviegen import bundled_checkpoint
from diffusers_moviegen.toybox.scenes import signed_distance
from diffusers_moviegen.toybox.vocabulary import SHAPES
from tests.tiny import tiny_text_encoder, tiny_tokenizer


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "probe_text_encoders.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_probe_finds_what_is_there_and_nothing_else(script):
    torch.manual_seed(0)
    features, test_features = torch.randn(900, 8), torch.randn(600, 8)
    directions = torch.randn(8, 3)
    classes, test_classes = (features @ directions).argmax(1), (test_features @ directions).argmax(1)
    assert script["probe"]((features, classes), (test_features, test_classes)) > 97
    # Classes that have nothing to do with the features are guessed, at three of them right in a third.
    classes, test_classes = torch.randint(3, (900,)), torch.randint(3, (600,))
    assert script["probe"]((features, classes), (test_features, test_classes)) < 42


def test_explained_variance_is_that_of_a_line(script):
    torch.manual_seed(0)
    features, test_features, lines = torch.randn(900, 8), torch.randn(600, 8), torch.randn(8, 2)
    sets = (features, features @ lines + 3), (test_features, test_features @ lines + 3)
    assert script["explained"](*sets) > 99.9
    # As much noise as signal leaves half of it, and values that have nothing to do with the features none.
    noisy = [(rows, values + lines.norm(dim=0) * torch.randn(values.shape)) for rows, values in sets]
    assert 40 < script["explained"](*noisy) < 60
    unrelated = [(rows, torch.randn(values.shape)) for rows, values in sets]
    assert -10 < script["explained"](*unrelated) < 5


def test_pictures_come_with_what_they_show(script):
    """The object's outline is where place, size and turn say; of what does not turn there is no turn."""
    pictures, shown = script["draw_frames"](20, torch.Generator().manual_seed(0), True)
    pixels = torch.arange(64) + 0.5
    for row, picture in enumerate(pictures.float()):
        drawn = (picture - picture[:, :1, :1]).abs().sum(0)
        drawn = drawn / drawn.max()
        x, y = shown["x (R2)"][row], shown["y (R2)"][row]
        assert abs((drawn.sum(0) @ pixels) / drawn.sum() - x) < 0.3
        assert abs((drawn.sum(1) @ pixels) / drawn.sum() - y) < 0.3
    pictures, shown = script["draw_turned"](20, torch.Generator().manual_seed(0), True)
    for row, picture in enumerate(pictures.float()):
        drawn = (picture - picture[:, :1, :1]).abs().sum(0)
        drawn = drawn / drawn.max()
        (shape,) = (name for name in script["SYMMETRIES"] if not shown[f"turn of {name} (R2)"][row].isnan().any())
        cosine, sine = shown[f"turn of {shape} (R2)"][row]
        turn = torch.atan2(sine, cosine) / script["SYMMETRIES"][shape]
        across = pixels - (drawn.sum(0) @ pixels) / drawn.sum()
        down = (pixels - (drawn.sum(1) @ pixels) / drawn.sum())[:, None]
        across, down = across * turn.cos() + down * turn.sin(), down * turn.cos() - across * turn.sin()
        # The radius follows from the share of the area that is covered.
        fits = [
            (drawn - (0.5 - signed_distance(shape, across, down, torch.tensor(radius))).clamp(0, 1)).abs().max()
            for radius in torch.arange(8, 14, 0.1).tolist()
        ]
        assert min(fits) < 0.2 and shape in SHAPES


def test_probes_of_pictures(script):
    """Each kind of picture is drawn, encoded and scored, from embeddings and patches that are those of the encoder."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        projection_dim=8,
    )
    encoder = CLIPVisionModelWithProjection(config).eval()
    processor = CLIPImageProcessor.from_pretrained(bundled_checkpoint("toybox"), subfolder="image_processor")
    results = {
        kind: script["probe_pictures"](processor, encoder, kind, seed=0, counts=(60, 40))
        for kind in script["PICTURES"]
    }
    assert list(results["pictures"]) == ["colour", "shape", "background"]
    assert {"skin", "style", "glasses", "expression", "hair hue (R2)"} < set(results["people"])
    assert all(len(both) == 2 and max(both) <= 100 for table in results.values() for both in table.values())
    assert results["pictures"]["background"][0] > 20

    pictures = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    embeds, patches = script["encode_pictures"](processor, encoder, pictures)
    with torch.no_grad():
        output = encoder(pictures[1:2].float() / 127.5 - 1)
    torch.testing.assert_close(embeds[1], output.image_embeds[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(patches[1], output.last_hidden_state[0, 1:].mean(0), atol=1e-4, rtol=0)


@torch.no_grad()
def test_features_are_those_of_each_text_alone(script):
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    texts = ["a red circle", "a much longer caption of a blue square", "star"]
    for text, features in zip(texts, script["encode"](tokenizer, encoder, texts), strict=True):
        expected = encoder(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0]
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
