"""The measuring parts of the script that probes text encoders."""

import runpy
from pathlib import Path

import pytest
import torch

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


@torch.no_grad()
def test_features_are_those_of_each_text_alone(script):
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    texts = ["a red circle", "a much longer caption of a blue square", "star"]
    for text, features in zip(texts, script["encode"](tokenizer, encoder, texts), strict=True):
        expected = encoder(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0]
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
