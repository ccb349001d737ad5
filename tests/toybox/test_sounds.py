"""Sounds against an independent reading of the world: closed forms and spectra in float64 NumPy."""

import math

import numpy as np
import pytest
import torch

from diffusers_moviegen.toybox.scenes import draw_scenes, draw_two_object_scenes, sample_tuple_pairs, trajectories
from diffusers_moviegen.toybox.sounds import SAMPLING_RATE, strike_times, synthesize
from diffusers_moviegen.toybox.vocabulary import BACKGROUNDS, MOTIONS, SHAPES


RATE = 48000
PITCHED = ("circle", "ring", "square", "triangle")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scenes_of(*words, rate=None, phase=None, seed=0):
    """Scenes of (shape, motion, background), all white."""
    scenes = draw_scenes([("white", *scene) for scene in words], seeded(seed))
    if rate is not None:
        scenes.touch_rate[:], scenes.touch_phase[:] = rate, phase
    return scenes


def heard(shape, motion, background="black", duration=2.0, seed=0, rate=None, phase=None, quality=None):
    """One sound in float64, of the generator `seed`."""
    scenes = scenes_of((shape, motion, background), rate=rate, phase=phase)
    quality = None if quality is None else [quality]
    return synthesize(scenes, duration, seeded(seed), quality)[0, 0].double().numpy()


def times(samples):
    return np.arange(samples) / RATE


def waveform(shape, seconds, scale=1.0):
    """A voice `seconds` after its phase was zero, all its frequencies times `scale`; zero before."""
    turns = scale * np.maximum(seconds, 0)
    if shape == "circle":
        wave = (np.sin(2 * np.pi * 880 * turns) + 0.5 * np.sin(2 * np.pi * 2.76 * 880 * turns)) / 1.5
    elif shape == "ring":
        wave = 0.5 * np.sin(2 * np.pi * 1320 * turns) + 0.5 * np.sin(2 * np.pi * 1325 * turns)
    elif shape == "square":
        # Rounded so that a half period that ends on a sample ends there.
        wave = np.where(np.round(220 * turns, 9) % 1 < 0.5, 1.0, -1.0)
    else:
        wave = 2 / np.pi * np.arcsin(np.sin(2 * np.pi * 440 * turns))
    return np.where(seconds >= 0, wave, 0)


def strike_envelope(seconds):
    return np.where(seconds >= 0, np.minimum(np.maximum(seconds, 0) / 0.001, 1) * np.exp(-seconds / 0.08), 0)


def expected_strikes(rate, phase, duration):
    """All touches of a clip one by one, then those that count."""
    touches = [(k - phase) / rate for k in range(-2, int(3 * duration) + 4)]
    return [t for t in touches if 0.02 <= t <= duration - 0.10]


def assert_same_up_to_level(sound, expected, tolerance=1e-5):
    """Equal after scaling the expected event to the peak of the sound."""
    expected = expected * (np.abs(sound).max() / np.abs(expected).max())
    assert np.abs(sound - expected).max() < tolerance


def power_spectrum(sound, window=np.ones):
    """Frequencies in Hz and power of the whole clip."""
    spectrum = np.fft.rfft(sound * window(len(sound)))
    return np.fft.rfftfreq(len(sound), 1 / RATE), np.abs(spectrum) ** 2


def share_outside(sound, low, high, window=np.ones):
    """Power outside a band over all power."""
    frequency, power = power_spectrum(sound, window)
    return power[(frequency < low) | (frequency > high)].sum() / power.sum()


def peak_frequency(sound, low, high):
    """Frequency of the strongest partial between two frequencies, to a fraction of a bin."""
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 16 * len(sound)))
    frequency = np.fft.rfftfreq(16 * len(sound), 1 / RATE)
    inside = (frequency >= low) & (frequency <= high)
    return frequency[inside][spectrum[inside].argmax()]


def level(sound):
    return np.sqrt(np.mean(sound**2))


