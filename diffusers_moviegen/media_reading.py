"""Reading pictures and films: what a file shows, upright and with square pixels, at the times asked for."""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError


_NOT_MEDIA = "no picture or film that can be decoded"

# Containers whose header says how long the film is; others only guess it from the size of the file.
_CONTAINERS_WITH_DURATION = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")

# FFmpeg also reads playlists, lists of files and addresses of streams, which would open whatever a data set names, and
# text, as the screen of a terminal. Sounds are here to be told apart from what cannot be read at all.
CONTAINER_FORMATS = (
    "aac,aiff,apng,asf,avi,dv,flac,flv,gif,h264,hevc,ivf,m4v,matroska,mov,mp3,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm,"
    "wav,yuv4mpegpipe"
)

# FFmpeg's own decoders drop the transparency of these.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


class MediaError(ValueError):
    """Why one file cannot be used: a `reason` that many files may share, and the `detail` of this one or ""."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self):
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class MediaInfo:
    """What a file shows, upright and with square pixels.

    Attributes:
        height, width: pixels of the picture as displayed.
        duration: seconds from the first frame to the end of the last one; None for a picture.
    """

    height: int
    width: int
    duration: float | None = None

    def num_frames(self, frame_rate: float) -> int:
        """Frames at `frame_rate`; the last counts if the film lasts for half of it or more. A picture has 1."""
        return 1 if self.duration is None else math.floor(self.duration * frame_rate + 0.5)


# --- Pictures ---------------------------------------------------------------------------------------------------


def _open_image(source: str | Path | bytes) -> Image.Image | None:
    """The picture in a file or in its bytes; None if it is none, or an animation."""
    if isinstance(source, bytes):
        if not source:
            raise MediaError("empty file")
        source = io.BytesIO(source)
    else:
        try:
            size = Path(source).stat().st_size
        except (OSError, ValueError) as error:
            raise MediaError("no such file") from error
        if size == 0:
            raise MediaError("empty file")
    try:
        image = Image.open(source)
    except UnidentifiedImageError:
        return None
    except OSError as error:
        raise MediaError("unreadable file", error.strerror or str(error)) from error
    except Image.DecompressionBombError as error:
        raise MediaError("picture too large", str(error)) from error
    except Exception as error:
        # What Pillow raises for damaged files depends on the format and on where the damage is.
        raise MediaError("damaged or truncated picture", str(error)) from error
    if image.format == "EPS":
        # Pillow would run it, as a program, with Ghostscript.
        raise MediaError(_NOT_MEDIA, "PostScript")
    # Other formats hold pages, or a photograph and its previews.
    if image.format in ("GIF", "PNG", "WEBP", "AVIF") and _is_animated(image):
        image.close()
        return None
    return image


def _is_animated(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception as error:
        # A GIF is read to its end for this.
        raise MediaError("damaged or truncated picture", str(error)) from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            # Pillow's own conversion clips at 255 instead of scaling.
            return Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8)).convert(
                "RGB"
            )
        if image.mode in ("I", "F"):
            raise MediaError("pixels without a known range", f"Pillow's mode {image.mode}")
        if image.has_transparency_data:
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            black.alpha_composite(image.convert("RGBA"))
            image = black
        return image.convert("RGB")
    except MediaError:
        raise
    except Exception as error:
        # See `_open_image`.
        raise MediaError("damaged or truncated picture", str(error)) from error


def resize_and_crop(image: Image.Image, height: int, width: int, pixel_aspect: float = 1.0) -> np.ndarray:
    """The largest part around the centre that has the shape asked for, at that size: uint8 `(height, width, 3)`.

    Bicubic, antialiased when it shrinks. `pixel_aspect` is the width of a pixel over its height.
    """
    aspect = width / height / pixel_aspect
    box_width, box_height = min(image.width, image.height * aspect), min(image.height, image.width / aspect)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


# --- Films ------------------------------------------------------------------------------------------------------


def open_film(source: str | Path | bytes):
    """An open `av` container and the stream that is its film."""
    import av

    container = av.open(
        io.BytesIO(source) if isinstance(source, bytes) else str(source),
        options={"format_whitelist": CONTAINER_FORMATS},
        # Old programs wrote titles in encodings of their own.
        metadata_errors="replace",
    )
    try:
        covers = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            raise MediaError("no video stream")
        if streams[0].codec_context is None:
            raise MediaError("no decoder for the film's codec")
        return container, streams[0]
    except BaseException:
        container.close()
        raise


def _decoder(stream):
    import av

    name = stream.codec_context.name
    if stream.metadata.get("alpha_mode") == "1" and name in _ALPHA_DECODERS:
        return av.CodecContext.create(_ALPHA_DECODERS[name], "r")
    return stream.codec_context


def decode_frames(container, stream) -> Iterator:
    """The frames of `av` of a stream, in the order in which they are shown."""
    decoder = _decoder(stream)
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise MediaError("damaged or truncated film")
        for frame in decoder.decode(packet if packet.size else None):
            if frame.pts is None:
                raise MediaError("film without timestamps")
            if frame.is_corrupt:
                raise MediaError("damaged or truncated film", f"at {float(frame.pts * stream.time_base):.2f} s")
            yield frame


def display_matrix(frame) -> tuple[int, int, int, int]:
    """`a, b, c, d`: what lies at `(x, y)` of the stored picture is displayed at `(a x + c y, b x + d y)`."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
            return a, b, c, d
    return 1, 0, 0, 1


