"""Synthesis of what Toybox scenes sound like, in step with their pictures.

Every sound is computed at the times of its own samples, `n / SAMPLING_RATE` seconds for sample `n`, from the same
closed forms as the picture: a strike begins at the very fraction of a sample at which the object touches the floor.
Random numbers are drawn on the CPU, scene by scene, so that a seed gives the same sounds on every device.
"""

import math

import torch

from .scenes import Scenes
from .vocabulary import AMBIENCES, BACKGROUNDS, EVENTS, MOTIONS, SHAPES, VOICES


SAMPLING_RATE = 48000
"""Samples a second."""

STRIKE_MARGINS = (0.02, 0.10)
"""Seconds after the start and before the end of a clip between which a floor touch is a strike."""

MIN_DURATION = 0.1
"""Seconds a sound lasts at least: shorter ones leave no room for the lowest ambience."""

MOTION_DURATION = 2.0
"""Seconds a sound lasts at most, unless its motion is one of `FILM_MOTIONS`."""

FILM_MOTIONS = ("bounces", "spins", "stays still")
"""Motions that can be heard for longer than one motion lasts."""

PEAKS = (0.40, 0.65)
"""Range of an event's largest absolute sample."""

AMBIENCE_LEVEL = -24.0
"""RMS of an ambience in decibels from the event's peak."""

DECAY = 0.08
"""Seconds in which a strike falls to 1/e."""

_NOISES = {"a low rumble": (20, 120), "rain": (2000, 6000), "passes": (300, 1200), "shaker": (3000, 24000)}
_TRIADS = ((262, 330, 392), (247, 294, 392))


def _check_one_object(scenes: Scenes) -> None:
    if scenes.motion.shape[1] != 1:
        raise ValueError(f"sounds are defined for one object a scene, not {scenes.motion.shape[1]}: pass one object.")


def strike_times(scenes: Scenes, duration: float) -> list[list[float]]:
    """When each scene's object strikes the floor audibly.

    An object that bounces touches the floor whenever `touch_rate tau + touch_phase` is whole. A touch is a strike
    where it keeps `STRIKE_MARGINS` from both ends of the clip.

    Args:
        scenes: the batch, one object a scene.
        duration: length of the clip in seconds.

    Returns:
        For each scene its strikes in ascending seconds; empty unless it bounces.

    Raises:
        ValueError: for scenes of several objects.
    """
    _check_one_object(scenes)
    times = []
    for motion, rate, phase in zip(
        scenes.motion[:, 0].tolist(), scenes.touch_rate[:, 0].tolist(), scenes.touch_phase[:, 0].tolist(), strict=True
    ):
        first, last = STRIKE_MARGINS[0], duration - STRIKE_MARGINS[1]
        touches = range(math.floor(rate * first + phase), math.ceil(rate * last + phase) + 1)
        strikes = [(touch - phase) / rate for touch in touches] if MOTIONS[motion] == "bounces" else []
        times.append([time for time in strikes if first <= time <= last])
    return times


def _sine(frequency: float, position: torch.Tensor) -> torch.Tensor:
    """Float32 sine of `frequency` Hz at float64 positions in samples."""
    # Whole periods go before the precision does: float32 could not tell the samples of a film apart.
    return torch.sin(2 * math.pi * torch.frac(frequency * position / SAMPLING_RATE).float())


def _tone(voice: str, position: torch.Tensor) -> torch.Tensor:
    """Any voice but the shaker, `position` samples (float64, not negative) after its phase was zero."""
    if voice == "bell":
        return (_sine(880, position) + 0.5 * _sine(2.76 * 880, position)) / 1.5
    if voice == "chime":
        return (_sine(1320, position) + _sine(1325, position)) / 2
    if voice == "buzzer":
        # Product before quotient: the sample on which half a period ends is hit exactly.
        return torch.where(torch.frac(220 * position / SAMPLING_RATE) < 0.5, 1.0, -1.0)
    # The flute: a quarter of a period late, the distance from the middle of the period starts at 0 and rises.
    return 4 * (torch.frac(440 * position / SAMPLING_RATE + 0.75) - 0.5).abs().float() - 1


