"""Options of the scripts: files, command line, and what is said about mistakes."""

import logging
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from diffusers import AutoencoderKL
from diffusers.utils import logging as diffusers_logging

from diffusers_moviegen import AutoencoderKLMovieGen
from diffusers_moviegen.training import (
    TrainingStopped,
    check_mixed_precision,
    check_model_folder,
    check_positive,
    check_training_options,
    parse_arguments,
    run_script,
)
from tests.tiny import tiny_vae


def test_counts_are_named():
    arguments = SimpleNamespace(num_frames=1, max_train_steps=0)
    check_positive(arguments, ("num_frames",))
    with pytest.raises(ValueError, match="--max_train_steps is 0: it must be at least 1"):
        check_positive(arguments, ("num_frames", "max_train_steps"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: 0}, f"--{name} is 0: it must be at least 1") for name in ("max_train_steps", "validation_steps")),
        ({"checkpoints_total_limit": -1}, "--checkpoints_total_limit is -1: it must be at least 1"),
        ({"learning_rate": -0.1}, "--learning_rate is -0.1: it must be at least 0 and finite"),
        ({"learning_rate": float("nan")}, "--learning_rate is nan: it must be at least 0 and finite"),
        ({"weight_decay": float("inf")}, "--weight_decay is inf: it must be at least 0 and finite"),
        ({"lr_warmup_steps": -1}, "--lr_warmup_steps is -1"),
        ({"seed": 2**32}, "--seed is 4294967296: it must be below 4294967296"),
        ({"max_grad_norm": float("nan")}, "--max_grad_norm is nan: it must be above 0"),
        ({"images_to_videos": [1]}, r"--images_to_videos is \[1\]: pass two numbers"),
        ({"images_to_videos": [0, 0]}, r"--images_to_videos is \[0, 0\]: pass two numbers"),
        ({"report_to": "abacus"}, "--report_to: 'abacus' is not installed"),
        ({"push_to_hub": True}, "--push_to_hub: pass the repository to push to"),
        ({"hub_private": True}, "--hub_model_id and --hub_private do nothing without --push_to_hub"),
    ],
)
def test_options_of_all_training_scripts(change, message):
    counts = "gradient_accumulation_steps max_train_steps validation_steps checkpointing_steps checkpoints_total_limit"
    options = dict.fromkeys(counts.split(), 1) | dict.fromkeys(("lr_warmup_steps", "num_workers", "seed"), 0)
    options |= {"learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0, "images_to_videos": [0, 1]}
    options |= {"report_to": "none", "push_to_hub": False, "hub_model_id": None, "hub_private": False}
    check_training_options(SimpleNamespace(**options))
    with pytest.raises(ValueError, match=message):
        check_training_options(SimpleNamespace(**options | change))


def test_float16_needs_a_scaler():
    for mixed_precision, scaler in (("no", None), ("bf16", None), ("fp16", object())):
        check_mixed_precision(SimpleNamespace(mixed_precision=mixed_precision, scaler=scaler))
    with pytest.raises(ValueError, match="--mixed_precision fp16 needs a GPU"):
        check_mixed_precision(SimpleNamespace(mixed_precision="fp16", scaler=None))


def test_model_folders_are_of_the_class_asked_for(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "run" / "vae")
    check_model_folder("vae", str(tmp_path / "run" / "vae"), AutoencoderKLMovieGen)
    for folder in ("run", "missing"):
        with pytest.raises(OSError, match=f"--vae: '.*{folder}' has no config.json; .* AutoencoderKLMovieGen"):
            check_model_folder("vae", str(tmp_path / folder), AutoencoderKLMovieGen)
    with pytest.raises(OSError, match="--vae: '.*vae' holds a AutoencoderKLMovieGen; .* of a AutoencoderKL\\."):
        check_model_folder("vae", str(tmp_path / "run" / "vae"), AutoencoderKL)
    for content in ("{", "[]", "{}"):
        (tmp_path / "run" / "vae" / "config.json").write_text(content)
        with pytest.raises(OSError, match="--vae: '.*config.json' is no configuration of a model"):
            check_model_folder("vae", str(tmp_path / "run" / "vae"), AutoencoderKLMovieGen)


@dataclass
class Arguments:
    output_dir: str
    learning_rate: float = 1e-3
    num_frames: int = 16
    max_grid_size: list[int] = field(default_factory=lambda: [1, 2, 2])
    schedule: str = field(default="cosine", metadata={"choices": ["cosine", "constant"]})
    private: bool = False
    vary: bool = True
    prompt: str | None = None

    def __post_init__(self):
        check_positive(self, ("num_frames",))


def write_config(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def test_file_sets_options_and_the_command_line_overrules_it(tmp_path):
    config = write_config(
        tmp_path,
        "output_dir: runs/a\nlearning_rate: 3e-4\nnum_frames: 8\nmax_grid_size: [4, 6, 6]\nprivate: true\n"
        "vary: false\nprompt: -1 is a number\nschedule: null\n",
    )
    expected = Arguments("runs/a", 3e-4, 8, [4, 6, 6], "cosine", True, False, "-1 is a number")
    assert parse_arguments(Arguments, ["--config", config]) == expected
    args = parse_arguments(
        Arguments, ["--num_frames", "9", "--config", config, "--max_grid_size", "1", "1", "1", "--private", "false"]
    )
    assert args == Arguments("runs/a", 3e-4, 9, [1, 1, 1], "cosine", False, False, "-1 is a number")
    assert parse_arguments(Arguments, ["--output_dir", "b"]) == Arguments("b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "run.yaml' has the option 'learning_rat', which this script does not"),
        ("config: other.yaml\n", "has the option 'config'"),
        ("- output_dir\n", "must hold lines of the form"),
        ("", "must hold lines of the form"),
        ("a: [\n", "is not valid YAML"),
        ("max_grid_size: [[1, 2]]\n", "gives 'max_grid_size' something nested"),
        ("prompt: {a: b}\n", "gives 'prompt' something nested"),
        ("output_dir: a\nnum_frames: 0\n", "--num_frames is 0"),
        (
            "output_dir: a\nmax_grid_size: 1, 2\n",
            "argument --max_grid_size/--max-grid-size: invalid int value: '1, 2'",
        ),
        (
            "output_dir: a\nmax_grid_size: []\n",
            "argument --max_grid_size/--max-grid-size: expected at least one argument",
        ),
    ],
)
def test_wrong_files_are_one_line_and_exit_code_2(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit) as stop:
        run_script(print, Arguments, ["--config", write_config(tmp_path, text)])
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == ""
    assert message in output.err and output.err.count("\n") == 1 and output.err.startswith("error: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --output_dir/--output-dir; see --help."),
        (["--output_dir", "a", "--unknown", "1"], "unrecognized arguments: --unknown 1; see --help."),
        (["--output_dir", "a", "--num_frame", "1"], "unrecognized arguments: --num_frame 1; see --help."),
        (
            ["--output_dir", "a", "--num_frames", "many"],
            "argument --num_frames/--num-frames: invalid int value: 'many'; see",
        ),
        (["--output_dir", "a", "--schedule", "linear"], "argument --schedule: invalid choice: 'linear'"),
        (["--output_dir", "a", "--config"], "argument --config: expected one argument; see --help."),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(print, Arguments, argv)
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == ""
    assert output.err.startswith(f"error: {message}") and output.err.count("\n") == 1


def test_no_is_a_word(tmp_path):
    """YAML itself takes it for a truth value, which `--mixed_precision` is not."""
    config = write_config(tmp_path, "output_dir: no\nprompt: on\nprivate: yes\nlearning_rate: 1e-4\n")
    args = parse_arguments(Arguments, ["--config", config])
    assert args == Arguments("no", prompt="on", private=True, learning_rate=1e-4)


def test_missing_file_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(print, Arguments, ["--config", str(tmp_path / "no.yaml")])
    assert stop.value.code == 2 and "there is no file" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(ValueError, 2), (FileNotFoundError, 2), (TrainingStopped, 1)])
def test_errors_of_a_run_are_one_line(error, code, capsys, caplog):
    def main(args):
        raise error(f"cannot go on\nin {args.output_dir}")

    with pytest.raises(SystemExit) as stop:
        run_script(main, Arguments, ["--output_dir", "a"])
    assert stop.value.code == code
    assert capsys.readouterr().err == "error: cannot go on in a\n"

    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.DEBUG)
    diffusers_logging.enable_propagation()
    try:
        with pytest.raises(SystemExit), caplog.at_level(logging.DEBUG):
            run_script(main, Arguments, ["--output_dir", "a"])
    finally:
        diffusers_logging.disable_propagation()
        diffusers_logging.set_verbosity(verbosity)
    assert "in main" in caplog.text


def test_defects_keep_their_traceback():
    def main(args):
        raise KeyError("defect")

    with pytest.raises(KeyError):
        run_script(main, Arguments, ["--output_dir", "a"])
