"""Buckets by aspect ratio and length, and a resumable order of batches of one shape."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Bucket(NamedTuple):
    """The shape of all samples of a batch. An image is a video of one frame."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Buckets:
    """The sizes and lengths that samples are brought to (Movie Gen: five aspect ratios, five lengths).

    Args:
        resolution: every size has about `resolution * resolution` pixels.
        aspect_ratios: width over height. Small resolutions may round two of them to one size.
        lengths: frames of the videos; images have 1 whatever is here. The default is 4 to 16 seconds at 16 frames a
            second.
        multiple: what height and width are multiples of: the spatial factor of the autoencoder times the patch size.

    Raises:
        ValueError: if a number is out of range or a list is empty.
    """

    resolution: int = 256
    aspect_ratios: tuple[float, ...] = (9 / 16, 3 / 4, 1.0, 4 / 3, 16 / 9)
    lengths: tuple[int, ...] = (64, 96, 128, 192, 256)
    multiple: int = 16

    def __post_init__(self):
        if self.multiple < 1 or self.resolution < self.multiple:
            raise ValueError(
                f"`resolution` must be at least `multiple`, which is 1 or more: not {self.resolution} and "
                f"{self.multiple}."
            )
        if not self.aspect_ratios or not all(0.1 <= ratio <= 10 for ratio in self.aspect_ratios):
            raise ValueError(f"`aspect_ratios` must be width over height, 0.1 to 10, not {self.aspect_ratios}.")
        if not self.lengths or not all(isinstance(length, int) and length >= 1 for length in self.lengths):
            raise ValueError(f"`lengths` must be whole numbers of frames, at least 1, not {self.lengths}.")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """`(height, width)` by aspect ratio."""
        sizes = []
        for ratio in sorted(self.aspect_ratios):
            sides = self.resolution / math.sqrt(ratio), self.resolution * math.sqrt(ratio)
            size = tuple(max(round(side / self.multiple), 1) * self.multiple for side in sides)
            if size not in sizes:
                sizes.append(size)
        return sizes

    def assign(self, height: int, width: int, num_frames: int, is_image: bool = False) -> Bucket | None:
        """The size whose aspect ratio is nearest, as a factor, and the longest length that `num_frames` suffice for.

        Returns:
            A [`Bucket`], or None if the video is shorter than the shortest length.
        """
        lengths = [1] if is_image else [length for length in self.lengths if length <= num_frames]
        if not lengths:
            return None
        ratio = math.log(width / height)
        size = min(self.sizes, key=lambda size: abs(math.log(size[1] / size[0]) - ratio))
        return Bucket(max(lengths), *size)


