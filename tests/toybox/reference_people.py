"""The Characters of Toybox drawn the slow and plain way, in float64 NumPy, one person, frame and part at a time.

Written from the description of the world alone: what the package draws and what its judge sees is held against this.
"""

import colorsys
from dataclasses import dataclass

import numpy as np


GROUNDS = {
    "black": (15, 15, 20),
    "grey": (110, 110, 115),
    "navy": (20, 25, 80),
    "brown": (90, 60, 35),
    "pink": (235, 170, 190),
}
SKINS = ((240, 205, 190), (222, 175, 135), (190, 132, 82), (150, 108, 84), (120, 72, 38), (82, 58, 52))
STYLES = ("short", "long", "spiky")
EXPRESSIONS = ("neutral", "smile", "open")
MOTIONS = ("stays still", "moves left", "moves right", "moves up", "moves down", "bounces")


@dataclass
class Person:
    """Who is seen (skin to glasses), how (expression to light) and where: `radius` over the shorter side of the
    picture, `x` over its width, `y` over its height."""

    skin: int
    hair: tuple[float, float, float]
    style: str
    iris: tuple[float, float, float]
    glasses: bool
    expression: str
    tilt: float
    light: float
    motion: str
    background: str
    radius: float
    x: float
    y: float
    touch_rate: float
    touch_phase: float

    @property
    def hair_hue(self) -> float:
        return 360 * colorsys.rgb_to_hsv(*(channel / 255 for channel in self.hair))[0]


def lit(colour, light):
    return np.minimum(np.array(colour, dtype=np.float64) * light, 255)


def nearest_to(colour, ground):
    """Smallest RGB distance of a colour to a ground under any light."""
    return min(np.linalg.norm(lit(colour, light) - ground) for light in np.linspace(0.85, 1.15, 61))


def draw_person(random: np.random.Generator, motion: str, background: str) -> Person:
    ground = np.array(GROUNDS[background])
    while True:
        skin = int(random.integers(6))
        hair = colorsys.hsv_to_rgb(random.uniform(0, 1), random.uniform(0.5, 0.9), random.uniform(0.25, 0.9))
        hair = tuple(255 * channel for channel in hair)
        if min(nearest_to(SKINS[skin], ground), nearest_to(hair, ground)) >= 60:
            break
    return Person(
        skin=skin,
        hair=hair,
        style=STYLES[random.integers(3)],
        iris=tuple(255 * channel for channel in colorsys.hsv_to_rgb(random.uniform(0, 1), 0.85, 0.75)),
        glasses=bool(random.integers(2)),
        expression=EXPRESSIONS[random.integers(3)],
        tilt=random.uniform(-15, 15),
        light=random.uniform(0.85, 1.15),
        motion=motion,
        background=background,
        radius=random.uniform(0.24, 0.28),
        x=random.uniform(0.42, 0.58),
        y=random.uniform(0.42, 0.58),
        touch_rate=random.uniform(0.7, 1.6),
        touch_phase=random.uniform(0, 1),
    )


def centre(person, tau, height, width):
    """Where the face is at time `tau`, in pixels."""
    u = tau / 2 % 2
    u = min(u, 2 - u)
    x, y = person.x * width, person.y * height
    match person.motion:
        case "moves left":
            x = width / 2 - (u - 0.5) * width / 4
        case "moves right":
            x = width / 2 + (u - 0.5) * width / 4
        case "moves up":
            y = height / 2 - (u - 0.5) * height / 4
        case "moves down":
            y = height / 2 + (u - 0.5) * height / 4
        case "bounces":
            lift = abs(np.sin(np.pi * (person.touch_rate * tau + person.touch_phase)))
            y = 0.80 * height - person.radius * min(height, width) - 0.20 * height * lift
    return x, y


# Signed distances, negative inside. Lengths in any one unit.


def disc(x, y, radius):
    return np.hypot(x, y) - radius


def ring(x, y, radius, half_thickness):
    return np.abs(np.hypot(x, y) - radius) - half_thickness


