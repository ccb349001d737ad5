"""What the frozen models of a pipeline make of pictures, films and sounds, computed once and read in every epoch.

    cache = LatentCache(["caches/clips", "caches/pictures"])
    sampler = BucketSampler([sample.bucket for sample in cache.samples], batch_size=4)
    for batch in BucketLoader(cache, sampler, num_workers=2): ...

A cache is a folder that [`LatentCacheWriter`] made: shards with the mean and deviation of each sample's normalised
latents and the text features of its captions, the text features of the empty prompt, and an index of it all, which is
written last. A sound comes with the features of its film's frames, one a latent; its bucket is its number of latents.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .buckets import Bucket
from .media_dataset import MediaReport


FORMAT = 1

INDEX_FILE, FINGERPRINT_FILE, REPORT_FILE = "index.json", "fingerprint.json", "report.txt"
UNCONDITIONAL_FILE = "unconditional.safetensors"

FROZEN_COMPONENTS = {
    "MovieGenPipeline": (
        "vae",
        *(f"{name}{suffix}" for suffix in ("", "_2", "_3") for name in ("tokenizer", "text_encoder")),
    ),
    "MovieGenAudioPipeline": ("vae", "tokenizer", "text_encoder", "image_processor", "image_encoder"),
}
"""What a cache is made with, by the class of the pipeline."""


# --- Which models made it -----------------------------------------------------------------------------------------


def find_pipeline(name_or_path: str | Path, class_name: str = "MovieGenPipeline") -> Path:
    """The folder of a pipeline of the class `class_name`; from the Hub all of it is downloaded but its transformer.

    Raises:
        OSError: if there is none, or it is of another class.
    """
    path = Path(name_or_path)
    if not path.exists():
        try:
            path = Path(
                snapshot_download(
                    str(name_or_path),
                    allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
                    ignore_patterns=["transformer/*"],
                )
            )
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(
                f"--pipeline: '{name_or_path}' is no folder, and no repository of the Hub could be loaded by this "
                f"name: {reason}"
            ) from error
    file = path / "model_index.json"
    if not file.is_file():
        raise OSError(f"--pipeline: '{path}' has no model_index.json; assemble_pipeline.py makes such a folder.")
    found = _pipeline_class(path)
    if found != class_name:
        raise OSError(f"--pipeline: '{path}' holds a {found}; pass a {class_name}.")
    return path


def _pipeline_class(pipeline: Path) -> str | None:
    index = _read_json(pipeline / "model_index.json")
    return index.get("_class_name") if isinstance(index, dict) else None


def models_fingerprint(pipeline: str | Path) -> dict[str, Any]:
    """What tells the autoencoder and the encoders of a pipeline's folder from others.

    Configurations are compared as they are. All bytes of all weights enter a digest, tensor by tensor in the order of
    their names, so it does not matter how many files they are in. Of the autoencoder those of its decoder are left
    out, which no latent depends on: it may be trained on while a backbone learns.

    Raises:
        OSError: if a component is missing or a file cannot be read.
    """
    pipeline = Path(pipeline)
    fingerprint = {}
    for name in FROZEN_COMPONENTS[_pipeline_class(pipeline)]:
        folder = pipeline / name
        if not folder.is_dir():
            raise OSError(f"--pipeline: '{pipeline}' has no {name}/, which a latent cache is made with.")
        if name.startswith(("tokenizer", "image_processor")):
            digest = hashlib.sha256()
            for file in sorted(path for path in folder.iterdir() if path.is_file()):
                digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
            fingerprint[name] = {"files": digest.hexdigest()}
            continue
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OSError(f"--pipeline: '{folder / 'config.json'}' cannot be read: {error}") from error
        ours = {
            key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"
        }
        parts = ("encoder.", "quant_conv.") if name == "vae" else ("",)
        fingerprint[name] = {"config": ours, "weights": _weights_digest(folder, parts)}
    return fingerprint


def _weights_digest(folder: Path, parts: tuple[str, ...]) -> str:
    """Of the tensors whose names begin with one of `parts`."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        # Others are variants, such as model.fp16.safetensors, which are not loaded.
        files = [
            folder / f"{stem}.safetensors"
            for stem in ("diffusion_pytorch_model", "model")
            if (folder / f"{stem}.safetensors").is_file()
        ]
    if not files:
        raise OSError(f"--pipeline: '{folder}' has no weights in safetensors files.")
    digest, tensors = hashlib.sha256(), {}
    for file in files:
        shard = _open_shard(file)
        tensors |= dict.fromkeys((key for key in shard.keys() if key.startswith(parts)), shard)
    for name in sorted(tensors):
        tensor = tensors[name].get_tensor(name).contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _open_shard(file: Path):
    try:
        return safe_open(str(file), framework="pt")
    except (OSError, SafetensorError) as error:
        raise OSError(f"'{file}' cannot be read: {error}") from error


