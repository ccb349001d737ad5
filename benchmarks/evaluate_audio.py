"""The rows of `evaluate.py --task audio`: sounds made to films and to captions, heard by Toybox's judge of sound.

Sounds last two seconds, those of the long rows twenty. Films and captions are of the tuples held out in sound, in
turn, with any colour, but for tones and noises, which are of all tuples; films have 64 pixels and 8 frames a second,
and nothing but what is seen says what is to be heard. Captions are those that no training tuple has, after the prefix
of a clean sound. Intervals are over sounds: with so few tuples held out, they do not speak of others.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from figures import Figure, NotMeasured, Result, count_right, find_films
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio
from tqdm.auto import tqdm

from diffusers_moviegen import MovieGenAudioPipeline
from diffusers_moviegen.pipelines.audio_conditioning import segment_starts
from diffusers_moviegen.toybox.captions import sound_caption, sound_prefix
from diffusers_moviegen.toybox.judges import Hearing, listen, strikes_f1
from diffusers_moviegen.toybox.scenes import Scenes, draw_scenes, render
from diffusers_moviegen.toybox.sounds import SAMPLING_RATE, strike_times, synthesize
from diffusers_moviegen.toybox.vocabulary import (
    AMBIENCES,
    BACKGROUNDS,
    COLOURS,
    EVENTS,
    MOTIONS,
    SHAPES,
    SPINNING_SHAPES,
    VOICES,
    is_sound_held_out,
)
from diffusers_moviegen.training import MediaError
from diffusers_moviegen.training.audio_losses import SpectralLoss
from diffusers_moviegen.training.sound_dataset import read_sound


DURATION, LONG_DURATION = 2.0, 20.0
"""Seconds of a sound, and of one that is made of segments of the former."""

FRAME_RATE, SIDE = 8, 64

SEGMENT_OVERLAP = 0.5

QUALITY = 9
"""Of the captions' prefix."""

VOICED_MOTIONS = ("bounces", "grows", "shrinks", "spins")
"""Motions that the voice of a shape is heard in."""

NUM_TRAINING_FILMS = 512
"""Films on which the fixed rhythm is chosen."""

TOLERANCE = 0.06
"""Seconds between a strike and a floor touch; what `strikes_f1` takes."""


# --- What is asked for ------------------------------------------------------------------------------------------


def sound_tuples(held_out: bool | None, motions=MOTIONS, shapes=SHAPES, backgrounds=tuple(BACKGROUNDS)) -> list[tuple]:
    """All `(shape, motion, background)` of a split, or of both."""
    return [
        words
        for words in itertools.product(shapes, motions, backgrounds)
        if (words[1] != "spins" or words[0] in SPINNING_SHAPES)
        and (held_out is None or is_sound_held_out(*words) == held_out)
    ]


@dataclass(frozen=True)
class Films:
    """Films that can be seen and heard; what is random in the sound of each has the seed plus its number for its own.

    `words` has of each `(shape, motion, background)`.
    """

    scenes: Scenes
    words: list[tuple[str, str, str]]
    duration: float
    seed: int

    def video(self) -> torch.Tensor:
        """`(films, 3, frames, height, width)`, uint8."""
        return render(self.scenes, round(self.duration * FRAME_RATE), FRAME_RATE, SIDE, SIDE)

    def audio(self, offset: int = 0) -> torch.Tensor:
        """`(films, 1, samples)` as it should be, clean; another `offset` draws other noise."""
        seeds = range(self.seed + offset, self.seed + offset + len(self.words))
        return synthesize(self.scenes, self.duration, [torch.Generator().manual_seed(seed) for seed in seeds])

    def strikes(self) -> list[list[float]]:
        return strike_times(self.scenes, self.duration)