# Where objects touch the floor, by hand: at 1.25 touches a second and phase 0.5, (k - 0.5) / 1.25 seconds.
@pytest.mark.parametrize(
    ("rate", "phase", "duration", "strikes"),
    [
        (1.25, 0.5, 2.0, [0.4, 1.2]),
        (1.25, 0.5, 1.0, [0.4]),
        (1.0, 0.25, 2.0, [0.75, 1.75]),
        (1.0, 0.0, 2.0, [1.0]),  # The touch at 0 s is too early, the one at 2 s too late.
        (0.75, 0.5, 0.5, []),
        (0.75, 0.5, 4.0, [2 / 3, 2.0, 10 / 3]),
    ],
)
def test_strikes_by_hand(rate, phase, duration, strikes):
    scenes = scenes_of(("circle", "bounces", "black"), rate=rate, phase=phase)
    assert strike_times(scenes, duration) == [pytest.approx(strikes, abs=1e-12)]


@pytest.mark.parametrize("duration", [0.1, 1.0, 2.0, 61.3])
def test_strikes_keep_their_distance_from_both_ends(duration):
    scenes = draw_scenes([("red", "circle", "bounces", "grey")] * 300, seeded())
    for i, strikes in enumerate(strike_times(scenes, duration)):
        rate, phase = scenes.touch_rate[i].item(), scenes.touch_phase[i].item()
        assert strikes == expected_strikes(rate, phase, duration)


def test_only_what_bounces_strikes():
    scenes = draw_scenes([("red", "square", motion, "grey") for motion in MOTIONS], seeded())
    assert [bool(strikes) for strikes in strike_times(scenes, 10.0)] == [motion == "bounces" for motion in MOTIONS]


def test_strikes_are_where_the_picture_shows_the_object_on_the_floor():
    scenes = draw_scenes([("red", "circle", "bounces", "grey")] * 20, seeded(3))
    for i, strikes in enumerate(strike_times(scenes, 2.0)):
        assert strikes
        _, y, radius, _ = trajectories(scenes[i : i + 1], torch.tensor(strikes), 64, 64)
        # A sample of 1/48000 s is at most 0.003 pixels above the floor.
        assert (y + radius - 0.80 * 64).abs().max() < 0.003


@pytest.mark.parametrize("shape", PITCHED)
def test_strikes_sound_from_their_sample_on(shape):
    for seed in range(5):
        scenes = scenes_of((shape, "bounces", "black"), seed=seed)
        (strikes,) = strike_times(scenes, 2.0)
        sound = synthesize(scenes, 2.0, seeded())[0, 0].numpy()
        onset = np.flatnonzero(sound)[0]
        assert 0 <= onset - strikes[0] * RATE <= 1
        for strike in strikes[1:]:
            # Later strikes jut out of what is left of the strikes before.
            start = math.ceil(strike * RATE)
            before = sum(
                waveform(shape, times(96000) - t) * strike_envelope(times(96000) - t) for t in strikes if t < strike
            )
            first = slice(math.floor(strikes[0] * RATE), start)
            gain = np.dot(sound[first], before[first]) / np.dot(before[first], before[first])
            added = np.abs(sound - gain * before)
            assert added[:start].max() < 1e-6 and added[start + 4 : start + 24].max() > 1e-3


@pytest.mark.parametrize("shape", PITCHED)
@pytest.mark.parametrize(("rate", "phase", "duration"), [(1.6, 0.9, 2.0), (0.7, 0.61, 1.0), (4.0, 0.123, 2.0)])
def test_knocks_are_the_sum_of_their_strikes(shape, rate, phase, duration):
    scenes = scenes_of((shape, "bounces", "black"), rate=rate, phase=phase)
    sound = synthesize(scenes, duration, seeded())[0, 0].double().numpy()
    # The rate and phase a scene has are float32.
    rate, phase = scenes.touch_rate.item(), scenes.touch_phase.item()
    since = [times(len(sound)) - t for t in expected_strikes(rate, phase, duration)]
    assert_same_up_to_level(sound, sum(waveform(shape, t) * strike_envelope(t) for t in since))