def first_difference(made: Any, now: Any, name: str = "") -> str | None:
    """Where two fingerprints first differ, such as `vae.config.layers_per_block 1, now 2`; None if they are equal."""
    if isinstance(made, dict) and isinstance(now, dict):
        for key in [*made, *(key for key in now if key not in made)]:
            path = f"{name}.{key}" if name else str(key)
            if key not in now or key not in made:
                return f"{path} {_brief(made.get(key))}, now {_brief(now.get(key))}"
            difference = first_difference(made[key], now[key], path)
            if difference is not None:
                return difference
        return None
    return None if made == now else f"{name} {_brief(made)}, now {_brief(now)}"


def _brief(value: Any, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


# --- Writing ------------------------------------------------------------------------------------------------------


class LatentCacheWriter:
    """Writes a cache, shard by shard and in any order, also from several processes.

    A file that is there is whole: each is written beside and renamed. So a run that was killed goes on with the shards
    that are missing. The folder itself is made with the first file that is written.

    Args:
        folder: the cache.
        fingerprint: all that the content depends on, in types that JSON has: "format", "models" as
            [`models_fingerprint`] returns them, "frame_rate", and more.

    Raises:
        OSError: if the folder holds something else.
        ValueError: if it was begun with another fingerprint; the message names the first difference.
    """

    def __init__(self, folder: str | Path, fingerprint: dict[str, Any]):
        self.folder, self.fingerprint = Path(folder), json.loads(json.dumps(fingerprint))
        file = self.folder / FINGERPRINT_FILE
        if file.is_file():
            difference = first_difference(_read_json(file), self.fingerprint)
            if difference is not None:
                raise ValueError(
                    f"--output_dir: '{folder}' was made with {difference}: pass another folder, or the options and "
                    "data that it was made with."
                )
        elif self.folder.is_file() or (
            self.folder.exists() and any(path.suffix != ".partial" for path in self.folder.iterdir())
        ):
            raise OSError(f"--output_dir: '{folder}' holds something other than a latent cache; pass a new folder.")

    @classmethod
    def resume(cls, folder: str | Path) -> "LatentCacheWriter":
        """The writer of a cache that was begun."""
        return cls(folder, _read_json(Path(folder) / FINGERPRINT_FILE))

    @property
    def finished(self) -> bool:
        return (self.folder / INDEX_FILE).is_file()

    def shard_file(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.safetensors"

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file of the folder."""
        self._write(self.folder / name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_unconditional(self, features: dict[str, torch.Tensor]) -> None:
        """Writes the text features `(tokens, channels)` of the empty prompt, by suffix of the encoder."""
        tensors = {f"text{suffix}": _half(value, "the empty prompt") for suffix, value in features.items()}
        self._write(self.folder / UNCONDITIONAL_FILE, lambda path: save_file(tensors, path))

    def write_shard(self, number: int, samples: list[dict[str, Any]], skipped: list[tuple[str, str, str]]) -> None:
        """Writes one shard.

        Args:
            number: which, from 0.
            samples: each with "name", "bucket" (a [`Bucket`], in pixels), "captions" (list of texts), "mean" and "std"
                of the normalised latents `(channels, frames, height, width)`, and "text": for each caption its
                features `(tokens, channels)` by suffix of the encoder. They are stored in float16, a caption that
                several samples share once. Latents of a sound are `(channels, latents)`, its bucket is `(latents, 1,
                1)`, and it has "video" `(latents, channels)`, the features of its film's frames, and "needs_text",
                whether it is another sound than the film alone would have.
            skipped: what should have been here but could not be used: name, reason and detail.

        Raises:
            OSError: if it cannot be written.
            ValueError: if a value is not finite in float16.
        """
        tensors, entries, places = {}, [], {}
        for index, sample in enumerate(samples):
            for key in ("mean", "std", "video"):
                if key in sample:
                    tensors[f"{index}.{key}"] = _half(sample[key], sample["name"])
            numbers = []
            for caption, features in zip(sample["captions"], sample["text"], strict=True):
                # The frame rate, which is part of what the encoders read, is for videos only.
                key = caption, sample["bucket"].num_frames == 1
                if key not in places:
                    places[key] = len(places)
                    for suffix, value in features.items():
                        tensors[f"text.{places[key]}{suffix}"] = _half(value, f"the caption {caption!r}")
                numbers.append(places[key])
            entries.append(
                {
                    "name": sample["name"],
                    "bucket": list(sample["bucket"]),
                    "captions": sample["captions"],
                    "text": numbers,
                    **({"needs_text": sample["needs_text"]} if "needs_text" in sample else {}),
                }
            )
        metadata = {"content": json.dumps({"samples": entries, "skipped": skipped})}
        self._write(self.shard_file(number), lambda path: save_file(tensors, path, metadata))

    def finish(self, num_shards: int, report: MediaReport) -> None:
        """Writes the report and the index, which makes the folder a cache; by one process when all shards are there.

        Args:
            num_shards: how many.
            report: has what was left out before; what is in the shards, and what they lack, is added.

        Raises:
            OSError: if a shard is missing, or a file cannot be written.
            ValueError: if no sample is left.
        """
        shards = []
        for number in range(num_shards):
            content = json.loads(_open_shard(self.shard_file(number)).metadata()["content"])
            shards.append({"file": self.shard_file(number).name, "samples": content["samples"]})
            for sample in content["samples"]:
                report.count(sample["bucket"][0])
            for failure in content["skipped"]:
                report.add(*failure)
        if not any(shard["samples"] for shard in shards):
            reasons = [f"{len(names)} {reason}" for reason, names in report.skipped.items() if names]
            raise ValueError(f"'{report.source}' has no usable sample: {'; '.join(reasons)}.")
        self.write_text(REPORT_FILE, f"{report}\n")
        index = {"format": FORMAT, "fingerprint": self.fingerprint, "shards": shards}
        self.write_text(INDEX_FILE, json.dumps(index))
        for path in self.folder.glob("*.partial"):
            path.unlink()

    def _write(self, file: Path, write: Callable[[Path], Any]) -> None:
        if file.name != FINGERPRINT_FILE and not (self.folder / FINGERPRINT_FILE).is_file():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"--output_dir: '{self.folder}' cannot be made: {error.strerror}.") from error
            self.write_text(FINGERPRINT_FILE, json.dumps(self.fingerprint, indent=1))
        # Processes may write the same small file at the same time.
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        try:
            write(partial)
            if file.suffix == ".safetensors":
                # safetensors makes files that nobody but their owner may read.
                shutil.copymode(self.folder / FINGERPRINT_FILE, partial)
            partial.replace(file)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"'{file}' cannot be written: {error}") from error


def _half(tensor: torch.Tensor, name: str) -> torch.Tensor:
    # A copy, because safetensors does not store parts of one memory as tensors of their own.
    tensor = tensor.detach().to("cpu", torch.float16, copy=True).contiguous()
    if not tensor.isfinite().all():
        raise ValueError(f"{name}: the models gave values that are not finite in float16, which a cache is stored in.")
    return tensor


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OSError(f"'{file}' cannot be read: {error}") from error


# --- Reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachedSample:
    """A sample of a cache.

    Attributes:
        name: of the file, with `#k` behind it if the film has several windows here.
        bucket: frames, height and width in pixels; of a sound the number of latents, 1 and 1.
        captions: one or more.
        frame_rate: frames a second; None for an image. Of a sound latents a second.
        shard: file.
        place: number in the shard.
        text: numbers of the captions' features in the shard.
        needs_text: whether it is a sound that its film alone does not tell.
    """

    name: str
    bucket: Bucket
    captions: tuple[str, ...]
    frame_rate: float | None
    shard: Path
    place: int
    text: tuple[int, ...]
    needs_text: bool = False


class LatentCache(torch.utils.data.Dataset):
    """Samples of one or several finished caches.

    Args:
        folders: the caches. All must be of the same models.
        script: what makes such caches, for messages.

    Attributes:
        samples (`list[CachedSample]`): in the order of the folders and their shards.
        fingerprint (`dict`): what the first cache depends on: "models" and the options and data it was made of.
        frame_rate (`float` or `None`): frames a second of most of the videos; None if there are only images.
        latent_channels (`int`): channels of the latents.
        video_dim (`int` or `None`): channels of the features of the frames; None if the latents are not of sounds.
        text_dims (`dict[str, int]`): channels of the text features by suffix of the encoder: "", "_2", "_3".
        unconditional (`dict[str, torch.Tensor]`): text features `(tokens, channels)` of the empty prompt, float32.

    Raises:
        OSError: if a folder is no cache, or not finished.
        ValueError: if there are no folders, or the caches are of different models or another version of the format;
            the message names the first difference.
    """

    max_open_shards = 64

    def __init__(self, folders: str | Path | Sequence[str | Path], script: str = "precompute.py"):
        folders = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
        if not folders:
            raise ValueError(f"--data: pass one or more folders that {script} wrote.")
        self.samples: list[CachedSample] = []
        self.fingerprint: dict[str, Any] = {}
        for folder in folders:
            if not (folder / FINGERPRINT_FILE).is_file():
                raise OSError(f"--data: '{folder}' is no latent cache; {script} makes one.")
            if not (folder / INDEX_FILE).is_file():
                raise OSError(
                    f"--data: the latent cache '{folder}' is not finished; run {script} with the same options again."
                )
            index = _read_json(folder / INDEX_FILE)
            if index["format"] != FORMAT:
                raise ValueError(
                    f"--data: '{folder}' has format {index['format']} of latent caches, this version reads {FORMAT}; "
                    f"run {script} again."
                )
            fingerprint = index["fingerprint"]
            self.fingerprint = self.fingerprint or fingerprint
            difference = first_difference(self.fingerprint["models"], fingerprint["models"])
            if difference is not None:
                raise ValueError(
                    f"--data: '{folders[0]}' and '{folder}' are of different models, {difference}: precompute both "
                    "with one pipeline."
                )
            for shard in index["shards"]:
                for place, sample in enumerate(shard["samples"]):
                    bucket = Bucket(*sample["bucket"])
                    self.samples.append(
                        CachedSample(
                            sample["name"],
                            bucket,
                            tuple(sample["captions"]),
                            None if bucket.num_frames == 1 else fingerprint["frame_rate"],
                            folder / shard["file"],
                            place,
                            tuple(sample["text"]),
                            sample.get("needs_text", False),
                        )
                    )
        rates = Counter(sample.frame_rate for sample in self.samples if sample.frame_rate is not None)
        self.frame_rate: float | None = rates.most_common(1)[0][0] if rates else None
        unconditional = _open_shard(folders[0] / UNCONDITIONAL_FILE)
        self.unconditional = {
            name.removeprefix("text"): unconditional.get_tensor(name).float() for name in sorted(unconditional.keys())
        }
        self.text_dims = {suffix: value.shape[1] for suffix, value in self.unconditional.items()}
        self._shards = {}
        first = self._shard(self.samples[0].shard)
        self.video_dim: int | None = first.get_slice("0.video").get_shape()[1] if "0.video" in first.keys() else None
        self.latent_channels: int = self.read(0)["mean"].shape[0]

    def check_models(self, pipeline: str | Path) -> None:
        """Compares the models of a pipeline's folder with those that the cache was made with.

        Raises:
            ValueError: if they differ; the message names the first difference.
        """
        difference = first_difference(self.fingerprint["models"], models_fingerprint(pipeline))
        if difference is not None:
            raise ValueError(
                f"--data: '{self.samples[0].shard.parent}' was made with {difference} in '{pipeline}': pass the "
                "--pipeline it was made with, or precompute it again."
            )

    def __len__(self) -> int:
        return len(self.samples)

    def latent_size(self, bucket: Bucket) -> tuple[int, ...]:
        """Frames, height and width of the latents of a bucket's samples; of sounds their number."""
        first = next(index for index, sample in enumerate(self.samples) if sample.bucket == bucket)
        return tuple(self.read(first)["mean"].shape[1:])

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to the workers of a `DataLoader`.
        return self.__dict__ | {"_shards": {}}

    def _shard(self, file: Path):
        if file not in self._shards:
            if len(self._shards) == self.max_open_shards:
                self._shards.clear()
            self._shards[file] = _open_shard(file)
        return self._shards[file]

    def read(self, index: int, position: float = 0.0) -> dict[str, Any]:
        """The sample `index`.

        Args:
            index: which.
            position: 0 to 1; chooses among the captions of the sample.

        Returns:
            A dictionary: "mean" and "std" of the normalised latents, `(latents - latents_mean) / latents_std`, both
            `(channels, frames, height, width)` in float32; "text", features `(tokens, channels)` in float32 by suffix
            of the encoder, "", "_2" and "_3", of which the last may have no tokens; "caption" and "name". Of a sound
            latents are `(channels, latents)`, and there are "video", features `(latents, channels)` in float32, and
            "needs_text".

        Raises:
            OSError: if the shard cannot be read.
        """
        sample = self.samples[index]
        choice = min(int(position * len(sample.captions)), len(sample.captions) - 1)
        shard = self._shard(sample.shard)
        try:
            latents = {key: shard.get_tensor(f"{sample.place}.{key}").float() for key in ("mean", "std")}
            if self.video_dim is not None:
                latents["video"] = shard.get_tensor(f"{sample.place}.video").float()
                latents["needs_text"] = sample.needs_text
            text = {
                suffix: shard.get_tensor(f"text.{sample.text[choice]}{suffix}").float()
                for suffix in self.unconditional
            }
        except SafetensorError as error:
            raise OSError(f"'{sample.shard}' cannot be read: {error}") from error
        return {**latents, "text": text, "caption": sample.captions[choice], "name": sample.name}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Items of one bucket as a batch: "mean", "std" and "video" stacked, lists of all else."""
        batch = {name: [item[name] for item in items] for name in items[0]}
        return batch | {name: torch.stack(batch[name]) for name in ("mean", "std", "video") if name in batch}
