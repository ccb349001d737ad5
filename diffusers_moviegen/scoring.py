"""Reads films that are to be given a sound, and sounds that are to be continued; writes films with a new sound.

What is read is read as for training, see `media_reading`; pictures are copied untouched.
"""

import heapq
import io
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from .media import (
    check_aac,
    check_audio,
    check_output_path,
    decoding_time,
    sound_packets,
    write_atomically,
)
from .media_reading import (
    CONTAINER_FORMATS,
    MediaError,
    decode_frames,
    display_matrix,
    open_film,
    probe_media,
    read_pixel_aspect,
    resize_and_crop,
    upright_frame,
)


# The sound has 25 latents a second; more frames would tell the model nothing more.
MAX_FILM_FRAME_RATE = 25

# What a container says of itself.
_CONTAINER_TAGS = ("major_brand", "minor_version", "compatible_brands", "encoder")

# Frames of a film that are held at a time: fewer of a large film.
_PART_FRAMES, _PART_BYTES = 64, 2**28


def load_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """Read the first sound of a sound file or film, whatever its format.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `tuple[np.ndarray, int]`: float32 of the shape (channels, samples), integer formats scaled to -1 to 1, and the
        samples a second, both as the file has them.

    Raises:
        ValueError: If the file is missing, empty, damaged, or has no sound.
    """
    import av

    _check_source(path)
    parts = []
    try:
        with av.open(
            str(path), options={"format_whitelist": CONTAINER_FORMATS}, metadata_errors="replace"
        ) as container:
            if not container.streams.audio:
                raise ValueError(f"{path} has no sound")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise ValueError(f"{path}: no decoder for the codec of its sound")
            sampling_rate = stream.rate
            resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=sampling_rate)
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise ValueError(f"{path}: damaged or truncated sound")
                for frame in packet.decode():
                    parts += [part.to_ndarray() for part in resampler.resample(frame)]
            parts += [part.to_ndarray() for part in resampler.resample(None)]
            # An .mp4 says how much of the last block is sound; elsewhere the length may be a guess.
            length = None
            if "mp4" in container.format.name and stream.duration:
                length = round(stream.duration * stream.time_base * sampling_rate)
    except av.FFmpegError as error:
        raise ValueError(f"{path}: no sound that can be decoded ({error.strerror})") from error
    if not parts:
        raise ValueError(f"{path}: no sound that can be decoded")
    return np.concatenate(parts, axis=1)[:, :length], sampling_rate


def _check_source(path: str | Path):
    try:
        size = Path(path).stat().st_size
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no such file") from error
    if size == 0:
        raise ValueError(f"{path}: empty file")


@dataclass(frozen=True)
class FilmInfo:
    """What a sound for a film needs to know of it.

    Attributes:
        path: the file.
        height, width: pixels of the picture as displayed, upright and with square pixels.
        duration: seconds from the first frame to the end of the last one.
        frame_rate: frames a second to read it at: its own average, at most `MAX_FILM_FRAME_RATE`.
        num_frames: frames at that rate, at least 1.
        sounds: codecs of the sounds in the file, such as "aac".
        other_streams: what else is in it, such as "subtitle".
    """

    path: Path
    height: int
    width: int
    duration: float
    frame_rate: float
    num_frames: int
    sounds: tuple[str, ...]
    other_streams: tuple[str, ...]


def probe_film(path: str | Path) -> FilmInfo:
    """Look at a film that is to be given a sound by [`save_scored_film`].

    All packets are read, for true timestamps, and one frame is decoded; damage further on is found by [`read_film`].

    Raises:
        ValueError: If the file is missing, empty, damaged, a picture, without a video stream, or of a codec that an
            .mp4 cannot hold.
    """
    import av

    path = Path(path)
    try:
        info = probe_media(path)
        if info.duration is None:
            raise MediaError("a picture, not a film")
        container, stream = open_film(path)
        with container, av.open(io.BytesIO(), "w", format="mp4") as copy:
            codec = stream.codec_context.name
            try:
                copy.add_stream_from_template(stream, opaque=True)
            except ValueError as error:
                raise MediaError(f"an .mp4 cannot hold its codec, {codec}; convert the film to H.264 first") from error
            rate = min(float(stream.average_rate or MAX_FILM_FRAME_RATE), MAX_FILM_FRAME_RATE)
            sounds = tuple(
                "unknown" if sound.codec_context is None else sound.codec_context.name
                for sound in container.streams.audio
            )
            others = tuple(
                other.type for other in container.streams if other.type != "audio" and other.index != stream.index
            )
    except MediaError as error:
        raise ValueError(f"{path}: {error}") from error
    return FilmInfo(
        path=path,
        height=info.height,
        width=info.width,
        duration=info.duration,
        frame_rate=rate,
        num_frames=max(round(info.duration * rate), 1),
        sounds=sounds,
        other_streams=others,
    )


