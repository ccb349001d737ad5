import os
import resource
import wave

import av
import numpy as np
import pytest
from PIL import Image

from diffusers_moviegen import media
from diffusers_moviegen.media import check_output_path, save_audio, save_video
from diffusers_moviegen.scoring import load_audio
from tests.training.films import decode, decode_sound, moving_square, psnr, struck_bell


@pytest.mark.parametrize("frame_rate, num_frames", [(8, 16), (16, 9), (24, 1), (30, 33), (23.5, 4)])
def test_mp4_is_what_a_browser_plays(tmp_path, frame_rate, num_frames):
    frames = moving_square(num_frames)
    save_video(frames, tmp_path / "film.mp4", frame_rate)
    with av.open(str(tmp_path / "film.mp4")) as container:
        (stream,) = container.streams
        decoded = list(container.decode(stream))
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.height, stream.width) == frames.shape[1:3]
        assert stream.average_rate == frame_rate
        assert stream.duration * stream.time_base * frame_rate == num_frames
        # 1 is BT.709 for matrix, primaries and transfer, and the limited ("MPEG") range.
        assert {
            (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) for frame in decoded
        } == {(1, 1, 1, 1)}
    assert [frame.time * frame_rate for frame in decoded] == pytest.approx(range(num_frames))
    content = (tmp_path / "film.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_mp4_shows_the_frames(tmp_path):
    frames = moving_square()
    save_video(frames, tmp_path / "film.mp4", 8)
    decoded = decode(tmp_path / "film.mp4")
    assert decoded.shape == frames.shape
    assert psnr(decoded, frames) > 34
    # Away from edges nothing but the rounding of 8-bit YUV and the quantiser is lost.
    for index in range(16):
        centre = decoded[index, 28:36, 4 * index + 4 : 4 * index + 12].reshape(-1, 3).mean(axis=0)
        assert np.abs(centre - (220, 40, 40)).max() < 4


@pytest.mark.parametrize("frame_rate, sampling_rate, channels", [(8, 48000, 1), (24, 44100, 2), (29.97, 48000, 2)])
def test_sound_and_picture_of_an_mp4_start_and_end_together(tmp_path, frame_rate, sampling_rate, channels):
    frames = moving_square(round(2 * frame_rate))
    seconds = len(frames) / frame_rate
    audio = struck_bell(seconds, sampling_rate).repeat(channels, axis=0)
    audio[1:] *= -0.5
    save_video(frames, tmp_path / "film.mp4", frame_rate, audio, sampling_rate)
    with av.open(str(tmp_path / "film.mp4")) as container:
        picture, sound = container.streams
        assert (picture.codec_context.name, sound.codec_context.name) == ("h264", "aac")
        assert (sound.rate, sound.channels) == (sampling_rate, channels)
        assert picture.start_time == sound.start_time == 0
        assert float(picture.duration * picture.time_base) == pytest.approx(seconds, abs=1e-3)
        assert float(sound.duration * sound.time_base) == pytest.approx(seconds, abs=1e-3)
        assert [frame.time for frame in container.decode(picture)][:2] == pytest.approx([0, 1 / frame_rate])
    content = (tmp_path / "film.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert psnr(decode(tmp_path / "film.mp4"), frames) > 34
    # AAC works on blocks of 1024 samples: one that starts late would be off by hundreds of samples.
    decoded = decode_sound(tmp_path / "film.mp4")[:, : audio.shape[1]]
    assert decoded.shape == audio.shape
    lags = [np.sum(np.roll(decoded, -lag, axis=1) * audio) for lag in range(-1100, 1101)]
    assert np.argmax(lags) == 1100
    assert np.abs(decoded - audio).max() < 0.05 and np.abs(decoded - audio).mean() < 0.002


def test_wav_is_exact(tmp_path):
    audio = struck_bell(0.5, 16000, strike=0.1).repeat(2, axis=0)
    audio[1] = np.linspace(-1, 1, audio.shape[1])
    save_audio(audio, tmp_path / "sound.WAV", 16000)
    with wave.open(str(tmp_path / "sound.WAV")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 16000)
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").reshape(-1, 2).T
    assert samples.shape == audio.shape
    assert np.abs(samples / 32767 - audio).max() <= 0.5 / 32767 + 1e-7
    assert samples[1, 0] == -32767 and samples[1, -1] == 32767


def test_a_long_film_is_interleaved(tmp_path):
    # A player that reads from the start needs both streams of a moment close to each other.
    save_video(moving_square(23 * 8, 16, 752), tmp_path / "film.mp4", 8, struck_bell(23), 48000)
    with av.open(str(tmp_path / "film.mp4")) as container:
        times = [(packet.pos, float(packet.dts * packet.time_base)) for packet in container.demux() if packet.size]
    times = [time for _, time in sorted(times)]
    assert np.diff(times).min() > -1.5


def test_float_wav_is_exact(tmp_path):
    audio = np.stack([struck_bell(0.1, 16000, 0.05)[0], np.linspace(-1, 1, 1600, dtype=np.float32)])
    save_audio(audio, tmp_path / "sound.wav", 16000, floating_point=True)
    content = (tmp_path / "sound.wav").read_bytes()
    # WAVE_FORMAT_IEEE_FLOAT, channels, samples a second, bytes a second, bytes a frame, bits a sample.
    start = content.index(b"fmt ") + 8
    assert content[:4] == b"RIFF" and int.from_bytes(content[start : start + 2], "little") == 3
    assert np.frombuffer(content[start + 2 : start + 16], "<u2").tolist() == [2, 16000, 0, 128000 % 65536, 1, 8, 32]
    start = content.index(b"data") + 8
    np.testing.assert_array_equal(np.frombuffer(content[start:], "<f4").reshape(-1, 2).T, audio)
    loaded, sampling_rate = load_audio(tmp_path / "sound.wav")
    assert sampling_rate == 16000 and loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, audio)


@pytest.mark.parametrize(
    "audio, sampling_rate, message",
    [
        (np.zeros((3, 100), np.float32), 48000, r"1 or 2 channels, not \(3, 100\)"),
        (np.zeros(100, np.float32), 48000, r"not \(100,\)"),
        (np.zeros((1, 0), np.float32), 48000, r"not \(1, 0\)"),
        (np.zeros((1, 100), np.int16), 48000, "floating point in -1 to 1, not int16"),
        (np.full((1, 100), 1.5), 48000, "-1 to 1, found 1.5 to 1.5"),
        (np.full((1, 100), np.nan), 48000, "-1 to 1, found nan to nan"),
        (np.zeros((1, 100)), None, "needs its sampling_rate, .* not None"),
        (np.zeros((1, 100)), 0, "needs its sampling_rate, .* not 0"),
    ],
)
def test_refused_sounds_leave_the_folder_as_it_was(tmp_path, audio, sampling_rate, message):
    for name in ("film.mp4", "sound.wav"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=message):
        save_video(moving_square(1), tmp_path / "film.mp4", 8, audio, sampling_rate)
    with pytest.raises(ValueError, match=message):
        save_audio(audio, tmp_path / "sound.wav", sampling_rate)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "sound.wav"]
    assert all(path.read_text() == "mine" for path in tmp_path.iterdir())


