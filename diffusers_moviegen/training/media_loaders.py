"""Batches of one shape from tables, caches of latents and streamed shards, with a position that a checkpoint can hold.

sampler = BucketSampler([sample.bucket for sample in dataset.samples], batch_size=4, seed=0)
loader = BucketLoader(dataset, sampler, num_workers=4)
accelerator.register_for_checkpointing(loader)
for batch in loader: ...
"""

import hashlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from diffusers.utils import logging
from torch.utils.data import DataLoader

from ..media_reading import MediaError
from .buckets import Bucket, BucketSampler
from .latent_cache import LatentCache
from .media_dataset import MediaDataset, MediaReport, MediaStream, collate_media


logger = logging.get_logger(__name__)

GRACE_SECONDS = 30
"""How long workers outlive SIGTERM: as long as most schedulers wait before they kill."""


def _as_it_is(item: Any) -> Any:
    """Instead of the default of a `DataLoader`, which changes the types of what it passes on."""
    return item


def _outlive_sigterm(worker_id: int) -> None:
    """Lets a worker go on for a while after SIGTERM.

    Schedulers send it to all processes of a job, and the one that saves a checkpoint then may still wait for a batch.
    But Python sends it too, to workers that are left when it exits, and waits for their end.
    """
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
        # Without an error, which would be raised in the process that trains.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))


class _Steps(torch.utils.data.Dataset):
    """The batch of each step, and what could not be read for it."""

    def __init__(self, dataset: MediaDataset | LatentCache, sampler: BucketSampler):
        self.dataset, self.sampler = dataset, sampler

    def _candidates(self, bucket: Bucket, index: int) -> Iterator[int]:
        yield index
        others = self.sampler.samples[bucket]
        place = others.index(index)
        yield from others[place + 1 :] + others[:place]

    def __getitem__(self, step: int) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
        bucket, requests = self.sampler.batch(step)
        items, failures = [], []
        for index, position in requests:
            for candidate in self._candidates(bucket, index):
                try:
                    items.append(self.dataset.read(candidate, position))
                    break
                except MediaError as error:
                    failures.append((self.dataset.samples[candidate].name, error.reason, error.detail))
            else:
                name, reason, _ = failures[-1]
                raise OSError(
                    f"no sample of the bucket {bucket} can be read any more; the last was '{name}': {reason}."
                )
        return self.dataset.collate(items), failures


class _From(torch.utils.data.Sampler):
    def __init__(self, step: int):
        self.step = step

    def __iter__(self) -> Iterator[int]:
        step = self.step
        while True:
            yield step
            step += 1


