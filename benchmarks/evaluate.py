"""Measures a checkpoint on prompts of Toybox, judged by the world's own judges, and prints a table.

    python benchmarks/evaluate.py --task video
    python benchmarks/evaluate.py --task audio
    python benchmarks/evaluate.py --task sampling
    python benchmarks/evaluate.py --task guidance

`video` measures what a checkpoint can do, on held-out tuples: all of `ROWS`, or those that `--rows` names. Where it
cannot do something at all, such as pictures larger than it has positions for, the table says so. `audio` measures a
checkpoint of sound in the same way, with the rows of evaluate_audio.py. `sampling` compares schedules and numbers of
steps on the prompts of `core_64`, `guidance` guidance scales on prompts of the training tuples, because it is for
choosing one.

Everything is decided by the seed: the tuples, drawn with replacement, and the noise of every prompt, which has the
seed plus the prompt's number for its own. Intervals of 95 % are bootstrapped over tuples, those of films over films.
"""

import json
import math
import random
import string
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evaluate_audio import AUDIO_ROWS
from figures import Figure, NotMeasured, Result, count_right, find_films, format_figure
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm.auto import tqdm

from diffusers_moviegen import MovieGenAudioPipeline, MovieGenPipeline, bundled_checkpoint
from diffusers_moviegen.toybox.captions import add_camera, add_written_word, core_caption, phrase, two_object_caption
from diffusers_moviegen.toybox.judges import Sight, compare, compare_objects, see
from diffusers_moviegen.toybox.previews import sheet
from diffusers_moviegen.toybox.scenes import TRAVEL, draw_scenes, render, sample_tuple_pairs, sample_tuples
from diffusers_moviegen.toybox.sounds import SAMPLING_RATE
from diffusers_moviegen.toybox.vocabulary import CAMERAS, MOTIONS, TEXT_MOTIONS
from diffusers_moviegen.training import (
    MediaError,
    check_positive,
    probe_media,
    read_media,
    run_script,
    save_sample_sheet,
)


@dataclass
class Arguments:
    task: str = field(default="video", metadata={"choices": ["video", "audio", "sampling", "guidance"]})
    model: str | None = field(
        default=None, metadata={"help": "pipeline folder; default: the bundled checkpoint of films or of sound"}
    )
    rows: list[str] = field(
        default_factory=list, metadata={"help": "which rows of `video` or `audio` to measure; default: all"}
    )
    num_prompts: int | None = field(
        default=None,
        metadata={
            "help": "of the largest rows, which have 256 for `video` and 64 for `audio`, the others in proportion; 64 "
            "for `sampling` and `guidance`"
        },
    )
    batch_size: int = field(
        default=16, metadata={"help": "clips of 64 px and 16 frames at a time, fewer if larger; or sounds"}
    )
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "of `video`, `audio` and `guidance`; default: the checkpoint's"}
    )
    guidance_scale: float | None = field(default=None, metadata={"help": "default: the checkpoint's"})
    step_counts: list[int] = field(
        default_factory=lambda: [4, 8, 12, 25, 50], metadata={"help": "numbers of steps that `sampling` compares"}
    )
    guidance_scales: list[float] = field(
        default_factory=lambda: [1.5, 2, 3, 4, 5, 7.5], metadata={"help": "what `guidance` compares"}
    )
    media: str | None = field(default=None, metadata={"help": "folder of films for the rows tae_media, dac_media"})
    media_pattern: str = field(default="*", metadata={"help": "which of its films to take"})
    seed: int = 0
    device: str = "cpu"
    sheet: str | None = field(
        default=None,
        metadata={
            "help": "PNG for a contact sheet of the first clips of core_64, or of strikes and voices with sound"
        },
    )
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures"})

    def __post_init__(self):
        if self.model is None:
            self.model = bundled_checkpoint("toybox-audio" if self.task == "audio" else "toybox")
        check_positive(self, ("batch_size",))
        for name in ("num_prompts", "num_inference_steps"):
            if getattr(self, name) is not None:
                check_positive(self, (name,))
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed is {self.seed}: it must be at least 0 and below {2**32}.")
        if not self.step_counts or min(self.step_counts) < 1:
            raise ValueError(f"--step_counts is {self.step_counts}: pass numbers of at least 1, such as 8 25 50.")
        if not self.guidance_scales or not all(map(math.isfinite, self.guidance_scales)):
            raise ValueError(f"--guidance_scales is {self.guidance_scales}: pass numbers such as 2 3 5.")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ValueError(f"--guidance_scale is {self.guidance_scale}: it must be finite.")
        for name in ("rows", "media", "sheet"):
            if getattr(self, name) and self.task not in TASK_ROWS:
                raise ValueError(f"--{name} does nothing with --task {self.task}: leave it out.")
        for name in self.rows:
            if name not in TASK_ROWS[self.task]:
                known = ", ".join(TASK_ROWS[self.task])
                raise ValueError(f"--rows: there is no row '{name}'; choose from {known}.")
        if self.guidance_scale is not None and self.task == "guidance":
            raise ValueError("--guidance_scale does nothing with --task guidance: pass --guidance_scales.")
        if self.num_inference_steps is not None and self.task == "sampling":
            raise ValueError("--num_inference_steps does nothing with --task sampling: pass --step_counts.")
        if self.sheet is not None and self.rows and not set(SHEET_ROWS[self.task]) & set(self.rows):
            names = " or ".join(SHEET_ROWS[self.task])
            raise ValueError(f"--sheet shows clips of {names}, which is not among --rows: add it.")
        if self.media is not None:
            find_films(self.media, self.media_pattern)