def test_a_film_stays_precise_to_its_end():
    scenes = scenes_of(("circle", "bounces", "black"), ("ring", "spins", "black"), rate=1.3, phase=0.2)
    knocks, warble = synthesize(scenes, 90.0, seeded())[:, 0].double().numpy()
    rate, phase = scenes.touch_rate[0].item(), scenes.touch_phase[0].item()
    tail = np.arange(85 * RATE, 90 * RATE) / RATE
    since = [tail - t for t in expected_strikes(rate, phase, 90.0) if t > 80]
    # The film's largest sample may lie in another strike: only the gain is fitted.
    expected = sum(waveform("circle", t) * strike_envelope(t) for t in since)
    gain = np.dot(knocks[85 * RATE :], expected) / np.dot(expected, expected)
    assert 0.4 < gain < 1.0
    assert np.abs(knocks[85 * RATE :] - gain * expected).max() < 1e-5
    assert_same_up_to_level(warble[85 * RATE :], waveform("ring", tail) * (0.5 - 0.5 * np.cos(8 * np.pi * tail)))


def test_shaker_strikes_rise_and_decay():
    scenes = scenes_of(("star", "bounces", "black"), rate=0.7, phase=0.8)
    (strikes,) = strike_times(scenes, 2.0)
    sounds = np.stack([synthesize(scenes, 2.0, seeded(seed))[0, 0].double().numpy() for seed in range(60)])
    sounds /= np.abs(sounds).max(axis=1, keepdims=True)
    since = [times(96000) - t for t in strikes]
    expected = sum(strike_envelope(t) for t in since)
    assert len(strikes) == 2 and not sounds[:, : math.ceil(strikes[0] * RATE)].any()
    # Mean power over the seeds in blocks of 5 ms.
    measured, expected = (np.sqrt((s**2).reshape(-1, 400, 240).mean(axis=(0, 2))) for s in (sounds, expected[None]))
    loud = expected > 1e-3
    ratio = measured[loud] / expected[loud]
    assert loud.sum() > 150 and np.abs(ratio / np.median(ratio) - 1).max() < 0.1
    # A 1 ms attack blurs the edge a little.
    for sound in sounds[:5]:
        assert share_outside(sound, 2900, 24000) < 1e-4


def test_a_scene_without_a_strike_has_no_event():
    # The object is in the air: it would touch at -0.1 and 1.15 seconds.
    words = [("square", "bounces", background) for background in ("black", "pink")]
    scenes = scenes_of(*words, rate=0.8, phase=0.08)
    assert strike_times(scenes, 1.0) == [[], []]
    sounds = synthesize(scenes, 1.0, [seeded(1), seeded(1)])
    still = synthesize(scenes_of(("square", "stays still", "pink")), 1.0, seeded(1))
    assert not sounds[0].any()
    assert torch.equal(sounds[1], still[0])


@pytest.mark.parametrize("shape", PITCHED)
@pytest.mark.parametrize("motion", ["grows", "shrinks"])
@pytest.mark.parametrize("duration", [1.0, 2.0])
def test_glides_are_the_integral_of_their_pitch(shape, motion, duration):
    sound = heard(shape, motion, duration=duration)
    # Trapezoids of 2^(2u - 1), eight to a sample, independent of the closed form.
    tau = np.arange(8 * len(sound) + 1) / (8 * RATE)
    pitch = 2.0 ** ((2 * (tau / 2) - 1) * (1 if motion == "grows" else -1))
    phase = np.concatenate([[0], np.cumsum((pitch[1:] + pitch[:-1]) / 2)])[:-1:8] / (8 * RATE)
    t = times(len(sound))
    fade = np.minimum(1, np.minimum(t, duration - t) / 0.010)
    expected = waveform(shape, phase) * fade
    if shape == "square":
        # A wave that jumps may jump a sample early or late in one of the two.
        jumps = np.abs(np.diff(waveform(shape, phase), append=0)) > 0
        sure = ~(jumps | np.roll(jumps, 1))
        assert sure.sum() > 0.97 * len(sound)
        sound, expected = sound * sure, expected * sure
    assert_same_up_to_level(sound, expected, 2e-5)


@pytest.mark.parametrize(("shape", "partials"), [("circle", (880, 2.76 * 880)), ("square", (220, 660, 1100))])
@pytest.mark.parametrize(("motion", "direction"), [("grows", 1), ("shrinks", -1)])
def test_glides_pass_their_pitches_on_time(shape, partials, motion, direction):
    sound = heard(shape, motion)
    for moment in (0.25, 0.5, 1.0, 1.5, 1.75):
        start = round((moment - 0.02) * RATE)
        for partial in partials:
            pitch = partial * 2 ** (direction * (moment - 1))
            found = peak_frequency(sound[start : start + 1920], 0.8 * pitch, 1.2 * pitch)
            assert found == pytest.approx(pitch, rel=0.01)


