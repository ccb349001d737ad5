import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_moviegen
from diffusers_moviegen import MovieGenPipeline, cli, toybox
from diffusers_moviegen.cli import main
from diffusers_moviegen.media import save_video
from diffusers_moviegen.toybox import previews
from diffusers_moviegen.toybox.data import TASKS
from tests.tiny import MAX_FRAMES, MAX_SIZE


PROMPT = "a red circle bounces on a grey background"


@pytest.fixture(scope="module")
def model(pipeline_folder):
    """Folder of a tiny pipeline: 9 frames of 32 x 48 (height x width) at 8 fps unless told otherwise."""
    return str(pipeline_folder)


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(model, *arguments):
    return main(["generate", PROMPT, "--model", model, "--steps", "2", *arguments])


def refused(capsys, *arguments):
    """The line on stderr of a command line that must end with status 2, without having printed anything else."""
    try:
        status = main(list(arguments))
    except SystemExit as exit:
        status = exit.code
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert output.err.startswith("moviegen: error: ")
    assert output.err.count("\n") == 1
    assert output.err.endswith("\n")
    return output.err


def test_generate_writes_the_film_of_the_pipeline(model, work, capsys):
    options = ["--seed", "3", "--num-frames", "17", "--height", "48", "--width", "64", "--frame-rate", "16"]
    options += ["--guidance", "5.5", "--negative-prompt", "blue", "--device", "cpu", "--dtype", "float32"]
    assert generate(model, "-o", "film.mp4", *options) == 0
    output = capsys.readouterr()
    lines = dict(line.split(": ", 1) for line in output.out.splitlines())
    assert list(lines) == ["prompt", "seed", "seconds", "path"]
    assert (lines["prompt"], lines["seed"], lines["path"]) == (PROMPT, "3", "film.mp4")
    assert float(lines["seconds"]) > 0
    assert "2/2" in output.err  # the progress bar

    with av.open("film.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width, stream.average_rate) == (48, 64, 16)
        assert len(list(container.decode(stream))) == 17

    pipeline = MovieGenPipeline.from_pretrained(model, dtype=torch.float32)
    video = pipeline(
        PROMPT,
        negative_prompt="blue",
        height=48,
        width=64,
        num_frames=17,
        frame_rate=16,
        num_inference_steps=2,
        guidance_scale=5.5,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    save_video(video, "expected.mp4", 16)
    assert (work / "film.mp4").read_bytes() == (work / "expected.mp4").read_bytes()


def test_defaults_come_from_the_checkpoint(model, work, capsys):
    assert generate(model, "-o", "film.mp4") == 0
    assert "seed: 0\n" in capsys.readouterr().out
    with av.open("film.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width, stream.average_rate) == (32, 48, 8)
        assert len(list(container.decode(stream))) == 9


@pytest.mark.parametrize(
    "option, value",
    [("--seed", "1"), ("--guidance", "1"), ("--negative-prompt", "blue"), ("--dtype", "bfloat16"), ("--steps", "3")],
)
def test_the_result_depends_on_the_options_and_on_nothing_else(model, work, option, value):
    # A PNG is compared because an MP4 could hide small changes.
    for name in ("plain.png", "again.png"):
        assert generate(model, "-o", name) == 0
    assert generate(model, "-o", "other.png", option, value) == 0
    assert (work / "again.png").read_bytes() == (work / "plain.png").read_bytes()
    assert (work / "other.png").read_bytes() != (work / "plain.png").read_bytes()


def test_gif_and_png(model, work):
    assert generate(model, "-o", "film.gif", "--num-frames", "8") == 0
    with Image.open("film.gif") as image:
        assert image.format == "GIF"
        assert image.size == (48, 32)
        assert sum(image.seek(i) or image.info["duration"] for i in range(image.n_frames)) == 1000

    assert generate(model, "-o", "picture.PNG") == 0
    pipeline = MovieGenPipeline.from_pretrained(model)
    frames = pipeline(
        PROMPT, num_frames=1, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
    ).frames
    with Image.open("picture.PNG") as image:
        np.testing.assert_array_equal(np.asarray(image), np.rint(255 * frames[0, 0]).astype(np.uint8))


def test_force_replaces_and_nothing_else_does(model, work, capsys):
    (work / "film.mp4").write_text("mine")
    error = refused(capsys, "generate", PROMPT, "--model", model, "-o", "film.mp4")
    assert error == "moviegen: error: film.mp4 exists; choose another name, or have it replaced (--force)\n"
    assert (work / "film.mp4").read_text() == "mine"
    assert generate(model, "-o", "film.mp4", "--force") == 0
    assert (work / "film.mp4").read_bytes()[4:8] == b"ftyp"
    assert os.listdir() == ["film.mp4"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--height", "50"], "`height` must be a multiple of 16, got 50; the nearest is 48."),
        (["--width", "60"], "`width` must be a multiple of 16, got 60; the nearest is 64."),
        (["--width", str(MAX_SIZE + 16)], f"at most {MAX_SIZE} pixels"),
        (["--num-frames", str(MAX_FRAMES + 1)], f"at most {MAX_FRAMES} frames"),
        (["--num-frames", "0"], "`num_frames` must be a whole number of at least 1, got 0"),
        (["--num-frames", "-8"], "`num_frames` must be a whole number of at least 1, got -8"),
        (["--num-frames", "2.5"], "--num-frames: invalid int value: '2.5'"),
        (["--height", "0"], "`height` must be a whole number of at least 1, got 0"),
        (["--width", "-64"], "`width` must be a whole number of at least 1, got -64"),
        (["--steps", "0"], "`num_inference_steps` must be a whole number of at least 1, got 0"),
        (["--frame-rate", "0"], "--frame-rate: must be a number from 1 to 1000, not '0'"),
        (["--frame-rate", "fast"], "--frame-rate: must be a number from 1 to 1000, not 'fast'"),
        (["--guidance", "much"], "--guidance: invalid float value: 'much'"),
        (["--seed", "-1"], "--seed: must be a whole number from 0 to 2**64 - 1, not '-1'"),
        (["--seed", "1.5"], "not '1.5'"),
        (["--seed", str(2**64)], f"not '{2**64}'"),
        (["--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
        (["--device", "abacus"], "device 'abacus' is not available here; use cpu"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available here; use cpu"),
        (["--negative-prompt", "\udcff"], "--negative-prompt: is not valid UTF-8"),
        (["--num-frame", "9"], "unrecognized arguments: --num-frame 9"),
        (["-o", "film.avi"], "unknown extension '.avi' of film.avi; use .mp4, .gif or .png"),
        (["-o", "film"], "unknown extension ''"),
        (["-o", "missing/film.mp4"], "there is no folder missing for film.mp4"),
        (["-o", "folder.mp4"], "folder.mp4 is a folder"),
        (["-o", "file.txt/film.mp4"], "there is no folder file.txt"),
        (["-o", "picture.png", "--num-frames", "9"], "a .png holds one frame, not 9; leave out --num-frames"),
    ],
)
def test_bad_option(model, work, capsys, options, message):
    (work / "folder.mp4").mkdir()
    (work / "file.txt").write_text("mine")
    assert message in refused(capsys, "generate", PROMPT, "--model", model, "-o", "film.mp4", *options)
    assert sorted(os.listdir()) == ["file.txt", "folder.mp4"]
    assert (work / "file.txt").read_text() == "mine"


@pytest.mark.parametrize("prompt", ["", " \t\n"])
def test_empty_prompt(model, work, capsys, prompt):
    error = refused(capsys, "generate", prompt, "--model", model, "-o", "film.mp4")
    assert error == "moviegen: error: argument prompt: is empty; say what to show\n"


def test_incomplete_command_lines(work, capsys):
    assert "required: command" in refused(capsys)
    assert "invalid choice: 'develop'" in refused(capsys, "develop")
    assert "required: prompt" in refused(capsys, "generate", "-o", "film.mp4")
    assert "required: -o/--output" in refused(capsys, "generate", PROMPT)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that not even root can write into")
def test_unwritable_folder(model, capsys):
    error = refused(capsys, "generate", PROMPT, "--model", model, "-o", "/proc/self/film.mp4")
    assert "cannot write into the folder /proc/self" in error


def test_the_output_is_checked_before_the_model_is_loaded(work, capsys):
    (work / "film.mp4").write_text("mine")
    for output in ("film.avi", "film.mp4", "missing/film.mp4"):
        assert "model" not in refused(capsys, "generate", PROMPT, "--model", "./no-such-model", "-o", output)
    assert "no-such-model" in refused(capsys, "generate", PROMPT, "--model", "./no-such-model", "-o", "new.mp4")


def remove_index(folder):
    (folder / "model_index.json").unlink()


def remove_weights(folder):
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()


def truncate_weights(folder):
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def truncate_tensors(folder):
    weights = folder / "text_encoder/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def mismatch_weights(folder):
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps({**config, "ffn_dim": 64}))


def mix_components(folder):
    shutil.copytree(folder / "text_encoder_3", folder / "text_encoder", dirs_exist_ok=True)


@pytest.mark.parametrize(
    "damage, message",
    [
        (remove_index, "model_index.json"),
        (remove_weights, "transformer"),
        (truncate_weights, "vae"),
        (truncate_tensors, "text_encoder"),
        (mismatch_weights, "transformer"),
        (mix_components, "`text_encoder` (UL2) gives features of width 16, but the transformer takes 32"),
    ],
)
def test_damaged_model(model, work, capsys, damage, message):
    shutil.copytree(model, "damaged")
    damage(work / "damaged")
    assert message in refused(capsys, "generate", PROMPT, "--model", "damaged", "-o", "film.mp4")
    assert os.listdir() == ["damaged"]


@pytest.mark.parametrize("model", ["", "./missing", "/missing", "not a name", "a/b/c"])
def test_no_such_model(work, capsys, model):
    error = refused(capsys, "generate", PROMPT, "--model", model, "-o", "film.mp4")
    assert f"'{model}'" in error


@pytest.fixture
def interruptible():
    """A job that a shell starts in the background ignores the signal."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
def test_interruption_leaves_the_old_file(model, work, capsys, monkeypatch):
    (work / "film.mp4").write_text("mine")
    calls = itertools.count()
    forward = diffusers_moviegen.MovieGenTransformer3DModel.forward

    def interrupted_forward(*args, **kwargs):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(*args, **kwargs)

    monkeypatch.setattr(diffusers_moviegen.MovieGenTransformer3DModel, "forward", interrupted_forward)
    assert generate(model, "-o", "film.mp4", "--force") == 130
    assert capsys.readouterr().err.endswith("\nmoviegen: interrupted\n")
    assert os.listdir() == ["film.mp4"]
    assert (work / "film.mp4").read_text() == "mine"


def test_the_default_model_is_the_bundled_one(model, work, monkeypatch):
    monkeypatch.setattr(cli, "bundled_checkpoint", {"toybox": model}.get)
    assert main(["generate", PROMPT, "--steps", "2", "-o", "bundled.png"]) == 0
    assert generate(model, "-o", "named.png") == 0
    assert (work / "bundled.png").read_bytes() == (work / "named.png").read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_preview_draws_a_sheet_and_tells_the_truth(work, capsys, task):
    assert main(["toybox", "preview", task, "-o", "sheet.png", "--num-samples", "2", "--seed", "5"]) == 0
    samples = list(toybox.dataset(task, seed=5, num_samples=2))
    with Image.open("sheet.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(previews.sheet(samples)))
    output = capsys.readouterr()
    expected = [f"{i}: {caption}\n   {truth}" for i, (caption, truth) in enumerate(map(previews.describe, samples))]
    assert output.out == "\n".join([*expected, "path: sheet.png\n"])
    assert output.err == ""


def test_preview_options(work):
    options = ["--split", "held_out", "--seed", "1", "--num-samples", "3", "--height", "96", "--width", "64"]
    options += ["--num-frames", "6", "--frame-rate", "12"]
    assert main(["toybox", "preview", "text_to_video", "-o", "film.mp4", *options]) == 0
    dataset = toybox.dataset(
        "text_to_video", "held_out", 1, num_samples=3, height=96, width=64, num_frames=6, frame_rate=12
    )
    frames, _ = previews.film(list(dataset))
    save_video(frames, "expected.mp4", 12)
    assert (work / "film.mp4").read_bytes() == (work / "expected.mp4").read_bytes()
    with av.open("film.mp4") as container:
        (stream,) = container.streams
        assert (stream.frames, stream.average_rate) == (6, 12)
    assert main(["toybox", "preview", "text_to_video", "-o", "film.mp4", "--force"]) == 0
    with av.open("film.mp4") as container:
        assert (container.streams.video[0].frames, container.streams.video[0].average_rate) == (16, 8)


def test_preview_of_sounds(work):
    assert main(["toybox", "preview", "audio", "-o", "film.mp4", "--num-samples", "2"]) == 0
    assert main(["toybox", "preview", "audio", "-o", "sound.wav", "--num-samples", "2"]) == 0
    samples = list(toybox.dataset("audio", num_samples=2))
    with av.open("film.mp4") as container:
        picture, sound = container.streams
        assert (picture.frames, sound.rate, sound.channels) == (32, 48000, 1)
        assert [float(stream.duration * stream.time_base) for stream in (picture, sound)] == [4, 4]
        decoded = np.concatenate([frame.to_ndarray() for frame in container.decode(sound)], axis=1)[0, : 2 * 96000]
    expected = np.concatenate([sample["audio"][0].numpy() for sample in samples])
    assert np.corrcoef(decoded, expected)[0, 1] > 0.98
    with wave.open("sound.wav") as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (1, 48000, 2 * 96000 + 24000)
        content = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2") / 32767
    np.testing.assert_allclose(content[:96000], samples[0]["audio"][0].numpy(), atol=2e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["develop", "-o", "sheet.png"], "argument task: invalid choice: 'develop'"),
        (["edit"], "the following arguments are required: -o/--output"),
        (["edit", "-o", "sheet.jpg"], "unknown extension '.jpg' of sheet.jpg; use .png, .mp4 or .wav"),
        (["edit", "-o", "mine.png"], "mine.png exists; choose another name, or have it replaced (--force)"),
        (["edit", "-o", "missing/sheet.png"], "there is no folder missing for sheet.png"),
        (["edit", "-o", "sound.wav"], "edit has no sound; use .png or .mp4"),
        (["text_to_image", "-o", "film.mp4"], "single frames make no film; use .png"),
        (["edit", "-o", "film.mp4", "--num-frames", "1"], "single frames make no film; use .png"),
        (["audio", "-o", "sound.wav", "--num-frames", "1"], "too short for a sound: 1 frame(s) at 8 frames a second"),
        (["edit", "-o", "sheet.png", "--split", "test"], "argument --split: invalid choice: 'test'"),
        (["edit", "-o", "sheet.png", "--seed", "-1"], "argument --seed: must be a whole number"),
        (["edit", "-o", "sheet.png", "--num-samples", "0"], "--num-samples must be 1 to 100, not 0"),
        (["edit", "-o", "sheet.png", "--num-samples", "101"], "--num-samples must be 1 to 100, not 101"),
        (
            ["edit", "-o", "sheet.png", "--num-frames", "251"],
            "8 samples of 251 frames are too many to show",
        ),
        (["edit", "-o", "sheet.png", "--height", "50"], "there is no edit of 50 x 64 (height x width): use one of"),
        (["edit", "-o", "sheet.png", "--num-frames", "0"], "`num_frames` must be a whole number of at least 1, not 0"),
        (["edit", "-o", "sheet.png", "--frame-rate", "0"], "--frame-rate: must be a number from 1 to 1000, not '0'"),
        (["text_to_image", "-o", "sheet.png", "--frame-rate", "8"], "text_to_image has single frames"),
    ],
)
def test_bad_previews(work, capsys, arguments, message):
    (work / "mine.png").write_text("mine")
    assert message in refused(capsys, "toybox", "preview", *arguments)
    assert os.listdir() == ["mine.png"]
    assert (work / "mine.png").read_text() == "mine"


def test_toybox_needs_a_command(capsys):
    assert "required: command" in refused(capsys, "toybox")


def test_installed_command():
    command = Path(sys.executable).with_name("moviegen")
    if not command.exists():
        pytest.skip("the package is not installed in this environment")
    result = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stdout) == (0, f"moviegen {diffusers_moviegen.__version__}\n")
