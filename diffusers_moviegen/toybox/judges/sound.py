"""The judge of sound: which voice does what, when it strikes, and what is heard behind it."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..sounds import SAMPLING_RATE


MIN_SAMPLES = 4800
"""Samples of the shortest sound judged."""

FLOOR = 2e-3
"""RMS (of a full scale of 1) under which a sound is silence; the quietest of the world has 0.025."""

MIN_EVENT_SHARE = 0.1
"""Power of an event's loudest moment over that of the whole sound's."""

MIN_TONE_SHARE = 0.5
"""Share of the power, in loud moments, at the fundamental of a voice from which it is that voice; 0.8 nominally."""

MIN_WHOOSH_SHARE = 0.6
"""Share of the power, in loud moments, between 300 and 1200 Hz from which a sound can be a whoosh."""

MIN_SHAKER_CONTRAST = 6.0
"""Decibels between the densities of power above and below the shaker's pitch."""

MIN_WARBLE_SHARE = 0.6
"""Share of the loudness' variance that is a sine of 4 Hz; 1 for a warble, 0.1 for knocks."""

MIN_WARBLE_DEPTH = 0.35
"""Standard deviation of the loudness over its mean; nominally 0.71."""

MAX_KNOCK_DUTY = 0.3
"""Share of the time for which knocks are more than half as loud as at their loudest; nominally 0.09."""

MIN_ATTACK = 0.45
"""Difference between the loudness in the 30 ms after and before a strike, over the largest; nominally 0.8."""

MIN_STRIKE = 0.35
"""Rise of the loudness at a strike, over that at the strongest."""

MIN_GLIDE_CONTRAST = 3.0
"""Decibels by which a band of the shaker falls silent when the cut-off passes it, at least 5 in rain."""

MIN_AMBIENCE = {"a low rumble": 7.0, "rain": 2.0, "crickets": 0.35, "soft music": 5.5}
"""How far each ambience must stand out. Decibels over what is beside it, but for the crickets: how much of the power
about 4.5 kHz comes and goes 8 times a second, 1.9 if nothing else sounds there."""

MIN_AMBIENCE_DURATION = 0.25
"""Seconds in which an ambience can be told from a coincidence: two chirps of the crickets."""

MAX_HUM = 10.0
"""Decibels between the arithmetic and the geometric mean over frequencies of what rumbles; 2 or less for noise."""

_PITCHES = {"bell": 880.0, "buzzer": 220.0, "flute": 440.0, "chime": 1322.5}
# Hz; 0.8 and more of the power of these voices is in their fundamental.

_PITCH_TOLERANCE = 0.1
# Octaves to either side of a fundamental that are taken as its own.

_DETUNINGS = (-0.08, -0.04, 0.0, 0.04, 0.08)
# Octaves by which a voice as a whole may be out of tune.

_CHORDS = ((262.0, 330.0, 392.0), (247.0, 294.0, 392.0))
# Hz, a second each.


@dataclass
class Hearing:
    """What a sound is heard as, in the words of the vocabulary; None where it is none of them.

    Attributes:
        voice: who does it; None for a whoosh, or if nothing happens.
        event: what happens.
        strikes: seconds from the start at which something knocks, in order; empty for all other events.
        ambience: what is heard behind.
    """

    voice: str | None
    event: str | None
    strikes: list[float]
    ambience: str | None


def _spectrogram(sound: torch.Tensor, window: int, hop: int) -> torch.Tensor:
    """Power `(window // 2 + 1, frames)` over that of white noise at `FLOOR`; frame `i` is about sample `i * hop`."""
    hann = torch.hann_window(window)
    transform = torch.stft(sound, window, hop, window=hann, pad_mode="constant", return_complex=True)
    # Raised by that noise: how far one inaudible thing is above another does not matter.
    return (transform.real.square() + transform.imag.square()) / (FLOOR**2 * hann.square().sum()) + 1


def _bins(spectrogram: torch.Tensor, low: float, high: float) -> slice:
    """The rows of a spectrogram from `low` to `high` Hz."""
    spacing = SAMPLING_RATE / 2 / (spectrogram.shape[0] - 1)
    return slice(math.ceil(low / spacing), math.floor(high / spacing) + 1)


def _decibels(power: torch.Tensor) -> torch.Tensor:
    return 10 * power.log10()


def _octaves(frames: int, step: float) -> torch.Tensor:
    """Octaves above its pitch at which a voice is that glides up, for frames `step` seconds apart."""
    u = torch.arange(frames) * step / 2 % 2
    return 2 * torch.where(u > 1, 2 - u, u) - 1


