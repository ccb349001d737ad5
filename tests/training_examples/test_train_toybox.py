"""The commands that made the bundled checkpoint."""

from pathlib import Path

import pytest

from diffusers_moviegen.training import parse_arguments
from tests.training_examples.scripts import EXAMPLES, ROOT, load_script, recorded_commands


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return recorded_commands("train_toybox.sh", tmp_path_factory.mktemp("commands"))


def test_every_command_is_understood(commands, monkeypatch):
    monkeypatch.chdir(ROOT)
    scripts = [Path(words[0]).stem for words in commands]
    assert list(dict.fromkeys(scripts)) == [
        *("train_text_encoders", "train_tae", "assemble_pipeline", "precompute", "train_text_to_video"),
        "average_checkpoints",
    ]
    for name, words in zip(scripts, commands, strict=True):
        if name == "average_checkpoints":
            assert words[-2] == "--output_dir" and len(words) > 4
        else:
            parse_arguments(load_script(name).Arguments, words[1:])


def test_every_folder_has_been_written_before(commands):
    written = set()
    for words in commands:
        output = words[words.index("--output_dir") + 1]
        read = [Path(word) for word in words if word.startswith("runs/") and word != output]
        assert all(any(Path(folder) in (path, *path.parents) for folder in written) for path in read), words
        assert output not in written
        written.add(output)
    read = {word for words in commands for word in words}
    caches = {folder for folder in written if folder.startswith("runs/cache/")}
    assert len(caches) == 41 and caches <= read


def test_its_stages_have_a_configuration_each(commands):
    used = {Path(word).name for words in commands for word in words if word.endswith(".yaml")}
    ours = {path.name for path in (EXAMPLES / "configs").glob("toybox_*.yaml")}
    of_sound = {"toybox_audio.yaml", "toybox_dac_vae.yaml", "toybox_precompute_audio.yaml"}
    assert used == ours - of_sound | {"precompute_toybox.yaml"}