# --- What is asked for ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Shape and frame rate of a clip; a picture is a clip of one frame."""

    height: int = 64
    width: int = 64
    num_frames: int = 16
    frame_rate: float = 8


CLIP_64, CLIP_128 = Size(), Size(128, 128, 32, 16)
IMAGE_64, IMAGE_128 = Size(num_frames=1), Size(128, 128, num_frames=1)
PORTRAIT, LANDSCAPE = Size(96, 64), Size(64, 96)


@dataclass(frozen=True)
class Sample:
    """One clip to make: its prompt, and the objects, word and camera move that the prompt asks for.

    Objects are `(colour, shape, motion, background)`. The noise is that of the prompt's `index`.
    """

    index: int
    prompt: str
    objects: tuple[tuple[str, str, str, str], ...]
    size: Size = CLIP_64
    word: str | None = None
    camera: str | None = None


def draw_tuples(count: int, seed: int, held_out: bool = True, motions: tuple[str, ...] = MOTIONS) -> list[tuple]:
    return sample_tuples(count, torch.Generator().manual_seed(seed), held_out=held_out, motions=motions)


def draw_core(count: int, seed: int, size: Size = CLIP_64, held_out: bool = True) -> list[Sample]:
    """The core caption of one object, without its motion if it is a picture."""
    if size.num_frames == 1:
        said = [(c, s, None, b) for c, s, _, b in draw_tuples(count, seed, held_out, ("stays still",))]
        objects = [(c, s, "stays still", b) for c, s, _, b in said]
    else:
        said = objects = draw_tuples(count, seed, held_out)
    return [Sample(i, core_caption(*said[i]), (objects[i],), size) for i in range(count)]


def draw_phrasings(count: int, seed: int) -> list[Sample]:
    """One object in words other than those of the core caption."""
    rng = random.Random(seed)
    return [Sample(i, phrase(*words, rng), (words,)) for i, words in enumerate(draw_tuples(count, seed))]


def draw_aspects(count: int, seed: int) -> list[Sample]:
    """Core captions for 2:3 and 3:2 in turn."""
    return [replace(sample, size=(PORTRAIT, LANDSCAPE)[sample.index % 2]) for sample in draw_core(count, seed)]


