"""Computes once what the frozen models of a pipeline make of pictures and films: latents and text features.

    python training_examples/precompute.py --config training_examples/configs/precompute_256px.yaml \\
        --pipeline runs/pipeline --data clips --output_dir caches/clips
    python training_examples/precompute.py --config training_examples/configs/precompute_toybox.yaml \\
        --pipeline runs/pipeline --toybox --output_dir caches/toybox

The trainers read the result with `--data`. Started again after an interruption, with the same options, it goes on
where it was; `accelerate launch` shares the work out among several devices.
"""

import hashlib
import itertools
import json
import math
import random
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffusers_moviegen import AutoencoderKLMovieGen, MovieGenPipeline
from diffusers_moviegen.pipelines.prompt_encoding import TEXT_ENCODERS
from diffusers_moviegen.toybox.captions import (
    add_camera,
    add_written_word,
    core_caption,
    person_caption,
    phrase,
    phrase_two_objects,
    two_object_caption,
)
from diffusers_moviegen.toybox.data import LOOKS, SPLITS, Sampler
from diffusers_moviegen.toybox.scenes import SIZES
from diffusers_moviegen.toybox.vocabulary import MOTIONS, SHAPES
from diffusers_moviegen.training import (
    Bucket,
    Buckets,
    LatentCacheWriter,
    MediaError,
    MediaInfo,
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
    run_script,
)
from diffusers_moviegen.training.latent_cache import FORMAT, REPORT_FILE


PLAN_FILE = "plan.json"


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "folder of the cache"})
    pipeline: str = field(metadata={"help": "folder or Hub id of a pipeline; its transformer is not needed"})
    data: str | None = field(
        default=None,
        metadata={"help": "a table of captions, its folder, a Hub id, or .tar shards: a file, a folder or a pattern"},
    )
    file_column: str = field(default="file_name", metadata={"help": "column of the table with the files' paths"})
    caption_column: str = field(default="caption", metadata={"help": "column, or field of a shard's .json"})
    exclude: list[str] = field(default_factory=list, metadata={"help": "patterns of file names to leave out"})
    toybox: bool = field(default=False, metadata={"help": "draw Toybox instead of reading --data"})
    num_images: int = field(default=0, metadata={"help": "pictures of Toybox to draw"})
    num_videos: int = field(default=0, metadata={"help": "films of Toybox to draw"})
    split: str = field(default="train", metadata={"help": "of Toybox: train or held_out", "choices": list(SPLITS)})
    looks: list[str] = field(default_factory=lambda: ["core"], metadata={"help": f"of Toybox: {', '.join(LOOKS)}"})
    shape_weights: list[str] = field(
        default_factory=list,
        metadata={"help": "how likely one object of Toybox has this shape, such as ring=2; 1 for the others"},
    )
    motion_weights: list[str] = field(
        default_factory=list,
        metadata={"help": "how likely one object of Toybox's films moves so, such as spins=6; 1 for the others"},
    )
    seed: int = field(default=0, metadata={"help": "another seed draws other samples of Toybox"})
    resolution: int = field(default=256, metadata={"help": "all sizes have about resolution * resolution pixels"})
    aspect_ratios: list[float] = field(
        default_factory=lambda: list(Buckets().aspect_ratios), metadata={"help": "width over height"}
    )
    lengths: list[int] = field(
        default_factory=lambda: list(Buckets().lengths),
        metadata={"help": "frames; a film is cut to the longest it fills. 1 makes pictures of films"},
    )
    frame_rate: float = field(default=16, metadata={"help": "frames a second that films are read at"})
    num_windows: int = field(default=1, metadata={"help": "windows of each film, evenly over its length"})
    film_part: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "part of each film to take windows from, as begin and end, 0 to 1"},
    )
    batch_size: int = field(default=1, metadata={"help": "samples that the autoencoder encodes at a time"})
    text_batch_size: int = field(default=64, metadata={"help": "captions that the text encoders encode at a time"})
    vae_tiling: bool = field(default=False, metadata={"help": "encode in tiles, which takes less memory"})
    samples_per_shard: int = field(default=256, metadata={"help": "samples a file; an interrupted one is done again"})
    mixed_precision: str = field(default="no", metadata={"help": "of the models", "choices": ["no", "bf16"]})
    num_workers: int = field(default=0, metadata={"help": "processes that read or draw ahead; 0 does it in this one"})

    def __post_init__(self):
        check_positive(self, ("num_windows", "batch_size", "text_batch_size", "samples_per_shard"))
        if self.toybox == (self.data is not None):
            raise ValueError("--data or --toybox: pass one of the two.")
        if len(self.film_part) != 2 or not 0 <= self.film_part[0] < self.film_part[1] <= 1:
            raise ValueError(f"--film_part is {self.film_part}: pass begin and end, such as 0 0.8, within 0 to 1.")
        if not 0 < self.frame_rate < math.inf:
            raise ValueError(f"--frame_rate is {self.frame_rate}: it must be above 0 frames a second.")
        if self.seed < 0 or self.num_workers < 0:
            raise ValueError("--seed and --num_workers must be 0 or more.")
        if not self.toybox:
            if self.shape_weights or self.motion_weights:
                raise ValueError("--shape_weights and --motion_weights say how Toybox is drawn: add --toybox.")
            if self.num_images or self.num_videos:
                raise ValueError("--num_images and --num_videos count samples of Toybox: add --toybox.")
            return
        if min(self.num_images, self.num_videos) < 0 or self.num_images + self.num_videos == 0:
            raise ValueError("--toybox: pass how much to draw, --num_images or --num_videos or both.")
        if self.num_videos and min(self.lengths, default=0) < 2:
            raise ValueError(f"--lengths is {self.lengths}: films of Toybox have 2 frames or more.")
        if self.num_windows > 1 or self.film_part != [0, 1] or self.exclude:
            raise ValueError("--num_windows, --film_part and --exclude are for --data: leave them out with --toybox.")
        if self.motion_weights and not self.num_videos:
            raise ValueError("--motion_weights does nothing for pictures: add --num_videos.")
        parse_weights("shape_weights", self.shape_weights, SHAPES)
        parse_weights("motion_weights", self.motion_weights, MOTIONS)
        unknown = [look for look in self.looks if look not in LOOKS]
        if unknown or not self.looks:
            raise ValueError(f"--looks is {self.looks}: use some of {', '.join(LOOKS)}.")