def draw_films(tuples: list[tuple[str, str, str]], count: int, seed: int, duration: float = DURATION) -> Films:
    """`count` films of the tuples in turn, in any colour."""
    rng, words = random.Random(seed), [tuples[i % len(tuples)] for i in range(count)]
    colours = [rng.choice(list(COLOURS)) for _ in words]
    scenes = draw_scenes([(colour, *rest) for colour, rest in zip(colours, words, strict=True)], _generator(seed))
    return Films(scenes, words, duration, seed)


def draw_bouncing_films(count: int, seed: int, duration: float = DURATION) -> Films:
    """Two seconds always have a strike: there are at least 0.7 touches a second."""
    return draw_films(sound_tuples(True, ("bounces",)), count, seed, duration)


def draw_voiced_films(count: int, seed: int) -> Films:
    return draw_films(sound_tuples(True, VOICED_MOTIONS), count, seed)


def new_captions() -> list[tuple[str, str, str]]:
    """Tuples held out whose captions no training tuple has."""
    trained = {sound_caption(*words) for words in sound_tuples(False)}
    return [words for words in sound_tuples(True) if sound_caption(*words) not in trained]


def clean_caption(shape: str, motion: str, background: str) -> str:
    return sound_prefix(QUALITY, AMBIENCES[background] == "soft music") + sound_caption(shape, motion, background)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- Making sounds ----------------------------------------------------------------------------------------------


def require(pipe: MovieGenAudioPipeline, *components: str) -> None:
    for name in components:
        if getattr(pipe, name) is None:
            raise NotMeasured(f"the pipeline has no {name}.")


def generate(
    args: Any,
    pipe: MovieGenAudioPipeline,
    description: str,
    films: Films | None = None,
    captions: list[str] | None = None,
    **options,
) -> tuple[torch.Tensor, float]:
    """Sounds `(count, 1, samples)` for films, captions of two seconds, or films with captions.

    Args:
        options: further arguments of the pipeline.

    Returns:
        The sounds, and the seconds that one took.
    """
    require(pipe, "transformer")
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale} | options
    if films is None:
        count, options = len(captions), options | {"audio_length_in_s": DURATION}
    else:
        require(pipe, "image_encoder")
        count, options = len(films.words), options | {"video_frame_rate": FRAME_RATE}
        video = films.video().transpose(1, 2)
    if captions is not None:
        require(pipe, "text_encoder")
    sounds, start = [], time.perf_counter()
    with tqdm(total=count, desc=description) as progress:
        for first in range(0, count, args.batch_size):
            last = min(first + args.batch_size, count)
            audio = pipe(
                prompt=None if captions is None else captions[first:last],
                video=None if films is None else video[first:last],
                generator=[_generator(args.seed + index) for index in range(first, last)],
                output_type="pt",
                **options,
            ).audios
            sounds.append(audio.float().cpu())
            progress.update(last - first)
    return torch.cat(sounds), (time.perf_counter() - start) / count


