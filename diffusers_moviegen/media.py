"""Writes frames and sounds to files: H.264 films with AAC sound, animated GIFs, PNG pictures and WAV sounds."""

import heapq
import io
import os
import uuid
import wave
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image


MIN_FRAME_RATE, MAX_FRAME_RATE = 1, 1000

VIDEO_EXTENSIONS = (".mp4", ".gif", ".png")
AUDIO_EXTENSIONS = (".wav",)

# What AAC knows; other rates would need resampling.
_AAC_SAMPLING_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)


def _as_uint8(frame) -> np.ndarray:
    frame = np.asarray(frame)
    if frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"a frame must have the shape (height, width, 3), not {frame.shape}")
    if frame.dtype == np.uint8:
        return frame
    low, high = float(frame.min()), float(frame.max())
    # Written so that NaN, which compares false, is refused as well.
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"frames that are not uint8 must lie in 0 to 1, found {low:.4g} to {high:.4g}")
    return np.rint(frame * 255.0).astype(np.uint8)


def check_audio(audio: np.ndarray, sampling_rate: int | None):
    """Raises a `ValueError` for what is no sound `(channels, samples)` from -1 to 1."""
    if audio.ndim != 2 or audio.shape[0] not in (1, 2) or audio.shape[1] == 0:
        raise ValueError(f"audio must have the shape (channels, samples) with 1 or 2 channels, not {audio.shape}")
    if not np.issubdtype(audio.dtype, np.floating):
        raise ValueError(f"audio must be floating point in -1 to 1, not {audio.dtype}")
    low, high = float(audio.min()), float(audio.max())
    # Written so that NaN, which compares false, is refused as well.
    if not (low >= -1.0 and high <= 1.0):
        raise ValueError(f"audio must lie in -1 to 1, found {low:.4g} to {high:.4g}")
    if sampling_rate is None or sampling_rate < 1:
        raise ValueError(f"audio needs its sampling_rate, a whole number of samples a second, not {sampling_rate}")


def check_aac(sampling_rate: int):
    """Raises a `ValueError` for a rate that AAC does not have."""
    if sampling_rate not in _AAC_SAMPLING_RATES:
        known = ", ".join(map(str, _AAC_SAMPLING_RATES))
        raise ValueError(f"the sound of an .mp4 cannot have {sampling_rate} samples a second; use one of {known}")


def _write_mp4(
    frames: list[np.ndarray], path: Path, frame_rate: float, audio: np.ndarray | None, sampling_rate: int | None
):
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

    height, width = frames[0].shape[:2]
    if height % 2 or width % 2:
        raise ValueError(f"an .mp4 needs an even height and width, not {height} x {width}")
    rate = Fraction(frame_rate).limit_denominator(1001)
    # Without `faststart` the index lies at the end of the file and a browser must load all of it before it plays. The
    # default clock of 1/1000 s would round the film's length.
    options = {"movflags": "+faststart", "movie_timescale": str(1000 * rate.numerator)}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # A player guesses the matrix of an untagged film from its size, so the colours would depend on the player.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.color_range = ColorRange.MPEG
        # Both streams must be known before the first packet is written.
        sound = iter(()) if audio is None else sound_packets(container, audio, sampling_rate)

        def pictures() -> Iterator[av.Packet]:
            for index, frame in enumerate(frames):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
                )
                picture.pts, picture.time_base = index, 1 / rate
                yield from stream.encode(picture)
            yield from stream.encode()

        for packet in heapq.merge(pictures(), sound, key=decoding_time):
            container.mux(packet)


def sound_packets(container, audio: np.ndarray, sampling_rate: int) -> Iterator:
    """Adds a stream of AAC to an open `av` container and returns its packets, from time 0 on."""
    import av

    layout = ("mono", "stereo")[len(audio) - 1]
    stream = container.add_stream("aac", rate=sampling_rate, layout=layout)
    stream.bit_rate = 128_000 * len(audio)

    def packets() -> Iterator[av.Packet]:
        # A second at a time, because the encoder copies what it gets.
        for start in range(0, audio.shape[1], sampling_rate):
            part = np.ascontiguousarray(audio[:, start : start + sampling_rate], dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.pts, frame.sample_rate, frame.time_base = start, sampling_rate, Fraction(1, sampling_rate)
            yield from stream.encode(frame)
        yield from stream.encode()

    return packets()


def decoding_time(packet) -> Fraction:
    """Seconds; the order of packets in a file that is played while it is read."""
    return (packet.pts if packet.dts is None else packet.dts) * packet.time_base


def _write_gif(frames: list[np.ndarray], path: Path, frame_rate: float):
    images = [Image.fromarray(frame) for frame in frames]
    # GIF counts time in 1/100 s. Rounding the end of each frame, not its length, keeps the film's total length.
    ends = [round(100 * (index + 1) / frame_rate) for index in range(len(images))]
    milliseconds = [10 * (end - start) for start, end in zip([0] + ends[:-1], ends, strict=True)]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)


