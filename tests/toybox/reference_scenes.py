"""An independent renderer of Toybox pictures: float64 NumPy, one frame at a time, brute force."""

import math

import numpy as np

from diffusers_moviegen.toybox.vocabulary import BACKGROUNDS, COLOURS


FONT = """
A 0E 11 11 1F 11 11 11 · B 1E 11 11 1E 11 11 1E · C 0E 11 10 10 10 11 0E · D 1E 11 11 11 11 11 1E ·
E 1F 10 10 1E 10 10 1F · F 1F 10 10 1E 10 10 10 · G 0E 11 10 17 11 11 0E · H 11 11 11 1F 11 11 11 ·
I 0E 04 04 04 04 04 0E · J 07 02 02 02 02 12 0C · K 11 12 14 18 14 12 11 · L 10 10 10 10 10 10 1F ·
M 11 1B 15 15 11 11 11 · N 11 19 15 13 11 11 11 · O 0E 11 11 11 11 11 0E · P 1E 11 11 1E 10 10 10 ·
Q 0E 11 11 11 15 12 0D · R 1E 11 11 1E 14 12 11 · S 0F 10 10 0E 01 01 1E · T 1F 04 04 04 04 04 04 ·
U 11 11 11 11 11 11 0E · V 11 11 11 11 11 0A 04 · W 11 11 11 15 15 1B 11 · X 11 11 0A 04 0A 11 11 ·
Y 11 11 0A 04 04 04 04 · Z 1F 01 02 04 08 10 1F
"""
"""One hexadecimal number a row, top to bottom; the highest of five bits is the left pixel."""

LETTERS = {
    letter: [[int(bit) for bit in f"{int(number, 16):05b}"] for number in rows]
    for letter, *rows in (entry.split() for entry in FONT.split("·"))
}


def share_of_motion(tau):
    """u: from 0 to 1 in two seconds, then back and forth."""
    u = (tau / 2) % 2
    return 2 - u if u > 1 else u


def path(motion, radius, x, y, rate, phase, tau, height, width):
    """Centre, radius and clockwise angle in pixels and degrees on the plane at one moment."""
    side, u = min(height, width), share_of_motion(tau)
    place, r, degrees = [x * width, y * height], radius * side, 0.0
    if motion == "moves left":
        place[0] = width / 2 - (u - 0.5) * width / 2
    elif motion == "moves right":
        place[0] = width / 2 + (u - 0.5) * width / 2
    elif motion == "moves up":
        place[1] = height / 2 - (u - 0.5) * height / 2
    elif motion == "moves down":
        place[1] = height / 2 + (u - 0.5) * height / 2
    elif motion == "bounces":
        place[1] = 0.80 * height - r - abs(math.sin(math.pi * (rate * tau + phase))) * 0.40 * height
    elif motion == "grows":
        r *= 0.5 + u
    elif motion == "shrinks":
        r *= 1.5 - u
    elif motion == "spins":
        degrees = 360 * u
    return place[0], place[1], r, degrees


def corners(shape, radius, degrees):
    """Corners of a polygon about the origin, turned clockwise; y points down."""
    if shape == "square":
        half = 0.85 * radius
        points = np.array([(-half, -half), (half, -half), (half, half), (-half, half)])
    else:
        reach = [1.0] * 3 if shape == "triangle" else [1.0, 0.45] * 5
        turns = 2 * math.pi * np.arange(len(reach)) / len(reach)
        points = radius * np.array(reach)[:, None] * np.stack([np.sin(turns), -np.cos(turns)], axis=1)
    # Turning the x axis (right) towards the y axis (down) is clockwise on the screen.
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.stack([points[:, 0] * c - points[:, 1] * s, points[:, 0] * s + points[:, 1] * c], axis=1)


def distance(shape, x, y, radius, degrees=0.0):
    """Signed distance, negative inside: the nearest of all edges, the sign by counting crossings."""
    if shape in ("circle", "ring"):
        from_centre = np.sqrt(x * x + y * y)
        return from_centre - radius if shape == "circle" else np.abs(from_centre - 0.75 * radius) - 0.25 * radius
    points = corners(shape, radius, degrees)
    nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        t = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.sqrt((x - ax - t * ex) ** 2 + (y - ay - t * ey) ** 2))
        if ey != 0:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -nearest, nearest)


def view(camera, tau, width):
    """Shift of the plane to the right in pixels, and its scale about the centre of the picture."""
    u = share_of_motion(tau)
    return {
        None: (0.0, 1.0),
        "Pan left": (0.25 * width * u, 1.0),
        "Pan right": (-0.25 * width * u, 1.0),
        "Zoom in": (0.0, 1 + 0.4 * u),
        "Zoom out": (0.0, 1.4 - 0.4 * u),
    }[camera]


def plane_of(camera, tau, height, width):
    """Coordinates `(x, y)` on the plane of every pixel's centre."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    shift, scale = view(camera, tau, width)
    return (columns - width / 2) / scale + width / 2 - shift, (rows - height / 2) / scale + height / 2


def text_box(word, height, width):
    """Left edge, top row, and the size of a font pixel."""
    pixel = max(1, round(0.2 * min(height, width) / 7))
    text_width = (len(word) * 5 + len(word) - 1) * pixel
    return math.floor((width - text_width) / 2), math.floor(0.96 * height) - 7 * pixel, pixel


def frame(objects, background, tau, height, width, camera=None, checkered=False, word=None):
    """One frame `(3, height, width)` in levels of 0 to 255, not yet rounded.

    `objects` are dictionaries of colour, shape, motion, radius, x, y and, of those that bounce, touch_rate and
    touch_phase.
    """
    rows, columns = np.mgrid[:height, :width] + 0.5
    ground = np.array(BACKGROUNDS[background], dtype=np.float64)[:, None, None]
    picture = np.broadcast_to(ground, (3, height, width))
    if checkered or camera is not None:
        plane_x, plane_y = plane_of(camera, tau, height, width)
        cell = min(height, width) / 4
        odd = (np.floor(plane_x / cell) + np.floor(plane_y / cell)) % 2 == 1
        picture = np.where(odd, ground + 0.25 * (255 - ground), ground)
    shift, scale = view(camera, tau, width)
    for item in objects:
        numbers = [item[name] for name in ("radius", "x", "y")]
        numbers += [item.get(name, 0.0) for name in ("touch_rate", "touch_phase")]
        x, y, radius, degrees = path(item["motion"], *numbers, tau, height, width)
        x, y = (x + shift - width / 2) * scale + width / 2, (y - height / 2) * scale + height / 2
        alpha = np.clip(0.5 - distance(item["shape"], columns - x, rows - y, radius * scale, degrees), 0, 1)
        colour = np.array(COLOURS[item["colour"]], dtype=np.float64)[:, None, None]
        picture = picture + alpha * (colour - picture)
    picture = picture.copy()
    if word is not None:
        left, top, pixel = text_box(word, height, width)
        ink = BACKGROUNDS["black"] if background in ("grey", "pink") else COLOURS["white"]
        for position, letter in enumerate(word):
            for i, row in enumerate(LETTERS[letter]):
                for j, bit in enumerate(row):
                    if bit:
                        y, x = top + i * pixel, left + (6 * position + j) * pixel
                        picture[:, y : y + pixel, x : x + pixel] = np.array(ink)[:, None, None]
    return picture