@pytest.mark.parametrize(("motion", "direction"), [("grows", 1), ("shrinks", -1)])
def test_the_shaker_glides_by_its_cut_off(motion, direction):
    words = ("star", motion, "black")
    sounds = synthesize(scenes_of(*[words] * 40), 2.0, seeded())[:, 0].double().numpy()
    for moment in (0.1, 0.5, 1.0, 1.5, 1.9):
        cut_off = 3000 * 2 ** (direction * (moment - 1))
        start = round((moment - 0.01) * RATE)
        pieces = sounds[:, start : start + 960] * np.hanning(960)
        power = (np.abs(np.fft.rfft(pieces)) ** 2).mean(axis=0)
        frequency = np.fft.rfftfreq(960, 1 / RATE)
        plateau = power[(frequency > 8000) & (frequency < 20000)].mean()
        assert power[frequency < cut_off - 400].max() < 1e-4 * plateau
        assert power[(frequency > cut_off + 200) & (frequency < cut_off + 1200)].mean() == pytest.approx(
            plateau, rel=0.2
        )
        # The middle of the edge is the cut-off itself.
        edge = frequency[np.flatnonzero(power > 0.5 * plateau)[0]]
        assert abs(edge - cut_off) <= 150
    fades = np.sqrt((sounds**2).mean(axis=0)[:480].reshape(8, 60).mean(axis=1))
    assert np.all(np.diff(fades) > 0) and not sounds[:, 0].any()


@pytest.mark.parametrize("shape", PITCHED)
@pytest.mark.parametrize("duration", [0.7, 2.0, 5.0])
def test_warbles_swell_four_times_a_second(shape, duration):
    sound = heard(shape, "spins", duration=duration)
    t = times(len(sound))
    assert_same_up_to_level(sound, waveform(shape, t) * (0.5 - 0.5 * np.cos(2 * np.pi * 4 * t)))


def test_shaker_warbles():
    sound = heard("star", "spins")
    assert share_outside(sound, 2990, 24000, np.hanning) < 1e-4
    power = (sound**2).reshape(-1, 480).mean(axis=1)  # 200 blocks of 10 ms.
    rate = np.abs(np.fft.rfft(power))[1:].argmax() + 1
    assert rate / 2 == 4
    expected = ((0.5 - 0.5 * np.cos(8 * np.pi * times(96000))) ** 2).reshape(-1, 480).mean(axis=1)
    assert np.corrcoef(power, expected)[0, 1] > 0.97


# Frequencies and amplitudes of the partials: bell 1 : 0.5, chime 1 : 1, a square wave's odd harmonics as 1 / n and a
# triangle wave's as 1 / n^2.
@pytest.mark.parametrize(
    ("shape", "partials"),
    [
        ("circle", {880: 1, 2.76 * 880: 0.5}),
        ("ring", {1320: 1, 1325: 1}),
        ("square", {220: 1, 660: 1 / 3, 1100: 1 / 5, 1540: 1 / 7}),
        ("triangle", {440: 1, 1320: 1 / 9, 2200: 1 / 25}),
    ],
)
def test_partials_of_the_voices(shape, partials):
    sound = heard(shape, "spins", duration=5.0)
    sound = sound * np.hanning(len(sound))
    t = times(len(sound))
    amplitudes = {f: abs(np.dot(sound, np.exp(-2j * np.pi * f * t))) for f in partials}
    for frequency, amplitude in partials.items():
        assert amplitudes[frequency] / max(amplitudes.values()) == pytest.approx(amplitude, rel=0.02, abs=0.002)
        # A tenth of a hertz beside it there is less.
        for beside in (frequency - 0.1, frequency + 0.1):
            assert abs(np.dot(sound, np.exp(-2j * np.pi * beside * t))) < amplitudes[frequency]
    # All other power is in the side bands 4 Hz away, in harmonics and in their aliases.
    if shape in ("circle", "ring"):
        frequency, power = power_spectrum(sound)
        near = np.min(np.abs(frequency[:, None] - np.array(list(partials))), axis=1) < 6
        assert power[~near].sum() < 1e-4 * power.sum()


