"""Sounds of one's own, in the formats and with the accidents that they come with."""

import io
import tarfile
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from diffusers_moviegen.media import save_audio
from diffusers_moviegen.media_reading import MediaError
from diffusers_moviegen.training import SoundDataset, read_sound
from tests.training.films import grey_frames, write_film


def sine(frequency: float, rate: int, seconds: float = 0.5, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * frequency / rate * np.arange(round(seconds * rate)))
    return np.repeat(wave[None], channels, axis=0).astype(np.float32)


def write_sound(path, sound: np.ndarray, rate: int, codec: str, **options):
    """A sound `(channels, samples)` with any of FFmpeg's encoders."""
    layout = ("mono", "stereo")[len(sound) - 1]
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate, frame_size=stream.frame_size)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    return path


def level(sound: torch.Tensor, frequency: float, rate: int = 48000) -> float:
    """Amplitude of a sine in the middle of a sound."""
    middle = sound[len(sound) // 4 : 3 * len(sound) // 4].double().numpy()
    wave = np.exp(-2j * np.pi * frequency / rate * np.arange(len(middle)))
    hann = np.hanning(len(middle))
    return 2 * abs((middle * wave * hann).sum()) / hann.sum()


# One file


def test_samples_of_a_wav_are_exact(tmp_path):
    sound = np.random.default_rng(0).uniform(-1, 1, (1, 4801)).astype(np.float32)
    save_audio(sound, tmp_path / "a.wav", 48000)
    expected = np.rint(sound[0] * 32767) / 32768
    found = read_sound(tmp_path / "a.wav")
    assert found.dtype == torch.float32 and found.shape == (4801,)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert torch.equal(read_sound((tmp_path / "a.wav").read_bytes()), found)


def test_channels_are_mixed_down(tmp_path):
    sound = np.concatenate([sine(440, 48000), -sine(440, 48000) + sine(1000, 48000)])
    save_audio(sound, tmp_path / "a.wav", 48000)
    found = read_sound(tmp_path / "a.wav")
    # The mean of both, up to the scale that keeps the mix from clipping.
    assert level(found, 440) < 1e-3 and level(found, 1000) == pytest.approx(0.25, rel=0.5)


@pytest.mark.parametrize(("rate", "name"), [(44100, "a.flac"), (16000, "a.wav"), (96000, "a.wav"), (48000, "a.m4a")])
def test_other_rates_are_resampled(tmp_path, rate, name):
    codec = {"a.flac": "flac", "a.wav": "pcm_s16le", "a.m4a": "aac"}[name]
    write_sound(tmp_path / name, sine(1000, rate), rate, codec)
    found = read_sound(tmp_path / name)
    assert abs(len(found) - 24000) < 1200
    assert level(found, 1000) == pytest.approx(0.5, rel=0.02) and level(found, 2000) < 0.02
    assert abs(len(read_sound(tmp_path / name, 8000)) - 4000) < 200


def test_the_sound_of_a_film(tmp_path):
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        video = container.add_stream("libx264", rate=8)
        video.height, video.width, video.pix_fmt = 32, 48, "yuv420p"
        audio = container.add_stream("aac", rate=48000, layout="mono")
        for index, pixels in enumerate(grey_frames(4)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 8)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        wave = sine(1000, 48000)
        for start in range(0, wave.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(wave[:, start : start + 1024].copy(), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
    found = read_sound(tmp_path / "film.mp4")
    assert abs(len(found) - 24000) < 1100 and level(found, 1000) == pytest.approx(0.5, rel=0.05)


def test_a_rate_that_changes_on_the_way(tmp_path):
    """Two radio recordings that somebody has joined byte by byte."""
    for name, rate in (("a.aac", 48000), ("b.aac", 24000)):
        write_sound(tmp_path / name, sine(1000, rate), rate, "aac", format="adts")
    (tmp_path / "both.aac").write_bytes((tmp_path / "a.aac").read_bytes() + (tmp_path / "b.aac").read_bytes())
    found = read_sound(tmp_path / "both.aac")
    assert abs(len(found) - 48000) < 6000
    for half in (found[2000:22000], found[-20000:]):
        assert level(half, 1000) == pytest.approx(0.5, rel=0.1)


def header_only(path):
    save_audio(sine(440, 48000), path, 48000)
    path.write_bytes(path.read_bytes()[:44])


def unknown_codec(path):
    save_audio(sine(440, 48000), path, 48000)
    content = bytearray(path.read_bytes())
    content[20:22] = b"\x34\x12"
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("none.wav", lambda path: None, "no sound that can be decoded"),
        ("empty.wav", lambda path: path.write_bytes(b""), "no sound that can be decoded"),
        ("text.mp3", lambda path: path.write_text("no sound at all"), "no sound that can be decoded"),
        ("nothing.wav", header_only, "no sound that can be decoded"),
        ("silent.mp4", lambda path: write_film(path, grey_frames(3)), "no sound track"),
        ("coded.wav", unknown_codec, "no decoder for the sound's codec"),
        ("list.m3u8", lambda path: path.write_text("#EXTM3U\n/etc/passwd\n"), "no sound that can be decoded"),
    ],
)
def test_files_without_a_sound_are_named(tmp_path, name, write, reason):
    write(tmp_path / name)
    with pytest.raises(MediaError, match=reason) as error:
        read_sound(tmp_path / name)
    assert "\n" not in str(error.value)


def test_samples_that_are_no_numbers_are_refused(tmp_path):
    sound = sine(440, 48000)
    sound[0, 100] = np.nan
    write_sound(tmp_path / "a.wav", sound, 48000, "pcm_f32le")
    with pytest.raises(MediaError, match="samples that are not finite"):
        read_sound(tmp_path / "a.wav")


# Many files


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Ramps, each of other values, so that a segment tells where it was cut out; and what cannot be used."""
    folder = tmp_path_factory.mktemp("sounds")
    ramp = np.arange(16000, dtype=np.float32)[None] / 32767
    save_audio(ramp[:, :1000], folder / "short.wav", 48000)
    save_audio(ramp[:, 4000:6000], folder / "middle.wav", 48000)
    save_audio(ramp[:, 8000:12000], folder / "long.wav", 48000)
    save_audio(ramp[:, :99], folder / "click.wav", 48000)
    (folder / "text.wav").write_text("no sound")
    names = ["short.wav", "middle.wav", "long.wav", "click.wav", "text.wav"]
    (folder / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{name},a sound\n" for name in names))
    return folder


def test_a_table_of_sounds(sounds):
    dataset = SoundDataset(sounds, min_samples=100)
    assert dataset.names == ["short.wav", "middle.wav", "long.wav"]
    assert [len(sound) for sound in dataset.sounds] == [1000, 2000, 4000]
    assert "3 of 5 samples used (3 sounds)" in str(dataset.report)
    skipped = dataset.report.skipped
    assert skipped["shorter than 0.00 s"] == ["click.wav"] and len(skipped) == 2
    assert skipped["no sound that can be decoded"][0].startswith("text.wav (")
    dataset = SoundDataset(sounds / "metadata.csv", exclude=["m*", "click*"])
    assert dataset.names == ["short.wav", "long.wav"]


def test_sounds_of_a_shard(sounds, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for index, name in enumerate(("short.wav", "long.wav", "text.wav")):
            for member, content in ((f"{index}.wav", (sounds / name).read_bytes()), (f"{index}.txt", b"a sound")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        archive.addfile(tarfile.TarInfo("3.png"), io.BytesIO())
    dataset = SoundDataset(tmp_path / "*.tar", min_samples=1000)
    assert dataset.names == ["0.wav", "1.wav"]
    assert torch.equal(dataset.sounds[1], read_sound(sounds / "long.wav"))
    assert dataset.report.skipped["no sound or film"] == ["3"]


def test_no_usable_sound_is_an_error_of_one_line(sounds, tmp_path):
    with pytest.raises(ValueError, match="has no usable sound: .*0 of 5 .*shorter than 1.00 s: short.wav") as error:
        SoundDataset(sounds, min_samples=48000)
    assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="missing"):
        SoundDataset(tmp_path / "missing")


def test_segments_are_drawn_by_length_and_anywhere(sounds):
    dataset = SoundDataset(sounds, min_samples=1000)
    generator = torch.Generator().manual_seed(0)
    segments, names = dataset.draw(3500, 500, generator)
    assert segments.shape == (3500, 1, 500) and len(names) == 3500
    starts = {name: [] for name in dataset.names}
    origins = {"short.wav": 0, "middle.wav": 4000, "long.wav": 8000}
    for segment, name in zip(segments[:, 0], names, strict=True):
        start = round(segment[0].item() * 32768) - origins[name]
        starts[name].append(start)
        assert torch.equal(segment, dataset.sounds[dataset.names.index(name)][start : start + 500])
    for name, samples in (("short.wav", 1000), ("middle.wav", 2000), ("long.wav", 4000)):
        assert len(starts[name]) == pytest.approx(samples / 2, rel=0.15)
        # From the first sample to the last.
        last = samples - 500
        assert 0 <= min(starts[name]) < 0.05 * last and 0.95 * last < max(starts[name]) <= last
        assert np.mean(starts[name]) == pytest.approx(last / 2, rel=0.1)
    # The generator decides everything; a segment may be the whole sound.
    again, _ = dataset.draw(3500, 500, torch.Generator().manual_seed(0))
    assert torch.equal(again, segments)
    assert dataset.draw(4, 1000, generator)[0].shape == (4, 1, 1000)