class BucketLoader:
    """The batches of a [`BucketSampler`] from the present step on, without end.

    A file whose damage shows only now, or that is gone, is replaced by the next one of its bucket, added to the
    dataset's report and logged as a warning. Each rank makes a sampler of its own rank and a loader; a loader is not
    to be passed to `accelerator.prepare`, which would share its batches out once more.

    Args:
        dataset: the samples: pictures and films, or a cache of their latents.
        sampler: the order, made for the buckets of the same samples.
        num_workers: processes that decode ahead; 0 decodes in this one.

    Attributes:
        step (`int`): number of batches handed out.
    """

    def __init__(self, dataset: MediaDataset | LatentCache, sampler: BucketSampler, num_workers: int = 0):
        self.dataset, self.sampler, self.num_workers = dataset, sampler, num_workers
        self.step = 0
        self._failed = set()
        if sampler.leftovers:
            left = ", ".join(f"{count} of {bucket}" for bucket, count in sampler.leftovers.items())
            logger.warning(f"{sum(sampler.leftovers.values())} samples are left over in every epoch: {left}")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        steps = _Steps(self.dataset, self.sampler)
        for batch, failures in DataLoader(
            steps,
            sampler=_From(self.step),
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_outlive_sigterm,
        ):
            for failure in failures:
                if failure not in self._failed:
                    self._failed.add(failure)
                    self.dataset.report.add(*failure)
                    logger.warning("replaced %s: %s %s", *failure)
            # Before the batch is handed out: to a checkpoint written while it is in use, it is no longer to come.
            self.step += 1
            yield batch

    @property
    def _fingerprint(self) -> dict[str, Any]:
        names = "\n".join(sample.name for sample in self.dataset.samples)
        return {**self.sampler.fingerprint, "samples of the digest": hashlib.sha256(names.encode()).hexdigest()[:16]}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, **self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after the last batch handed out when `state_dict` was made.

        Raises:
            ValueError: if the data or the batches have changed, so that the position would mean another order.
        """
        for name, value in self._fingerprint.items():
            if state_dict[name] != value:
                raise ValueError(
                    f"the data position was saved with {name} {state_dict[name]}, now it is {value}: restore what it "
                    "was, or start a new run from the trained weights."
                )
        self.step = state_dict["step"]


class StreamLoader:
    """Batches of one shape from a [`MediaStream`], epoch after epoch.

    The samples a rank has read wait in their buckets until every rank has a batch of the same bucket: the ranks
    compare their counts with one small `all_reduce` before every batch. What is left when all shards are read is
    counted in `leftovers`. Images and videos come as the shards mix them.

    Args:
        stream: the shards, made for this rank.
        batch_size: samples a batch on each rank.
        num_workers: processes that read and decode; at most the number of shards of a rank is of use.
        device: where the process group can reduce, such as `accelerator.device`.

    Attributes:
        report (`MediaReport`): what this rank used and skipped in the last finished epoch; it is logged as a warning
            if anything was skipped.
        leftovers (`dict[Bucket, int]`): samples of this rank that filled no batch in the last finished epoch.
        epoch, step (`int`): the present epoch and the number of its batches handed out.
    """

    def __init__(self, stream: MediaStream, batch_size: int, num_workers: int = 0, device: str | torch.device = "cpu"):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, not {batch_size}.")
        self.stream, self.batch_size, self.num_workers, self.device = stream, batch_size, num_workers, device
        self.report: MediaReport = stream.new_report()
        self.leftovers: dict[Bucket, int] = {}
        self.epoch, self.step = 0, 0
        lengths = sorted({1, *stream.buckets.lengths})
        self._buckets = [Bucket(length, *size) for length in lengths for size in stream.buckets.sizes]

    def _least(self, counts: list[int]) -> list[int]:
        """The element-wise minimum over the ranks."""
        tensor = torch.tensor(counts, device=self.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor.tolist()

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        """One epoch."""
        self.stream.set_epoch(self.epoch)
        items = iter(
            DataLoader(
                self.stream,
                batch_size=None,
                num_workers=self.num_workers,
                collate_fn=_as_it_is,
                worker_init_fn=_outlive_sigterm,
            )
        )
        report = self.stream.new_report()
        waiting, finished = {bucket: [] for bucket in self._buckets}, False
        while True:
            *counts, all_finished = self._least([*map(len, waiting.values()), int(finished)])
            most = max(counts)
            if most >= self.batch_size:
                bucket = self._buckets[counts.index(most)]
                yield [waiting[bucket].pop(0) for _ in range(self.batch_size)]
                continue
            if all_finished:
                break
            for _ in range(0 if finished else self.batch_size):
                item = next(items, None)
                if item is None:
                    finished = True
                    break
                if "reason" in item:
                    report.add(**item)
                    continue
                video = item["video"]
                report.count(video.shape[1])
                waiting[Bucket(*video.shape[1:])].append(item)
        self.report = report
        self.leftovers = {bucket: len(items) for bucket, items in waiting.items() if items}
        if report.num_skipped:
            logger.warning(str(report))
        if self.leftovers:
            left = ", ".join(f"{count} of {bucket}" for bucket, count in self.leftovers.items())
            logger.warning(f"{sum(self.leftovers.values())} samples are left over in epoch {self.epoch}: {left}")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            # After a restored checkpoint the epoch is read once more, up to the position.
            done, count = self.step, 0
            for count, items in enumerate(self._batches(), start=1):
                if count > done:
                    self.step = count
                    yield collate_media(items)
            if count == 0:
                reasons = [f"{len(names)} {reason}" for reason, names in self.report.skipped.items() if names]
                left = ", ".join(f"{count} of {bucket}" for bucket, count in self.leftovers.items())
                raise ValueError(
                    f"'{self.report.source}' fills no batch of {self.batch_size}: "
                    f"{'; '.join(reasons) or 'nothing was skipped'}; waiting: {left or 'nothing'}."
                )
            self.epoch, self.step = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "batch_size": self.batch_size,
            "num_replicas": self.stream.num_replicas,
            "num_workers": self.num_workers,
            "seed": self.stream.seed,
            "shuffle_buffer": self.stream.shuffle_buffer,
            "shards": self.stream.shards,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after the last batch handed out when `state_dict` was made; the epoch is read again up to it.

        Raises:
            ValueError: if what the order depends on has changed: the shards, the seed, the size of the batches or of
                the shuffle buffer, or the number of ranks or workers, which share the shards out.
        """
        for name, value in self.state_dict().items():
            if name not in ("epoch", "step") and state_dict[name] != value:
                raise ValueError(
                    f"the data position was saved with {name} {state_dict[name]}, now it is {value}: restore what it "
                    "was, or start a new run from the trained weights."
                )
        self.epoch, self.step = state_dict["epoch"], state_dict["step"]