def draw_frame_rates(count: int, seed: int) -> list[Sample]:
    """Every prompt twice, 16 frames at 8 and at 16 frames a second, of what moves at a known speed."""
    moves = tuple(motion for motion in MOTIONS if motion.startswith("moves "))
    return [
        Sample(i, core_caption(*words), (words,), Size(frame_rate=frame_rate))
        for i, words in enumerate(draw_tuples(count, seed, motions=moves))
        for frame_rate in (8, 16)
    ]


def draw_two_objects(count: int, seed: int) -> list[Sample]:
    pairs = sample_tuple_pairs(count, torch.Generator().manual_seed(seed), held_out=True)
    return [
        Sample(i, two_object_caption([words[:3] for words in pair], pair[0][3]), pair) for i, pair in enumerate(pairs)
    ]


def draw_words(count: int, seed: int) -> list[Sample]:
    """Words of one, two and three letters in turn."""
    rng, samples = random.Random(seed), []
    for i, words in enumerate(draw_tuples(count, seed, motions=TEXT_MOTIONS)):
        word = "".join(rng.choices(string.ascii_uppercase, k=1 + i % 3))
        samples.append(Sample(i, add_written_word(core_caption(*words), word), (words,), word=word))
    return samples


def draw_cameras(count: int, seed: int) -> list[Sample]:
    """The four camera moves in turn, over a checkered ground."""
    samples = []
    for i, words in enumerate(draw_tuples(count, seed)):
        camera = CAMERAS[i % len(CAMERAS)]
        caption = core_caption(*words[:3], f"checkered {words[3]}")
        samples.append(Sample(i, add_camera(caption, camera), (words,), camera=camera))
    return samples


# --- How it is scored -------------------------------------------------------------------------------------------

FIELDS = ("colour", "background", "shape", "motion")

Scores = tuple[list[Figure], list[str]]


def score_fields(samples: list[Sample], sights: list[Sight], in_table: bool = False) -> Scores:
    """Whether all fields of one object are right at once, and each of them alone."""
    tuples = [sample.objects[0] for sample in samples]
    verdicts = compare(sights, tuples)
    is_picture = samples[0].size.num_frames == 1
    fields = FIELDS[:3] if is_picture else FIELDS
    figures = [Figure(name, [verdict[name] for verdict in verdicts], tuples, in_table=in_table) for name in fields]
    figures.append(Figure(f"all {'three' if is_picture else 'four'}", [row["all"] for row in verdicts], tuples))
    notes = []
    for place, name in ((1, "shape"), (2, "motion")):
        if name in fields:
            right = [verdict[name] for verdict in verdicts]
            notes.append(f"{name} right: {count_right([words[place] for words in tuples], right)}")
    return figures, notes


def score_speeds(samples: list[Sample], sights: list[Sight]) -> Scores:
    """Whether an object covers half the picture in two seconds, within 20 %, at both frame rates of a prompt."""
    groups = [sample.objects[0] for sample in samples[::2]]
    right = [sight.speed is not None and abs(sight.speed / (TRAVEL / 2) - 1) <= 0.2 for sight in sights]
    slow, fast = right[::2], right[1::2]
    both = [a and b for a, b in zip(slow, fast, strict=True)]
    figures = [
        Figure("speed right at both frame rates", both, groups),
        Figure("at 8 frames a second", slow, groups, in_table=False),
        Figure("at 16 frames a second", fast, groups, in_table=False),
    ]
    return figures, []


def score_two_objects(samples: list[Sample], sights: list[Sight]) -> Scores:
    groups = [sample.objects for sample in samples]
    looks = [
        Counter((seen.colour, seen.shape) for seen in sight.objects) == Counter(words[:2] for words in sample.objects)
        for sample, sight in zip(samples, sights, strict=True)
    ]
    verdicts = compare_objects(sights, groups)
    figures = [
        Figure("both colours and shapes", looks, groups),
        Figure("motions and background too", [verdict["all"] for verdict in verdicts], groups, in_table=False),
    ]
    return figures, []