# --- What to encode -----------------------------------------------------------------------------------------------


def windows(info: MediaInfo, buckets: Buckets, args: Arguments) -> tuple[Bucket, list[float]]:
    """The bucket of a file, and where in its film the windows start, in seconds."""
    is_image = info.duration is None
    duration = 0.0 if is_image else info.duration
    begin, end = (share * duration for share in args.film_part)
    # The last frame of a whole film counts if half of it is there; a part must not reach into the next one.
    tolerance = 0.5 if args.film_part == [0, 1] else 1e-6
    num_frames = math.floor((end - begin) * args.frame_rate + tolerance)
    bucket = buckets.assign(info.height, info.width, num_frames, is_image)
    if bucket is None:
        shortest = f"shorter than {min(buckets.lengths)} frames at {args.frame_rate:g} frames a second"
        raise MediaError(shortest, f"{num_frames} frames")
    slack = 0.0 if is_image else max(end - begin - bucket.num_frames / args.frame_rate, 0.0)
    # Windows less than a frame apart would be the same.
    count = min(args.num_windows, 1 + math.floor(slack * args.frame_rate))
    shares = [0.5] if count == 1 else [number / (count - 1) for number in range(count)]
    return bucket, [begin + share * slack for share in shares]


def as_it_is(item: Any) -> Any:
    """Instead of the default of a `DataLoader`, which changes the types of what it passes on."""
    return item


class Probes(Dataset):
    """What `windows` says of each row, or why the file cannot be used."""

    def __init__(self, rows: list[MediaRow], buckets: Buckets, args: Arguments):
        self.rows, self.buckets, self.args = rows, buckets, args

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Bucket, list[float]] | MediaError:
        source = self.rows[index].source
        try:
            return windows(
                probe_media(source.read() if isinstance(source, MediaMember) else source), self.buckets, self.args
            )
        except MediaError as error:
            return error


