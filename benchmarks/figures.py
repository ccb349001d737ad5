"""What the rows of evaluate.py are made of: figures with intervals, the reasons why there are none, and films."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from diffusers_moviegen.training.media_dataset import FILM_EXTENSIONS


class NotMeasured(Exception):
    """Why a row cannot be measured, in one line."""


@dataclass(frozen=True)
class Figure:
    """A mean of `values`, with a 95 % interval over their `groups`. Those in percent are 0 or 1 each.

    `in_table` tells what the row is about from what is only noted below the table. Each value counts as much as its
    weight, by default the same. With a `baseline`, of the same groups in the same order, the figure is the difference
    to that.
    """

    name: str
    values: list[float]
    groups: list
    unit: str = "%"
    in_table: bool = True
    weights: list[float] | None = None
    baseline: "Figure | None" = None

    def summary(self, seed: int) -> dict[str, Any]:
        """Value and ends of the interval, which are None if there is a single group, and the unit."""
        scale = 100 if self.unit == "%" else 1
        value, means = resample(self.values, self.groups, seed, self.weights)
        if self.baseline is not None:
            # The same groups are drawn for both.
            other, other_means = resample(self.baseline.values, self.baseline.groups, seed, self.baseline.weights)
            value, means = value - other, means - other_means
        low, high = (scale * end for end in torch.quantile(means, torch.tensor([0.025, 0.975])).tolist())
        if len(set(self.groups)) == 1:
            low = high = None
        return {"value": scale * value, "low": low, "high": high, "unit": self.unit}


@dataclass
class Result:
    """What was measured in a row: figures and notes on `count` samples, and the seconds that a clip took.

    `clips` are what the sheet of the row shows.
    """

    figures: list[Figure]
    notes: list[str]
    count: int
    seconds: float
    clips: list = field(default_factory=list)


def resample(
    values: list[float], groups: list, seed: int, weights: list[float] | None = None, resamples: int = 2000
) -> tuple[float, torch.Tensor]:
    """Weighted mean, and `resamples` of it, bootstrapped over groups: clips of one tuple succeed and fail together."""
    weights = [1.0] * len(values) if weights is None else weights
    sums, counts = defaultdict(float), defaultdict(float)
    for value, group, weight in zip(values, groups, weights, strict=True):
        sums[group] += float(value) * weight
        counts[group] += weight
    total, count = torch.tensor(list(sums.values())), torch.tensor(list(counts.values()))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(total), (resamples, len(total)), generator=generator)
    return (total.sum() / count.sum()).item(), total[chosen].sum(1) / count[chosen].sum(1)


def format_figure(summary: dict[str, Any]) -> tuple[str, str]:
    """Value and interval as the tables have them."""
    digits = {"%": 1, "dB": 1, "s": 1, "": 3}[summary["unit"]]
    value = f"{summary['value']:.{digits}f} {summary['unit']}".strip()
    if summary["low"] is None:
        return value, ""
    return value, f"{summary['low']:.{digits}f} to {summary['high']:.{digits}f}"


def count_right(words: list, right: list[bool]) -> str:
    """`circle 3 of 4, ring 2 of 2`: how many were right of each word asked for."""
    asked = Counter(words)
    found = Counter(word for word, is_right in zip(words, right, strict=True) if is_right)
    return ", ".join(f"{word} {found[word]} of {asked[word]}" for word in sorted(asked))


def find_films(folder: str, pattern: str) -> list[Path]:
    """The films of a folder whose names match, in the order of their names.

    Raises:
        OSError: if there is no such folder.
        ValueError: if it has no such film.
    """
    if not Path(folder).is_dir():
        raise OSError(f"--media: there is no folder '{folder}'.")
    films = [path for path in sorted(Path(folder).iterdir()) if path.suffix.lower().lstrip(".") in FILM_EXTENSIONS]
    films = [path for path in films if fnmatchcase(path.name, pattern)]
    if not films:
        raise ValueError(f"--media: '{folder}' has no film whose name matches --media_pattern '{pattern}'.")
    return films