@pytest.mark.parametrize("motion", [motion for motion in MOTIONS if motion.startswith("moves")])
@pytest.mark.parametrize("duration", [1.0, 2.0])
def test_whooshes_pass(motion, duration):
    words = ("circle", motion, "black")
    sounds = synthesize(scenes_of(*[words] * 60), duration, seeded())[:, 0].double().numpy()
    for sound in sounds[:5]:
        assert share_outside(sound, 290, 1210, np.hanning) < 1e-4
    # Power is even between the edges: each of three bands has its share.
    powers = np.mean([power_spectrum(sound)[1] for sound in sounds], axis=0)
    frequency = np.fft.rfftfreq(sounds.shape[1], 1 / RATE)
    for low in (300, 600, 900):
        share = powers[(frequency >= low) & (frequency < low + 300)].sum() / powers.sum()
        assert share == pytest.approx(1 / 3, abs=0.03)
    # Loudness over the seeds: half a whoosh in the first second.
    sounds /= np.sqrt((sounds**2).mean(axis=1, keepdims=True))
    measured = np.sqrt((sounds**2).reshape(60, -1, 2400).mean(axis=(0, 2)))
    envelope = (0.5 - 0.5 * np.cos(2 * np.pi * times(sounds.shape[1]) / 2)).reshape(-1, 2400)
    envelope = np.sqrt((envelope**2).mean(axis=1))
    assert np.abs(measured / measured.max() - envelope / envelope.max()).max() < 0.12


@pytest.mark.parametrize(("background", "low", "high"), [("grey", 20, 120), ("navy", 2000, 6000)])
@pytest.mark.parametrize("duration", [0.1, 1.0, 1.9875, 2.0, 6.0])
def test_bands_of_noises(background, low, high, duration):
    sound = heard("circle", "stays still", background, duration=duration)
    assert share_outside(sound, low, high) < 1e-10
    frequency, power = power_spectrum(sound)
    inside = (frequency >= low) & (frequency <= high)
    # Noise: no frequency of the band is missing, and halves of it are about even.
    assert np.all(power[inside] > 1e-8 * power[inside].mean())
    if duration >= 1:
        share = power[inside & (frequency < (low + high) / 2)].sum() / power.sum()
        assert share == pytest.approx(0.5, abs=0.15)


def test_shaker_noise_reaches_the_highest_frequency():
    sounds = synthesize(scenes_of(*[("star", "spins", "black")] * 20), 2.0, seeded())[:, 0].double().numpy()
    power = np.mean([power_spectrum(sound)[1] for sound in sounds], axis=0)
    shares = [band.sum() / power.sum() for band in np.split(power[6000:48000], 14)]  # 3 to 24 kHz by 1.5 kHz.
    assert shares == pytest.approx([1 / 14] * 14, rel=0.1)


def test_crickets_chirp_eight_times_a_second():
    offsets = []
    for seed in range(40):
        sound = heard("circle", "stays still", "brown", seed=seed)
        # A chirp is symmetric: the middle of its power is 15 ms after its start, on the circle of one period.
        turn = np.dot(sound**2, np.exp(2j * np.pi * times(96000) / 0.125))
        offsets.append((np.angle(turn) / (2 * np.pi) * 0.125 - 0.015) % 0.125)
        t = (times(96000) - offsets[-1]) % 0.125
        chirp = (0.5 - 0.5 * np.cos(2 * np.pi * t / 0.030)) * np.sin(2 * np.pi * 4500 * t)
        assert_same_up_to_level(sound, np.where(t < 0.030, chirp, 0))
    assert min(offsets) < 0.015 and max(offsets) > 0.110 and 0.04 < np.mean(offsets) < 0.085


@pytest.mark.parametrize("duration", [0.5, 2.0, 5.25])
def test_soft_music_alternates_triads(duration):
    sound = heard("circle", "stays still", "pink", duration=duration)
    t = times(len(sound))
    expected = np.zeros(len(sound))
    for first, second in zip((262, 330, 392), (247, 294, 392), strict=True):
        # The phase is the sum of the frequencies of all samples before, whatever the closed form.
        frequency = np.where(np.floor(t) % 2 == 0, first, second)
        expected += np.sin(2 * np.pi * np.concatenate([[0], np.cumsum(frequency)[:-1]]) / RATE)
    assert_same_up_to_level(sound, expected)
    for start in range(0, math.floor(duration)):
        for low in (262, 330, 392) if start % 2 == 0 else (247, 294, 392):
            second = sound[start * RATE : (start + 1) * RATE]
            assert peak_frequency(second, low - 7, low + 7) == pytest.approx(low, abs=0.2)
    # No click at the change: no step is larger than elsewhere.
    if duration > 1:
        steps = np.abs(np.diff(sound))
        assert steps[RATE - 3 : RATE + 3].max() <= steps[: RATE - 100].max()