def plan_media(args: Arguments, rows: list[MediaRow], buckets: Buckets, report: MediaReport) -> list[dict[str, Any]]:
    """An entry for each window of each usable file; what cannot be used goes to the report."""
    entries = []
    probes = DataLoader(Probes(rows, buckets, args), None, num_workers=args.num_workers, collate_fn=as_it_is)
    for row, probe in zip(rows, tqdm(probes, desc="probing", disable=None), strict=True):
        if isinstance(probe, MediaError):
            report.add(row.name, probe.reason, probe.detail)
            continue
        bucket, starts = probe
        source = row.source
        if isinstance(source, MediaMember):
            place = [str(source.archive.absolute()), source.offset, source.size]
        else:
            place = [str(source.absolute())]
        for number, start in enumerate(starts):
            name = row.name if len(starts) == 1 else f"{row.name}#{number}"
            entries.append(
                {"name": name, "captions": [row.caption], "bucket": bucket, "source": place, "start": start}
            )
    return entries


def toybox_sampler(args: Arguments, bucket: Bucket) -> Sampler:
    num_frames, height, width = bucket
    task = "text_to_image" if num_frames == 1 else "text_to_video"
    looks = {look: LOOKS[look] for look in args.looks}
    likely = parse_weights("shape_weights", args.shape_weights, SHAPES)
    if num_frames > 1:
        likely |= parse_weights("motion_weights", args.motion_weights, MOTIONS)
    size = height, width, num_frames, args.frame_rate
    return Sampler(task, args.split, args.seed, *size, looks, paired=False, weights=likely)


def toybox_captions(words: dict[str, Any], is_image: bool, rng: random.Random) -> list[str]:
    """The core caption of what was drawn and, but of a person, one of its other phrasings."""

    def said(parts: dict[str, str]) -> tuple[str, str, str | None]:
        return parts["colour"], parts["shape"], None if is_image else parts["motion"]

    background = words["background"]
    if words["look"] == "person":
        return [person_caption(None if is_image else words["motion"], background)]
    if "objects" in words:
        objects = [said(parts) for parts in words["objects"]]
        return [two_object_caption(objects, background), phrase_two_objects(objects, background, rng)]
    if words["look"] in ("camera", "checkered"):
        background = f"checkered {background}"
    captions = [core_caption(*said(words), background), phrase(*said(words), background, rng)]
    if "word" in words:
        captions = [add_written_word(caption, words["word"]) for caption in captions]
    if "camera" in words:
        captions = [add_camera(caption, words["camera"]) for caption in captions]
    return captions


def plan_toybox(args: Arguments, buckets: Buckets) -> list[dict[str, Any]]:
    """An entry for each picture and film; sizes and lengths take turns."""
    unfit = [size for size in buckets.sizes if size not in SIZES]
    if unfit:
        known = ", ".join(f"{height} x {width}" for height, width in SIZES)
        raise ValueError(
            f"--resolution and --aspect_ratios give {unfit[0][0]} x {unfit[0][1]} (height x width), but Toybox is "
            f"drawn at {known}."
        )
    entries = []
    for count, lengths in ((args.num_images, (1,)), (args.num_videos, buckets.lengths)):
        if not count:
            continue
        shapes = [Bucket(length, *size) for length in lengths for size in buckets.sizes]
        for look, fits in (("camera", 1 not in lengths), ("person", min(map(min, buckets.sizes)) >= 128)):
            if look in args.looks and not fits:
                raise ValueError(f"--looks: there is no {look!r} in single frames or below 128 pixels; leave it out.")
        for index in range(count):
            bucket = shapes[index % len(shapes)]
            sampler = toybox_sampler(args, bucket)
            name = f"{sampler.task}/{args.split}/{args.seed}/{index}"
            words = sampler.draw_words(index)[1]
            captions = toybox_captions(words, bucket.num_frames == 1, random.Random(name))
            entries.append({"name": name, "captions": captions, "bucket": bucket, "index": index})
    return entries


