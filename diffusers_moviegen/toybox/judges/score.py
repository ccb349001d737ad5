"""How often what was seen is what was asked for."""

from .sight import Sight


FIELDS = ("colour", "shape", "motion", "background")


def compare(sights: list[Sight], tuples: list[tuple[str, str, str, str]]) -> list[dict[str, bool]]:
    """Whether each field of a one-object clip is as asked for; "all" is whether every field is.

    Args:
        sights: what the judge saw.
        tuples: `(colour, shape, motion, background)` asked for, one a clip.
    """
    rows = []
    for sight, (colour, shape, motion, background) in zip(sights, tuples, strict=True):
        seen = sight.objects[0] if len(sight.objects) == 1 else None
        row = {
            "colour": seen is not None and seen.colour == colour,
            "shape": seen is not None and seen.shape == shape,
            "motion": seen is not None and seen.motion == motion,
            "background": sight.background == background,
        }
        rows.append(row | {"all": all(row.values())})
    return rows