def score_words(samples: list[Sample], sights: list[Sight]) -> Scores:
    """Letters at their places, counted from the left, and whole words."""
    groups = [sample.objects[0] for sample in samples]
    letters, letter_groups = [], []
    for sample, sight, group in zip(samples, sights, groups, strict=True):
        seen = (sight.text or "").ljust(len(sample.word))
        letters += [seen[place] == letter for place, letter in enumerate(sample.word)]
        letter_groups += [group] * len(sample.word)
    words = [sight.text == sample.word for sample, sight in zip(samples, sights, strict=True)]
    figures = [Figure("letters right", letters, letter_groups), Figure("words right", words, groups)]
    lengths = [f"{len(sample.word)} letter{'s' * (len(sample.word) > 1)}" for sample in samples]
    return figures, [f"words right: {count_right(lengths, words)}"]


def score_cameras(samples: list[Sample], sights: list[Sight]) -> Scores:
    right = [sight.camera == sample.camera for sample, sight in zip(samples, sights, strict=True)]
    cameras = [sample.camera for sample in samples]
    figure = Figure("camera move right", right, [sample.objects[0] for sample in samples])
    return [figure], [f"camera move right: {count_right(cameras, right)}"]


# --- Making clips -----------------------------------------------------------------------------------------------


def clips_at_a_time(args: Arguments, height: int, width: int, num_frames: int) -> int:
    """As many as have the latents of `--batch_size` clips of 64 px and 16 frames, so that memory stays the same."""
    return max(1, args.batch_size * 64 * 64 * 2 // (height * width * math.ceil(num_frames / 8)))


def generate(
    args: Arguments, pipe: MovieGenPipeline, samples: list[Sample], description: str, **options
) -> tuple[list[torch.Tensor], float]:
    """A clip `(3, frames, height, width)`, uint8, of every sample, and the seconds that one took.

    Args:
        options: further arguments of the pipeline.

    Raises:
        NotMeasured: if the models cannot make clips of this size.
    """
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale} | options
    places = defaultdict(list)
    for place, sample in enumerate(samples):
        places[sample.size].append(place)
    for size in places:
        try:
            pipe.check_size(size.height, size.width, size.num_frames)
        except ValueError as error:
            raise NotMeasured(error) from error
    clips, start = [None] * len(samples), time.perf_counter()
    with tqdm(total=len(samples), desc=description) as progress:
        for size, members in places.items():
            step = clips_at_a_time(args, size.height, size.width, size.num_frames)
            for part in (members[i : i + step] for i in range(0, len(members), step)):
                frames = pipe(
                    [samples[place].prompt for place in part],
                    height=size.height,
                    width=size.width,
                    num_frames=size.num_frames,
                    frame_rate=size.frame_rate,
                    generator=[torch.Generator().manual_seed(args.seed + samples[place].index) for place in part],
                    output_type="pt",
                    **options,
                ).frames
                video = (frames.float().transpose(1, 2) * 255).round().to(torch.uint8).cpu()
                for place, clip in zip(part, video, strict=True):
                    clips[place] = clip
                progress.update(len(part))
    return clips, (time.perf_counter() - start) / len(samples)


def judge(samples: list[Sample], clips: list[torch.Tensor]) -> list[Sight]:
    return [see(clip[None], sample.size.frame_rate)[0] for sample, clip in zip(samples, clips, strict=True)]