@torch.no_grad()
def reconstruct(args: Any, pipe: MovieGenAudioPipeline, audio: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What the autoencoder makes of sounds `(count, 1, samples)` from the mean of the posterior, and the seconds."""
    vae, parts, start = pipe.vae, [], time.perf_counter()
    for part in audio.split(args.batch_size):
        latents = vae.encode(part.to(args.device, vae.dtype)).latent_dist.mode()
        parts.append(vae.decode(latents, num_samples=part.shape[-1]).sample.float().cpu())
    return torch.cat(parts), (time.perf_counter() - start) / len(audio)


# --- The autoencoder --------------------------------------------------------------------------------------------


def log_mel_distances(audio: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Mean absolute difference in dB of 80 mel bands, of each sound; what is below -80 dB of the full scale fades."""
    distance = SpectralLoss(SAMPLING_RATE, windows=(2048,), mel_bins=(80,), floor=1e-4)
    # Of decimal logarithms of magnitudes.
    return [20 * distance(*pair)["mel"].item() for pair in zip(audio.split(1), reference.split(1), strict=True)]


def mean_by_word(words: list[str], values: list[float]) -> str:
    """`bell 12.3 dB, flute 9.8 dB`: the mean of every word's values."""
    means = []
    for word in sorted(set(words)):
        its = [value for other, value in zip(words, values, strict=True) if other == word]
        means.append(f"{word} {sum(its) / len(its):.1f} dB")
    return ", ".join(means)


def measure_tones(args: Any, pipe: MovieGenAudioPipeline, count: int) -> Result:
    """Voices with a pitch, without ambience. One such tuple is held out, so all are heard, and that one alone too."""
    shapes = tuple(shape for shape in SHAPES if VOICES[shape] != "shaker")
    films = draw_films(sound_tuples(None, VOICED_MOTIONS, shapes, ("black",)), count, args.seed)
    audio = films.audio()
    decoded, seconds = reconstruct(args, pipe, audio)
    ratios = scale_invariant_signal_distortion_ratio(decoded[:, 0], audio[:, 0]).tolist()
    figures = [Figure("SI-SDR", ratios, list(range(count)), "dB")]
    held_out = [i for i, words in enumerate(films.words) if is_sound_held_out(*words)]
    if held_out:
        name = f"SI-SDR of {sound_caption(*films.words[held_out[0]])}, held out"
        figures.append(Figure(name, [ratios[i] for i in held_out], held_out, "dB", in_table=False))
    notes = [
        mean_by_word([VOICES[shape] for shape, _, _ in films.words], ratios),
        mean_by_word([EVENTS[motion] for _, motion, _ in films.words], ratios),
    ]
    return Result(figures, notes, count, seconds)


def measure_sounds(args: Any, pipe: MovieGenAudioPipeline, count: int) -> Result:
    """Whether the judge hears after the round trip what it heard before."""
    films = draw_films(sound_tuples(True), count, args.seed)
    audio = films.audio()
    decoded, seconds = reconstruct(args, pipe, audio)
    before, after = listen(audio), listen(decoded)
    fields = ("voice", "event", "ambience")
    same = {
        name: [getattr(a, name) == getattr(b, name) for a, b in zip(before, after, strict=True)] for name in fields
    }
    all_same, groups = [all(verdicts) for verdicts in zip(*same.values(), strict=True)], list(range(count))
    figures = [Figure("voice, event and ambience judged the same", all_same, groups)]
    figures += [Figure(name, same[name], groups, in_table=False) for name in fields]
    notes = [f"ambience the same: {count_right([hearing.ambience or 'none' for hearing in before], same['ambience'])}"]
    return Result(figures, notes, count, seconds)


NOISES = {
    "shaker": (VOICED_MOTIONS, ("star",), ("black",)),
    "whoosh": (("moves left", "moves right", "moves up", "moves down"), SHAPES, ("black",)),
    "rumble": (("stays still",), SHAPES, ("grey",)),
    "rain": (("stays still",), SHAPES, ("navy",)),
}
"""Motions, shapes and backgrounds that make noise and nothing else."""


def measure_noises(args: Any, pipe: MovieGenAudioPipeline, count: int) -> Result:
    """The kinds of noise in turn. Beside it, how far other noise of the same kind would be away."""
    kinds = [list(NOISES)[i % len(NOISES)] for i in range(count)]
    choices = {kind: itertools.cycle(sound_tuples(None, *what)) for kind, what in NOISES.items()}
    films = draw_films([next(choices[kind]) for kind in kinds], count, args.seed)
    audio = films.audio()
    decoded, seconds = reconstruct(args, pipe, audio)
    distances, groups = log_mel_distances(decoded, audio), list(range(count))
    others = log_mel_distances(films.audio(offset=count), audio)
    figures = [
        Figure("log-mel distance", distances, groups, "dB"),
        Figure("log-mel distance of another sound of the same film", others, groups, "dB", in_table=False),
    ]
    return Result(figures, [mean_by_word(kinds, distances)], count, seconds)


def measure_media(args: Any, pipe: MovieGenAudioPipeline, count: None) -> Result:
    """The sound of films: every window of two seconds, one after the other."""
    if args.media is None:
        raise NotMeasured("pass --media, a folder of films.")
    distances, groups, notes, seconds = [], [], [], 0.0
    samples = round(DURATION * SAMPLING_RATE)
    for film in tqdm(find_films(args.media, args.media_pattern), desc="DAC-VAE, films"):
        try:
            sound = read_sound(film, SAMPLING_RATE)
            if len(sound) < samples:
                raise MediaError(f"shorter than {DURATION:g} s")
        except MediaError as error:
            notes.append(f"{film.name} left out: {error}")
            continue
        windows = sound[: len(sound) // samples * samples].view(-1, 1, samples)
        decoded, each = reconstruct(args, pipe, windows)
        seconds += each * len(windows)
        distances += log_mel_distances(decoded, windows)
        groups += [film.name] * len(windows)
    if not groups:
        raise NotMeasured(f"none of the films can be used: {'; '.join(notes)}")
    notes.append(f"{len(groups)} windows of {len(set(groups))} films")
    return Result([Figure("log-mel distance", distances, groups, "dB")], notes, len(groups), seconds / len(groups))


# --- Films ------------------------------------------------------------------------------------------------------


def strikes_figure(name: str, heard: list[list[float]], true: list[list[float]], **options) -> Figure:
    """F1 of strikes, counts of all films taken together: the mean of F1s where a film counts by its strikes."""
    scores = [strikes_f1(h, t, TOLERANCE) for h, t in zip(heard, true, strict=True)]
    weights = [float(len(h) + len(t)) for h, t in zip(heard, true, strict=True)]
    return Figure(name, scores, list(range(len(true))), "", weights=weights, **options)


def rhythm(period: float, phase: float, duration: float) -> list[float]:
    """Seconds at which a fixed rhythm strikes."""
    return torch.arange(phase, duration, period, dtype=torch.float64).tolist()


def best_rhythm(duration: float, seed: int) -> tuple[float, float]:
    """Period and phase in seconds, both in steps of 20 ms, that F1 is best with on training films, taken together."""
    films = draw_films(sound_tuples(False, ("bounces",)), NUM_TRAINING_FILMS, seed + 1, duration)
    touches = torch.tensor([time for times in films.strikes() for time in times], dtype=torch.float64)
    best = (-1.0, 0.0, 0.0)
    # Any longer period, such as one that strikes only once, is that of a clip's length.
    for period in torch.arange(0.20, duration + 0.01, 0.02, dtype=torch.float64).tolist():
        for phase in torch.arange(0, min(period, duration), 0.02, dtype=torch.float64).tolist():
            guesses = torch.tensor(rhythm(period, phase, duration), dtype=torch.float64)
            # Guesses are farther apart than two tolerances, and so are touches: a match is one to one.
            matches = ((touches[:, None] - guesses).abs().amin(1) <= TOLERANCE).sum().item()
            score = 2 * matches / (len(touches) + NUM_TRAINING_FILMS * len(guesses))
            best = max(best, (score, period, phase))
    return best[1:]


def heard_on_sheet(films: Films, audio: torch.Tensor, hearings: list[Hearing], count: int = 4) -> list[dict]:
    """The first films as samples of [`~diffusers_moviegen.toybox.previews.sheet`], strikes being the floor touches."""
    samples = []
    for video, sound, words, strikes, hearing in zip(
        films.video()[:count], audio, films.words, films.strikes(), hearings, strict=False
    ):
        heard = [word for word in (hearing.voice, hearing.event, hearing.ambience) if word is not None]
        truth = {"heard": ", ".join(heard) or "silence", "strikes": torch.tensor(strikes, dtype=torch.float64)}
        caption = "a {} {} on a {} background".format(*words)
        samples.append({"video": video, "audio": sound, "caption": caption, "truth": truth})
    return samples


def measure_strikes(args: Any, pipe: MovieGenAudioPipeline, count: int) -> Result:
    """Bouncing films alone. Beside it a fixed rhythm, the best on training films, and the difference."""
    films = draw_bouncing_films(count, args.seed)
    audio, seconds = generate(args, pipe, "video to audio, strikes", films)
    hearings, true = listen(audio), films.strikes()
    period, phase = best_rhythm(films.duration, args.seed)
    score = strikes_figure("F1", [hearing.strikes for hearing in hearings], true)
    fixed = strikes_figure("F1 of a fixed rhythm", [rhythm(period, phase, films.duration)] * count, true)
    difference = Figure(
        "F1 above the fixed rhythm", score.values, score.groups, "", weights=score.weights, baseline=fixed
    )
    notes = [
        f"fixed rhythm: every {period:.2f} s from {phase:.2f} s on",
        f"{sum(len(hearing.strikes) for hearing in hearings)} strikes heard, {sum(map(len, true))} floor touches",
    ]
    return Result([score, fixed, difference], notes, count, seconds, heard_on_sheet(films, audio, hearings))


def measure_voices(args: Any, pipe: MovieGenAudioPipeline, count: int) -> Result:
    """Films alone in which a voice is heard."""
    films = draw_voiced_films(count, args.seed)
    audio, seconds = generate(args, pipe, "video to audio, voices", films)
    hearings = listen(audio)
    voices, events, ambiences = _wanted(films.words)
    right = {
        "voice": [hearing.voice == voice for hearing, voice in zip(hearings, voices, strict=True)],
        "event": [hearing.event == event for hearing, event in zip(hearings, events, strict=True)],
        "ambience": [hearing.ambience == ambience for hearing, ambience in zip(hearings, ambiences, strict=True)],
    }
    groups = list(range(count))
    figures = [Figure("voice right", right["voice"], groups)]
    figures += [Figure(f"{name} right", right[name], groups, in_table=False) for name in ("event", "ambience")]
    notes = [
        f"voice right: {count_right(voices, right['voice'])}",
        f"event right: {count_right(events, right['event'])}",
    ]
    return Result(figures, notes, count, seconds, heard_on_sheet(films, audio, hearings))


def _wanted(words: list[tuple[str, str, str]]) -> tuple[list[str], list[str], list[str | None]]:
    """Voices, events and ambiences of tuples in which a voice is heard."""
    voices = [VOICES[shape] for shape, _, _ in words]
    return voices, [EVENTS[motion] for _, motion, _ in words], [AMBIENCES[background] for _, _, background in words]


# --- Captions ---------------------------------------------------------------------------------------------------


def measure_captions(args: Any, pipe: MovieGenAudioPipeline, count: int) -> Result:
    tuples = new_captions()
    words = [tuples[i % len(tuples)] for i in range(count)]
    audio, seconds = generate(args, pipe, "text to audio", captions=[clean_caption(*parts) for parts in words])
    hearings, (voices, events, ambiences) = listen(audio), _wanted(words)
    both, ambience, groups = [], [], list(range(count))
    for hearing, *wanted in zip(hearings, voices, events, ambiences, strict=True):
        both.append([hearing.voice, hearing.event] == wanted[:2])
        ambience.append(hearing.ambience == wanted[2])
    figures = [
        Figure("voice and event both right", both, groups),
        Figure("ambience right", ambience, groups),
        Figure("voice right", [h.voice == v for h, v in zip(hearings, voices, strict=True)], groups, in_table=False),
        Figure("event right", [h.event == e for h, e in zip(hearings, events, strict=True)], groups, in_table=False),
    ]
    names = [sound_caption(*parts) for parts in words]
    notes = [
        f"voice and event right: {count_right(names, both)}",
        f"ambience right: {count_right([name or 'none' for name in ambiences], ambience)}",
    ]
    return Result(figures, notes, count, seconds)


def other_voices(films: Films, seed: int) -> list[str]:
    """A shape for each film whose voice could do the same, but is another."""
    rng = random.Random(seed)
    return [
        rng.choice([s for s in (SPINNING_SHAPES if motion == "spins" else SHAPES) if s != shape])
        for shape, motion, _ in films.words
    ]


def measure_other_voices(args: Any, pipe: MovieGenAudioPipeline, count: int) -> Result:
    """Films with the caption of another voice that does the same."""
    films = draw_voiced_films(count, args.seed)
    shapes = other_voices(films, args.seed)
    captions = [clean_caption(shape, *words[1:]) for shape, words in zip(shapes, films.words, strict=True)]
    audio, seconds = generate(args, pipe, "video and another voice's caption", films, captions)
    hearings, groups = listen(audio), list(range(count))
    seen = [hearing.voice == VOICES[words[0]] for hearing, words in zip(hearings, films.words, strict=True)]
    said = [hearing.voice == VOICES[shape] for hearing, shape in zip(hearings, shapes, strict=True)]
    event = [hearing.event == EVENTS[words[1]] for hearing, words in zip(hearings, films.words, strict=True)]
    figures = [
        Figure("the text wins", said, groups),
        Figure("the film wins", seen, groups),
        Figure("event right", event, groups, in_table=False),
    ]
    notes = [f"the text wins: {count_right([VOICES[shape] for shape in shapes], said)}"]
    bounces = [i for i, words in enumerate(films.words) if words[1] == "bounces"]
    if bounces:
        heard, true = [hearings[i].strikes for i in bounces], films.strikes()
        figures.append(strikes_figure("F1 of strikes", heard, [true[i] for i in bounces], in_table=False))
    return Result(figures, notes, count, seconds)


# --- Long films -------------------------------------------------------------------------------------------------

SEAM_MARGIN = 1.0
"""Decibels by which a border must stand out. Less is inaudible, but even a steady tone differs from phase to phase."""


def segment_borders(num_latents: int, segment: int, long_form: str) -> list[int]:
    """The latents before which a segment starts or ends within a sound."""
    starts = segment_starts(num_latents, segment, SEGMENT_OVERLAP)
    ends = [start + segment for start in starts[:-1]]
    # One after another, what a segment shares with the last one is given.
    borders = ends if long_form == "sequential" else [*starts[1:], *ends]
    return sorted(set(borders))


def roughness(sound: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What happens at some samples of a sound `(samples,)`, in dB from -80 dB of the full scale up.

    Returns:
        By how much the 20 ms before a position and after it differ in level, and the largest second difference within
        10 ms of it: a click, where a phase jumps.
    """
    width = round(0.020 * SAMPLING_RATE)
    energy = F.pad(sound.double().square().cumsum(0), (1, 0))
    before = (energy[positions] - energy[positions - width]) / width
    after = (energy[positions + width] - energy[positions]) / width
    before, after = (10 * power.clamp(min=1e-8).log10() for power in (before, after))
    bend = F.pad((sound[2:] - 2 * sound[1:-1] + sound[:-2]).abs(), (1, 1))
    clicks = bend.unfold(0, width + 1, 1)[positions - width // 2].amax(1)
    return (before - after).abs(), 20 * clicks.double().clamp(min=1e-4).log10()


def has_seam(sound: torch.Tensor, borders: list[float], strikes: list[float]) -> bool:
    """Whether a sound `(samples,)` is rougher at the borders, in seconds, than elsewhere.

    It is if their median is above the 90 % quantile of the places elsewhere, 5 ms apart, or their 90 % quantile above
    the 99 % one. Neither counts from 30 ms before a strike to 300 ms after it, when it is 33 dB down.
    """

    def since(positions, times):
        return positions[:, None] / SAMPLING_RATE - torch.tensor([*times, -1e9], dtype=torch.float64)

    def is_quiet(positions):
        return ((since(positions, strikes) < -0.030) | (since(positions, strikes) > 0.300)).all(1)

    at = (torch.tensor(borders, dtype=torch.float64) * SAMPLING_RATE).round().long()
    elsewhere = torch.arange(960, len(sound) - 960, 240)
    elsewhere = elsewhere[is_quiet(elsewhere) & (since(elsewhere, borders).abs() > 0.050).all(1)]
    at = at[is_quiet(at)]
    if not len(at) or not len(elsewhere):
        return False
    for here, there in zip(roughness(sound, at), roughness(sound, elsewhere), strict=True):
        for share, limit in ((0.5, 0.9), (0.9, 0.99)):
            if here.quantile(share) > there.quantile(limit) + SEAM_MARGIN:
                return True
    return False


@contextmanager
def segments_of(pipe: MovieGenAudioPipeline, seconds: float) -> Iterator[None]:
    """Has the pipeline make no more seconds at once."""
    length = pipe.config.segment_length_in_s
    pipe.register_to_config(segment_length_in_s=seconds)
    try:
        yield
    finally:
        pipe.register_to_config(segment_length_in_s=length)


def measure_long(args: Any, pipe: MovieGenAudioPipeline, count: int, long_form: str) -> Result:
    films = draw_bouncing_films(count, args.seed, LONG_DURATION)
    with segments_of(pipe, DURATION):
        options = {"long_form": long_form, "segment_overlap": SEGMENT_OVERLAP}
        audio, seconds = generate(args, pipe, f"20 s, {long_form}", films, **options)
    hearings, true = listen(audio), films.strikes()
    rate = SAMPLING_RATE / pipe.vae.hop_length
    borders = segment_borders(round(LONG_DURATION * rate), round(DURATION * rate), long_form)
    borders = [border / rate for border in borders]
    seamless = [
        not has_seam(sound[0], borders, [*hearing.strikes, *times])
        for sound, hearing, times in zip(audio, hearings, true, strict=True)
    ]
    voices = [VOICES[shape] for shape, _, _ in films.words]
    figures = [
        strikes_figure("strikes, F1", [hearing.strikes for hearing in hearings], true),
        Figure("without a seam", seamless, list(range(count))),
    ]
    right = [hearing.voice == voice for hearing, voice in zip(hearings, voices, strict=True)]
    return Result(figures, [f"voice right: {count_right(voices, right)}"], count, seconds)


def measure_speed(args: Any, pipe: MovieGenAudioPipeline, count: None) -> Result:
    """One film of two seconds, the best of three times."""
    films = draw_bouncing_films(1, args.seed)
    seconds = min(generate(args, pipe, "speed", films)[1] for _ in range(3))
    return Result([Figure("two seconds of sound", [seconds], ["all"], "s")], [], 1, seconds)


@dataclass(frozen=True)
class AudioRow:
    """Something `measure` measures on `count` sounds."""

    title: str
    count: int | None
    measure: Callable[[Any, MovieGenAudioPipeline, int | None], Result]


AUDIO_ROWS = {
    "dac_tones": AudioRow("DAC-VAE, voices with a pitch, all tuples", 64, measure_tones),
    "dac_sounds": AudioRow("DAC-VAE, all sounds", 64, measure_sounds),
    "dac_noises": AudioRow("DAC-VAE, noises, all tuples", 64, measure_noises),
    "dac_media": AudioRow("DAC-VAE, real films", None, measure_media),
    "strikes": AudioRow("video to audio, bouncing", 64, measure_strikes),
    "voices": AudioRow("video to audio", 64, measure_voices),
    "captions": AudioRow("text to audio", 64, measure_captions),
    "other_voices": AudioRow("video and text of another voice", 64, measure_other_voices),
    "long": AudioRow("20 s by MultiDiffusion", 8, partial(measure_long, long_form="multidiffusion")),
    "long_sequential": AudioRow("20 s one after another", 8, partial(measure_long, long_form="sequential")),
    "speed": AudioRow("speed", None, measure_speed),
}
"""What `--task audio` measures, in this order."""
