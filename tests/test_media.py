import bisect
import hashlib
import os
import resource
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_moviegen import media, scoring
from diffusers_moviegen.media import check_output_path, save_audio, save_video
from diffusers_moviegen.scoring import load_audio, probe_film, read_film, save_scored_film
from diffusers_moviegen.training import read_media
from tests.training.films import grey_frames, quarters, write_film, write_sound


def moving_square(num_frames=16, height=64, width=96):
    """A smooth coloured ground over which a red square of 16 pixels, on even coordinates, moves to the right."""
    rows, columns = np.mgrid[:height, :width]
    ground = np.stack([60 + columns, 40 + rows, 200 - columns], axis=-1).astype(np.uint8)
    frames = np.repeat(ground[None], num_frames, axis=0)
    for index, frame in enumerate(frames):
        frame[24:40, 4 * index : 4 * index + 16] = (220, 40, 40)
    return frames


def struck_bell(seconds=2.0, sampling_rate=48000, strike=0.5):
    """Silence up to the strike, then a tone of 880 Hz that starts suddenly and decays; shape (1, samples)."""
    time = np.arange(round(seconds * sampling_rate)) / sampling_rate - strike
    tone = 0.6 * np.sin(2 * np.pi * 880 * time) * np.exp(-np.maximum(time, 0) / 0.08)
    return np.where(time >= 0, tone, 0).astype(np.float32)[None]


def decode_sound(path):
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
        assert frames[0].pts == 0
        return np.concatenate([frame.to_ndarray() for frame in frames], axis=1)