def _is_sideways(matrix: tuple[int, int, int, int]) -> bool:
    a, b, _, _ = matrix
    return abs(b) > abs(a)


def upright_frame(frame, matrix: tuple[int, int, int, int]) -> Image.Image:
    """A frame of `av` as it is displayed."""
    from av.video.reformatter import Interpolation

    flags = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
    if any(component.is_alpha for component in frame.format.components):
        pixels = frame.to_ndarray(format="rgba", interpolation=flags).astype(np.uint16)
        pixels = ((pixels[..., :3] * pixels[..., 3:] + 127) // 255).astype(np.uint8)
    else:
        pixels = frame.to_ndarray(format="rgb24", interpolation=flags)
    a, b, c, d = matrix
    if _is_sideways(matrix):
        pixels, flip_x, flip_y = pixels.swapaxes(0, 1), c < 0, b < 0
    else:
        flip_x, flip_y = a < 0, d < 0
    pixels = pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
    return Image.fromarray(np.ascontiguousarray(pixels))


def read_pixel_aspect(stream, matrix: tuple[int, int, int, int]) -> float:
    """The width of a displayed pixel over its height."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return 1 / aspect if _is_sideways(matrix) else aspect


def _probe_film(container, stream) -> MediaInfo:
    decoder, first, times, ends = _decoder(stream), None, [], []
    for packet in container.demux():
        end = None
        if packet.pts is not None and not packet.is_discard:
            end = (packet.pts + (packet.duration or 0)) * packet.time_base
            ends.append(end)
        if packet.stream.index != stream.index:
            continue
        if packet.is_corrupt:
            raise MediaError("damaged or truncated film")
        if end is not None:
            times.append((packet.pts * stream.time_base, end))
        if first is None:
            first = next(iter(decoder.decode(packet if packet.size else None)), None)
    if first is None:
        raise MediaError("no frame can be decoded")
    if not times or first.pts is None:
        raise MediaError("film without timestamps")
    if container.format.name in _CONTAINERS_WITH_DURATION and container.duration:
        # A player's clock starts at 0 even when the first packet does not.
        promised, held = container.duration / 1e6, float(max(ends) - (container.start_time or 0) / Fraction(10**6))
        if promised - held > 0.5:
            raise MediaError("damaged or truncated film", f"{held:.2f} s of {promised:.2f} s")
    last, end = max(times)
    if end == last and stream.average_rate:
        end += 1 / stream.average_rate
    matrix = display_matrix(first)
    height, width = (first.width, first.height) if _is_sideways(matrix) else (first.height, first.width)
    width = max(round(width * read_pixel_aspect(stream, matrix)), 1)
    return MediaInfo(height, width, float(end - first.pts * stream.time_base))


def probe_media(source: str | Path | bytes) -> MediaInfo:
    """Looks at a picture or film by its content, whatever its name says.

    A picture is decoded. Of a film all packets are read, for true timestamps, and the first frame is decoded: damage
    further on is found by [`read_media`].

    Args:
        source: a file, or its content.

    Raises:
        MediaError: if it cannot be used: missing, empty, neither picture nor film, without a video stream (the cover
            of a song is none), without timestamps, damaged, or truncated by more than half a second.
    """
    import av

    image = _open_image(source)
    if image is not None:
        with image:
            upright = _upright_rgb(image)
        return MediaInfo(upright.height, upright.width)
    try:
        container, stream = open_film(source)
        with container:
            return _probe_film(container, stream)
    except av.FFmpegError as error:
        raise MediaError(_NOT_MEDIA, error.strerror or "") from error


def read_media(
    source: str | Path | bytes,
    num_frames: int,
    height: int,
    width: int,
    frame_rate: float | None = None,
    start: float = 0.0,
) -> torch.Tensor:
    """Decodes a picture or a window of a film.

    Frame `k` is the last one that is on screen at `start + k / frame_rate` seconds after the film's first frame, by
    the timestamps of the file, so a variable frame rate comes out right; the clock's rounding is allowed for. The last
    frame stays on screen. Rotation, mirroring and non-square pixels are applied, the centre is cropped to the shape
    asked for and resized (bicubic, antialiased), transparent parts turn black. Values above 8 bit are scaled; HDR is
    not tone-mapped.

    Args:
        source: a file, or its content.
        num_frames: frames to decode, 1 for a picture.
        height, width: pixels.
        frame_rate: frames a second; needed for films.
        start: seconds.

    Returns:
        `torch.Tensor` of shape `(3, num_frames, height, width)`, uint8.

    Raises:
        MediaError: if the file, or this part of it, cannot be decoded.
    """
    import av

    image = _open_image(source)
    if image is not None:
        if num_frames != 1:
            raise ValueError(f"a picture has 1 frame, not {num_frames}")
        with image:
            pixels = resize_and_crop(_upright_rgb(image), height, width)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[:, None].contiguous()
    if frame_rate is None or not 0 < frame_rate < math.inf:
        raise ValueError(f"`frame_rate` must be above 0 frames a second to decode a film, not {frame_rate}")
    try:
        container, stream = open_film(source)
        with container:
            video = _read_film(container, stream, num_frames, height, width, frame_rate, start)
    except av.FFmpegError as error:
        raise MediaError("damaged or truncated film", error.strerror or "") from error
    return torch.from_numpy(video).permute(3, 0, 1, 2).contiguous()


def _read_film(container, stream, num_frames, height, width, frame_rate, start) -> np.ndarray:
    rate, tick = Fraction(frame_rate).limit_denominator(1001), stream.time_base
    # A clock of 1 ms counts 24 frames a second as 0, 42, 83 ms: "at or before" must not miss a frame by its rounding.
    # A clock of one tick a frame rounds nothing.
    tolerance = tick / 2 if tick <= Fraction(1, 100) else 0
    frames = decode_frames(container, stream)
    frame = next(frames, None)
    if frame is None:
        raise MediaError("no frame can be decoded")
    matrix = display_matrix(frame)
    pixel_aspect = read_pixel_aspect(stream, matrix)
    begin = frame.pts * tick + Fraction(start).limit_denominator(10**6)
    limits = [math.floor((begin + k / rate + tolerance) / tick) for k in range(num_frames)]

    if start > 0:
        # To the key frame at or before the window; should the index lead behind it, all is decoded from the start.
        origin = frame.pts
        for offset in (limits[0], origin):
            container.seek(offset, stream=stream)
            frames = decode_frames(container, stream)
            frame = next(frames, None)
            if frame is not None and frame.pts <= limits[0]:
                break
        else:
            raise MediaError("damaged or truncated film", f"nothing to decode at {start:.2f} s")

    video = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    filled = 0
    while frame is not None and filled < num_frames:
        following = next(frames, None)
        # How many of the target times this frame is on screen for: until the next one, or to the end.
        count = sum(following is None or limit < following.pts for limit in limits[filled:])
        if count:
            pixels = resize_and_crop(upright_frame(frame, matrix), height, width, pixel_aspect)
            video[filled : filled + count] = pixels
            filled += count
        frame = following
    return video
