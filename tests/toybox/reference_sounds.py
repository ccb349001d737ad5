"""The sounds of Toybox read once more from their definition: float64 NumPy, one sound at a time, slow and plain."""

import numpy as np


RATE = 48000

# Hz; the shaker's is its cut-off.
PITCHES = {"circle": 880.0, "square": 220.0, "triangle": 440.0, "ring": 1320.0, "star": 3000.0}

BANDS = {"whoosh": (300.0, 1200.0), "rumble": (20.0, 120.0), "rain": (2000.0, 6000.0)}

CHORDS = ((262.0, 330.0, 392.0), (247.0, 294.0, 392.0))


def band_noise(samples, low, high, rng):
    """White noise of which only the frequencies from `low` to `high` are kept."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequencies = np.fft.rfftfreq(samples, 1 / RATE)
    return np.fft.irfft(np.where((frequencies >= low) & (frequencies <= high), spectrum, 0), samples)


def progress(time):
    """u: one motion takes two seconds, after which it runs back and forth."""
    u = time / 2 % 2
    return np.where(u > 1, 2 - u, u)


def touch_times(rate, phase, duration):
    """Seconds at which `rate * tau + phase` is whole and the touch counts as a strike."""
    times = [(whole - phase) / rate for whole in range(int(np.ceil(rate * duration + phase)) + 1)]
    return [time for time in times if 0.02 <= time <= duration - 0.10]


def tone(shape, phase):
    """The voice of a shape at a phase given in turns of its pitch."""
    if shape == "circle":
        return (np.sin(2 * np.pi * phase) + 0.5 * np.sin(2 * np.pi * 2.76 * phase)) / 1.5
    if shape == "square":
        return np.where(phase % 1 < 0.5, 1.0, -1.0)
    if shape == "triangle":
        return 2 / np.pi * np.arcsin(np.sin(2 * np.pi * phase))
    return (np.sin(2 * np.pi * phase) + np.sin(2 * np.pi * 1325 / 1320 * phase)) / 2


def gliding_noise(cutoff, rng):
    """Noise above a frequency that changes: short overlapping pieces, each kept above the cut-off at its middle."""
    length, step = 1024, 256
    window = np.sin(np.pi * (np.arange(length) + 0.5) / length) ** 2
    samples = len(cutoff)
    sound = np.zeros(samples + 2 * length)
    noise = rng.standard_normal(samples + 2 * length)
    frequencies = np.fft.rfftfreq(length, 1 / RATE)
    for start in range(0, samples + length, step):
        middle = min(max(start - length // 2, 0), samples - 1)
        spectrum = np.fft.rfft(noise[start : start + length] * window)
        sound[start : start + length] += np.fft.irfft(np.where(frequencies >= cutoff[middle], spectrum, 0), length)
    return sound[length : length + samples]


def event(shape, motion, time, strikes, rng):
    """What the motion of a shape sounds like before it is scaled, and silence if it sounds like nothing."""
    samples, pitch = len(time), PITCHES[shape]
    if motion == "bounces":
        sound = np.zeros(samples)
        for strike in strikes:
            since = time - strike
            after = since >= 0
            loudness = np.where(after, np.minimum(since / 0.001, 1) * np.exp(-np.maximum(since - 0.001, 0) / 0.080), 0)
            voice = band_noise(samples, pitch, RATE / 2, rng) if shape == "star" else tone(shape, pitch * since)
            sound += loudness * voice
        return sound
    if motion.startswith("moves"):
        return band_noise(samples, *BANDS["whoosh"], rng) * (0.5 - 0.5 * np.cos(2 * np.pi * time / 2))
    if motion in ("grows", "shrinks"):
        octaves = (2 * progress(time) - 1) * (1 if motion == "grows" else -1)
        fades = np.minimum(np.minimum(time, samples / RATE - time) / 0.010, 1)
        if shape == "star":
            return gliding_noise(pitch * 2**octaves, rng) * fades
        pitches = pitch * 2**octaves
        turns = np.concatenate([[0], np.cumsum((pitches[1:] + pitches[:-1]) / 2)]) / RATE
        return tone(shape, turns) * fades
    if motion == "spins":
        voice = band_noise(samples, pitch, RATE / 2, rng) if shape == "star" else tone(shape, pitch * time)
        return voice * (0.5 - 0.5 * np.cos(2 * np.pi * 4 * time))
    return np.zeros(samples)


def ambience(background, time, rng):
    """What is heard behind, at an RMS of 1; silence on black."""
    samples = len(time)
    if background == "black":
        return np.zeros(samples)
    if background == "grey":
        sound = band_noise(samples, *BANDS["rumble"], rng)
    elif background == "navy":
        sound = band_noise(samples, *BANDS["rain"], rng)
    elif background == "brown":
        into = (time + rng.uniform(0, 0.125)) % 0.125
        sound = np.where(into < 0.030, np.sin(np.pi * into / 0.030) ** 2, 0) * np.sin(2 * np.pi * 4500 * time)
    else:
        sound = np.zeros(samples)
        for i in range(3):
            pitch = np.where(time % 2 < 1, CHORDS[0][i], CHORDS[1][i])
            sound += np.sin(2 * np.pi * np.cumsum(pitch) / RATE)
    return sound / np.sqrt(np.mean(sound**2))


def degrade(sound, quality, rng):
    """The sound at a quality from 1 to 10."""
    if quality in (1, 2):
        limit = 0.3 * np.abs(sound).max()
        sound = np.clip(sound, -limit, limit)
    if quality in (1, 3):
        sound = sound + rng.standard_normal(len(sound)) * np.sqrt(np.mean(sound**2)) * 10 ** (-20 / 20)
    if quality in (1, 4):
        spectrum = np.fft.rfft(sound)
        spectrum[np.fft.rfftfreq(len(sound), 1 / RATE) > 6000] = 0
        sound = np.fft.irfft(spectrum, len(sound))
    return sound


def synthesize(shape, motion, background, duration, rng, touch_rate=1.0, touch_phase=0.5, quality=10):
    """One sound `(samples,)` and the times of its strikes."""
    time = np.arange(round(duration * RATE)) / RATE
    strikes = touch_times(touch_rate, touch_phase, duration) if motion == "bounces" else []
    peak = rng.uniform(0.40, 0.65)
    sound = event(shape, motion, time, strikes, rng)
    if sound.any():
        sound = sound * peak / np.abs(sound).max()
    sound = sound + peak * 10 ** (-24 / 20) * ambience(background, time, rng)
    return degrade(sound, quality, rng), strikes