def read_film(film: FilmInfo) -> Iterator[np.ndarray]:
    """Decode a film once, from its start to its end, at the constant rate `film.frame_rate`.

    Frame `k` is the last one that is on screen at `k / film.frame_rate` seconds after the film's first frame, by the
    timestamps of the file; the last frame stays on screen. Rotation, mirroring and non-square pixels are applied.

    Args:
        film (`FilmInfo`): From [`probe_film`].

    Yields:
        `np.ndarray`: The next frames, at most 64, uint8 RGB of the shape (frames, height, width, 3);
        `film.num_frames` in all.

    Raises:
        ValueError: If the file is damaged.
    """
    import av

    count = min(max(_PART_BYTES // (3 * film.height * film.width), 1), _PART_FRAMES)
    try:
        container, stream = open_film(film.path)
        with container:
            pictures = _pictures(film, container, stream)
            while part := list(itertools.islice(pictures, count)):
                yield np.stack(part)
    except MediaError as error:
        raise ValueError(f"{film.path}: {error}") from error
    except av.FFmpegError as error:
        raise ValueError(f"{film.path}: damaged or truncated film ({error.strerror})") from error


def _pictures(film: FilmInfo, container, stream) -> Iterator[np.ndarray]:
    rate, tick = Fraction(film.frame_rate).limit_denominator(1001), stream.time_base
    # A clock of 1 ms counts 24 frames a second as 0, 42, 83 ms: "at or before" must not miss a frame by its rounding.
    # A clock of one tick a frame rounds nothing.
    tolerance = tick / 2 if tick <= Fraction(1, 100) else 0
    frames = decode_frames(container, stream)
    frame = next(frames)
    matrix = display_matrix(frame)
    pixel_aspect, begin = read_pixel_aspect(stream, matrix), frame.pts * tick
    filled = 0
    while frame is not None and filled < film.num_frames:
        following = next(frames, None)
        # How many of the target times this frame is on screen for: until the next one, or to the end.
        end = film.num_frames
        if following is not None:
            end = min(math.ceil((following.pts * tick - begin - tolerance) * rate), end)
        if end > filled:
            pixels = resize_and_crop(upright_frame(frame, matrix), film.height, film.width, pixel_aspect)
            yield from itertools.repeat(pixels, end - filled)
            filled = end
        frame = following


# --- A sound for a film that exists ---------------------------------------------------------------------------------


def save_scored_film(film: FilmInfo, path: str | Path, audio: np.ndarray, sampling_rate: int):
    """Write a film to an .mp4 with a sound: the packets of its video stream as they are, and the sound as AAC.

    The first frame and the sound start at time 0. Rotation, the shape of pixels, colours, the clock and the file's
    titles are kept; all other streams, such as the film's own sound, are left out. The file appears under its name
    when it is complete, as with [`save_video`].

    Args:
        film (`FilmInfo`): From [`probe_film`].
        path (`str` or `Path`): The .mp4 to write; an existing one is replaced.
        audio (`np.ndarray`): Floating point in -1 to 1 of the shape (channels, samples), mono or stereo.
        sampling_rate (`int`): Samples a second of `audio`, one of the rates of AAC from 8000 to 96000.

    Raises:
        ValueError: If `path` is the film itself or has another extension, the sound does not fit the description
            above, or the film's packets do not fit an .mp4.
        OSError: If the file cannot be written.
    """
    check_output_path(path, overwrite=True, extensions=(".mp4",))
    check_not_itself(film.path, path)
    check_audio(audio, sampling_rate)
    check_aac(sampling_rate)
    write_atomically(Path(path), lambda temporary: _write_scored_mp4(film, temporary, audio, sampling_rate))


def check_not_itself(film: str | Path, path: str | Path):
    """Refuse to write a film over the one it is made from, with a `ValueError`, whatever names the two go by."""
    if os.path.exists(film) and os.path.exists(path) and os.path.samefile(film, path):
        raise ValueError(f"{path} is the film itself; choose another name")


def _write_scored_mp4(film: FilmInfo, path: Path, audio: np.ndarray, sampling_rate: int):
    import av

    container, stream = open_film(film.path)
    with container:
        origin = next(decode_frames(container, stream)).pts
    source, stream = open_film(film.path)
    clock = stream.time_base.denominator
    options = {
        "movflags": "+faststart",
        # The clock of the packets, and for the file one that has its ticks but is finer than 1/1000 s.
        "video_track_timescale": str(clock),
        "movie_timescale": str(clock * math.ceil(1000 / clock)),
    }
    try:
        with source, av.open(str(path), "w", format="mp4", options=options) as container:
            copy = container.add_stream_from_template(stream, opaque=True)
            if stream.sample_aspect_ratio:
                copy.codec_context.sample_aspect_ratio = stream.sample_aspect_ratio
            if stream.codec_context.codec_tag == "hvc1":
                # The default, hev1, is not played by Apple's programs.
                copy.codec_context.codec_tag = "hvc1"
            container.metadata.update(
                {name: value for name, value in source.metadata.items() if name not in _CONTAINER_TAGS}
            )
            sound = sound_packets(container, audio, sampling_rate)
            for packet in heapq.merge(_shown_packets(source, stream, copy, origin), sound, key=decoding_time):
                container.mux(packet)
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(
            f"{film.path}: its packets do not fit an .mp4 ({error.strerror}); convert the film to H.264 first"
        ) from error


def _shown_packets(source, stream, copy, origin: int) -> Iterator:
    """The packets of `stream` for the stream `copy`, with `origin` as time 0."""
    cut, last = [], -math.inf
    for packet in source.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None:
            raise ValueError(f"{source.name}: film without timestamps; convert it to H.264 first")
        packet.pts -= origin
        if packet.dts is not None:
            packet.dts -= origin
            if packet.dts <= last:
                # An .mp4 cannot hold two packets of one time.
                packet.dts = last + 1
                packet.pts = max(packet.pts, packet.dts)
            last = packet.dts
        packet.stream = copy
        # An editor can cut a film by hiding its packets. Hidden ones at the end would make the copy longer.
        cut.append(packet)
        if not packet.is_discard:
            yield from cut
            cut = []
