"""Computes once what the frozen models of a pipeline make of films with sound: latents, frame and text features.

    python training_examples/precompute_audio.py --config training_examples/configs/toybox_precompute_audio.yaml \\
        --pipeline runs/audio_frozen --output_dir caches/sounds
    python training_examples/precompute_audio.py --pipeline runs/audio_frozen --data clips --window_seconds 4 \\
        --output_dir caches/clips

train_audio.py reads the result with `--data`. Started again after an interruption, with the same options, it goes on
where it was; `accelerate launch` shares the work out among several devices.
"""

import hashlib
import json
import math
import random
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffusers_moviegen import AutoencoderDACVAE, MovieGenAudioPipeline
from diffusers_moviegen.media_reading import open_film
from diffusers_moviegen.pipelines.audio_conditioning import resample_frame_features
from diffusers_moviegen.pipelines.pipeline_moviegen_audio import CONTROL_PREFIX
from diffusers_moviegen.pipelines.prompt_encoding import encode_texts
from diffusers_moviegen.toybox.captions import sound_caption, sound_prefix
from diffusers_moviegen.toybox.data import LOOKS, SPLITS, Sampler
from diffusers_moviegen.toybox.judges.sight import MAX_COLOUR_DISTANCE
from diffusers_moviegen.toybox.scenes import SIZES, draw_scenes, render
from diffusers_moviegen.toybox.sounds import MIN_DURATION, SAMPLING_RATE, STRIKE_MARGINS, strike_times, synthesize
from diffusers_moviegen.toybox.vocabulary import (
    BACKGROUNDS,
    EVENTS,
    MOTIONS,
    SHAPES,
    SPINNING_SHAPES,
    is_held_out,
    is_sound_held_out,
)
from diffusers_moviegen.training import (
    Bucket,
    LatentCacheWriter,
    MediaError,
    MediaMember,
    MediaReport,
    MediaRow,
    check_model_folder,
    check_positive,
    end_training,
    find_pipeline,
    list_media,
    models_fingerprint,
    parse_weights,
    probe_media,
    read_media,
    read_sound,
    run_script,
)
from diffusers_moviegen.training.latent_cache import FORMAT, REPORT_FILE


PLAN_FILE = "plan.json"

