"""The commands that make sounds: `score`, `sound` and `generate --audio`."""

import os
import wave

import av
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_moviegen import AutoencoderDACVAE, MovieGenAudioPipeline, MovieGenPipeline, cli
from diffusers_moviegen.cli import main
from diffusers_moviegen.media import save_video
from diffusers_moviegen.scoring import load_audio, probe_film, read_film, save_scored_film
from tests.test_cli import PROMPT, refused, work  # noqa: F401
from tests.tiny import tiny_audio_pipeline
from tests.training.films import cut_off, film_packets, moving_square, struck_bell, write_film, write_sound


HEAR = "rain and a chime"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny audio pipeline at the rate of the real one, which is one that films can have."""
    torch.manual_seed(6)
    vae = AutoencoderDACVAE(
        encoder_hidden_size=1,
        decoder_hidden_size=16,
        latent_channels=6,
        latents_mean=[0.0] * 6,
        # With random weights it would whisper otherwise.
        latents_std=[1000.0] * 6,
    ).eval()
    folder = tmp_path_factory.mktemp("audio")
    tiny_audio_pipeline(vae=vae).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def film(work):  # noqa: F811
    """A film of 70 frames, more than one part, at 24 frames a second, with a sound."""
    save_video(moving_square(70, 32, 304), "film.mp4", 24, struck_bell(70 / 24), 48000)
    return "film.mp4"


def sound_of(model, **options):
    pipeline = MovieGenAudioPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "generator": torch.Generator().manual_seed(0), **options}
    return pipeline(**options).audios[0]


def score(model, film, *arguments):
    return main(["score", film, "--model", model, "--steps", "1", *arguments])


def test_score_adds_the_sound_of_the_pipeline(model, film, work, capsys):  # noqa: F811
    options = ["--seed", "3", "--guidance", "4", "--negative-prompt", "music", "--device", "cpu", "--dtype", "float32"]
    assert score(model, film, "-o", "scored.mp4", "--prompt", HEAR, *options) == 0
    output = capsys.readouterr()
    lines = dict(line.split(": ", 1) for line in output.out.splitlines())
    assert list(lines) == ["film", "prompt", "replaced", "seed", "seconds", "path"]
    assert (lines["film"], lines["prompt"], lines["path"]) == ("film.mp4", HEAR, "scored.mp4")
    assert lines["replaced"] == "the film's own sound (aac)"
    assert "70/70" in output.err and "1/1" in output.err  # the progress bars

    assert film_packets("scored.mp4") == film_packets("film.mp4")
    with av.open("scored.mp4") as container:
        picture, sound = container.streams
        assert (sound.codec_context.name, sound.rate, sound.channels) == ("aac", 48000, 1)
        assert picture.start_time == sound.start_time == 0
        for stream in (picture, sound):
            assert float(stream.duration * stream.time_base) == pytest.approx(70 / 24, abs=1e-3)

    # All frames at once, where the command encodes them in parts.
    info = probe_film(film)
    audio = sound_of(
        model,
        prompt=HEAR,
        video=np.concatenate(list(read_film(info))),
        video_frame_rate=24,
        negative_prompt="music",
        guidance_scale=4,
        generator=torch.Generator().manual_seed(3),
    )
    assert audio.shape == (1, 140000)
    save_scored_film(info, "expected.mp4", audio, 48000)
    assert np.abs(audio).max() > 0.01
    assert (work / "scored.mp4").read_bytes() == (work / "expected.mp4").read_bytes()


@pytest.mark.parametrize(
    "option, value",
    [("--prompt", HEAR), ("--seed", "1"), ("--guidance", "1"), ("--steps", "2"), ("--negative-prompt", "a bell")],
)
def test_the_sound_depends_on_the_options_and_on_nothing_else(model, work, option, value):  # noqa: F811
    film = str(write_film("film.mp4", moving_square(5, 32)))
    for name in ("plain.mp4", "again.mp4"):
        assert score(model, film, "-o", name) == 0
    assert score(model, film, "-o", "other.mp4", option, value) == 0
    assert (work / "again.mp4").read_bytes() == (work / "plain.mp4").read_bytes()
    assert np.abs(load_audio("other.mp4")[0] - load_audio("plain.mp4")[0]).max() > 1e-3


def test_a_film_without_sound_and_with_fast_frames(model, work, capsys):  # noqa: F811
    # Read at 25 frames a second of its 60; the sound lasts as long as the film, not as long as 12 of those.
    write_film("film.mkv", moving_square(29, 32, 304), rate=60)
    assert score(model, "film.mkv", "-o", "scored.mp4") == 0
    assert "replaced" not in capsys.readouterr().out
    samples = round(probe_film("film.mkv").duration * 48000)
    assert load_audio("scored.mp4")[0].shape == (1, pytest.approx(samples, abs=48))


def test_sound_writes_the_sound_of_the_pipeline(model, work, capsys):  # noqa: F811
    arguments = ["sound", HEAR, "--model", model, "--seconds", "0.5", "--steps", "1", "--seed", "3"]
    assert main([*arguments, "-o", "sound.wav"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["prompt", "seed", "seconds", "path"]
    assert (lines["prompt"], lines["seed"], lines["path"]) == (HEAR, "3", "sound.wav")
    assert main([*arguments, "-o", "float.wav", "--float"]) == 0
    expected = sound_of(model, prompt=HEAR, audio_length_in_s=0.5, generator=torch.Generator().manual_seed(3))
    with wave.open("sound.wav") as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 48000)
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    np.testing.assert_array_equal(samples, np.rint(expected[0] * 32767))
    audio, sampling_rate = load_audio("float.wav")
    assert sampling_rate == 48000
    np.testing.assert_array_equal(audio, expected)


def test_generate_with_audio(model, pipeline_folder, work):  # noqa: F811
    video_model = str(pipeline_folder)
    arguments = ["generate", PROMPT, "--model", video_model, "--steps", "2", "--seed", "3"]
    audio_arguments = ["--audio", "--audio-model", model, "--audio-steps", "1"]
    assert main([*arguments, "-o", "silent.mp4"]) == 0
    assert main([*arguments, *audio_arguments, "-o", "film.mp4"]) == 0
    assert main([*arguments, *audio_arguments, "-o", "rain.mp4", "--audio-prompt", HEAR]) == 0
    assert film_packets("film.mp4") == film_packets("silent.mp4")

    generator = torch.Generator().manual_seed(3)
    pipeline = MovieGenPipeline.from_pretrained(video_model)
    video = pipeline(PROMPT, num_inference_steps=2, generator=generator, output_type="np").frames[0]
    for name, prompt in (("film.mp4", None), ("rain.mp4", HEAR)):
        generator = torch.Generator().manual_seed(3)
        audio = sound_of(model, prompt=prompt, video=video, video_frame_rate=8, generator=generator)
        assert audio.shape == (1, 54000)
        save_video(video, "expected.mp4", 8, audio, 48000)
        assert (work / name).read_bytes() == (work / "expected.mp4").read_bytes()
    assert (work / "rain.mp4").read_bytes() != (work / "film.mp4").read_bytes()


def test_the_default_model_is_the_bundled_one(model, pipeline_folder, film, work, monkeypatch):  # noqa: F811
    bundles = {"toybox": str(pipeline_folder), "toybox-audio": model}
    monkeypatch.setattr(cli, "bundled_checkpoint", bundles.__getitem__)
    assert main(["score", film, "-o", "scored.mp4", "--steps", "1"]) == 0
    assert main(["sound", HEAR, "-o", "sound.wav", "--seconds", "0.04", "--steps", "1"]) == 0
    assert main(["generate", PROMPT, "-o", "new.mp4", "--steps", "1", "--audio", "--audio-steps", "1"]) == 0
    assert load_audio("sound.wav")[0].shape == (1, 1920)
    assert load_audio("new.mp4")[0].shape == (1, 54000)


def test_force_replaces_and_nothing_else_does(model, film, work, capsys):  # noqa: F811
    for name, arguments in {
        "scored.mp4": ["score", film],
        "sound.wav": ["sound", HEAR, "--seconds", "0.1"],
    }.items():
        (work / name).write_text("mine")
        arguments += ["--model", model, "--steps", "1", "-o", name]
        assert f"{name} exists; choose another name" in refused(capsys, *arguments)
        assert (work / name).read_text() == "mine"
        assert main([*arguments, "--force"]) == 0
        assert (work / name).read_bytes()[:4] != b"mine"
        capsys.readouterr()
    assert sorted(os.listdir()) == ["film.mp4", "scored.mp4", "sound.wav"]


def test_a_film_is_not_written_over_itself(model, film, work, capsys):  # noqa: F811
    content = (work / film).read_bytes()
    os.symlink(film, "link.mp4")
    os.link(film, "same.mp4")
    for name in (film, "link.mp4", "same.mp4", str(work / film)):
        error = refused(capsys, "score", film, "-o", name, "--model", model, "--force")
        assert f"{name} is the film itself; choose another name" in error
    assert (work / film).read_bytes() == content
    assert sorted(os.listdir()) == ["film.mp4", "link.mp4", "same.mp4"]


def write_bad_films(folder):
    frames = moving_square(48, 32, 304)
    write_sound(folder / "song.mp4")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no film\n" * 100)
    Image.fromarray(frames[0]).save(folder / "picture.png")
    cut_off(write_film(folder / "headless.mp4", frames), 0.9)
    cut_off(write_film(folder / "truncated.mp4", frames, container_options={"movflags": "faststart"}), 0.6)
    damaged = write_film(folder / "damaged.mp4", frames)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 500] = bytes(500)
    damaged.write_bytes(content)
    write_film(folder / "old.webm", frames[:2], codec="libvpx")
    (folder / "folder.mp4").mkdir()


@pytest.mark.parametrize(
    "film, message",
    [
        ("missing.mp4", "missing.mp4: no such file"),
        ("", "unreadable file (Is a directory)"),
        ("folder.mp4", "folder.mp4: unreadable file (Is a directory)"),
        ("empty.mp4", "empty.mp4: empty file"),
        ("text.mp4", "text.mp4: no picture or film that can be decoded"),
        ("song.mp4", "song.mp4: no video stream"),
        ("picture.png", "picture.png: a picture, not a film"),
        ("headless.mp4", "headless.mp4: no picture or film that can be decoded"),
        ("truncated.mp4", "truncated.mp4: damaged or truncated film"),
        ("damaged.mp4", "damaged.mp4: damaged or truncated film"),
        ("old.webm", "old.webm: an .mp4 cannot hold its codec, vp8; convert the film to H.264 first"),
    ],
)
def test_bad_films(model, work, capsys, film, message):  # noqa: F811
    write_bad_films(work)
    (work / "mine.mp4").write_text("mine")
    before = sorted(os.listdir())
    try:
        status = score(model, film, "-o", "mine.mp4", "--force")
    except SystemExit as exit:
        status = exit.code
    output = capsys.readouterr()
    assert (status, output.out) == (2, "")
    # Before the line there may be the progress bar, since some damage is found by decoding only.
    assert message in output.err.splitlines()[-1]
    assert output.err.splitlines()[-1].startswith("moviegen: error: ")
    assert sorted(os.listdir()) == before
    assert (work / "mine.mp4").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["score", "film.mp4", "-o", "a.mkv"], "unknown extension '.mkv' of a.mkv; use .mp4"),
        (["score", "film.mp4", "-o", "missing/a.mp4"], "there is no folder missing for a.mp4"),
        (["score", "film.mp4", "-o", "a.mp4", "--prompt", " "], "argument --prompt: is empty; say what to hear"),
        (["score", "film.mp4", "-o", "a.mp4", "--steps", "0"], "`num_inference_steps` must be a whole number"),
        (["score", "film.mp4", "-o", "a.mp4", "--guidance", "nan"], "`guidance_scale` must be a finite number"),
        (["score", "film.mp4", "-o", "a.mp4", "--device", "abacus"], "device 'abacus' is not available here"),
        (["score", "film.mp4"], "required: -o/--output"),
        (["score", "-o", "a.mp4"], "required: film"),
        (["sound", HEAR, "-o", "a.mp3", "--seconds", "1"], "unknown extension '.mp3' of a.mp3; use .wav"),
        (["sound", "", "-o", "a.wav", "--seconds", "1"], "argument prompt: is empty; say what to hear"),
        (["sound", "\udcff", "-o", "a.wav", "--seconds", "1"], "argument prompt: is not valid UTF-8"),
        (["sound", HEAR, "-o", "a.wav"], "required: --seconds"),
        (["sound", HEAR, "-o", "a.wav", "--seconds", "0"], "--seconds: must be a number from 0.04 to 14400, not '0'"),
        (["sound", HEAR, "-o", "a.wav", "--seconds", "-1"], "not '-1'"),
        (["sound", HEAR, "-o", "a.wav", "--seconds", "nan"], "not 'nan'"),
        (["sound", HEAR, "-o", "a.wav", "--seconds", "inf"], "not 'inf'"),
        (["sound", HEAR, "-o", "a.wav", "--seconds", "20000"], "not '20000'"),
        (["sound", HEAR, "-o", "a.wav", "--seconds", "long"], "not 'long'"),
        (["generate", PROMPT, "-o", "a.gif", "--audio"], "only an .mp4 holds sound, not a.gif"),
        (["generate", PROMPT, "-o", "a.png", "--audio"], "only an .mp4 holds sound, not a.png"),
        (["generate", PROMPT, "-o", "a.mp4", "--audio-prompt", HEAR], "--audio-prompt is for films with sound; add"),
        (["generate", PROMPT, "-o", "a.mp4", "--audio-steps", "1"], "--audio-steps is for films with sound; add"),
        (["generate", PROMPT, "-o", "a.mp4", "--audio-model", "."], "--audio-model is for films with sound; add"),
        (["generate", PROMPT, "-o", "a.mp4", "--audio", "--audio-prompt", ""], "--audio-prompt: is empty"),
    ],
)
def test_bad_options(model, film, capsys, arguments, message):
    if arguments[0] != "generate":
        arguments = [*arguments, "--model", model]
    try:
        status = main(arguments)
    except SystemExit as exit:
        status = exit.code
    output = capsys.readouterr()
    assert (status, output.out) == (2, "")
    assert message in output.err.splitlines()[-1]
    assert os.listdir() == ["film.mp4"]


def test_a_film_that_is_too_long(model, film, capsys, monkeypatch):
    monkeypatch.setattr(cli, "MAX_SECONDS", 2)
    error = refused(capsys, "score", film, "-o", "a.mp4", "--model", model)
    assert "film.mp4 lasts 3 seconds; a sound lasts at most 2, so cut it" in error


def test_what_is_wrong_is_found_before_a_model_is_loaded(film, work, capsys):  # noqa: F811
    (work / "text.mp4").write_text("no film")
    for arguments in (
        ["score", film, "-o", "a.avi"],
        ["score", "text.mp4", "-o", "a.mp4"],
        ["sound", HEAR, "--seconds", "1", "-o", "a.mp3"],
    ):
        assert "no-such-model" not in refused(capsys, *arguments, "--model", "./no-such-model")
    for arguments in (["score", film, "-o", "a.mp4"], ["sound", HEAR, "--seconds", "1", "-o", "a.wav"]):
        assert "no-such-model" in refused(capsys, *arguments, "--model", "./no-such-model")


def test_the_models_of_films_and_of_sounds_are_not_mixed_up(model, pipeline_folder, film, capsys):
    video_model = str(pipeline_folder)
    for arguments in (["score", film, "-o", "a.mp4"], ["sound", HEAR, "--seconds", "1", "-o", "a.wav"]):
        error = refused(capsys, *arguments, "--model", video_model)
        assert f"'{video_model}' holds a MovieGenPipeline; this needs a MovieGenAudioPipeline" in error
    error = refused(capsys, "generate", PROMPT, "-o", "a.mp4", "--model", model)
    assert f"'{model}' holds a MovieGenAudioPipeline; this needs a MovieGenPipeline" in error
    arguments = ["--model", video_model, "--audio", "--audio-model", video_model]
    assert "this needs a MovieGenAudioPipeline" in refused(capsys, "generate", PROMPT, "-o", "a.mp4", *arguments)
    assert os.listdir() == ["film.mp4"]


def test_a_model_whose_sounds_no_film_can_have(tmp_path_factory, film, capsys):
    folder = tmp_path_factory.mktemp("slow")
    tiny_audio_pipeline().save_pretrained(folder)
    assert score(str(folder), film, "-o", "a.mp4") == 2
    assert "cannot have 200 samples a second" in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir() == ["film.mp4"]