def check_output_path(path: str | Path, overwrite: bool = False, extensions: tuple[str, ...] = VIDEO_EXTENSIONS):
    """Refuse an output path that [`save_video`] or [`save_audio`] could not write, before any work is done for it.

    Args:
        path (`str` or `Path`): The file to be written.
        overwrite (`bool`, defaults to `False`): Whether a file of this name may be replaced.
        extensions (`tuple[str, ...]`, defaults to `VIDEO_EXTENSIONS`): What the name may end with, in lower case.

    Raises:
        ValueError: If the extension is not one of `extensions`.
        OSError: If the folder is missing or cannot be written, or the file exists and `overwrite` is not set.
    """
    path = Path(path)
    if path.suffix.lower() not in extensions:
        known = " or ".join(filter(None, (", ".join(extensions[:-1]), extensions[-1])))
        raise ValueError(f"unknown extension {path.suffix!r} of {path}; use {known}")
    if path.is_dir():
        raise OSError(f"{path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise OSError(f"{path} exists; choose another name, or have it replaced (--force)")
    if not path.parent.is_dir():
        raise OSError(f"there is no folder {path.parent} for {path.name}; create it first")
    # Permissions alone do not tell (root, read-only and virtual file systems), so a file is made and removed.
    probe = _temporary_beside(path)
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise OSError(f"cannot write into the folder {path.parent}: {error.strerror}; choose another one") from error
    probe.unlink()


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".moviegen-{uuid.uuid4().hex}.tmp")


def write_atomically(path: Path, write: Callable[[Path], None]):
    """Has `write` write a temporary file beside `path`, which takes its place once it is complete."""
    temporary = _temporary_beside(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_video(
    frames,
    path: str | Path,
    frame_rate: float,
    audio: np.ndarray | None = None,
    sampling_rate: int | None = None,
):
    """Write frames to an .mp4, .gif or .png file, whichever the extension says.

    An .mp4 is H.264 in yuv420p, tagged BT.709, with its index in front, which every browser plays. Its sound, if any,
    is AAC and starts with the first frame. The file appears under its name when it is complete: a failure or an
    interruption leaves a file of that name as it was.

    Args:
        frames (`np.ndarray` or sequence of `PIL.Image.Image`):
            One clip: RGB of the shape (frames, height, width, 3), uint8 or floating point in 0 to 1, or a list of
            such frames.
        path (`str` or `Path`): The file to write; an existing one is replaced.
        frame_rate (`float`):
            Frames a second, 1 to 1000. An .mp4 has it exactly, a .gif rounds each frame's end to 1/100 s.
        audio (`np.ndarray`, *optional*):
            Sound of an .mp4: floating point in -1 to 1 of the shape (channels, samples), mono or stereo.
        sampling_rate (`int`, *optional*): Samples a second of `audio`, one of the rates of AAC from 8000 to 96000.

    Raises:
        ValueError: If the extension is unknown, there are no frames, their shapes differ or values are out of range,
            a .png gets more than one frame, an .mp4 an odd height or width, `frame_rate` is out of range, or the sound
            does not fit the description above or the file.
        OSError: If the file cannot be written.
    """
    check_output_path(path, overwrite=True)
    path = Path(path)
    if not MIN_FRAME_RATE <= frame_rate <= MAX_FRAME_RATE:
        raise ValueError(f"frame_rate must be {MIN_FRAME_RATE} to {MAX_FRAME_RATE} frames a second, not {frame_rate}")
    frames = [_as_uint8(frame) for frame in frames]
    if not frames:
        raise ValueError(f"there are no frames to write to {path}")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise ValueError(f"all frames of a clip must have one size, found {sorted({f.shape[:2] for f in frames})}")
    extension = path.suffix.lower()
    if extension == ".png" and len(frames) != 1:
        raise ValueError(f"a .png holds one frame, not {len(frames)}; use .mp4 or .gif")
    if audio is not None:
        if extension != ".mp4":
            raise ValueError(f"a {extension} holds no sound; use .mp4, or leave the audio out")
        check_audio(audio, sampling_rate)
        check_aac(sampling_rate)

    def write(temporary: Path):
        if extension == ".mp4":
            _write_mp4(frames, temporary, frame_rate, audio, sampling_rate)
        elif extension == ".gif":
            _write_gif(frames, temporary, frame_rate)
        else:
            Image.fromarray(frames[0]).save(temporary, format="PNG")

    write_atomically(path, write)


def save_audio(audio: np.ndarray, path: str | Path, sampling_rate: int, floating_point: bool = False):
    """Write a sound to a .wav file, as a whole or, on a failure, not at all.

    Args:
        audio (`np.ndarray`): Floating point in -1 to 1 of the shape (channels, samples), mono or stereo.
        path (`str` or `Path`): The file to write; an existing one is replaced.
        sampling_rate (`int`): Samples a second.
        floating_point (`bool`, defaults to `False`): Whether to write 32-bit floats instead of 16-bit integers.

    Raises:
        ValueError: If the extension is not .wav, or the sound does not fit the description above.
        OSError: If the file cannot be written.
    """
    check_output_path(path, overwrite=True, extensions=AUDIO_EXTENSIONS)
    check_audio(audio, sampling_rate)
    content = io.BytesIO()
    if floating_point:
        _write_float_wav(audio, content, sampling_rate)
    else:
        with wave.open(content, "wb") as file:
            file.setnchannels(len(audio))
            file.setsampwidth(2)
            file.setframerate(sampling_rate)
            file.writeframes(np.rint(audio.T * 32767).astype("<i2").tobytes())
    write_atomically(Path(path), lambda temporary: temporary.write_bytes(content.getbuffer()))


def _write_float_wav(audio: np.ndarray, file: io.BytesIO, sampling_rate: int):
    import av

    layout = ("mono", "stereo")[len(audio) - 1]
    # Otherwise the library signs the file with its version.
    with av.open(file, "w", format="wav", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("pcm_f32le", rate=sampling_rate, layout=layout)
        # A second at a time, because a frame holds less than 2 GiB.
        for start in range(0, audio.shape[1], sampling_rate):
            part = audio[:, start : start + sampling_rate]
            samples = np.ascontiguousarray(part.T, dtype=np.float32).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(samples, format="flt", layout=layout)
            frame.pts, frame.sample_rate, frame.time_base = start, sampling_rate, Fraction(1, sampling_rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# --- Reading --------------------------------------------------------------------------------------------------------