MAX_TOKENS, TEXT_BATCH_SIZE = 512, 64


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "folder of the cache"})
    pipeline: str = field(metadata={"help": "folder or Hub id of a pipeline of sound; its transformer is not needed"})
    data: str | None = field(
        default=None,
        metadata={"help": "a table of captions, its folder, a Hub id, or .tar shards: a file, a folder or a pattern"},
    )
    file_column: str = field(default="file_name", metadata={"help": "column of the table with the films' paths"})
    caption_column: str = field(default="caption", metadata={"help": "column, or field of a shard's .json"})
    exclude: list[str] = field(default_factory=list, metadata={"help": "patterns of file names to leave out"})
    toybox: bool = field(default=False, metadata={"help": "draw Toybox instead of reading --data"})
    num_samples: int = field(default=0, metadata={"help": "films of Toybox to draw"})
    split: str = field(default="train", metadata={"help": "of Toybox: train or held_out", "choices": list(SPLITS)})
    seed: int = field(default=0, metadata={"help": "another seed draws other samples of Toybox"})
    film_seconds: float = field(default=2.0, metadata={"help": "length of the films of Toybox"})
    frame_rates: list[float] = field(
        default_factory=lambda: [8.0, 16.0],
        metadata={"help": "frames a second that films are seen at; each is drawn, or read, at one of them"},
    )
    height: int = field(default=64, metadata={"help": "pixels that films are drawn, or cropped and resized, to"})
    width: int = 64
    window_seconds: float | None = field(
        default=None,
        metadata={"help": "length of the samples, windows of the films; Toybox without it: whole films"},
    )
    num_windows: int = field(
        default=1, metadata={"help": "windows of each film, evenly over its length; of Toybox at random"}
    )
    shape_weights: list[str] = field(
        default_factory=list,
        metadata={"help": "how likely an object of Toybox has this shape, such as star=2; 1 for the others"},
    )
    motion_weights: list[str] = field(
        default_factory=list,
        metadata={"help": "how likely an object of Toybox moves so, such as bounces=4; 1 for the others"},
    )
    degraded_share: float | None = field(
        default=None, metadata={"help": "of Toybox: share of sounds of a quality below 5; 0.4 by default"}
    )
    other_films: float = field(
        default=0.0,
        metadata={"help": "of Toybox: share of the sounds with a voice whose film shows another shape: text decides"},
    )
    colour_augmentation: float = field(
        default=0.0,
        metadata={"help": "share of the films seen in wrong colours, so that sounds follow shapes and motions more"},
    )
    batch_size: int = field(default=8, metadata={"help": "films that the models encode at a time"})
    samples_per_shard: int = field(default=512, metadata={"help": "films a file; an interrupted one is done again"})
    num_workers: int = field(default=0, metadata={"help": "processes that read or draw ahead; 0 does it in this one"})

    def __post_init__(self):
        check_positive(self, ("num_windows", "batch_size", "samples_per_shard", "height", "width"))
        if self.toybox == (self.data is not None):
            raise ValueError("--data or --toybox: pass one of the two.")
        if not self.frame_rates or not all(0 < rate < math.inf for rate in self.frame_rates):
            raise ValueError(f"--frame_rates is {self.frame_rates}: pass one or more, above 0 frames a second.")
        if self.seed < 0 or self.num_workers < 0:
            raise ValueError("--seed and --num_workers must be 0 or more.")
        if self.window_seconds is not None and not 0 < self.window_seconds < math.inf:
            raise ValueError(f"--window_seconds is {self.window_seconds}: it must be above 0.")
        for name in ("degraded_share", "other_films", "colour_augmentation"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--{name} is {value}: it must be from 0 to 1.")
        if not self.toybox:
            drawing = ("num_samples", "shape_weights", "motion_weights", "degraded_share", "other_films")
            if any(getattr(self, name) not in (0, None, []) for name in drawing):
                options = ", ".join(f"--{name}" for name in drawing[:-1])
                raise ValueError(f"{options} and --{drawing[-1]} are of Toybox: add --toybox.")
            if self.window_seconds is None:
                raise ValueError("--window_seconds is missing: films of --data are cut to windows of one length.")
            return
        self.drawing_weights()
        if self.num_samples < 1:
            raise ValueError(f"--num_samples is {self.num_samples}: pass how many films of Toybox to draw.")
        if (self.height, self.width) not in SIZES:
            known = ", ".join(f"{height} x {width}" for height, width in SIZES)
            raise ValueError(
                f"--height and --width give {self.height} x {self.width}, but Toybox is drawn at {known}."
            )
        if not MIN_DURATION <= self.film_seconds < math.inf:
            raise ValueError(f"--film_seconds is {self.film_seconds}: sounds last {MIN_DURATION} s or more.")
        for rate in self.frame_rates:
            count = self.film_seconds * rate
            if abs(count - round(count)) > 1e-6 or count < 2:
                raise ValueError(
                    f"--film_seconds {self.film_seconds:g} at {rate:g} frames a second is {count:g} frames: change "
                    "--film_seconds or --frame_rates to make it 2 or more whole ones."
                )
        if self.window_seconds is not None and self.window_seconds > self.film_seconds:
            raise ValueError(
                f"--window_seconds is {self.window_seconds}: it is at most --film_seconds, {self.film_seconds}."
            )
        if self.num_windows > 1 and self.window_seconds is None:
            raise ValueError("--num_windows does nothing without --window_seconds: add it.")
        if self.exclude:
            raise ValueError("--exclude is for --data: leave it out with --toybox.")

    def drawing_weights(self) -> dict[str, float]:
        """How likely each shape and motion of Toybox is, by name; 1 for those it does not name."""
        return parse_weights("shape_weights", self.shape_weights, SHAPES) | parse_weights(
            "motion_weights", self.motion_weights, MOTIONS
        )


# --- What to encode -----------------------------------------------------------------------------------------------


def captions_of(caption: str, is_alone: bool) -> list[str]:
    """How a sound is said in training: as it is, without its control prefix, and by that alone.

    Args:
        caption: with or without a prefix.
        is_alone: whether the prefix and the film tell all there is to be heard.
    """
    prefix = CONTROL_PREFIX.match(caption)
    if prefix is None:
        return [caption]
    captions = [caption, caption[prefix.end() :]] if caption[prefix.end() :] else [caption]
    return [*captions, prefix[0]] if is_alone and len(captions) == 2 else captions


def augment_colours(film: torch.Tensor, rng: random.Random, ground: str | None = None) -> torch.Tensor:
    """A film in wrong colours: its channels permuted, and each inverted or not.

    Args:
        film: `(3, frames, height, width)`, uint8.
        rng: decides on the colours.
        ground: the background, if it is a film of Toybox. It stays as it is if its background would come to look like
            one of that world, which has a sound of its own, or is held out with such an object.
    """
    channels, is_inverted = rng.sample(range(3), 3), torch.tensor([rng.random() < 0.5 for _ in range(3)])

    def wrong(colours: torch.Tensor) -> torch.Tensor:
        colours = colours[channels]
        return torch.where(is_inverted.view(3, *[1] * (colours.ndim - 1)), 255 - colours, colours)

    if ground is not None:
        known = torch.tensor(list(BACKGROUNDS.values()))
        distance = torch.linalg.vector_norm((known - wrong(torch.tensor(BACKGROUNDS[ground]))).float(), dim=1)
        if distance.min() <= MAX_COLOUR_DISTANCE:
            return film
    return wrong(film)


def draw_film(args: Arguments, index: int, num_latents: int, latent_rate: float) -> dict[str, Any]:
    """A film of Toybox with its sound, the captions of its windows, and where these start, in latents."""
    rng = random.Random(f"{args.split}|{args.seed}|{index}")
    frame_rate = rng.choice(args.frame_rates)
    sizes = {"height": args.height, "width": args.width}
    sizes |= {"num_frames": round(args.film_seconds * frame_rate), "frame_rate": frame_rate}
    likely = args.drawing_weights()
    sampler = Sampler("audio", args.split, args.seed, **sizes, looks=LOOKS, paired=False, weights=likely)
    words = sampler.draw_words(index)[1]
    shape, motion, background, quality = (words[name] for name in ("shape", "motion", "background", "quality"))
    if args.degraded_share is not None:
        quality = rng.randint(1, 4) if rng.random() < args.degraded_share else rng.randint(5, 10)
    generator = torch.Generator().manual_seed(sampler.torch_seed(index))
    scenes = draw_scenes([(words["colour"], shape, motion, background)], generator)
    audio = synthesize(scenes, args.film_seconds, [generator], [quality])[0]

    shown = scenes
    is_voiced = EVENTS[motion] not in (None, "passes")
    if is_voiced and rng.random() < args.other_films:
        shapes = [
            name
            for name in (SPINNING_SHAPES if motion == "spins" else SHAPES)
            if name != shape
            and (
                args.split == "held_out"
                or not (
                    is_held_out(words["colour"], name, motion, background)
                    or is_sound_held_out(name, motion, background)
                )
            )
        ]
        if shapes:
            shown = replace(scenes, shape=torch.tensor([[SHAPES.index(rng.choice(shapes))]]))
    is_other = shown is not scenes

    windows = []
    (strikes,) = strike_times(scenes, args.film_seconds)
    length = num_latents if args.window_seconds is None else round(args.window_seconds * latent_rate)
    for _ in range(args.num_windows):
        start = rng.randint(0, num_latents - length)
        begin, end = start / latent_rate, min((start + length) / latent_rate, args.film_seconds)
        heard = [time for time in strikes if begin + STRIKE_MARGINS[0] <= time <= end - STRIKE_MARGINS[1]]
        prefix = sound_prefix(quality, words["music"])
        caption = sound_caption(shape, motion, background, motion != "bounces" or bool(heard))
        captions = captions_of(prefix + caption, not is_other)
        if quality < 5:
            # Without a prefix sounds are clean.
            captions = [caption for caption in captions if caption.startswith(prefix)]
        windows.append((start, length, captions))
    video = render(shown, **sizes)[0]
    return {
        "audio": audio,
        "video": augment_colours(video, rng, background) if rng.random() < args.colour_augmentation else video,
        "frame_rate": frame_rate,
        "windows": windows,
        # A film says neither that a sound is bad nor that it is another one.
        "needs_text": is_other or quality < 5,
    }


def plan_media(args: Arguments, rows: list[MediaRow], report: MediaReport) -> list[dict[str, Any]]:
    """An entry for each window of each usable film; what cannot be used goes to the report."""
    entries = []
    for row in tqdm(rows, desc="probing", disable=None):
        source = row.source
        try:
            duration = probe_media(source.read() if isinstance(source, MediaMember) else source).duration
            if duration is None:
                raise MediaError("no film")
            slack = duration - args.window_seconds
            # Half a frame may be missing at the end.
            if slack < -0.5 / min(args.frame_rates):
                raise MediaError(f"shorter than {args.window_seconds:g} s", f"{duration:.2f} s")
        except MediaError as error:
            report.add(row.name, error.reason, error.detail)
            continue
        slack = max(slack, 0.0)
        if isinstance(source, MediaMember):
            place = [str(source.archive.absolute()), source.offset, source.size]
        else:
            place = [str(source.absolute())]
        for number in range(args.num_windows):
            start = slack / 2 if args.num_windows == 1 else slack * number / (args.num_windows - 1)
            name = row.name if args.num_windows == 1 else f"{row.name}#{number}"
            entries.append({"name": name, "source": place, "start": start, "caption": row.caption})
    return entries


def sound_beside(source: str | bytes, start: float, num_samples: int) -> torch.Tensor:
    """The sound `(1, num_samples)` of a film from `start` seconds after its first frame on, silent where it ends."""
    sound = read_sound(source, SAMPLING_RATE)
    container, film = open_film(source)
    with container:
        track = container.streams.audio[0]
        if film.start_time is None or track.start_time is None:
            raise MediaError("film without timestamps")
        delay = track.start_time * track.time_base - film.start_time * film.time_base
    first = round((start - float(delay)) * SAMPLING_RATE)
    if first >= len(sound) or first + num_samples <= 0:
        raise MediaError("no sound at this time", f"at {start:.2f} s")
    sound = F.pad(sound, (max(-first, 0), max(first + num_samples - len(sound), 0)))
    return sound[None, max(first, 0) : max(first, 0) + num_samples]


def read_film(args: Arguments, entry: dict[str, Any], num_latents: int) -> dict[str, Any]:
    """A window of a film with its sound, in the form of `draw_film`."""
    path, *place = entry["source"]
    source = MediaMember(path, *place).read() if place else path
    rng = random.Random(entry["name"])
    frame_rate = rng.choice(args.frame_rates)
    num_frames = max(round(args.window_seconds * frame_rate), 1)
    video = read_media(source, num_frames, args.height, args.width, frame_rate, entry["start"])
    return {
        "audio": sound_beside(source, entry["start"], round(args.window_seconds * SAMPLING_RATE)),
        "video": augment_colours(video, rng) if rng.random() < args.colour_augmentation else video,
        "frame_rate": frame_rate,
        "windows": [(0, num_latents, captions_of(entry["caption"], True))],
        "needs_text": False,
    }


class Films(Dataset):
    """The films of each batch of entries with their sounds, or why there are none."""

    def __init__(self, batches: list[list[dict[str, Any]]], args: Arguments, latent_rate: float):
        self.batches, self.args, self.latent_rate = batches, args, latent_rate

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[dict[str, Any] | MediaError]:
        return [self._read(entry) for entry in self.batches[index]]

    def _read(self, entry: dict[str, Any]) -> dict[str, Any] | MediaError:
        seconds = self.args.film_seconds if self.args.toybox else self.args.window_seconds
        num_latents = math.ceil(seconds * self.latent_rate - 1e-6)
        if self.args.toybox:
            return draw_film(self.args, entry["index"], num_latents, self.latent_rate)
        try:
            return read_film(self.args, entry, num_latents)
        except MediaError as error:
            return error


# --- What the models make of it -----------------------------------------------------------------------------------


@torch.no_grad()
def encode_films(
    pipe: MovieGenAudioPipeline, films: list[dict[str, Any]], latent_rate: float
) -> list[dict[str, torch.Tensor]]:
    """Mean and deviation of the normalised latents of each sound, and the features of its film's frames."""
    config = pipe.vae.config
    audio = torch.stack([film["audio"] for film in films])
    posterior = pipe.vae.encode(audio.to(pipe.vae.device, pipe.vae.dtype)).latent_dist
    mean, std = (
        torch.tensor(value, device=pipe.vae.device).view(-1, 1) for value in (config.latents_mean, config.latents_std)
    )
    means, stds = (posterior.mean.float() - mean) / std, posterior.std.float() / std
    encoded = []
    for film, mean, std in zip(films, means.cpu(), stds.cpu(), strict=True):
        features = pipe.encode_video(film["video"].transpose(0, 1)).float().cpu()
        features = resample_frame_features(features, film["frame_rate"], means.shape[2], latent_rate)
        encoded.append({"mean": mean, "std": std, "video": features[0]})
    return encoded


@torch.no_grad()
def encode_captions(pipe: MovieGenAudioPipeline, captions: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Features `(tokens, channels)` of each caption."""
    features = {}
    for part in chunks(captions, TEXT_BATCH_SIZE):
        embeds, mask = encode_texts(part, pipe.tokenizer, pipe.text_encoder, MAX_TOKENS, "T5")
        features |= {caption: {"": row[kept].half()} for caption, row, kept in zip(part, embeds, mask, strict=True)}
    return features


def cut_windows(entry: dict[str, Any], film: dict[str, Any], tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The samples of a film, whose text is still to come."""
    samples = []
    for number, (start, length, captions) in enumerate(film["windows"]):
        part = slice(start, start + length)
        samples.append(
            {
                "name": entry["name"] if len(film["windows"]) == 1 else f"{entry['name']}#{number}",
                "bucket": Bucket(length, 1, 1),
                "captions": captions,
                "needs_text": film["needs_text"],
                "mean": tensors["mean"][:, part],
                "std": tensors["std"][:, part],
                "video": tensors["video"][part],
            }
        )
    return samples


# --- The run ------------------------------------------------------------------------------------------------------


def chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def as_it_is(item: Any) -> Any:
    """Instead of the default of a `DataLoader`, which changes the types of what it passes on."""
    return item


def prepare(args: Arguments, pipeline: Path, latent_rate: float) -> LatentCacheWriter:
    """Lists the data, refuses a folder that was begun with anything else, and plans what there is to encode."""
    options = asdict(args)
    # What the content does not depend on.
    for name in ("output_dir", "pipeline", "data", "batch_size", "num_workers"):
        del options[name]
    rows, report, content = [], MediaReport("toybox"), {}
    if not args.toybox:
        rows, report = list_media(
            args.data, file_column=args.file_column, caption_column=args.caption_column, exclude=args.exclude
        )
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps([row.name, row.caption, row.num_bytes]).encode())
        content = {"files": len(rows), "digest of names, captions and sizes of files": digest.hexdigest()}
    models = models_fingerprint(pipeline)
    fingerprint = {"format": FORMAT, "models": models, "frame_rate": latent_rate, **options, "data": content}
    writer = LatentCacheWriter(args.output_dir, fingerprint)
    plan_file, location = writer.folder / PLAN_FILE, None if args.toybox else str(Path(args.data).resolve())
    # The data may have been moved since the run was interrupted.
    planned = plan_file.is_file() and json.loads(plan_file.read_text())["location"] == location
    if not writer.finished and not planned:
        if args.toybox:
            name = f"audio/{args.split}/{args.seed}"
            entries = [{"name": f"{name}/{index}", "index": index} for index in range(args.num_samples)]
        else:
            entries = plan_media(args, rows, report)
        if not entries:
            reasons = [f"{len(names)} {reason}" for reason, names in report.skipped.items() if names]
            raise ValueError(
                f"--data: '{args.data}' has no usable sample: {'; '.join(reasons) or 'it names no film'}."
            )
        plan = {"source": report.source, "location": location, "entries": entries, "skipped": report.skipped}
        writer.write_text(PLAN_FILE, json.dumps(plan))
    return writer


def write_shards(
    writer: LatentCacheWriter,
    shards: dict[int, list[dict[str, Any]]],
    pipe: MovieGenAudioPipeline,
    latent_rate: float,
    args: Arguments,
) -> None:
    """Encodes and writes the shards, given as lists of entries by number."""
    batches = [(number, batch) for number, entries in shards.items() for batch in chunks(entries, args.batch_size)]
    films = DataLoader(
        Films([batch for _, batch in batches], args, latent_rate),
        None,
        num_workers=args.num_workers,
        collate_fn=as_it_is,
    )
    progress = tqdm(total=sum(map(len, shards.values())), desc="encoding", mininterval=5, disable=None)
    samples, skipped = [], []
    for place, ((number, entries), items) in enumerate(zip(batches, films, strict=True)):
        read = []
        for entry, item in zip(entries, items, strict=True):
            if isinstance(item, MediaError):
                skipped.append((entry["name"], item.reason, item.detail))
            else:
                read.append((entry, item))
        if read:
            encoded = encode_films(pipe, [film for _, film in read], latent_rate)
            for (entry, film), tensors in zip(read, encoded, strict=True):
                if all(tensor.half().isfinite().all() for tensor in tensors.values()):
                    samples += cut_windows(entry, film, tensors)
                else:
                    skipped.append((entry["name"], "features that are not finite in float16", ""))
        progress.update(len(entries))
        if place + 1 == len(batches) or batches[place + 1][0] != number:
            captions = dict.fromkeys(caption for sample in samples for caption in sample["captions"])
            features = encode_captions(pipe, list(captions))
            for sample in samples:
                sample["text"] = [features[caption] for caption in sample["captions"]]
            writer.write_shard(number, samples, skipped)
            samples, skipped = [], []


def check_lengths(args: Arguments, latent_rate: float) -> None:
    """Raises a `ValueError` if windows do not begin and end with a latent."""
    if args.window_seconds is None:
        return
    count = args.window_seconds * latent_rate
    if abs(count - round(count)) > 1e-6 or round(count) < 2:
        raise ValueError(
            f"--window_seconds {args.window_seconds:g} is {count:g} latents at {latent_rate:g} a second: pass a "
            f"multiple of {1 / latent_rate:g}, at least {2 / latent_rate:g}."
        )


def main(args: Arguments) -> None:
    # Processes wait for one that probes the data, or has more left to encode, as long as that takes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=4))])
    started = time.perf_counter()

    # 1. What there is to do; what was begun with other models, options or data is refused
    pipeline = find_pipeline(args.pipeline, MovieGenAudioPipeline.__name__)
    check_model_folder("pipeline", str(pipeline / "vae"), AutoencoderDACVAE)
    config = AutoencoderDACVAE.load_config(pipeline / "vae")
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        raise ValueError(
            f"--pipeline: the config of '{pipeline / 'vae'}' has no latents_mean and latents_std; pass an autoencoder "
            "that train_dac_vae.py measured them for."
        )
    if config["sampling_rate"] != SAMPLING_RATE:
        raise ValueError(
            f"--pipeline: '{pipeline / 'vae'}' is for {config['sampling_rate']} samples a second, sounds are read at "
            f"{SAMPLING_RATE}; pass one for these."
        )
    latent_rate = SAMPLING_RATE / math.prod(config["downsampling_ratios"])
    check_lengths(args, latent_rate)
    if accelerator.is_main_process:
        prepare(args, pipeline, latent_rate)
    accelerator.wait_for_everyone()
    writer = LatentCacheWriter.resume(args.output_dir)
    if writer.finished:
        accelerator.print(
            f"'{args.output_dir}' is finished already\n{(writer.folder / REPORT_FILE).read_text()}", end=""
        )
        return
    plan = json.loads((writer.folder / PLAN_FILE).read_text())
    shards = chunks(plan["entries"], args.samples_per_shard)

    # 2. Models
    pipe = MovieGenAudioPipeline.from_pretrained(pipeline, transformer=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(accelerator.device)

    # 3. Shards: those that are there are whole
    if accelerator.is_main_process:
        # Without text a backbone reads no token.
        writer.write_unconditional({"": torch.zeros(0, pipe.text_encoder.config.d_model)})
    missing = [number for number in range(len(shards)) if not writer.shard_file(number).is_file()]
    # All share out the same list: none writes before the others have looked.
    accelerator.wait_for_everyone()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    write_shards(writer, {number: shards[number] for number in mine}, pipe, latent_rate, args)
    accelerator.wait_for_everyone()

    # 4. The index makes it a cache
    if accelerator.is_main_process:
        report = MediaReport(plan["source"], skipped=plan["skipped"])
        writer.finish(len(shards), report)
        (writer.folder / PLAN_FILE).unlink()
        print(report)
        print(f"{len(missing)} of {len(shards)} shards written in {time.perf_counter() - started:.0f} s")
    end_training(accelerator)


if __name__ == "__main__":
    run_script(main, Arguments)