class BucketSampler:
    """Which samples make the batch of a step: a function of the seed and the step alone.

    A step takes `batch_size * num_replicas` samples of one bucket and deals them out to the ranks, so all ranks have
    the same shape at the same step. Images and videos are shuffled apart: an epoch of the videos has every video once,
    an epoch of the images every image once, but for leftovers that fill no step; which ones are left over changes from
    epoch to epoch. Steps of images are spread evenly among those of videos, without end. Since nothing else is
    remembered, the position of a run is its step.

    Args:
        buckets: the bucket of each sample.
        batch_size: samples a step on each rank, or a function that says how many of a bucket.
        seed: seed of the order.
        images_to_videos: steps of images to steps of videos. None makes no difference between the two: an epoch has
            every sample once. It does not matter if there are only images or only videos.
        rank, num_replicas: this process and how many there are.

    Attributes:
        leftovers (`dict[Bucket, int]`): samples of each bucket that an epoch leaves out.

    Raises:
        ValueError: if a number is out of range, or no bucket has samples enough for one step.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        batch_size: int | Callable[[Bucket], int],
        *,
        seed: int = 0,
        images_to_videos: tuple[int, int] | None = (1, 10),
        rank: int = 0,
        num_replicas: int = 1,
    ):
        batch_sizes = {bucket: batch_size(bucket) if callable(batch_size) else batch_size for bucket in buckets}
        smallest = min(batch_sizes.values(), default=1)
        if smallest < 1 or seed < 0 or not 0 <= rank < num_replicas:
            raise ValueError(
                "`batch_size` must be at least 1, `seed` at least 0 and `rank` below `num_replicas`, not "
                f"{smallest}, {seed}, {rank} and {num_replicas}."
            )
        if images_to_videos is not None and (min(images_to_videos) < 0 or max(images_to_videos) == 0):
            raise ValueError(
                f"`images_to_videos` must be two numbers of steps such as (1, 10), not {images_to_videos}."
            )
        self.batch_sizes, self.seed, self.images_to_videos = batch_sizes, seed, images_to_videos
        self.rank, self.num_replicas = rank, num_replicas
        self.samples: dict[Bucket, list[int]] = {}
        for index, bucket in enumerate(buckets):
            self.samples.setdefault(bucket, []).append(index)
        self.samples = dict(sorted(self.samples.items()))
        steps = {bucket: len(indices) // self._total(bucket) for bucket, indices in self.samples.items()}
        leftovers = {bucket: len(indices) % self._total(bucket) for bucket, indices in self.samples.items()}
        self.leftovers = {bucket: count for bucket, count in leftovers.items() if count}
        if not any(steps.values()):
            # The bucket that lacks least.
            fullest = max(self.samples, key=lambda bucket: leftovers[bucket] / self._total(bucket), default=None)
            count, size = leftovers.get(fullest, 0), batch_sizes.get(fullest, smallest)
            raise ValueError(
                f"no bucket has the {size * num_replicas} samples of a step ({size} on each of {num_replicas} ranks), "
                f"the fullest has {count}: lower `batch_size`, or use fewer sizes and lengths."
            )
        # With nothing to mix, all steps are of the second kind.
        is_image = {bucket: images_to_videos is not None and bucket.num_frames == 1 for bucket in self.samples}
        self._kinds = [[bucket for bucket in self.samples if is_image[bucket] == kind] for kind in (True, False)]
        self._steps = [sum(steps[bucket] for bucket in kind) for kind in self._kinds]
        self._ratio = images_to_videos or (0, 1)
        for kind, name in enumerate(("images", "videos")):
            if self._kinds[kind] and not self._steps[kind] and not self._ratio[1 - kind]:
                total = min(map(self._total, self._kinds[kind]))
                raise ValueError(
                    f"`images_to_videos` is {images_to_videos}, but no bucket of {name} has the {total} samples of a "
                    "step: lower `batch_size`, or let the others in."
                )
        if not self._steps[0]:
            self._ratio = (0, 1)
        elif not self._steps[1]:
            self._ratio = (1, 0)
        self._plans: dict[int, tuple[int, list]] = {}

    def _total(self, bucket: Bucket) -> int:
        """Samples of a step on all ranks."""
        return self.batch_sizes[bucket] * self.num_replicas

    def _locate(self, step: int) -> tuple[int, int, int]:
        """Whether a step is of images (0) or videos (1), its epoch of that kind and its place therein."""
        images, videos = self._ratio
        images_before, images_after = (count * images // (images + videos) for count in (step, step + 1))
        kind, count = (0, images_before) if images_after > images_before else (1, step - images_before)
        return kind, *divmod(count, self._steps[kind])

    def epoch(self, step: int) -> int:
        """The epoch of the kind of sample, image or video, that `step` takes."""
        return self._locate(step)[1]

    def _plan(self, kind: int, epoch: int) -> list[tuple[Bucket, np.ndarray, np.ndarray]]:
        if self._plans.get(kind, (None,))[0] != epoch:
            generator = np.random.default_rng([self.seed, kind, epoch])
            plan = []
            for bucket in self._kinds[kind]:
                total = self._total(bucket)
                indices = generator.permutation(self.samples[bucket])
                for start in range(0, len(indices) - total + 1, total):
                    plan.append((bucket, indices[start : start + total], generator.random(total)))
            self._plans[kind] = epoch, [plan[index] for index in generator.permutation(len(plan))]
        return self._plans[kind][1]

    def batch(self, step: int) -> tuple[Bucket, list[tuple[int, float]]]:
        """The bucket of a step and this rank's samples.

        Returns:
            The [`Bucket`] and its `batch_size` pairs of a sample's index and the position of the window in its film,
            0 to 1, drawn anew every epoch.
        """
        kind, epoch, place = self._locate(step)
        bucket, indices, positions = self._plan(kind, epoch)[place]
        size = self.batch_sizes[bucket]
        mine = slice(self.rank * size, (self.rank + 1) * size)
        return bucket, list(zip(indices[mine].tolist(), positions[mine].tolist(), strict=True))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on. Ranks may come and go as long as a step has as many samples in all."""
        totals = {str(bucket): self._total(bucket) for bucket in self.samples}
        return {
            "seed": self.seed,
            "samples a step": totals if len(set(totals.values())) > 1 else next(iter(totals.values())),
            "images_to_videos": None if self.images_to_videos is None else list(self.images_to_videos),
            "samples by bucket": {str(bucket): len(indices) for bucket, indices in self.samples.items()},
        }
