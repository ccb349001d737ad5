"""How often what was seen is what was asked for."""

from itertools import permutations

from .people import SeenPerson
from .sight import Sight


FIELDS = ("colour", "shape", "motion", "background")

MAX_HUE_ERROR, MAX_TILT_ERROR = 15.0, 3.0
"""Degrees within which the hue of hair and the tilt of a head are right."""


def compare(
    sights: list[Sight],
    tuples: list[tuple[str, str, str, str]],
    words: list[str | None] | None = None,
    cameras: list[str | None] | None = None,
) -> list[dict[str, bool]]:
    """Whether each field of a one-object clip is as asked for; "all" is whether every field is.

    Args:
        sights: what the judge saw.
        tuples: `(colour, shape, motion, background)` asked for, one a clip.
        words: the word that each clip should show, None for nothing written; adds the field "text".
        cameras: the camera move of each clip, None for a camera that stands still; adds the field "camera".
    """
    rows = compare_objects(sights, [(asked,) for asked in tuples])
    for name, given in (("text", words), ("camera", cameras)):
        if given is not None:
            for row, sight, asked in zip(rows, sights, given, strict=True):
                row[name] = getattr(sight, name) == asked
    return [row | {"all": all(right for name, right in row.items() if name != "all")} for row in rows]


def compare_objects(sights: list[Sight], scenes: list[tuple[tuple[str, str, str, str], ...]]) -> list[dict[str, bool]]:
    """Whether each field of a clip of one or more objects is as asked for, of all objects together.

    A caption does not say which object is where, so they are taken in the order in which most is right.

    Args:
        sights: what the judge saw.
        scenes: a `(colour, shape, motion, background)` for every object asked for, one tuple of them a clip.
    """
    rows = []
    for sight, asked in zip(sights, scenes, strict=True):
        row = dict.fromkeys(FIELDS, False)
        if len(sight.objects) == len(asked):
            matches = [
                [[getattr(seen, name) == words[i] for i, name in enumerate(FIELDS[:3])] for seen, words in pairs]
                for pairs in (list(zip(order, asked, strict=True)) for order in permutations(sight.objects))
            ]
            best = max(matches, key=lambda match: sum(map(sum, match)))
            row = {name: all(match[i] for match in best) for i, name in enumerate(FIELDS[:3])}
        row["background"] = all(sight.background == words[3] for words in asked)
        rows.append(row | {"all": all(row.values())})
    return rows


def compare_people(people: list[SeenPerson], asked: list[dict]) -> list[dict[str, bool]]:
    """Whether each field of a person is as asked for.

    Args:
        people: whom the judge saw.
        asked: fields of `SeenPerson` by name, one dictionary a person, all of the same or fewer names.
    """
    rows = []
    for person, fields in zip(people, asked, strict=True):
        row = {}
        for name, wanted in fields.items():
            seen = getattr(person, name)
            if name == "hair_hue":
                row[name] = seen is not None and abs((seen - wanted + 180) % 360 - 180) <= MAX_HUE_ERROR
            elif name == "tilt":
                row[name] = seen is not None and abs(seen - wanted) <= MAX_TILT_ERROR
            else:
                row[name] = seen == wanted
        rows.append(row)
    return rows