def test_sounds_go_where_sounds_belong(tmp_path):
    audio = struck_bell(0.1)
    for name in ("film.gif", "film.png"):
        with pytest.raises(ValueError, match=f"a {name[-4:]} holds no sound; use .mp4"):
            save_video(moving_square(1), tmp_path / name, 8, audio, 48000)
    with pytest.raises(ValueError, match="cannot have 12345 samples a second; use one of 8000, .*, 96000"):
        save_video(moving_square(1), tmp_path / "film.mp4", 8, audio, 12345)
    with pytest.raises(ValueError, match="unknown extension '.mp3' of .*; use .wav$"):
        save_audio(audio, tmp_path / "sound.mp3", 48000)
    with pytest.raises(ValueError, match="unknown extension '.wav' of .*; use .mp4, .gif or .png$"):
        save_video(moving_square(1), tmp_path / "sound.wav", 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("frame_rate", [7, 8, 24])
def test_gif_keeps_frames_and_length(tmp_path, frame_rate):
    frames = moving_square()
    save_video(frames, tmp_path / "film.gif", frame_rate)
    with Image.open(tmp_path / "film.gif") as image:
        assert image.n_frames == 16
        assert image.info["loop"] == 0
        milliseconds, decoded = 0, []
        for index in range(image.n_frames):
            image.seek(index)
            milliseconds += image.info["duration"]
            decoded.append(np.asarray(image.convert("RGB")))
    # A GIF's clock ticks every 10 ms.
    assert abs(milliseconds - 16000 / frame_rate) <= 5
    assert psnr(np.stack(decoded), frames) > 30


def test_png_is_exact(tmp_path):
    frames = moving_square(1)
    save_video(frames, tmp_path / "picture.PNG", 8)
    with Image.open(tmp_path / "picture.PNG") as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), frames[0])