def _noise(name: str, position: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """White noise that a brickwall filter has cut to the band `name`: every frequency of the clip is in or out."""
    low, high = _NOISES[name]
    samples = len(position)
    first, last = math.ceil(low * samples / SAMPLING_RATE), math.floor(high * samples / SAMPLING_RATE)
    spectrum = torch.zeros(samples // 2 + 1, dtype=torch.complex64, device=position.device)
    band = torch.randn(last - first + 1, dtype=torch.complex64, generator=generator)
    spectrum[first : last + 1] = band.to(position.device)
    return torch.fft.irfft(spectrum, n=samples)


def _gliding_noise(direction: int, position: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """White noise above a cut-off that glides by an octave a second, through 3 kHz after one second."""
    # Frames short enough for the cut-off to stand still in each (21 ms, 89 Hz at most) resolve 47 Hz. Their overlap
    # of three quarters adds up exactly.
    noise = torch.randn(len(position), generator=generator).to(position.device)
    window = torch.hann_window(1024, device=position.device)
    spectra = torch.stft(noise, 1024, hop_length=256, window=window, return_complex=True)
    frequency = torch.arange(513, device=position.device)[:, None] * (SAMPLING_RATE / 1024)
    tau = torch.arange(spectra.shape[1], device=position.device) * (256 / SAMPLING_RATE)
    spectra = spectra * (frequency >= _NOISES["shaker"][0] * 2 ** (direction * (tau - 1)))
    return torch.istft(spectra, 1024, hop_length=256, window=window, length=len(position))


def _event(
    motion: str, voice: str, strikes: list[float], position: torch.Tensor, generator: torch.Generator
) -> torch.Tensor | None:
    """What a scene's object does, at any level; None where it makes no sound."""
    kind = EVENTS[motion]
    if kind == "knocks" and strikes:
        noise = _noise(voice, position, generator) if voice == "shaker" else None
        event = torch.zeros_like(position, dtype=torch.float32)
        for time in strikes:
            # After 20 times the decay a strike is below float32's precision.
            start = math.ceil(time * SAMPLING_RATE)
            heard = slice(start, start + math.ceil(20 * DECAY * SAMPLING_RATE))
            since = position[heard] - time * SAMPLING_RATE
            seconds = (since / SAMPLING_RATE).float()
            envelope = (seconds / 0.001).clamp(max=1) * torch.exp(-seconds / DECAY)
            event[heard] += envelope * (_tone(voice, since) if noise is None else noise[heard])
        return event
    if kind == "passes":
        envelope = 0.5 - 0.5 * torch.cos(math.pi / SAMPLING_RATE * position).float()
        return envelope * _noise("passes", position, generator)
    if kind in ("glides up", "glides down"):
        direction = 1 if kind == "glides up" else -1
        if voice == "shaker":
            event = _gliding_noise(direction, position, generator)
        else:
            # The integral of the pitch 2^(direction (tau - 1)): where the steady voice would have got to by now.
            tau = position / SAMPLING_RATE
            glided = (2 ** (direction * (tau - 1)) - 2.0**-direction).abs() / math.log(2)
            event = _tone(voice, glided * SAMPLING_RATE)
        edge = torch.minimum(position, len(position) - position) / (0.010 * SAMPLING_RATE)
        return event * edge.clamp(max=1).float()
    if kind == "warbles":
        envelope = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.frac(4 * position / SAMPLING_RATE).float())
        return envelope * (_noise(voice, position, generator) if voice == "shaker" else _tone(voice, position))
    return None


def _ambience(name: str, position: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What is heard behind a scene, at any level."""
    if name == "crickets":
        period, length = 0.125 * SAMPLING_RATE, 0.030 * SAMPLING_RATE
        offset = period * torch.rand((), generator=generator).item()
        # They were singing before the clip began: it may start within a chirp.
        since = torch.remainder(position - offset, period)
        chirp = (0.5 - 0.5 * torch.cos(2 * math.pi / length * since.float())) * _sine(4500, since)
        return torch.where(since < length, chirp, 0)
    if name == "soft music":
        # Every note sounds whole periods in its second: the next starts at phase zero, where this one ends.
        second = torch.floor(position / SAMPLING_RATE)
        since, on_second = position - second * SAMPLING_RATE, second % 2 == 1
        music = torch.zeros_like(position, dtype=torch.float32)
        for frequencies in zip(*_TRIADS, strict=True):
            note = torch.where(on_second, frequencies[1], frequencies[0])
            music += torch.sin(2 * math.pi * torch.frac(since * note / SAMPLING_RATE).float())
        return music
    return _noise(name, position, generator)


def _root_mean_square(signal: torch.Tensor) -> torch.Tensor:
    return signal.square().mean().sqrt()


def _degrade(signal: torch.Tensor, quality: int, generator: torch.Generator) -> torch.Tensor:
    """The signal as a recording of the quality 1 to 10."""
    if quality in (4, 1):
        spectrum = torch.fft.rfft(signal)
        spectrum[math.floor(6000 * len(signal) / SAMPLING_RATE) + 1 :] = 0
        signal = torch.fft.irfft(spectrum, n=len(signal))
    if quality in (3, 1):
        noise = torch.randn(signal.shape, generator=generator).to(signal.device)
        signal = signal + noise * (0.1 * _root_mean_square(signal) / _root_mean_square(noise))
    if quality in (2, 1):
        limit = 0.3 * signal.abs().max()
        signal = signal.clamp(-limit, limit)
    return signal


def synthesize(
    scenes: Scenes,
    duration: float,
    generator: torch.Generator | list[torch.Generator],
    quality: list[int] | None = None,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Synthesizes what a batch of scenes sounds like.

    The event of a scene (its `EVENTS` by the voice of its shape) is scaled to a peak drawn from `PEAKS`; the ambience
    of its background has an RMS of `AMBIENCE_LEVEL` from that peak, with or without an event.

    Args:
        scenes: the batch, one object a scene.
        duration: seconds, at least `MIN_DURATION`; more than `MOTION_DURATION` only with `FILM_MOTIONS`.
        generator: on the CPU; one for all scenes, or a list with one for each, which makes every sound a function of
            its own seed, whatever else is in the batch.
        quality: one number from 1 to 10 for each scene, by default clean. 5 to 10 are clean, 4 is band-limited to
            6 kHz, 3 has white noise 20 dB below the signal, 2 is hard-clipped at 0.3 of the peak, 1 is 4, 3 and 2 in
            turn. The sound underneath does not depend on it when generators come in a list.
        device: where to compute; one with float64, which the phases of long films need.

    Returns:
        `torch.FloatTensor` of shape `(batch, 1, samples)` with `samples = round(duration * SAMPLING_RATE)`, mono at
        `SAMPLING_RATE`, within -1 and 1 where clean.

    Raises:
        ValueError: for scenes of several objects, a duration out of range, or lists of another length than the batch.
    """
    _check_one_object(scenes)
    generators = generator if isinstance(generator, list) else [generator] * len(scenes)
    quality = [10] * len(scenes) if quality is None else quality
    for name, values in (("generators", generators), ("qualities", quality)):
        if len(values) != len(scenes):
            raise ValueError(f"{len(values)} {name} for {len(scenes)} scenes: pass one for each.")
    if any(value not in range(1, 11) for value in quality):
        raise ValueError(f"quality {quality} is out of range: use whole numbers from 1 to 10.")
    if not MIN_DURATION <= duration < math.inf:
        raise ValueError(f"a sound cannot last {duration} s: use at least {MIN_DURATION} s, and an end.")
    motions = [MOTIONS[motion] for motion in scenes.motion[:, 0].tolist()]
    for motion in motions:
        if duration > MOTION_DURATION and motion not in FILM_MOTIONS:
            raise ValueError(
                f"{motion!r} lasts {MOTION_DURATION} s, not {duration} s: shorten it or use {', '.join(FILM_MOTIONS)}."
            )

    position = torch.arange(round(duration * SAMPLING_RATE), dtype=torch.float64, device=device)
    audio = torch.zeros(len(scenes), 1, len(position), device=device)
    voices = [VOICES[SHAPES[shape]] for shape in scenes.shape[:, 0].tolist()]
    backgrounds = list(BACKGROUNDS)
    ambiences = [AMBIENCES[backgrounds[background]] for background in scenes.background.tolist()]
    # Clip by clip, which fills the processor, so that not even rounding depends on what else is in the batch.
    for i, strikes in enumerate(strike_times(scenes, duration)):
        peak = PEAKS[0] + (PEAKS[1] - PEAKS[0]) * torch.rand((), generator=generators[i]).item()
        event = _event(motions[i], voices[i], strikes, position, generators[i])
        if event is not None:
            audio[i, 0] += event * (peak / event.abs().max())
        if ambiences[i] is not None:
            ambience = _ambience(ambiences[i], position, generators[i])
            audio[i, 0] += ambience * (peak * 10 ** (AMBIENCE_LEVEL / 20) / _root_mean_square(ambience))
        audio[i, 0] = _degrade(audio[i, 0], quality[i], generators[i])
    return audio
