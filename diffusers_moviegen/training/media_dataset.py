"""Pictures and films of one's own: tables and WebDataset shards, decoded to the sizes and lengths of the buckets.

    dataset = MediaDataset("clips", frame_rate=16, buckets=Buckets(resolution=256), exclude=["heldout-*"])
    print(dataset.report)

Whatever cannot be used is skipped, counted and named with the reason in the report.
"""

import csv
import glob
import itertools
import json
import math
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tqdm.auto import tqdm

from ..media_reading import MediaError, MediaInfo, probe_media, read_media
from .buckets import Bucket, Buckets


logger = logging.get_logger(__name__)

TABLE_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# Which members of a WebDataset shard are media.
FILM_EXTENSIONS = ("avi", "gif", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "webm")
PICTURE_EXTENSIONS = ("bmp", "jpeg", "jpg", "png", "tif", "tiff", "webp")

# Which ones are sounds, where sounds are asked for.
SOUND_EXTENSIONS = ("aac", "aif", "aiff", "flac", "m4a", "mp3", "ogg", "opus", "wav")

# Up to the first dot of its last part, a name tells which sample a member of a shard belongs to.
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")


@dataclass
class MediaReport:
    """What became of the samples of a source; `str()` of it has one line for the used ones and one for each reason.

    Attributes:
        source: the table or the shards.
        num_images, num_videos: samples used, of one frame and of more.
        num_sounds: samples of whose sound alone is used.
        skipped: names of the skipped samples by reason, in the order met. A pattern of `exclude` that matches nothing
            has an empty list.
    """

    source: str
    num_images: int = 0
    num_videos: int = 0
    num_sounds: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)

    max_names = 20
    """How many names a line of the text has; `skipped` has them all."""

    def count(self, num_frames: int) -> None:
        """Counts a used sample of `num_frames` frames."""
        self.num_images += num_frames == 1
        self.num_videos += num_frames > 1

    def add(self, name: str, reason: str, detail: str = "") -> None:
        self.skipped.setdefault(reason, []).append(f"{name} ({detail})" if detail else name)

    @property
    def num_skipped(self) -> int:
        return sum(map(len, self.skipped.values()))

    def __str__(self) -> str:
        used = self.num_images + self.num_videos + self.num_sounds
        kinds = f"{self.num_images} images, {self.num_videos} videos"
        if self.num_sounds:
            kinds = f"{self.num_sounds} sounds"
        lines = [f"{self.source}: {used} of {used + self.num_skipped} samples used ({kinds})"]
        for reason, names in self.skipped.items():
            text = ", ".join(names[: self.max_names])
            more = f" and {len(names) - self.max_names} more" if len(names) > self.max_names else ""
            lines.append(f"skipped {len(names)}, {reason}{': ' if names else ''}{text}{more}")
        return "\n".join(lines)


# --- Tables -----------------------------------------------------------------------------------------------------


def _find_table(source: str | Path) -> Path:
    path = Path(source)
    if not path.exists():
        try:
            path = Path(snapshot_download(str(source), repo_type="dataset"))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(
                f"'{source}' is no file or folder here, and no data set of the Hub could be loaded by this name: "
                f"{reason}"
            ) from error
    if path.is_file():
        if path.suffix not in (".csv", ".jsonl", ".parquet"):
            raise ValueError(f"'{path}' is no table: pass a .csv, .jsonl or .parquet file, or the folder it is in.")
        return path
    tables = [path / name for name in TABLE_NAMES if (path / name).is_file()]
    if not tables:
        shards = " Its .tar files are shards: read them with MediaStream." if any(path.glob("*.tar")) else ""
        raise OSError(f"'{path}' has no table of captions: add one of {', '.join(TABLE_NAMES)}.{shards}")
    if len(tables) > 1:
        names = " and ".join(table.name for table in tables)
        raise OSError(f"'{path}' has {names}: pass the path of the one to use.")
    return tables[0]


