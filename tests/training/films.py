"""Small films and sounds with known content, of the kinds that cameras, editors and accidents produce."""

import hashlib
from fractions import Fraction

import av
import numpy as np


def write_film(
    path,
    frames,
    rate=24,
    codec="libx264",
    pix_fmt="yuv420p",
    options=None,
    times=None,
    rotation=None,
    sample_aspect_ratio=None,
    container_options=None,
):
    """Writes frames, uint8 `(height, width, 3 or 4)`; `times` are milliseconds instead of a constant rate."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=1000 if times else rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(*rotation)
        if sample_aspect_ratio is not None:
            stream.codec_context.sample_aspect_ratio = sample_aspect_ratio
        for index, pixels in enumerate(frames):
            pixels = np.ascontiguousarray(pixels)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.shape[2] == 3 else "rgba")
            frame.pts = times[index] if times else index
            frame.time_base = Fraction(1, 1000) if times else Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def grey_frames(count, height=32, width=48):
    """Frame `k` has the level `20 + 9 k` everywhere: see `numbers`."""
    return [np.full((height, width, 3), 20 + 9 * index, dtype=np.uint8) for index in range(count)]


def numbers(video):
    """Which of the `grey_frames` a decoded video `(3, frames, height, width)` shows."""
    return ((video.float().mean(dim=(0, 2, 3)) - 20) / 9).round().int().tolist()


def quarters(height=64, width=96):
    """Red, green, blue and white from the upper left to the lower right."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    top, left = height // 2, width // 2
    pixels[:top, :left], pixels[:top, left:] = (220, 20, 20), (20, 220, 20)
    pixels[top:, :left], pixels[top:, left:] = (20, 20, 220), (230, 230, 230)
    return pixels


def write_sound(path, seconds=1):
    """A film without pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for index in range(seconds * 16000 // 1024):
            samples = np.sin(np.arange(1024, dtype=np.float32)[None] / 10)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * index, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut_off(path, share):
    """Drops the end of a file and keeps `share` of it."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


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


def noise(height, width, channels=3, seed=0):
    """Any picture, uint8 `(height, width, channels)`."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
