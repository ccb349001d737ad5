"""Contact sheets, films and sounds that show samples of [`dataset`] together with their captions and truth."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .sounds import SAMPLING_RATE


_PAPER, _INK, _FAINT_INK, _MARK = (240, 240, 240), (20, 20, 20), (100, 100, 100), (220, 40, 40)
_GAP = 4
_LINE_HEIGHT = 15
_SHEET_WIDTH = 1250
_FILM_WIDTH = 1000
_PANEL_HEIGHT = 56

_SHORTEST_SIDE = 128
"""Pixels; smaller pictures are shown enlarged."""


def describe(sample: dict) -> tuple[str, str]:
    """Caption (or instruction) and truth of a sample in one line each, without what does not apply."""
    words = []
    for name, value in sample["truth"].items():
        if isinstance(value, torch.Tensor):
            value = " ".join(f"{number:.3f}" for number in value.tolist() if not math.isnan(number))
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, float):
            value = "" if math.isnan(value) else f"{value:.4g}"
        if value != "":
            words.append(f"{name}: {value}")
    return sample.get("caption", sample.get("instruction")), ", ".join(words)


def _frames(clip: torch.Tensor) -> list[Image.Image]:
    """Pictures of a clip `(channels, frames, height, width)`, uint8 RGB or a boolean mask."""
    if clip.dtype == torch.bool:
        clip = clip.expand(3, -1, -1, -1) * torch.tensor(255, dtype=torch.uint8)
    scale = max(1, _SHORTEST_SIDE // min(clip.shape[2:]))
    clip = clip.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return [Image.fromarray(frame) for frame in clip.permute(1, 2, 3, 0).contiguous().numpy()]


def _tracks(sample: dict) -> dict[str, list[Image.Image]]:
    """What there is to see of a sample: lists of frames, of one frame for a picture."""
    pictures = {name: sample[name][:, None] for name in ("image", "reference_image") if name in sample}
    clips = {name: sample[name] for name in ("video", "source", "target", "mask") if name in sample}
    return {name: _frames(clip) for name, clip in (pictures | clips).items()}


def _arrange(images: Sequence[Image.Image], across: bool) -> Image.Image:
    """Images in a row or a column, a gap apart, on paper."""
    widths, heights = [image.width for image in images], [image.height for image in images]
    gaps = _GAP * (len(images) - 1)
    size = (sum(widths) + gaps, max(heights)) if across else (max(widths), sum(heights) + gaps)
    canvas, place = Image.new("RGB", size, _PAPER), 0
    for image in images:
        canvas.paste(image, (place, 0) if across else (0, place))
        place += (image.width if across else image.height) + _GAP
    return canvas


def _text(text: str, width: int, colour: tuple[int, int, int] = _INK) -> Image.Image:
    font, lines = ImageFont.load_default(12), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    image = Image.new("RGB", (width, _LINE_HEIGHT * len(lines)), _PAPER)
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((0, _LINE_HEIGHT * i), line, fill=colour, font=font)
    return image


def _grid(cells: Sequence[Image.Image], width: int, cell_height: int) -> Image.Image:
    """Cells of one width in as many columns as fit into `width`, on paper with a margin around each."""
    columns = max(1, width // (cells[0].width + 4 * _GAP))
    size = (cells[0].width + 4 * _GAP, cell_height + 4 * _GAP)
    canvas = Image.new("RGB", (size[0] * min(columns, len(cells)), size[1] * math.ceil(len(cells) / columns)), _PAPER)
    for i, cell in enumerate(cells):
        canvas.paste(cell, (i % columns * size[0] + 2 * _GAP, i // columns * size[1] + 2 * _GAP))
    return canvas


def _sound_panels(sample: dict, width: int) -> list[Image.Image]:
    """Waveform, and spectrogram from 50 Hz to 16 kHz in octaves of one height; strikes are marked."""
    audio = sample["audio"][0]
    bounds = torch.linspace(0, len(audio), width + 1).long().tolist()
    parts = [audio[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    wave = Image.new("RGB", (width, _PANEL_HEIGHT), (250, 250, 250))
    draw = ImageDraw.Draw(wave)
    for column, part in enumerate(parts):
        low, high = (_PANEL_HEIGHT / 2 * (1 - value.item()) for value in (part.min(), part.max()))
        draw.line((column, high, column, low), fill=(60, 60, 90))

    window = torch.hann_window(2048)
    spectrum = torch.stft(audio, 2048, hop_length=256, window=window, return_complex=True).abs() / window.sum()
    frequencies = 50 * (16000 / 50) ** torch.linspace(1, 0, _PANEL_HEIGHT)
    rows = (frequencies * 2048 / SAMPLING_RATE).round().long()
    columns = torch.linspace(0, spectrum.shape[1] - 1, width).round().long()
    decibels = 20 * torch.log10(spectrum[rows][:, columns] + 1e-6)
    # From -90 to -20 dB; sixteen shades keep the file small.
    shades = 250 - 15 * ((decibels + 90) * 16 / 70).clamp(0, 15).floor()
    spectrogram = Image.fromarray(shades.to(torch.uint8).numpy()).convert("RGB")

    for panel in (wave, spectrogram):
        for strike in sample["truth"]["strikes"].tolist():
            if not math.isnan(strike):
                column = round(strike * SAMPLING_RATE / len(audio) * width)
                ImageDraw.Draw(panel).line((column, 0, column, _PANEL_HEIGHT), fill=_MARK)
    return [wave, spectrogram]


def sheet(samples: list[dict]) -> Image.Image:
    """Contact sheet: first, middle and last frame of every clip, sounds as waveform and spectrogram, all described."""
    cells = []
    for sample in samples:
        rows = []
        for name, frames in _tracks(sample).items():
            shown = [frames[i] for i in sorted({0, len(frames) // 2, len(frames) - 1})]
            row = _arrange(shown, across=True)
            if name == "video" and "reference_image" in sample:
                rows[-1] = _arrange([rows[-1], row], across=True)
                continue
            if "source" in sample:
                rows.append(_text(name, row.width))
            rows.append(row)
        width = max(row.width for row in rows)
        if "audio" in sample:
            rows += _sound_panels(sample, width)
        caption, truth = describe(sample)
        cells.append(_arrange([*rows, _text(caption, width), _text(truth, width, _FAINT_INK)], across=False))
    return _grid(cells, _SHEET_WIDTH, max(cell.height for cell in cells))


def film(samples: list[dict]) -> tuple[np.ndarray, np.ndarray | None]:
    """All samples with their captions: side by side, or one after another if they sound.

    Returns:
        Frames, uint8 of shape `(frames, height, width, 3)` with even height and width, and the sound, float32 of shape
        `(1, samples)`, or `None`.
    """
    cells = []
    for sample in samples:
        tracks = _tracks(sample)
        length = max(map(len, tracks.values()))
        # A picture stands beside its clip all the time.
        tracks = [frames * (length // len(frames)) for frames in tracks.values()]
        pictures = [_arrange(moment, across=True) for moment in zip(*tracks, strict=True)]
        caption = _text(describe(sample)[0], pictures[0].width)
        cells.append([_arrange([picture, caption], across=False) for picture in pictures])
    has_sound = "audio" in samples[0]
    moments = [[cell] for clip in cells for cell in clip] if has_sound else list(zip(*cells, strict=True))
    highest = max(clip[0].height for clip in cells)
    frames = np.stack([np.asarray(_grid(moment, _FILM_WIDTH, highest)) for moment in moments])
    # Half the chroma of an .mp4 is left out, which needs an even height and width.
    odd = [(0, 0), *((0, size % 2) for size in frames.shape[1:3]), (0, 0)]
    frames = np.pad(frames, odd, mode="edge")
    return frames, sound(samples, pause=0) if has_sound else None


def sound(samples: list[dict], pause: float = 0.5) -> np.ndarray:
    """Sounds one after another, `pause` seconds apart: float32 of shape `(1, samples)`, within -1 and 1."""
    silence = np.zeros((1, round(pause * SAMPLING_RATE)), dtype=np.float32)
    parts = [part for sample in samples for part in (sample["audio"].numpy(), silence)]
    # A file holds no more; the noise of a poor quality can go beyond.
    return np.concatenate(parts[:-1], axis=1).clip(-1, 1)