class Videos(Dataset):
    """The pixels of each batch of entries, uint8 `(3, frames, height, width)`, or why there are none."""

    def __init__(self, batches: list[list[dict[str, Any]]], args: Arguments):
        self.batches, self.args = batches, args

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[torch.Tensor | MediaError]:
        return [self._read(entry) for entry in self.batches[index]]

    def _read(self, entry: dict[str, Any]) -> torch.Tensor | MediaError:
        bucket = Bucket(*entry["bucket"])
        if self.args.toybox:
            columns = toybox_sampler(self.args, bucket)({"index": [entry["index"]]})
            return columns["image"][0][:, None] if bucket.num_frames == 1 else columns["video"][0]
        path, *place = entry["source"]
        try:
            source = MediaMember(path, *place).read() if place else path
            return read_media(source, *bucket, self.args.frame_rate, entry["start"])
        except MediaError as error:
            return error


# --- What the models make of it -----------------------------------------------------------------------------------


@torch.no_grad()
def encode_videos(vae: AutoencoderKLMovieGen, videos: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Mean and deviation of the normalised latents of each video, in float16."""
    posterior = vae.encode(videos.to(vae.device).float() / 127.5 - 1).latent_dist
    mean, std = (
        torch.tensor(value, device=vae.device).view(1, -1, 1, 1, 1)
        for value in (vae.config.latents_mean, vae.config.latents_std)
    )
    means, stds = ((posterior.mean.float() - mean) / std).half().cpu(), (posterior.std.float() / std).half().cpu()
    return [{"mean": mean, "std": std} for mean, std in zip(means, stds, strict=True)]


def encode_captions(
    pipe: MovieGenPipeline, captions: list[str], is_image: bool, args: Arguments
) -> dict[str, dict[str, torch.Tensor]]:
    """Features `(tokens, channels)` of each caption by suffix of the encoder."""
    features = {}
    for part in chunks(captions, args.text_batch_size):
        embeds = pipe.encode_prompt(
            part,
            do_classifier_free_guidance=False,
            # Any number above 1 makes it a video's caption.
            num_frames=1 if is_image else 2,
            frame_rate=args.frame_rate,
            dtype=torch.float32,
        )
        for row, caption in enumerate(part):
            features[caption] = {
                suffix: embeds[f"prompt_embeds{suffix}"][row][embeds[f"prompt_attention_mask{suffix}"][row]].half()
                for suffix in TEXT_ENCODERS
            }
    return features


def encode_shard(
    pipe: MovieGenPipeline, pairs: list[tuple[dict[str, Any], dict[str, torch.Tensor]]], args: Arguments
) -> list[dict[str, Any]]:
    """The samples of a shard from pairs of an entry and its latents."""
    features = {}
    for is_image in (True, False):
        captions = dict.fromkeys(
            caption for entry, _ in pairs for caption in entry["captions"] if (entry["bucket"][0] == 1) == is_image
        )
        features[is_image] = encode_captions(pipe, list(captions), is_image, args)
    return [
        {
            "name": entry["name"],
            "bucket": Bucket(*entry["bucket"]),
            "captions": entry["captions"],
            "text": [features[entry["bucket"][0] == 1][caption] for caption in entry["captions"]],
            **latents,
        }
        for entry, latents in pairs
    ]


# --- The run ------------------------------------------------------------------------------------------------------


def chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def prepare(args: Arguments, pipeline: Path, buckets: Buckets) -> LatentCacheWriter:
    """Lists the data, refuses a folder that was begun with anything else, and plans what there is to encode."""
    options = asdict(args)
    # What the content does not depend on.
    for name in ("output_dir", "pipeline", "data", "batch_size", "text_batch_size", "num_workers"):
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
    fingerprint = {"format": FORMAT, "models": models_fingerprint(pipeline), **options, "data": content}
    writer = LatentCacheWriter(args.output_dir, fingerprint)
    plan_file, location = writer.folder / PLAN_FILE, None if args.toybox else str(Path(args.data).resolve())
    # The data may have been moved since the run was interrupted.
    planned = plan_file.is_file() and json.loads(plan_file.read_text())["location"] == location
    if not writer.finished and not planned:
        entries = plan_toybox(args, buckets) if args.toybox else plan_media(args, rows, buckets, report)
        if not entries:
            reasons = [f"{len(names)} {reason}" for reason, names in report.skipped.items() if names]
            raise ValueError(
                f"--data: '{args.data}' has no usable sample: {'; '.join(reasons) or 'it names no picture or film'}."
            )
        # A batch has one shape, so those of one shape come together.
        entries.sort(key=lambda entry: entry["bucket"])
        plan = {"source": report.source, "location": location, "entries": entries, "skipped": report.skipped}
        writer.write_text(PLAN_FILE, json.dumps(plan))
    return writer


def write_shards(
    writer: LatentCacheWriter, shards: dict[int, list[dict[str, Any]]], pipe: MovieGenPipeline, args: Arguments
) -> None:
    """Encodes and writes the shards, given as lists of entries by number."""
    batches = []
    for number, entries in shards.items():
        for _, group in itertools.groupby(entries, key=lambda entry: entry["bucket"]):
            batches += [(number, batch) for batch in chunks(list(group), args.batch_size)]
    videos = DataLoader(
        Videos([batch for _, batch in batches], args), None, num_workers=args.num_workers, collate_fn=as_it_is
    )
    autocast = torch.autocast(pipe.vae.device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16")
    progress = tqdm(total=sum(map(len, shards.values())), desc="encoding", mininterval=5, disable=None)
    pairs, skipped = [], []
    for place, ((number, entries), items) in enumerate(zip(batches, videos, strict=True)):
        read = []
        for entry, item in zip(entries, items, strict=True):
            if isinstance(item, MediaError):
                skipped.append((entry["name"], item.reason, item.detail))
            else:
                read.append((entry, item))
        if read:
            with autocast:
                latents = encode_videos(pipe.vae, torch.stack([item for _, item in read]))
            for (entry, _), tensors in zip(read, latents, strict=True):
                if all(tensor.isfinite().all() for tensor in tensors.values()):
                    pairs.append((entry, tensors))
                else:
                    skipped.append((entry["name"], "latents that are not finite in float16", ""))
        progress.update(len(entries))
        if place + 1 == len(batches) or batches[place + 1][0] != number:
            with autocast:
                samples = encode_shard(pipe, pairs, args)
            writer.write_shard(number, samples, skipped)
            pairs, skipped = [], []


def main(args: Arguments) -> None:
    # Processes wait for one that probes the data, or has more left to encode, as long as that takes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=4))])
    started = time.perf_counter()

    # 1. What there is to do; what was begun with other models, options or data is refused
    pipeline = find_pipeline(args.pipeline)
    check_model_folder("pipeline", str(pipeline / "vae"), AutoencoderKLMovieGen)
    vae_config = AutoencoderKLMovieGen.load_config(pipeline / "vae")
    if vae_config.get("latents_mean") is None or vae_config.get("latents_std") is None:
        raise ValueError(
            f"--pipeline: the config of '{pipeline / 'vae'}' has no latents_mean and latents_std; pass an autoencoder "
            "that train_tae.py measured them for."
        )
    if accelerator.is_main_process:
        # The backbones' patches are 2 x 2 latents.
        multiple = 2 * 2 ** (len(vae_config["block_out_channels"]) - 1)
        buckets = Buckets(args.resolution, tuple(args.aspect_ratios), tuple(args.lengths), multiple)
        prepare(args, pipeline, buckets)
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
    pipe = MovieGenPipeline.from_pretrained(pipeline, transformer=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(accelerator.device)
    if args.vae_tiling:
        pipe.vae.enable_tiling()

    # 3. Shards: those that are there are whole
    if accelerator.is_main_process:
        writer.write_unconditional(encode_captions(pipe, [""], True, args)[""])
    missing = [number for number in range(len(shards)) if not writer.shard_file(number).is_file()]
    # All share out the same list: none writes before the others have looked.
    accelerator.wait_for_everyone()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    write_shards(writer, {number: shards[number] for number in mine}, pipe, args)
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
