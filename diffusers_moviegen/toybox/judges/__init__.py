"""Programs that say what a Toybox clip shows, one module a sense."""

from .edits import EditVerdict, judge_edits
from .people import SeenPerson, recognize
from .score import FIELDS, compare, compare_objects, compare_people
from .sight import SeenObject, Sight, see
from .sound import Hearing, listen, strikes_f1


__all__ = [
    "EditVerdict",
    "FIELDS",
    "Hearing",
    "SeenObject",
    "SeenPerson",
    "Sight",
    "compare",
    "compare_objects",
    "compare_people",
    "judge_edits",
    "listen",
    "recognize",
    "see",
    "strikes_f1",
]