def box(x, y, half_width, half_height):
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def ellipse(x, y, a, b):
    """The nearest point of the outline is (a^2 x / (t + a^2), b^2 y / (t + b^2)) for the largest root t of
    (a x / (t + a^2))^2 + (b y / (t + b^2))^2 = 1, found by bisection."""
    x, y = np.abs(x), np.abs(y)
    low = np.maximum(a * x - a * a, b * y - b * b)
    high = np.hypot(a * x, b * y) - min(a, b) ** 2
    for _ in range(50):
        t = (low + high) / 2
        beyond = (a * x / (t + a * a)) ** 2 + (b * y / (t + b * b)) ** 2 > 1
        low, high = np.where(beyond, t, low), np.where(beyond, high, t)
    distance = np.hypot(x - a * a * x / (t + a * a), y - b * b * y / (t + b * b))
    return np.where((x / a) ** 2 + (y / b) ** 2 < 1, -distance, distance)


def triangle(x, y, corners):
    """Corners in clockwise order on the screen."""
    distance, inside = np.full(x.shape, np.inf), np.ones(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * ex + (y - y0) * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, np.hypot(x - x0 - along * ex, y - y0 - along * ey))
        inside &= ex * (y - y0) - ey * (x - x0) > 0
    return np.where(inside, -distance, distance)


def spike_corner(degrees, k):
    return 0.92 * k * np.sin(np.radians(degrees)), -1.15 * k * np.cos(np.radians(degrees))


def figure(person, x, y):
    """Signed distance in radii and colour of every part, back to front."""
    skin, white, black, mouth = SKINS[person.skin], (245, 245, 245), (20, 20, 25), (140, 30, 45)
    if person.style == "long":
        for side in (-0.75, 0.75):
            yield box(x - side, y - (1.0 - 0.23) / 2, 0.25, (1.0 + 0.23) / 2), person.hair
    yield ellipse(x, y, 0.8, 1.0), skin
    if person.style == "spiky":
        for d in (-60, -30, 0, 30, 60):
            corners = [spike_corner(d - 13, 0.97), spike_corner(d, 1.3), spike_corner(d + 13, 0.97)]
            yield triangle(x, y, corners), person.hair
    yield np.maximum(ellipse(x, y, 0.92, 1.15), y + 0.23), person.hair
    for side in (-0.32, 0.32):
        yield disc(x - side, y - 0.08, 0.16), white
        yield disc(x - side, y - 0.08, 0.10), person.iris
    if person.glasses:
        for side in (-0.32, 0.32):
            yield ring(x - side, y - 0.08, 0.26, 0.045), black
        yield box(x, y - 0.08, 0.06, 0.045), black
    match person.expression:
        case "neutral":
            yield box(x, y - 0.55, 0.22, 0.06), mouth
        case "smile":
            yield np.maximum(ring(x, y - 0.38, 0.30, 0.06), 0.46 - y), mouth
        case "open":
            yield ellipse(x, y - 0.57, 0.17, 0.22), mouth


def paint(person, ground, centre_x, centre_y, radius, height, width):
    """One picture, float64 `(height, width, 3)`; centre and radius in pixels."""
    picture = np.ones((height, width, 3)) * np.array(ground)
    # Nothing of a figure lies farther than 1.5 radii from its centre.
    top, bottom = max(0, int(centre_y - 1.5 * radius) - 2), int(centre_y + 1.5 * radius) + 3
    left, right = max(0, int(centre_x - 1.5 * radius) - 2), int(centre_x + 1.5 * radius) + 3
    view = picture[top:bottom, left:right]
    x = (np.arange(width)[left:right] + 0.5 - centre_x)[None] / radius
    y = (np.arange(height)[top:bottom] + 0.5 - centre_y)[:, None] / radius
    tilt = np.radians(person.tilt)
    x, y = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
    for distance, colour in figure(person, x, y):
        alpha = np.clip(0.5 - distance * radius, 0, 1)[..., None]
        view[:] = (1 - alpha) * view + alpha * lit(colour, person.light)
    return picture


def render_person(person, num_frames=16, frame_rate=8, height=128, width=128):
    """One clip, uint8 `(3, frames, height, width)`."""
    frames = [
        paint(
            person,
            GROUNDS[person.background],
            *centre(person, t / frame_rate, height, width),
            person.radius * min(height, width),
            height,
            width,
        )
        for t in range(num_frames)
    ]
    return np.rint(np.stack(frames)).astype(np.uint8).transpose(3, 0, 1, 2)


def render_reference(person, side=128):
    """The figure alone on grey, uint8 `(3, side, side)`."""
    picture = paint(person, (128, 128, 128), 0.50 * side, 0.54 * side, 0.32 * side, side, side)
    return np.rint(picture).astype(np.uint8).transpose(2, 0, 1)
