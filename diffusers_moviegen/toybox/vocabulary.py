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

LUMA_WEIGHTS = (0.2126, 0.7152, 0.0722)
"""Rec. 709 weights of red, green and blue in the luma."""

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

TEXT_MOTIONS = ("stays still", "moves left", "moves right", "spins")
"""Motions that leave room for a written word."""

TWO_OBJECT_MOTIONS = tuple(motion for motion in MOTIONS if motion != "bounces")
"""Motions two objects can have side by side."""

PERSON_MOTIONS = ("stays still", "moves left", "moves right", "moves up", "moves down", "bounces")
"""Motions a person can have."""

CAMERAS = ("Pan left", "Pan right", "Zoom in", "Zoom out")
"""Camera words; a caption starts with them and a full stop."""

VOICES = {"circle": "bell", "square": "buzzer", "triangle": "flute", "star": "shaker", "ring": "chime"}
"""What each shape sounds like."""

EVENTS = {
    "stays still": None,
    "moves left": "passes",
    "moves right": "passes",
    "moves up": "passes",
    "moves down": "passes",
    "bounces": "knocks",
    "grows": "glides up",
    "shrinks": "glides down",
    "spins": "warbles",
}
"""What each motion is heard as. What "passes" is a whoosh, the rest is done by the voice of the shape."""

AMBIENCES = {
    "black": None,
    "grey": "a low rumble",
    "navy": "rain",
    "brown": "crickets",
    "pink": "soft music",
}
"""What is heard behind each background."""

CORNERS = ("top left", "top right", "bottom left", "bottom right")
"""Where an edit can add an object."""

EDIT_TASKS = ("recolour", "replace", "background", "remove", "add", "style", "segmentation")
"""The tasks of editing. "black and white" and "invert" are the two edits of the task "style"."""


def is_held_out(colour: str, shape: str, motion: str, background: str) -> bool:
    """Whether a tuple is reserved for evaluation: `sha256("colour|shape|motion|background") % 10 == 0`."""
    digest = hashlib.sha256(f"{colour}|{shape}|{motion}|{background}".encode()).hexdigest()
    return int(digest, 16) % 10 == 0


def is_sound_held_out(shape: str, motion: str, background: str) -> bool:
    """Whether a sound is reserved for evaluation, whatever the colour of what makes it."""
    return is_held_out("sound", shape, motion, background)


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