def test_events_have_the_peak_that_was_drawn():
    words = [
        (shape, motion, "black")
        for shape in SHAPES
        for motion in ("bounces", "moves up", "grows", "shrinks", "spins")
        for _ in range(8)
    ]
    scenes = scenes_of(*words, rate=1.0, phase=0.5)
    peaks = synthesize(scenes, 2.0, seeded()).abs().amax(dim=(1, 2))
    assert 0.40 <= peaks.min() < 0.41 and 0.64 < peaks.max() <= 0.65
    assert peaks.mean() == pytest.approx(0.525, abs=0.02)
    # The same peak in all of a seed's sounds: it is drawn first.
    for seed in range(3):
        peak = 0.40 + 0.25 * torch.rand((), generator=seeded(seed)).item()
        for shape, motion, background in words[::8]:
            sound = heard(shape, motion, background, seed=seed, rate=1.0, phase=0.5)
            assert np.abs(sound).max() == pytest.approx(peak, abs=1e-6)


@pytest.mark.parametrize("background", [background for background in BACKGROUNDS if background != "black"])
@pytest.mark.parametrize("motion", ["bounces", "moves left", "grows", "spins", "stays still"])
@pytest.mark.parametrize("duration", [0.5, 2.0])
def test_ambiences_are_24_db_under_the_peak(background, motion, duration):
    for seed in range(3):
        peak = 0.40 + 0.25 * torch.rand((), generator=seeded(seed)).item()
        mix = heard("ring", motion, background, duration, seed, rate=0.9, phase=0.7)
        event = heard("ring", motion, "black", duration, seed, rate=0.9, phase=0.7)
        assert np.abs(mix).max() < 1
        assert 20 * math.log10(level(mix - event) / peak) == pytest.approx(-24, abs=1e-3)


def test_silence():
    assert not heard("circle", "stays still").any()
    for quality in range(1, 11):
        assert not heard("circle", "stays still", quality=quality).any()


@pytest.mark.parametrize(
    "words", [("star", "spins", "pink"), ("square", "bounces", "brown"), ("star", "grows", "navy")]
)
def test_qualities(words):
    def recorded(quality):
        return heard(*words, seed=5, rate=1.2, phase=0.1, quality=quality)

    clean = heard(*words, seed=5, rate=1.2, phase=0.1)
    for quality in range(5, 11):
        assert np.array_equal(recorded(quality), clean)

    spectrum = np.fft.rfft(clean)
    spectrum[np.fft.rfftfreq(len(clean), 1 / RATE) > 6000] = 0
    narrow = np.fft.irfft(spectrum, len(clean))
    assert np.abs(narrow - clean).max() > 0.01
    assert np.abs(recorded(4) - narrow).max() < 1e-6

    noise = recorded(3) - clean
    assert 20 * math.log10(level(noise) / level(clean)) == pytest.approx(-20, abs=1e-3)
    # White: every 3 kHz have an eighth of the power.
    bands = np.split(power_spectrum(noise)[1][:48000], 8)
    assert [band.sum() / sum(map(np.sum, bands)) for band in bands] == pytest.approx([1 / 8] * 8, rel=0.06)
    assert abs(np.corrcoef(noise, clean)[0, 1]) < 0.02

    limit = 0.3 * np.abs(clean).max()
    assert np.abs(recorded(2) - np.clip(clean, -limit, limit)).max() < 1e-6

    # All in the order 4, 3, 2: the noise of quality 3, 20 dB under the narrow signal, is clipped with it.
    noisy = narrow + noise * (0.1 * level(narrow) / level(noise))
    limit = 0.3 * np.abs(noisy).max()
    assert np.abs(recorded(1) - np.clip(noisy, -limit, limit)).max() < 1e-6