def _load_table(path: Path, columns: tuple[str, str]):
    """The table as a `datasets.Dataset`; what the `columns` hold is text, be it "007", "None" or nothing at all."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if path.stat().st_size == 0:
        raise ValueError(f"'{path}' cannot be read as a table with rows: the file is empty.")
    builder = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet"}[path.suffix]
    options = {}
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                header = next(csv.reader(file), [])
            # By default the caption "None" is a missing value, as is the empty field of a column of numbers.
            others = {name: [""] for name in header if name not in columns}
            options = {"converters": dict.fromkeys(columns, str), "keep_default_na": False, "na_values": others}
        table = load_dataset(builder, data_files=str(path), split="train", **options)
    except (DatasetGenerationError, ValueError) as error:
        # What is wrong with the file is at the bottom of the chain.
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(
            f"'{path}' cannot be read as a table with rows: {str(cause).strip().splitlines()[0]}"
        ) from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ValueError(
            f"'{path}' has no column {' and no column '.join(map(repr, missing))}: its columns are "
            f"{', '.join(table.column_names)}."
        )
    return table


def _excluding_pattern(name: str, exclude: Sequence[str]) -> str | None:
    names = (name, PurePosixPath(name).name)
    return next((pattern for pattern in exclude if any(fnmatchcase(name, pattern) for name in names)), None)


def _new_report(source: str, exclude: Sequence[str]) -> MediaReport:
    if isinstance(exclude, str):
        raise ValueError(f"`exclude` is a list of patterns, not the text {exclude!r}: write [{exclude!r}].")
    return MediaReport(source, skipped={_excluded_by(pattern): [] for pattern in exclude})


def _excluded_by(pattern: str) -> str:
    return f"excluded by '{pattern}'"


def _choose_bucket(info: MediaInfo, buckets: Buckets, frame_rate: float) -> Bucket:
    num_frames = info.num_frames(frame_rate)
    bucket = buckets.assign(info.height, info.width, num_frames, is_image=info.duration is None)
    if bucket is None:
        shortest = f"shorter than {min(buckets.lengths)} frames at {frame_rate:g} frames a second"
        raise MediaError(shortest, f"{num_frames} frames")
    return bucket


def _window_start(info: MediaInfo, bucket: Bucket, frame_rate: float, position: float) -> float:
    """Seconds; `position` is 0 for the first possible window and 1 for the last one."""
    return position * max((info.duration or 0.0) - bucket.num_frames / frame_rate, 0.0)


def _check_frame_rate(frame_rate: float) -> None:
    if not 0 < frame_rate < math.inf:
        raise ValueError(f"`frame_rate` must be above 0 frames a second, not {frame_rate}")


@dataclass(frozen=True)
class MediaMember:
    """A file within a .tar archive: where its bytes begin and how many they are."""

    archive: Path | str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its content.

        Raises:
            MediaError: if the archive is gone or cut off.
        """
        try:
            with open(self.archive, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise MediaError("unreadable archive", f"{self.archive}: {error.strerror}") from error
        if len(content) < self.size:
            raise MediaError("damaged or truncated archive", str(self.archive))
        return content


@dataclass(frozen=True)
class MediaRow:
    """A picture or film that a table or an archive names; it has not been looked at.

    Attributes:
        name: what the table, or the archive, calls the file.
        caption: its caption, without spaces around it.
        source: where it is.
        row: its number in the table or among the archives' samples, from 0.
    """

    name: str
    caption: str
    source: Path | MediaMember
    row: int

    @property
    def num_bytes(self) -> int | None:
        """Its size; None if there is no such file."""
        if isinstance(self.source, MediaMember):
            return self.source.size
        try:
            return self.source.stat().st_size if self.source.is_file() else None
        except OSError:
            # Such as a name that is too long.
            return None


def list_media(
    source: str | Path,
    *,
    file_column: str = "file_name",
    caption_column: str = "caption",
    exclude: Sequence[str] = (),
    extensions: Sequence[str] = FILM_EXTENSIONS + PICTURE_EXTENSIONS,
) -> tuple[list[MediaRow], MediaReport]:
    """What a table, or WebDataset shards on this machine, name, without looking at the pictures and films.

    Args:
        source: as for [`MediaDataset`], or a .tar file, a folder of them or a pattern such as `"shards/*.tar"`, with
            samples as for [`MediaStream`].
        file_column: column with the files' paths, relative to the table.
        caption_column: column with the captions, or their field of a sample's `.json` in a shard.
        exclude: glob patterns of names to leave out.
        extensions: which members of a shard are media, the ones to be preferred first.

    Returns:
        The rows with a file and a caption, and a report of the others.

    Raises:
        OSError: if there is no such source, or a folder has no table or several.
        ValueError: if a table cannot be read, lacks a column or has no caption at all.
    """
    archives = _find_archives(source)
    report = _new_report(str(source), exclude)
    if archives is None:
        path = _find_table(source)
        candidates = _table_rows(path, _load_table(path, (file_column, caption_column)), file_column, caption_column)
    else:
        candidates = _archive_rows(archives, caption_column, extensions, report)
    return list(_usable_rows(candidates, exclude, report)), report


def _usable_rows(candidates: Iterable[MediaRow], exclude: Sequence[str], report: MediaReport) -> Iterator[MediaRow]:
    for row in candidates:
        pattern = _excluding_pattern(row.name, exclude)
        if pattern is not None:
            report.add(row.name, _excluded_by(pattern))
        elif not row.name:
            report.add(f"row {row.row}", "no file name")
        elif not row.caption:
            report.add(row.name, "empty caption")
        else:
            yield row


def _table_rows(path: Path, table, file_column: str, caption_column: str) -> list[MediaRow]:
    names = ["" if name is None else str(name).strip() for name in table[file_column]]
    captions = list(table[caption_column])
    unfit = next((caption for caption in captions if isinstance(caption, dict | list)), None)
    if unfit is not None:
        raise ValueError(f"'{path}': the column {caption_column!r} holds {unfit!r:.60}, which is no text.")
    captions = ["" if text is None else str(text).strip() for text in captions]
    if names and not any(captions):
        raise ValueError(f"'{path}' has no captions: the column {caption_column!r} is empty in every row.")
    return [
        MediaRow(name, caption, path.parent / name, row)
        for row, (name, caption) in enumerate(zip(names, captions, strict=True))
    ]


def _find_archives(source: str | Path) -> list[Path] | None:
    path = Path(source)
    if path.is_dir():
        has_table = any((path / name).is_file() for name in TABLE_NAMES)
        return None if has_table else sorted(path.glob("*.tar")) or None
    if path.suffix != ".tar":
        return None
    if path.is_file():
        return [path]
    archives = sorted(map(Path, glob.glob(str(source))))
    if not archives:
        raise OSError(f"there is no archive '{source}'.")
    return archives


def _archive_members(archive: Path, report: MediaReport) -> Iterator[tuple[str, str, MediaMember]]:
    """Name up to its first dot, what follows the dot, and place of each file of an archive."""
    try:
        # What is no UTF-8 in a name could not be written to a report.
        with tarfile.open(archive, "r:", errors="replace") as tar:
            for entry in tar:
                match = _MEMBER_NAME.fullmatch(entry.name)
                if entry.isfile() and match:
                    yield match[1], match[2], MediaMember(archive, entry.offset_data, entry.size)
            # tarfile takes anything that is no header for the end, which is a block of zeros or nothing at all.
            with archive.open("rb") as file:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError("no header where the next file should begin")
    except (OSError, tarfile.TarError) as error:
        report.add(str(archive), "damaged or truncated archive", str(error))


def _archive_rows(
    archives: list[Path], caption_column: str, extensions: Sequence[str], report: MediaReport
) -> Iterator[MediaRow]:
    """One row for each sample with a medium; the others are reported."""
    numbers = itertools.count()
    for archive in archives:
        for key, group in itertools.groupby(_archive_members(archive, report), key=lambda member: member[0]):
            members = {extension: member for _, extension, member in group}
            media = [name for name in extensions if name in members]
            if not media:
                kinds = "no picture or film" if set(PICTURE_EXTENSIONS) <= set(extensions) else "no sound or film"
                report.add(key, kinds)
                continue
            name = f"{key}.{media[0]}"
            try:
                text, fields = (members[name].read() if name in members else None for name in ("txt", "json"))
                caption, _ = _caption_and_columns(text, fields, caption_column)
            except MediaError as error:
                report.add(name, error.reason, error.detail)
                continue
            yield MediaRow(name, caption, members[media[0]], next(numbers))


def _caption_and_columns(text: bytes | None, fields: bytes | None, caption_column: str) -> tuple[str, dict[str, Any]]:
    """The caption of a sample of a shard from its `.txt` and `.json`, and the other fields of the latter."""
    try:
        columns = json.loads(fields) if fields is not None else {}
        text = "" if text is None else text.decode("utf-8")
        columns = dict(columns) if isinstance(columns, dict) else {}
        caption = columns.pop(caption_column, None) or text
        if isinstance(caption, dict | list):
            raise MediaError("caption that is no text", f"{caption!r:.60}")
        caption = str(caption).strip()
        # JSON can hold halves of characters, which no tokenizer takes.
        caption.encode("utf-8")
    except MediaError:
        raise
    except ValueError as error:
        raise MediaError("unreadable caption", str(error)) from error
    return caption, columns


def collate_media(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items of one shape as a batch: "video" uint8 `(batch, 3, num_frames, height, width)`, lists of all else."""
    batch = {name: [item[name] for item in items] for name in items[0]}
    batch["video"] = torch.stack(batch["video"])
    return batch


@dataclass(frozen=True)
class MediaSample:
    """A usable row of a table.

    Attributes:
        name: what the table calls the file.
        path: where it is.
        caption: its caption, without spaces around it.
        row: its number in the table, from 0.
        info: size and duration.
        bucket: the size and length it is read at.
    """

    name: str
    path: Path
    caption: str
    row: int
    info: MediaInfo
    bucket: Bucket


class MediaDataset(torch.utils.data.Dataset):
    """Pictures and films beside a table of their captions.

    The table is read with `datasets`, and every file is looked at once ([`probe_media`]); what cannot be used is in
    `report`, which is logged as a warning if anything was skipped. `dataset[index]` is a dictionary:

    | key | value |
    | --- | --- |
    | video | uint8 tensor of shape `(3, num_frames, height, width)`, the sizes of the sample's bucket |
    | caption | text |
    | name | the file's name in the table |
    | frame_rate | frames a second, float |
    | columns | the other columns of the table |

    Batches of one shape come from [`BucketLoader`].

    Args:
        source: a folder with a `metadata.csv`, `metadata.jsonl` or `metadata.parquet`, the path of such a table under
            any name, or the id of a data set of the Hub that has one (it is downloaded to the Hub's cache).
        frame_rate: frames a second that films are read at.
        buckets: the sizes and lengths.
        file_column: column with the files' paths, relative to the table.
        caption_column: column with the captions.
        exclude: glob patterns (`*`, `?`, `[...]`); a file is left out if its name in the table, with or without
            folders, matches one.

    Attributes:
        samples (`list[MediaSample]`): what can be used, in the table's order.
        report (`MediaReport`): what was used and what was skipped.

    Raises:
        OSError: if there is no such source, or a folder has no table or several.
        ValueError: if the table cannot be read, lacks a column, has no caption at all, or no sample can be used.
    """

    def __init__(
        self,
        source: str | Path,
        frame_rate: float,
        buckets: Buckets,
        *,
        file_column: str = "file_name",
        caption_column: str = "caption",
        exclude: Sequence[str] = (),
    ):
        _check_frame_rate(frame_rate)
        path = _find_table(source)
        self.frame_rate, self.report = float(frame_rate), _new_report(str(path), exclude)
        self._table = _load_table(path, (file_column, caption_column))
        self._others = [name for name in self._table.column_names if name not in (file_column, caption_column)]
        candidates = _table_rows(path, self._table, file_column, caption_column)

        self.samples: list[MediaSample] = []
        progress = tqdm(candidates, desc=f"probing {path.parent.name}", disable=None)
        for row in _usable_rows(progress, exclude, self.report):
            try:
                info = probe_media(row.source)
                bucket = _choose_bucket(info, buckets, frame_rate)
            except MediaError as error:
                self.report.add(row.name, error.reason, error.detail)
                continue
            self.report.count(bucket.num_frames)
            self.samples.append(MediaSample(row.name, row.source, row.caption, row.row, info, bucket))
        if not self.samples:
            reasons = [f"{len(names)} {reason}" for reason, names in self.report.skipped.items() if names]
            raise ValueError(f"'{path}' has no usable sample: {'; '.join(reasons)}.")
        if self.report.skipped:
            logger.warning(str(self.report))

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int, position: float = 0.0) -> dict[str, Any]:
        """The sample `index` with the window of its film at `position`: 0 is the first possible, 1 the last.

        Raises:
            MediaError: if the file has damage that only decoding finds, or is gone.
        """
        sample = self.samples[index]
        start = _window_start(sample.info, sample.bucket, self.frame_rate, position)
        return {
            "video": read_media(sample.path, *sample.bucket, self.frame_rate, start),
            "caption": sample.caption,
            "name": sample.name,
            "frame_rate": self.frame_rate,
            "columns": {name: self._table[sample.row][name] for name in self._others},
        }

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Items of one bucket as a batch: "video" uint8 `(batch, 3, num_frames, height, width)`, lists of all else."""
        return collate_media(items)


# --- Shards -----------------------------------------------------------------------------------------------------


def _stream_samples(shards: list[str]) -> Iterator[dict[str, Any]]:
    """The samples of a shard as "key" and "members", bytes by extension; where it is damaged it ends with "damage"."""
    from datasets import StreamingDownloadManager

    # `datasets` reads one shard after another and hands this function a list of one.
    (shard,) = shards
    wanted = {*FILM_EXTENSIONS, *PICTURE_EXTENSIONS, "txt", "json"}

    def members() -> Iterator[tuple[str, str, bytes | None]]:
        for name, file in StreamingDownloadManager().iter_archive(shard):
            match = _MEMBER_NAME.fullmatch(name)
            if match:
                yield match[1], match[2], file.read() if match[2] in wanted else None

    try:
        for key, group in itertools.groupby(members(), key=lambda member: member[0]):
            contents = {extension: content for _, extension, content in group if content is not None}
            yield {"key": key, "members": contents, "damage": ""}
    except Exception as error:
        # Archives, files and networks fail in ways of their own; none of them ends the epoch.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        yield {"key": shard, "members": {}, "damage": reason}


class MediaStream(torch.utils.data.IterableDataset):
    """WebDataset shards, streamed with `datasets` and split among ranks and the workers of a `DataLoader`.

    A sample is the members of a tar file whose names differ in their extension only, which starts at the first dot of
    the name: one picture or film (`PICTURE_EXTENSIONS`, `FILM_EXTENSIONS`, in small letters) and its caption, either a
    `.txt` or the field `caption_column` of a `.json`. Pictures and films may be mixed. The items are those of
    [`MediaDataset`], with the `.json`'s fields as "columns" and a window of the film drawn anew every epoch; a sample
    that cannot be used is an item with the keys "name", "reason" and "detail" only, and so is damage of a shard, which
    stands for all that would follow. Batches of one shape, and the report, come from [`StreamLoader`].

    Ranks get whole shards if their number is a multiple of the number of ranks; otherwise every rank reads all shards
    and keeps its share of the samples. Every sample is read once an epoch, by one rank, in an order that `seed` and
    the epoch decide.

    Args:
        shards: path, URL (`https://`, `hf://datasets/...`) or glob pattern of tar files, or a list of them.
        frame_rate, buckets, caption_column, exclude: as for [`MediaDataset`]; patterns are matched against the name of
            the medium within its shard.
        seed: seed of the order.
        shuffle_buffer: from how many samples the next one is drawn, besides the shuffled order of shards. Their files
            are held in memory.
        rank, num_replicas: this process and how many there are.

    Raises:
        OSError: if there are no such shards.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        frame_rate: float,
        buckets: Buckets,
        *,
        caption_column: str = "caption",
        exclude: Sequence[str] = (),
        seed: int = 0,
        shuffle_buffer: int = 100,
        rank: int = 0,
        num_replicas: int = 1,
    ):
        from datasets import IterableDataset
        from datasets.data_files import DataFilesList
        from datasets.distributed import split_dataset_by_node

        _check_frame_rate(frame_rate)
        self.shards = [str(shards)] if isinstance(shards, (str, Path)) else [str(shard) for shard in shards]
        self.frame_rate, self.buckets, self.caption_column = float(frame_rate), buckets, caption_column
        self.exclude, self.seed, self.epoch = exclude, seed, 0
        self.shuffle_buffer, self.num_replicas = shuffle_buffer, num_replicas
        self.new_report()
        files = list(DataFilesList.from_local_or_remote(self.shards))
        if not files:
            raise OSError(f"there are no shards {', '.join(self.shards)}.")
        stream = IterableDataset.from_generator(_stream_samples, gen_kwargs={"shards": files})
        stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self._stream = split_dataset_by_node(stream, rank=rank, world_size=num_replicas)

    def new_report(self) -> MediaReport:
        """An empty report of these shards."""
        return _new_report(", ".join(self.shards), self.exclude)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self.epoch = epoch
        self._stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for sample in self._stream:
            yield self._read(sample)

    def _read(self, sample: dict[str, Any]) -> dict[str, Any]:
        members = sample["members"]
        media = [name for name in FILM_EXTENSIONS + PICTURE_EXTENSIONS if name in members]
        name = f"{sample['key']}.{media[0]}" if media else sample["key"]
        try:
            if sample["damage"]:
                raise MediaError("damaged or truncated archive", sample["damage"])
            if not media:
                raise MediaError("no picture or film")
            pattern = _excluding_pattern(name, self.exclude)
            if pattern is not None:
                raise MediaError(_excluded_by(pattern))
            caption, columns = _caption_and_columns(members.get("txt"), members.get("json"), self.caption_column)
            if not caption:
                raise MediaError("empty caption", f"its .json has {', '.join(columns)}" if columns else "")
            content = members[media[0]]
            info = probe_media(content)
            bucket = _choose_bucket(info, self.buckets, self.frame_rate)
            # Decided by the name, so that it does not depend on which worker reads it.
            position = np.random.default_rng([self.seed, self.epoch, zlib.crc32(name.encode())]).random()
            start = _window_start(info, bucket, self.frame_rate, position)
            video = read_media(content, *bucket, self.frame_rate, start)
        except MediaError as error:
            return {"name": name, "reason": error.reason, "detail": error.detail}
        return {
            "video": video,
            "caption": caption,
            "name": name,
            "frame_rate": self.frame_rate,
            "columns": columns,
        }