def _loudness(sound: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Amplitude `(milliseconds,)` of the part of a sound between two frequencies, averaged over 5 ms."""
    # Whole seconds, with room to ring out, so that any rate of a whole number of hertz takes whole samples.
    seconds = math.ceil(len(sound) / SAMPLING_RATE + 0.1)
    spectrum = torch.fft.rfft(sound, seconds * SAMPLING_RATE)[math.ceil(low * seconds) : math.floor(high * seconds)]
    # A band taken out of the spectrum is the analytic signal, shifted to 0 Hz and sampled just often enough.
    per_millisecond = math.ceil((high - low) / 1000)
    power = torch.fft.ifft(spectrum, 1000 * per_millisecond * seconds).abs().square() * per_millisecond**2
    power = power.view(-1, per_millisecond).mean(1)[: math.ceil(len(sound) / SAMPLING_RATE * 1000)]
    return F.avg_pool1d(power[None], 5, stride=1, padding=2, count_include_pad=False)[0].sqrt()


def _rhythm(loudness: torch.Tensor) -> tuple[str | None, list[float]]:
    """Whether a loudness `(milliseconds,)` warbles or knocks, and when it strikes."""
    mean = loudness.mean()
    steps = torch.arange(len(loudness)) / 1000
    rates = torch.linspace(3.7, 4.3, 7)[:, None]
    waves = torch.polar(torch.ones(7, len(loudness)), 2 * math.pi * rates * steps)
    centred = loudness - mean
    share = 2 * (waves @ centred.to(waves.dtype) / len(loudness)).abs().square().max() / centred.square().mean()
    if share > MIN_WARBLE_SHARE and centred.square().mean().sqrt() > MIN_WARBLE_DEPTH * mean:
        return "warbles", []
    # A strike is where the next 30 ms are louder than the last 30 ms, and by more than at any time close by.
    width = 30
    means = F.avg_pool1d(F.pad(loudness, (width, width))[None], width, stride=1)[0]
    rise = (means[width:] - means[:-width])[: len(loudness)]
    peaks = (rise == F.max_pool1d(rise[None], 301, stride=1, padding=150)[0]) & (rise > MIN_STRIKE * rise.max())
    duty = (loudness > 0.5 * loudness.max()).float().mean()
    if rise.max() > MIN_ATTACK * loudness.max() and duty < MAX_KNOCK_DUTY:
        return "knocks", (torch.nonzero(peaks).flatten() / 1000).tolist()
    return None, []


def _tone(spectrogram: torch.Tensor, weight: torch.Tensor, octaves: torch.Tensor) -> tuple[float, str, int, float]:
    """The voice and path that fit best: share of the power at the fundamental, voice, direction of glide and pitch."""
    spacing = SAMPLING_RATE / 2 / (len(spectrogram) - 1)
    spectrogram = spectrogram[: _bins(spectrogram, 0, 4000).stop]
    below = F.pad(spectrogram.cumsum(0, dtype=torch.float64), (0, 0, 1, 0))
    pitches = torch.tensor(list(_PITCHES.values()))[:, None, None, None]
    paths = torch.tensor([0.0, 1.0, -1.0])[:, None] * octaves
    # (voices, directions, detunings, frames)
    pitch = pitches * 2 ** (paths[:, None] + torch.tensor(_DETUNINGS)[:, None])
    low = torch.minimum(pitch * 2**-_PITCH_TOLERANCE, pitch - 20)
    high = torch.maximum(pitch * 2**_PITCH_TOLERANCE, pitch + 20)
    low, high = ((edge / spacing).round().long().flatten(0, 2) for edge in (low, high + spacing))
    inside = (below.gather(0, high) - below.gather(0, low)).view(pitch.shape)
    shares = (inside * weight).sum(-1)
    # A single strike fits the path that happens to be there as well as its own.
    shares[:, 0] += 0.1
    share, index = shares.flatten().max(0)
    voice, direction, detuning = torch.unravel_index(index, shares.shape)
    voice = list(_PITCHES)[voice]
    return share.item(), voice, (0, 1, -1)[direction], _PITCHES[voice] * 2 ** _DETUNINGS[detuning]


def _glide_of_noise(spectrogram: torch.Tensor, times: torch.Tensor) -> tuple[float, int]:
    """By how many decibels bands fall silent as a rising (1) or falling (-1) cut-off passes them: the better one."""
    # Only while there is noise above every cut-off, so that what comes and goes as a whole does not glide.
    above = _decibels(spectrogram[_bins(spectrogram, 6300, 12000)].mean(0))
    sounding = above > above.max() - 15
    scores = []
    frequencies = 1600 * 2 ** (torch.arange(12) / 6)
    for direction in (1, -1):
        changes = []
        for frequency in frequencies.tolist():
            level = _decibels(spectrogram[_bins(spectrogram, frequency, frequency * 2 ** (1 / 6))].mean(0))
            centre = frequency * 2 ** (1 / 12)
            crossing = math.log2(centre / 1500) if direction == 1 else math.log2(6000 / centre)
            before = sounding & (times > crossing - 0.5) & (times < crossing - 0.08)
            after = sounding & (times < crossing + 0.5) & (times > crossing + 0.08)
            if before.sum() > 4 and after.sum() > 4:
                changes.append(direction * (level[before].mean() - level[after].mean()).clamp(-20, 20))
        scores.append(torch.stack(changes).mean().item() if changes else 0.0)
    return max(zip(scores, (1, -1), strict=True))


def _event(sound: torch.Tensor) -> tuple[str | None, str | None, list[float]]:
    spectrogram = _spectrogram(sound, 4096, 960)
    times = torch.arange(spectrogram.shape[1]) * 0.020
    octaves = _octaves(len(times), 0.020)

    # 1. What sounds outside the bands of the rumble and of the crickets, and the moments when it is loud.
    total = spectrogram.sum(0)
    audible = spectrogram.clone()
    for low, high in ((0, 130), (4300, 4700), (20000, 24000)):
        audible[_bins(audible, low, high)] = 0
    power = audible.sum(0)
    if power.max() < MIN_EVENT_SHARE * total.max():
        return None, None, []
    weight = power / power.square().sum()

    # 2. A voice with a pitch.
    share, voice, direction, pitch = _tone(audible, weight, octaves)
    if share > MIN_TONE_SHARE:
        if direction:
            return voice, "glides up" if direction == 1 else "glides down", []
        event, strikes = _rhythm(_loudness(sound, 0.65 * pitch, 1.35 * pitch))
        return (voice if event else None), event, strikes

    # 3. A whoosh: noise in its band, nowhere concentrated, that swells as it should.
    band = audible[_bins(audible, 280, 1250)]
    loudness = band.sum(0)
    if (loudness * weight).sum() > MIN_WHOOSH_SHARE:
        parts = torch.stack([part.sum() for part in band.chunk(8)])
        swell = torch.stack([loudness.sqrt(), 0.5 - 0.5 * torch.cos(math.pi * times)])
        if parts.max() < 0.5 * parts.sum() and torch.corrcoef(swell)[0, 1] > 0.5:
            return None, "passes", []
        return None, None, []

    # 4. The shaker: noise with nothing under it.
    def density(low, high):
        return (audible[_bins(audible, low, high)].mean(0) * weight).sum()

    above = torch.maximum(density(4800, 5900), density(6300, 16000))
    if _decibels(above) - _decibels(density(450, 1300)) < MIN_SHAKER_CONTRAST:
        return None, None, []
    event, strikes = _rhythm(_loudness(sound, 4800, 16000))
    if event is None:
        contrast, direction = _glide_of_noise(spectrogram, times)
        if contrast > MIN_GLIDE_CONTRAST:
            event = "glides up" if direction == 1 else "glides down"
    return ("shaker" if event else None), event, strikes


def _ambience(sound: torch.Tensor, event: str | None, voice: str | None) -> str | None:
    duration = len(sound) / SAMPLING_RATE
    if duration < MIN_AMBIENCE_DURATION:
        return None
    fine, coarse = _spectrogram(sound, 8192, 2400), _spectrogram(sound, 1024, 480)
    scores = {}

    # 1. Rumble and rain are heard in the quiet cells of the plane of time and frequency, between the partials of a
    # voice and between its strikes: more of them than beside their bands.
    def quiet(spectrogram, low, high):
        return _decibels(spectrogram[_bins(spectrogram, low, high)].flatten().quantile(0.2)).item()

    scores["a low rumble"] = quiet(fine, 30, 112) - quiet(fine, 135, 200)
    # Hum is as low, but made of lines.
    low = fine[_bins(fine, 30, 112)].median(1).values
    if _decibels(low.mean()) - _decibels(low).mean() > MAX_HUM:
        scores["a low rumble"] = 0.0
    if voice == "shaker" and event in ("glides up", "glides down"):
        # Only under its cut-off is there anything to be heard beside a shaker that never pauses.
        octaves = _octaves(coarse.shape[1], 0.010) * (1 if event == "glides up" else -1)
        frequencies = torch.arange(coarse.shape[0])[:, None] * SAMPLING_RATE / 1024
        under = frequencies < 0.93 * 3000 * 2**octaves
        bands = _bins(coarse, 2080, 5900), _bins(coarse, 1300, 1920)
        inside, outside = (coarse[band][under[band]] for band in bands)
        enough = min(len(inside), len(outside)) > 20
        scores["rain"] = (_decibels(inside.median()) - _decibels(outside.median())).item() if enough else 0.0
    else:
        lower = quiet(coarse, 2080, 2800) - quiet(coarse, 1300, 1920)
        upper = quiet(coarse, 5200, 5920) - quiet(coarse, 6080, 6800)
        scores["rain"] = (lower + upper) / 2

    # 2. Crickets are 8 times a second louder at 4.5 kHz than beside it. What is louder still only passes through.
    chirps = coarse[_bins(coarse, 4400, 4600)].mean(0)
    beside = (coarse[_bins(coarse, 3900, 4200)].mean(0) + coarse[_bins(coarse, 4800, 5100)].mean(0)) / 2
    limit = chirps.quantile(0.85)
    chirps, beside = chirps.clamp(max=limit), beside.clamp(max=limit)
    turns = 8 * 0.010 * torch.arange(len(chirps))
    wave = (chirps - beside) * torch.exp(2j * math.pi * turns)
    seconds = wave[: len(wave) // 100 * 100].view(-1, 100) if len(wave) >= 100 else wave[None]
    swing = 2 * seconds.mean(1).abs().mean() / (chirps.mean() + beside.mean())
    scores["crickets"] = swing.item()

    # 3. Soft music: at least two lines of each second's chord stand out on both sides.
    level = _decibels(fine[: _bins(fine, 0, 500).stop])
    frequencies = torch.arange(len(level)) * SAMPLING_RATE / 8192
    lines = torch.tensor(_CHORDS).flatten()
    free = ((frequencies[:, None] - lines).abs() > 12).all(1)
    times = torch.arange(level.shape[1]) * 0.050
    heights = []
    for second in range(math.ceil(duration)):
        frames = (times > second + 0.04) & (times < min(second + 0.96, duration))
        if frames.any():
            chord = []
            for line in _CHORDS[second % 2]:
                distance = frequencies - line
                on = level[distance.abs() < 4.5][:, frames].amax(0)
                sides = [level[free & (side > 0) & (side < 45)][:, frames] for side in (distance, -distance)]
                chord.append((on - torch.maximum(*(side.median(0).values for side in sides))).median())
            # A chord that is very clear does not make up for one that is missing.
            heights.append(torch.stack(chord).topk(2).values.mean().clamp(max=15))
    scores["soft music"] = torch.stack(heights).mean().item()

    best = max(scores, key=lambda name: scores[name] / MIN_AMBIENCE[name])
    return best if scores[best] > MIN_AMBIENCE[best] else None


def listen(audio: torch.Tensor, sampling_rate: int = SAMPLING_RATE) -> list[Hearing]:
    """Judges sounds.

    Args:
        audio (`torch.FloatTensor` of shape `(batch, 1, samples)` or `(batch, samples)`): sounds of 0.1 s or more.
        sampling_rate: samples a second; 48000.

    Returns:
        One `Hearing` a sound. A path that takes two seconds (a glide, a whoosh) runs backwards after them.

    Raises:
        ValueError: if the sounds are at another rate, of another shape or shorter.
    """
    if sampling_rate != SAMPLING_RATE:
        raise ValueError(f"sampling_rate is {sampling_rate}: resample the sounds to {SAMPLING_RATE}.")
    if audio.ndim not in (2, 3) or (audio.ndim == 3 and audio.shape[1] != 1):
        raise ValueError(f"audio is {tuple(audio.shape)}: use (batch, 1, samples) or (batch, samples), one channel.")
    if audio.shape[-1] < MIN_SAMPLES:
        raise ValueError(f"audio has {audio.shape[-1]} samples: use {MIN_SAMPLES} or more, 0.1 s.")
    return [_hear(sound) for sound in audio.flatten(1).float().cpu()]


def _hear(sound: torch.Tensor) -> Hearing:
    sound = sound - sound.mean()
    # Written so that what is not a number is silence, too.
    if not sound.square().mean().sqrt() >= FLOOR:
        return Hearing(None, None, [], None)
    voice, event, strikes = _event(sound)
    return Hearing(voice, event, strikes, _ambience(sound, event, voice))


def strikes_f1(heard: list[float], true: list[float], tolerance: float = 0.06) -> float:
    """F1 score of strike times in seconds, each heard matched to at most one true within the tolerance; 1 for none."""
    if not heard and not true:
        return 1.0
    heard, true, matches, i, j = sorted(heard), sorted(true), 0, 0, 0
    # On a line, matching the earliest pair that fits never costs a later one.
    while i < len(heard) and j < len(true):
        if abs(heard[i] - true[j]) <= tolerance:
            matches, i, j = matches + 1, i + 1, j + 1
        elif heard[i] < true[j]:
            i += 1
        else:
            j += 1
    return 2 * matches / (len(heard) + len(true))