def test_floats_and_pil_images_give_the_same_file(tmp_path):
    frames = moving_square(3)
    save_video(frames, tmp_path / "uint8.mp4", 8)
    save_video(frames.astype(np.float32) / 255, tmp_path / "float.mp4", 8)
    save_video([Image.fromarray(frame) for frame in frames], tmp_path / "pil.mp4", 8)
    expected = (tmp_path / "uint8.mp4").read_bytes()
    assert (tmp_path / "float.mp4").read_bytes() == expected
    assert (tmp_path / "pil.mp4").read_bytes() == expected


@pytest.mark.parametrize(
    "frames, name, frame_rate, message",
    [
        (moving_square(2), "film.avi", 8, "unknown extension '.avi'"),
        (moving_square(2), "film", 8, "unknown extension ''"),
        (moving_square(2), "film.png", 8, "one frame, not 2"),
        (moving_square(2), "film.mp4", 0, "frame_rate must be 1 to 1000 frames a second, not 0"),
        (moving_square(2)[:, :, :95], "film.mp4", 8, "even height and width, not 64 x 95"),
        (moving_square(0), "film.mp4", 8, "no frames"),
        (moving_square(2)[..., :1], "film.mp4", 8, r"not \(64, 96, 1\)"),
        ([*moving_square(1), *moving_square(1, width=64)], "film.gif", 8, r"\[\(64, 64\), \(64, 96\)\]"),
        (np.full((2, 16, 16, 3), -0.5), "film.mp4", 8, "0 to 1, found -0.5 to -0.5"),
        (np.full((2, 16, 16, 3), np.nan), "film.mp4", 8, "0 to 1, found nan to nan"),
    ],
)
def test_refused_frames_leave_the_folder_as_it_was(tmp_path, frames, name, frame_rate, message):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=message):
        save_video(frames, tmp_path / name, frame_rate)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_check_output_path(tmp_path):
    check_output_path(tmp_path / "film.mp4")
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "film.mp4").write_text("mine")
    with pytest.raises(OSError, match="film.mp4 exists"):
        check_output_path(tmp_path / "film.mp4")
    check_output_path(tmp_path / "film.mp4", overwrite=True)
    assert (tmp_path / "film.mp4").read_text() == "mine"

    with pytest.raises(OSError, match="no folder .*missing for film.mp4"):
        check_output_path(tmp_path / "missing" / "film.mp4")
    with pytest.raises(OSError, match="no folder"):
        check_output_path(tmp_path / "film.mp4" / "film.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OSError, match="folder.mp4 is a folder"):
        check_output_path(tmp_path / "folder.mp4", overwrite=True)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that not even root can write into")
def test_unwritable_folder_is_refused():
    with pytest.raises(OSError, match="cannot write into the folder /proc/self"):
        check_output_path("/proc/self/film.mp4")


@pytest.fixture
def full_disk():
    """A limit on the size of files stands in for a disk with no more than 2000 bytes left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
def test_a_full_disk_leaves_the_old_file(tmp_path, name, full_disk):
    (tmp_path / name).write_text("mine")
    frames = np.random.default_rng(0).random((8, 64, 64, 3))
    with pytest.raises(OSError, match=f"^cannot write {tmp_path / name}: File too large$"):
        save_video(frames, tmp_path / name, 8)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_full_disk_leaves_the_old_sound(tmp_path, full_disk):
    (tmp_path / "sound.wav").write_text("mine")
    (tmp_path / "film.mp4").write_text("mine")
    with pytest.raises(OSError, match=f"^cannot write {tmp_path / 'sound.wav'}: File too large$"):
        save_audio(struck_bell(), tmp_path / "sound.wav", 48000)
    with pytest.raises(OSError, match=f"^cannot write {tmp_path / 'film.mp4'}: File too large$"):
        save_video(moving_square(8), tmp_path / "film.mp4", 8, struck_bell(), 48000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "sound.wav"]
    assert all(path.read_text() == "mine" for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["film.mp4", "film.gif", "film.png", "sound.wav"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, name):
    def interrupt(source, destination):
        assert os.path.getsize(source) > 0
        raise KeyboardInterrupt

    (tmp_path / name).write_text("mine")
    monkeypatch.setattr(media.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        if name == "sound.wav":
            save_audio(struck_bell(), tmp_path / name, 48000)
        else:
            save_video(moving_square(1), tmp_path / name, 8)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
