"""Folders of runs: what is refused, and results that are whole."""

import pytest
from safetensors import SafetensorError

from diffusers_moviegen.training import TrainingStopped, check_output_dir, written_beside


def test_a_new_run_takes_a_folder_of_its_own(tmp_path):
    elsewhere = str(tmp_path / "elsewhere" / "checkpoint-3")
    for resume in (None, "latest", elsewhere):
        check_output_dir(tmp_path / "missing", "lora", resume)
        check_output_dir(tmp_path, "lora", resume)
    # What a run leaves that is killed in its first save.
    (tmp_path / "partial-checkpoint-5").mkdir()
    check_output_dir(tmp_path, "lora", None)

    (tmp_path / "checkpoint-5").mkdir()
    for resume in (None, elsewhere):
        with pytest.raises(ValueError, match=f"--output_dir: '{tmp_path}' has checkpoint-5 of another run; go on"):
            check_output_dir(tmp_path, "lora", resume)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="--output_dir: '.*run' is a file; pass a folder"):
        check_output_dir(tmp_path / "run", "lora", None)


def test_a_run_goes_on_in_its_folder(tmp_path, monkeypatch):
    for name in ("checkpoint-3", "checkpoint-5", "lora"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for resume in ("latest", str(tmp_path / "checkpoint-3"), "checkpoint-3"):
        check_output_dir(tmp_path, "lora", resume)


@pytest.mark.parametrize("resume", [None, "latest", "elsewhere/checkpoint-3"])
def test_a_result_without_a_run_is_not_replaced(tmp_path, resume):
    (tmp_path / "pipeline").mkdir()
    check_output_dir(tmp_path, "lora", resume)
    with pytest.raises(ValueError, match="--output_dir: '.*pipeline' is there already, and would be replaced"):
        check_output_dir(tmp_path, "pipeline", resume)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_results_take_the_place_of_earlier_ones(tmp_path):
    # What a run leaves that is killed in between.
    (tmp_path / "partial-lora" / "old").mkdir(parents=True)
    (tmp_path / "partial-lora-replaced").mkdir()
    for text, before in (("first", {}), ("second", {"lora/first": "first"})):
        with written_beside(tmp_path / "lora") as folder:
            assert not list(folder.iterdir()) and content(tmp_path) == before
            (folder / text).write_text(text)
        assert content(tmp_path) == {f"lora/{text}": text}
        assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_results_that_cannot_be_written_change_nothing(tmp_path, error):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "weights").write_text("old")
    with pytest.raises(TrainingStopped, match="lora' cannot be written: no space; make room and go on with --resume"):
        with written_beside(tmp_path / "lora") as folder:
            (folder / "weights").write_text("half")
            raise error("no space")
    assert content(tmp_path) == {"lora/weights": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
