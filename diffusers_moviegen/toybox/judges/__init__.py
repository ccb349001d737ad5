"""Programs that say what a Toybox clip shows, one module a sense."""

from .score import FIELDS, compare
from .sight import SeenObject, Sight, see


__all__ = ["FIELDS", "SeenObject", "Sight", "compare", "see"]