@pytest.mark.parametrize(("duration", "samples"), [(0.1, 4800), (1 / 3, 16000), (1.00001, 48000), (2, 96000)])
def test_shape_and_type(duration, samples):
    scenes = scenes_of(*[("star", motion, "brown") for motion in MOTIONS])
    audio = synthesize(scenes, duration, seeded())
    assert audio.shape == (len(MOTIONS), 1, samples)
    assert audio.dtype == torch.float32 and audio.isfinite().all()
    assert SAMPLING_RATE == RATE


def test_same_seed_same_sounds():
    words = [(shape, motion, background) for shape in SHAPES for motion in MOTIONS[4:] for background in BACKGROUNDS]
    scenes = scenes_of(*words)
    quality = [1 + i % 10 for i in range(len(words))]
    first = synthesize(scenes, 0.5, seeded(7), quality)
    assert torch.equal(first, synthesize(scenes, 0.5, seeded(7), quality))
    assert not torch.equal(first, synthesize(scenes, 0.5, seeded(8), quality))


def test_a_sound_depends_on_its_own_generator_only():
    words = [(shape, motion, background) for shape in SHAPES for motion in MOTIONS[4:] for background in BACKGROUNDS]
    scenes = scenes_of(*words)
    quality = [1 + i % 10 for i in range(len(words))]
    together = synthesize(scenes, 0.5, [seeded(i) for i in range(len(words))], quality)
    order = torch.randperm(len(words), generator=seeded()).tolist()
    mixed = synthesize(scenes[order], 0.5, [seeded(i) for i in order], [quality[i] for i in order])
    assert torch.equal(mixed, together[order])
    for i in range(0, len(words), 7):
        alone = synthesize(scenes[i : i + 1], 0.5, seeded(i), quality[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_noises_differ_from_scene_to_scene():
    for words in (("star", "spins", "black"), ("star", "grows", "black"), ("circle", "moves up", "black")):
        first, second = synthesize(scenes_of(words, words), 1.0, seeded())[:, 0].numpy()
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares two devices")
def test_an_accelerator_computes_the_same_sounds():
    words = [(shape, motion, background) for shape in SHAPES for motion in MOTIONS[4:] for background in BACKGROUNDS]
    scenes = scenes_of(*words)
    sounds = synthesize(scenes, 2.0, seeded())
    elsewhere = synthesize(scenes, 2.0, seeded(), device="cuda")
    assert elsewhere.device.type == "cuda"
    assert (elsewhere.cpu() - sounds).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"duration": 0.05}, "cannot last 0.05 s: use at least 0.1 s"),
        ({"duration": math.inf}, "cannot last inf s: use at least 0.1 s"),
        ({"duration": 2.5}, "'grows' lasts 2.0 s, not 2.5 s: shorten it or use bounces, spins, stays still"),
        ({"generator": [seeded()]}, "1 generators for 2 scenes: pass one for each"),
        ({"quality": [5]}, "1 qualities for 2 scenes: pass one for each"),
        ({"quality": [5, 0]}, r"quality \[5, 0\] is out of range: use whole numbers from 1 to 10"),
        ({"quality": [11, 5]}, "out of range"),
        ({"quality": [5, 4.5]}, "out of range"),
    ],
)
def test_errors(arguments, message):
    scenes = scenes_of(("circle", "bounces", "black"), ("circle", "grows", "black"))
    with pytest.raises(ValueError, match=message):
        synthesize(scenes, **({"duration": 1.0, "generator": seeded()} | arguments))


@pytest.mark.parametrize("motion", [motion for motion in MOTIONS if motion not in ("bounces", "spins", "stays still")])
def test_only_some_motions_make_films(motion):
    with pytest.raises(ValueError, match="shorten it"):
        synthesize(scenes_of(("square", motion, "black")), 2.01, seeded())


def test_two_objects_have_no_sound():
    scenes = draw_two_object_scenes(sample_tuple_pairs(2, seeded()), seeded(), 64, 64)
    with pytest.raises(ValueError, match="one object a scene, not 2"):
        synthesize(scenes, 2.0, seeded())
    with pytest.raises(ValueError, match="one object a scene, not 2"):
        strike_times(scenes, 2.0)