@torch.no_grad()
def reconstruct(
    args: Arguments, pipe: MovieGenPipeline, video: torch.Tensor
) -> tuple[torch.Tensor, list[list[float]]]:
    """What the autoencoder makes of clips `(batch, 3, frames, height, width)`, uint8, from the mean of the posterior.

    Returns:
        Clips of the same shape and type, and for each frame of the latents of each clip the largest norm of a place,
        over their normalised channels, divided by the mean norm.
    """
    vae, num_frames = pipe.vae, video.shape[2]
    mean = torch.tensor(vae.config.latents_mean or 0.0, device=args.device).view(-1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std or 1.0, device=args.device).view(-1, 1, 1, 1)
    clips, peaks = [], []
    for part in video.split(clips_at_a_time(args, *video.shape[3:], num_frames)):
        pixels = (part.to(args.device).float() / 127.5 - 1).to(vae.dtype)
        latents = vae.encode(pixels).latent_dist.mode()
        decoded = vae.decode(latents, num_frames=num_frames).sample
        clips.append(((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
        norms = ((latents.float() - mean) / std).norm(dim=1).flatten(2)
        peaks += (norms.amax(2) / norms.mean(2)).tolist()
    return torch.cat(clips), peaks


def psnr(clip: torch.Tensor, reference: torch.Tensor) -> float:
    """In dB, on 8-bit values of the whole clip."""
    return peak_signal_noise_ratio(clip.float(), reference.float(), data_range=255.0).item()


def ssim(clip: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over the frames of `(3, frames, height, width)`."""
    frames = [video.float().transpose(0, 1) for video in (clip, reference)]
    return structural_similarity_index_measure(*frames, data_range=255.0).item()


def peak_figures(peaks: list[list[float]], groups: list) -> list[Figure]:
    """Mean and largest of what `reconstruct` says of every latent frame."""
    values = [value for clip in peaks for value in clip]
    frame_groups = [group for group, clip in zip(groups, peaks, strict=True) for _ in clip]
    name = "largest latent norm over the mean norm of its frame"
    return [
        Figure(f"{name}, mean", values, frame_groups, unit=""),
        Figure(f"{name}, largest", [max(values)], ["all"], unit=""),
    ]


# --- Rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptRow:
    """Clips made of `count` prompts that `draw` draws from a seed, judged and handed to `score`."""

    title: str
    count: int
    draw: Callable[[int, int], list[Sample]]
    score: Callable[[list[Sample], list[Sight]], Scores]

    def measure(self, args: Arguments, pipe: MovieGenPipeline, count: int) -> Result:
        samples = self.draw(count, args.seed)
        clips, seconds = generate(args, pipe, samples, self.title)
        figures, notes = self.score(samples, judge(samples, clips))
        return Result(figures, notes, count, seconds, clips)


@dataclass(frozen=True)
class ReconstructionRow:
    """What the autoencoder leaves of `count` rendered held-out clips: a ceiling for what the backbone can do."""

    title: str
    count: int
    size: Size

    def measure(self, args: Arguments, pipe: MovieGenPipeline, count: int) -> Result:
        size, samples = self.size, draw_core(count, args.seed, self.size)
        tuples = [sample.objects[0] for sample in samples]
        scenes = draw_scenes(tuples, torch.Generator().manual_seed(args.seed))
        video = render(scenes, size.num_frames, size.frame_rate, size.height, size.width)
        start = time.perf_counter()
        decoded, peaks = reconstruct(args, pipe, video)
        seconds = (time.perf_counter() - start) / count
        ratios = [psnr(clip, reference) for clip, reference in zip(decoded, video, strict=True)]
        judged, notes = score_fields(samples, judge(samples, list(decoded)))
        figures = [Figure("PSNR", ratios, tuples, "dB")]
        figures += [replace(figure, name=f"{figure.name} still judged right") for figure in judged]
        return Result([*figures, *peak_figures(peaks, tuples)], notes, count, seconds)


@dataclass(frozen=True)
class FilmRow:
    """What the autoencoder leaves of films: every window of 16 frames at 8 frames a second, one after the other."""

    title: str
    size: Size
    count: None = None

    def measure(self, args: Arguments, pipe: MovieGenPipeline, count: None) -> Result:
        if args.media is None:
            raise NotMeasured("pass --media, a folder of films.")
        size = self.size
        shape = (size.num_frames, size.height, size.width, size.frame_rate)
        ratios, similarities, peaks, groups, notes, seconds = [], [], [], [], [], 0.0
        for film in tqdm(find_films(args.media, args.media_pattern), desc=self.title):
            try:
                num_windows = probe_media(film).num_frames(size.frame_rate) // size.num_frames
                if num_windows == 0:
                    raise MediaError(f"shorter than {size.num_frames} frames at {size.frame_rate:g} a second")
                for k in range(num_windows):
                    video = read_media(film, *shape, start=k * size.num_frames / size.frame_rate)
                    start = time.perf_counter()
                    (decoded,), window_peaks = reconstruct(args, pipe, video[None])
                    seconds += time.perf_counter() - start
                    ratios.append(psnr(decoded, video))
                    similarities.append(ssim(decoded, video))
                    peaks += window_peaks
                    groups.append(film.name)
            except MediaError as error:
                notes.append(f"{film.name} left out: {error}")
        if not groups:
            raise NotMeasured(f"none of the films can be used: {'; '.join(notes)}")
        figures = [Figure("PSNR", ratios, groups, "dB"), Figure("SSIM", similarities, groups, "")]
        notes.append(f"{len(groups)} windows of {len(set(groups))} films")
        return Result([*figures, *peak_figures(peaks, groups)], notes, len(groups), seconds / len(groups))


score_each_field = partial(score_fields, in_table=True)

ROWS = {
    "core_64": PromptRow("text to video, 64 px", 256, draw_core, score_each_field),
    "core_128": PromptRow("text to video, 128 px", 256, partial(draw_core, size=CLIP_128), score_fields),
    "image_64": PromptRow("text to image, 64 px", 256, partial(draw_core, size=IMAGE_64), score_fields),
    "image_128": PromptRow("text to image, 128 px", 256, partial(draw_core, size=IMAGE_128), score_fields),
    "frame_rate": PromptRow("frame rate", 256, draw_frame_rates, score_speeds),
    "phrasing": PromptRow("other phrasings", 256, draw_phrasings, score_fields),
    "aspect": PromptRow("2:3 and 3:2", 64, draw_aspects, score_fields),
    "two_objects": PromptRow("two objects", 64, draw_two_objects, score_two_objects),
    "text": PromptRow("visual text", 64, draw_words, score_words),
    "camera": PromptRow("camera", 64, draw_cameras, score_cameras),
    "tae_64": ReconstructionRow("TAE, 64 px", 64, CLIP_64),
    "tae_128": ReconstructionRow("TAE, 128 px", 64, CLIP_128),
    "tae_media": FilmRow("TAE, real films, 128 px", Size(128, 128, 16, 8)),
}
"""What `--task video` measures, in this order."""

TASK_ROWS = {"video": ROWS, "audio": AUDIO_ROWS}

SHEET_ROWS = {"video": ("core_64",), "audio": ("strikes", "voices")}
"""Rows whose clips `--sheet` shows."""


# --- Tasks ------------------------------------------------------------------------------------------------------


def measure_rows(args: Arguments, pipe: MovieGenPipeline | MovieGenAudioPipeline) -> dict[str, Any]:
    """The table of `--task video` or `audio`, printed while it is measured."""
    rows, results, notes, shown = TASK_ROWS[args.task], {}, [], []
    largest = max(row.count or 0 for row in rows.values())
    print("| figure | samples | value | 95 % interval |\n| --- | --- | --- | --- |", flush=True)
    for name in dict.fromkeys(args.rows or rows):
        row = rows[name]
        # `--num_prompts` is for the largest rows.
        count = row.count
        if count is not None and args.num_prompts is not None:
            count = math.ceil(count * args.num_prompts / largest)
        try:
            result = row.measure(args, pipe, count)
        except NotMeasured as reason:
            print(f"| {row.title} | | not measured: {reason} | |", flush=True)
            results[name] = {"title": row.title, "not_measured": str(reason)}
            continue
        figures, asides = {}, []
        for figure in result.figures:
            figures[figure.name] = figure.summary(args.seed)
            value, ends = format_figure(figures[figure.name])
            if figure.in_table:
                print(f"| {row.title}: {figure.name} | {result.count} | {value} | {ends} |", flush=True)
            else:
                asides.append(f"{figure.name} {value}{ends and f' ({ends})'}")
        row_notes = ([", ".join(asides)] if asides else []) + result.notes
        notes += [f"{row.title}: {note}" for note in [*row_notes, f"{result.seconds:.2f} s a sample"]]
        results[name] = {
            "title": row.title,
            "samples": result.count,
            "figures": figures,
            "notes": row_notes,
            "seconds_per_sample": result.seconds,
        }
        if name == "core_64" and args.sheet is not None:
            save_sample_sheet(torch.stack(result.clips[:16]).float() / 127.5 - 1, args.sheet)
            for sample in row.draw(count, args.seed)[:16]:
                notes.append(f"seed {args.seed + sample.index}: {sample.prompt}")
        if args.task == "audio" and args.sheet is not None and result.clips:
            shown += result.clips
            Path(args.sheet).parent.mkdir(parents=True, exist_ok=True)
            sheet(shown).save(args.sheet)
    print("\n" + "\n".join(notes))
    return {"rows": results}


def compare_settings(
    args: Arguments, pipe: MovieGenPipeline, held_out: bool, settings: list[tuple[dict[str, Any], dict[str, Any]]]
) -> dict[str, Any]:
    """The prompts of `core_64` under one setting after another.

    Args:
        held_out: the split of the prompts.
        settings: of each its names in the table and the arguments of the pipeline.
    """
    samples = draw_core(args.num_prompts or 64, args.seed, held_out=held_out)
    lines = []
    columns = [*settings[0][0], "all four", "95 % interval", *FIELDS, "s a sample"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    for names, options in settings:
        clips, seconds = generate(args, pipe, samples, ", ".join(map(str, names.values())), **options)
        figures, _ = score_fields(samples, judge(samples, clips))
        summaries = {figure.name: figure.summary(args.seed) for figure in figures}
        fields = [format_figure(summaries[name])[0] for name in FIELDS]
        cells = [*names.values(), *format_figure(summaries["all four"]), *fields, f"{seconds:.2f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        lines.append({**names, "figures": summaries, "seconds_per_sample": seconds})
    return {"samples": len(samples), "lines": lines}


def compare_schedules(args: Arguments, pipe: MovieGenPipeline) -> dict[str, Any]:
    """The checkpoint's linear-quadratic schedule and the linear one, which steps evenly from noise to data."""
    settings = []
    for count in args.step_counts:
        linear = [1 - i / count for i in range(count)]
        settings.append(({"schedule": "linear-quadratic", "steps": count}, {"num_inference_steps": count}))
        settings.append(({"schedule": "linear", "steps": count}, {"sigmas": linear}))
    return compare_settings(args, pipe, True, settings)


def compare_guidance(args: Arguments, pipe: MovieGenPipeline) -> dict[str, Any]:
    settings = [({"guidance": scale}, {"guidance_scale": scale}) for scale in args.guidance_scales]
    return compare_settings(args, pipe, False, settings)


def main(args: Arguments) -> None:
    if args.output is not None:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    pipeline_class = MovieGenAudioPipeline if args.task == "audio" else MovieGenPipeline
    pipe = pipeline_class.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.task == "audio" and pipe.vae.config.sampling_rate != SAMPLING_RATE:
        rate = pipe.vae.config.sampling_rate
        raise ValueError(f"--model: its sounds have {rate} samples a second, those of Toybox {SAMPLING_RATE}.")
    guidance_scale = pipe.config.default_guidance_scale if args.guidance_scale is None else args.guidance_scale
    steps = pipe.config.default_num_inference_steps if args.num_inference_steps is None else args.num_inference_steps
    chosen = {"seed": args.seed, "steps": steps, "guidance": guidance_scale}
    if args.task == "sampling":
        del chosen["steps"]
    if args.task == "guidance":
        del chosen["guidance"]
    print(
        f"{'training' if args.task == 'guidance' else 'held-out'} tuples, "
        f"{', '.join(f'{name} {value:g}' for name, value in chosen.items())}\n"
    )
    comparisons = {"sampling": compare_schedules, "guidance": compare_guidance}
    report = {"task": args.task, **chosen, **comparisons.get(args.task, measure_rows)(args, pipe)}
    if args.output is not None:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main, Arguments)
