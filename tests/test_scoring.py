import bisect
import os
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from diffusers_moviegen import scoring
from diffusers_moviegen.media import save_audio, save_video
from diffusers_moviegen.scoring import load_audio, probe_film, read_film, save_scored_film
from diffusers_moviegen.training import read_media
from tests.training.films import (
    decode,
    film_packets,
    grey_frames,
    moving_square,
    quarters,
    struck_bell,
    write_film,
    write_sound,
)


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
