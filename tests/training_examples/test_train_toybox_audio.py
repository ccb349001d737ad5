"""The commands that made the bundled checkpoint of sound."""

from pathlib import Path

import pytest

from diffusers_moviegen.training import parse_arguments
from tests.training_examples.scripts import ROOT, load_script, recorded_commands


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return recorded_commands("train_toybox_audio.sh", tmp_path_factory.mktemp("commands"))


def test_every_command_is_understood(commands, monkeypatch):
    monkeypatch.chdir(ROOT)
    scripts = [Path(words[0]).stem for words in commands]
    assert list(dict.fromkeys(scripts)) == [
        *("train_image_encoder", "train_dac_vae", "assemble_pipeline", "precompute_audio", "train_audio"),
        "average_checkpoints",
    ]
    for name, words in zip(scripts[:-1], commands[:-1], strict=True):
        parse_arguments(load_script(name).Arguments, words[1:])


def test_every_folder_has_been_written_before(commands):
    written = set()
    for words in commands:
        output = words[words.index("--output_dir") + 1]
        read = [Path(word) for word in words if word.startswith("runs/") and word != output]
        assert all(any(Path(folder) in (path, *path.parents) for folder in written) for path in read), words
        assert output not in written
        written.add(output)
    runs = [words for words in commands if Path(words[0]).stem == "train_audio"]
    for folder, count, words in zip(("cache_b", *3 * ["cache"]), (3, 3, 4, 4), runs, strict=True):
        caches = {word for word in words if word in written and Path(word).parent.name == folder}
        assert len(caches) == count
    assert {path for path in written if "/cache" in path} == {
        word for words in runs for word in words if "/cache" in word
    }


def test_no_cache_draws_the_samples_of_another(commands):
    """Films of one split, seed and length are the same ones."""
    drawn = []
    for words in commands:
        if Path(words[0]).stem == "precompute_audio":
            args = parse_arguments(load_script("precompute_audio").Arguments, words[1:])
            drawn.append((args.split, args.seed))
    trained = [seed for split, seed in drawn if split == "train"]
    assert len(trained) == len(set(trained)) == 5
    assert [split for split, _ in drawn] == 2 * ["train", "train", "held_out"] + ["train"]


def test_its_stages_have_a_configuration_each(commands):
    used = [Path(word).name for words in commands for word in words if word.endswith(".yaml")]
    assert set(used) == {"toybox_dac_vae.yaml", "toybox_precompute_audio.yaml", "toybox_audio.yaml"}
