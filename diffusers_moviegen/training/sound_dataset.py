"""The sounds of one's own files, decoded once and kept in memory, to be cut into short segments at random."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..media_reading import MediaError
from .media_dataset import FILM_EXTENSIONS, SOUND_EXTENSIONS, MediaMember, list_media


# As in `media_reading`: formats that could open other files are not among them.
_FORMATS = "aac,aiff,asf,avi,flac,flv,m4v,matroska,mov,mp3,mpeg,mpegts,mxf,nut,ogg,wav"


def read_sound(source: str | Path | bytes, sampling_rate: int = 48000) -> torch.Tensor:
    """Decodes the first sound track of a file, resampled and mixed down to one channel.

    Args:
        source: a file, or its content.
        sampling_rate: samples a second of the result.

    Returns:
        float32 `(samples,)` with a full scale of 1.

    Raises:
        MediaError: if there is no such file, or no sound in it that can be decoded.
    """
    import av

    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        with av.open(file, options={"format_whitelist": _FORMATS}, metadata_errors="replace") as container:
            if not container.streams.audio:
                raise MediaError("no sound track")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise MediaError("no decoder for the sound's codec")
            resampler, setup, parts = None, None, []
            for frame in container.decode(stream):
                # A recording can change these on its way, and a resampler cannot.
                if setup != (frame.format.name, frame.layout.name, frame.sample_rate):
                    if resampler is not None:
                        parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
                    resampler = av.AudioResampler(format="flt", layout="mono", rate=sampling_rate)
                    setup = (frame.format.name, frame.layout.name, frame.sample_rate)
                parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
            if resampler is not None:
                parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
    except (av.FFmpegError, OSError) as error:
        raise MediaError("no sound that can be decoded", getattr(error, "strerror", None) or str(error)) from error
    if not parts:
        raise MediaError("no sound that can be decoded")
    sound = torch.from_numpy(np.concatenate(parts)).float()
    if not sound.isfinite().all():
        raise MediaError("samples that are not finite")
    return sound


class SoundDataset:
    """The sounds that a table of media names, or WebDataset shards on this machine, those of films among them.

    Args:
        source: as for [`list_media`].
        sampling_rate: samples a second.
        min_samples: shorter sounds are skipped.
        file_column, caption_column, exclude: as for [`list_media`].

    Attributes:
        sounds (`list[torch.Tensor]`): float32 `(samples,)` each.
        names (`list[str]`): theirs.
        report ([`MediaReport`]): what was used, and what was not and why.

    Raises:
        OSError, ValueError: as [`list_media`], or if no file has a sound.
    """

    def __init__(
        self,
        source: str | Path,
        sampling_rate: int = 48000,
        min_samples: int = 1,
        *,
        file_column: str = "file_name",
        caption_column: str = "caption",
        exclude: Sequence[str] = (),
    ):
        rows, self.report = list_media(
            source,
            file_column=file_column,
            caption_column=caption_column,
            exclude=exclude,
            extensions=SOUND_EXTENSIONS + FILM_EXTENSIONS,
        )
        self.sounds, self.names = [], []
        for row in tqdm(rows, desc="decoding sounds", disable=None):
            place = row.source
            try:
                sound = read_sound(place.read() if isinstance(place, MediaMember) else place, sampling_rate)
                if len(sound) < min_samples:
                    raise MediaError(f"shorter than {min_samples / sampling_rate:.2f} s")
            except MediaError as error:
                self.report.add(row.name, error.reason, error.detail)
                continue
            self.sounds.append(sound)
            self.names.append(row.name)
            self.report.num_sounds += 1
        if not self.sounds:
            raise ValueError(f"'{source}' has no usable sound: {self.report}".replace("\n", "; "))

    def draw(self, count: int, samples: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        """Segments `(count, 1, samples)` at random, every second of sound as likely as any other, and their names."""
        lengths = torch.tensor([float(len(sound)) for sound in self.sounds])
        segments, names = [], []
        for index in torch.multinomial(lengths, count, replacement=True, generator=generator).tolist():
            last = len(self.sounds[index]) - samples
            start = torch.randint(last + 1, (), generator=generator).item()
            segments.append(self.sounds[index][start : start + samples])
            names.append(self.names[index])
        return torch.stack(segments)[:, None], names