def decode(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def film_packets(path):
    """What a film's stream of pictures consists of: times in seconds from its first frame on, and contents."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        tick, start = stream.time_base, min(packet.pts for packet in packets if not packet.is_discard)
        times = [((packet.pts - start) * tick, packet.is_keyframe) for packet in packets]
        return tick, times, [hashlib.sha256(bytes(packet)).hexdigest() for packet in packets]


def psnr(first, second):
    return 10 * np.log10(255**2 / np.mean((first.astype(np.float64) - second) ** 2))


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


@pytest.mark.parametrize("channels, sampling_rate", [(1, 16000), (2, 44100)])
def test_load_audio(tmp_path, channels, sampling_rate):
    audio = struck_bell(0.7, sampling_rate, 0.2).repeat(channels, axis=0)
    audio[1:] *= -0.5
    save_audio(audio, tmp_path / "sound.wav", sampling_rate)
    loaded, rate = load_audio(tmp_path / "sound.wav")
    assert rate == sampling_rate
    np.testing.assert_allclose(loaded, audio, atol=1e-4)
    # Neither the samples with which AAC begins nor those that fill its last block are sound.
    save_video(moving_square(7), tmp_path / "film.mp4", 10, audio, sampling_rate)
    loaded, rate = load_audio(tmp_path / "film.mp4")
    assert rate == sampling_rate and loaded.shape == audio.shape
    assert np.abs(loaded - audio).max() < 0.1


def test_load_audio_refuses_what_has_no_sound(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no sound\n" * 100)
    save_video(moving_square(2), tmp_path / "film.mp4", 8)
    for name, message in {
        "missing.wav": "missing.wav: no such file",
        "empty.wav": "empty.wav: empty file",
        "text.wav": "text.wav: no sound that can be decoded",
        "film.mp4": "film.mp4 has no sound",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_audio(tmp_path / name)


# --- Films that get a sound ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate, expected", [(8, 8), (24, 24), (25, 25), (60, 25)])
@pytest.mark.parametrize("name", ["film.mp4", "film.mkv"])
def test_read_film_shows_what_read_media_shows(tmp_path, name, rate, expected):
    path = write_film(tmp_path / name, grey_frames(24), rate=rate, options={"bf": "2", "g": "8"})
    film = probe_film(path)
    assert film.frame_rate == pytest.approx(expected)
    assert film.duration == pytest.approx(24 / rate, abs=2e-3)
    assert film.num_frames == round(24 * expected / rate)
    (frames,) = read_film(film)
    reference = read_media(path, film.num_frames, film.height, film.width, film.frame_rate)
    assert torch.equal(torch.from_numpy(frames).permute(3, 0, 1, 2), reference)


def test_read_film_goes_by_timestamps(tmp_path):
    times = [0, 33, 100, 133, 480, 500, 1210, 1250, 1290, 1800]
    film = probe_film(write_film(tmp_path / "film.mkv", grey_frames(10), times=times))
    (frames,) = read_film(film)
    assert (film.frame_rate, len(frames)) == (25, 45)
    shown = ((frames.mean(axis=(1, 2, 3)) - 20) / 9).round().astype(int).tolist()
    assert shown == [bisect.bisect_right(times, 40 * k) - 1 for k in range(45)]


@pytest.mark.parametrize(
    "part_bytes, lengths", [(2**28, [64, 64, 2]), (3 * 16 * 24 * 50, [50, 50, 30]), (9, [1] * 130)]
)
def test_read_film_in_parts(tmp_path, monkeypatch, part_bytes, lengths):
    monkeypatch.setattr(scoring, "_PART_BYTES", part_bytes)
    film = probe_film(write_film(tmp_path / "film.mp4", grey_frames(26, 16, 24) * 5, rate=25))
    parts = list(read_film(film))
    assert [len(part) for part in parts] == lengths
    (whole,) = torch.from_numpy(np.concatenate(parts))[None]
    assert torch.equal(whole.permute(3, 0, 1, 2), read_media(film.path, 130, 16, 24, 25))


@pytest.mark.parametrize(
    "options, size",
    [({"rotation": (-90,)}, (96, 64)), ({"rotation": (180, True)}, (64, 96)), ({"sample_aspect_ratio": 2}, (64, 192))],
)
def test_read_film_shows_what_a_player_shows(tmp_path, options, size):
    film = probe_film(write_film(tmp_path / "film.mp4", [quarters(64, 96)] * 2, **options))
    assert (film.height, film.width) == size
    (frames,) = read_film(film)
    reference = read_media(film.path, 2, film.height, film.width, 24)
    assert torch.equal(torch.from_numpy(frames).permute(3, 0, 1, 2), reference)


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("film.mp4", "libx264", {"bf": "2", "g": "8"}),
        ("film.mov", "libx264", {"bf": "0"}),
        ("film.mkv", "libx264", {"bf": "2", "g": "8"}),
        ("film.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
        ("film.avi", "mpeg4", {}),
        ("film.mpg", "mpeg2video", {"bf": "2"}),
    ],
)
def test_a_scored_film_has_the_packets_of_the_film(tmp_path, name, codec, options):
    path = write_film(tmp_path / name, grey_frames(26), rate=25, codec=codec, options=options)
    film = probe_film(path)
    audio = struck_bell(film.duration)
    save_scored_film(film, tmp_path / "scored.mp4", audio, 48000)
    assert film_packets(tmp_path / "scored.mp4") == film_packets(path)
    np.testing.assert_array_equal(decode(tmp_path / "scored.mp4"), decode(path))
    with av.open(str(tmp_path / "scored.mp4")) as container:
        picture, sound = container.streams
        assert (sound.codec_context.name, sound.rate, sound.channels) == ("aac", 48000, 1)
        assert picture.start_time == sound.start_time == 0
        ends = [float(stream.duration * stream.time_base) for stream in (picture, sound)]
        assert ends == pytest.approx([1.04, 1.04], abs=2.1e-3)
    loaded, _ = load_audio(tmp_path / "scored.mp4")
    assert loaded.shape == (1, pytest.approx(audio.shape[1], abs=48))
    lags = [np.sum(np.roll(loaded, -lag, axis=1) * audio[:, : loaded.shape[1]]) for lag in range(-50, 51)]
    assert np.argmax(lags) == 50


def test_two_pictures_of_one_time_are_no_obstacle(tmp_path):
    with av.open(str(tmp_path / "film.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        packets = []
        for index, pixels in enumerate(grey_frames(8)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = 40 * index, Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode()
        packets[4].pts = packets[4].dts = 3 * 40
        container.mux(packets)
    film = probe_film(tmp_path / "film.mkv")
    save_scored_film(film, tmp_path / "scored.mp4", struck_bell(film.duration), 48000)
    (tick, times, contents), (_, scored_times, scored_contents) = map(
        film_packets, (tmp_path / "film.mkv", tmp_path / "scored.mp4")
    )
    assert scored_contents == contents
    # An .mp4 counts the ticks from one picture to the next, and they cannot be none.
    assert [time - other for (time, _), (other, _) in zip(scored_times, times, strict=True)] == [
        tick if index == 4 else 0 for index in range(8)
    ]


def test_a_scored_transport_stream_shows_the_same(tmp_path):
    # Its packets begin with start codes, which an .mp4 has no place for, and its clock starts anywhere.
    path = write_film(tmp_path / "film.ts", grey_frames(26), rate=25, options={"bf": "2"})
    film = probe_film(path)
    save_scored_film(film, tmp_path / "scored.mp4", struck_bell(film.duration), 48000)
    assert film_packets(tmp_path / "scored.mp4")[:2] == film_packets(path)[:2]
    np.testing.assert_array_equal(decode(tmp_path / "scored.mp4"), decode(path))
    with av.open(str(tmp_path / "scored.mp4")) as container:
        assert {stream.start_time for stream in container.streams} == {0}


@pytest.mark.parametrize("options", [{"rotation": (90,)}, {"sample_aspect_ratio": Fraction(4, 3)}])
def test_a_scored_film_is_shown_as_the_film_is(tmp_path, options):
    path = write_film(tmp_path / "film.mp4", [quarters()] * 3, **options)
    film = probe_film(path)
    save_scored_film(film, tmp_path / "scored.mp4", struck_bell(film.duration), 48000)
    scored = probe_film(tmp_path / "scored.mp4")
    assert (scored.height, scored.width) == (film.height, film.width) != (64, 96)
    assert np.array_equal(*(np.concatenate(list(read_film(each))) for each in (scored, film)))


def test_a_scored_film_keeps_titles_and_colours_and_leaves_out_the_rest(tmp_path):
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        container.metadata["title"] = "A grey film"
        stream = container.add_stream("libx264", rate=25)
        sounds = [container.add_stream("aac", rate=48000, layout="stereo") for _ in range(2)]
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.color_primaries = stream.codec_context.color_trc = stream.codec_context.colorspace = 1
        for index, pixels in enumerate(grey_frames(5)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        for sound in sounds:
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 9600), np.float32), format="fltp", layout="stereo")
            frame.pts, frame.sample_rate, frame.time_base = 0, 48000, Fraction(1, 48000)
            container.mux([*sound.encode(frame), *sound.encode()])
        container.mux(stream.encode())
    film = probe_film(tmp_path / "film.mp4")
    assert (film.sounds, film.other_streams) == (("aac", "aac"), ())
    save_scored_film(film, tmp_path / "scored.mp4", struck_bell(0.2, strike=0.1), 48000)
    with av.open(str(tmp_path / "scored.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
        assert container.metadata["title"] == "A grey film"
        assert container.streams.video[0].codec_context.color_primaries == 1
    assert np.abs(load_audio(tmp_path / "scored.mp4")[0]).max() > 0.3


def shifted(source, path, ticks):
    """A copy of an .mp4 whose stream of pictures is later, or, with negative ticks, loses its start to an edit."""
    with av.open(str(source)) as film, av.open(str(path), "w") as container:
        copies = {stream.index: container.add_stream_from_template(stream) for stream in film.streams}
        for packet in film.demux():
            if packet.size:
                if packet.stream.type == "video":
                    packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
                packet.stream = copies[packet.stream.index]
                container.mux(packet)
    return path


@pytest.mark.parametrize("ticks", [12288 // 2, -10 * 512])
def test_a_late_or_cut_start_is_where_the_sound_starts(tmp_path, ticks):
    write_film(tmp_path / "whole.mp4", grey_frames(24))
    path = shifted(tmp_path / "whole.mp4", tmp_path / "film.mp4", ticks)
    film = probe_film(path)
    assert film.duration == pytest.approx(1 if ticks > 0 else 14 / 24, abs=1e-3)
    (frames,) = read_film(film)
    assert round((frames[0].mean() - 20) / 9) == (0 if ticks > 0 else 10)
    save_scored_film(film, tmp_path / "scored.mp4", struck_bell(film.duration), 48000)
    scored = probe_film(tmp_path / "scored.mp4")
    assert scored.duration == pytest.approx(film.duration, abs=1e-3)
    assert np.array_equal(frames, *read_film(scored))
    with av.open(str(tmp_path / "scored.mp4")) as container:
        assert {stream.start_time for stream in container.streams} == {0}
        assert container.duration / 1e6 == pytest.approx(film.duration, abs=1e-3)


def test_films_and_sounds_that_do_not_fit(tmp_path):
    film = probe_film(write_film(tmp_path / "film.mp4", grey_frames(3)))
    before = (tmp_path / "film.mp4").read_bytes()
    os.link(tmp_path / "film.mp4", tmp_path / "same.mp4")
    audio = struck_bell(0.1)
    for path, sound, rate, message in (
        ("film.mp4", audio, 48000, "film.mp4 is the film itself"),
        ("same.mp4", audio, 48000, "same.mp4 is the film itself"),
        ("new.mkv", audio, 48000, "unknown extension '.mkv'"),
        ("new.mp4", audio * np.nan, 48000, "-1 to 1, found nan"),
        ("new.mp4", audio, 200, "cannot have 200 samples a second"),
    ):
        with pytest.raises(ValueError, match=message):
            save_scored_film(film, tmp_path / path, sound, rate)
    write_sound(tmp_path / "song.mp4")
    with pytest.raises(ValueError, match="song.mp4: no video stream"):
        probe_film(tmp_path / "song.mp4")
    (tmp_path / "film.mp4").write_bytes(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "same.mp4", "song.mp4"]


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
