"""The words of Toybox, the colours they stand for, and the held-out rule."""

import hashlib


COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (160, 60, 200),
    "orange": (245, 140, 30),
    "cyan": (50, 210, 220),
    "white": (240, 240, 240),
}
"""Object colours, sRGB 0-255."""

BACKGROUNDS = {
    "black": (15, 15, 20),
    "grey": (110, 110, 115),
    "navy": (20, 25, 80),
    "brown": (90, 60, 35),
    "pink": (235, 170, 190),
}
"""Flat grounds, sRGB 0-255."""

SHAPES = ("circle", "ring", "square", "triangle", "star")

SPINNING_SHAPES = ("square", "triangle", "star")
"""Shapes whose rotation can be seen."""

MOTIONS = (
    "stays still",
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "bounces",
    "grows",
    "shrinks",
    "spins",
)


def is_held_out(colour: str, shape: str, motion: str, background: str) -> bool:
    """Whether a tuple is reserved for evaluation: `sha256("colour|shape|motion|background") % 10 == 0`."""
    digest = hashlib.sha256(f"{colour}|{shape}|{motion}|{background}".encode()).hexdigest()
    return int(digest, 16) % 10 == 0


def core_tuples(held_out: bool, motions: tuple[str, ...] = MOTIONS) -> list[tuple[str, str, str, str]]:
    """All one-object tuples `(colour, shape, motion, background)` of one split, in a fixed order."""
    return [
        (colour, shape, motion, background)
        for colour in COLOURS
        for shape in SHAPES
        for motion in motions
        for background in BACKGROUNDS
        if (motion != "spins" or shape in SPINNING_SHAPES)
        and is_held_out(colour, shape, motion, background) == held_out
    ]
