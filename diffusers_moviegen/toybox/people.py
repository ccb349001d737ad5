"""Characters of Toybox and their reference images, drawn and rendered in batched torch.

A person takes the place of a shape. Who it is (skin, hair, iris, glasses) is never in a caption and can only be told
from a reference image; how it looks at the moment (expression, tilt, light) is drawn for every clip. As for scenes,
parameters are drawn on the CPU and lengths are fractions of the picture.
"""

import math
from dataclasses import dataclass, fields, replace

import torch

from .scenes import TOUCH_RATES, trajectories, uniform, word_indices
from .vocabulary import BACKGROUNDS, MOTIONS, PERSON_MOTIONS


SKINS = ((240, 205, 190), (222, 175, 135), (190, 132, 82), (150, 108, 84), (120, 72, 38), (82, 58, 52))
"""Skin colours, sRGB 0-255."""

HAIR_STYLES = ("short", "long", "spiky")

EXPRESSIONS = ("neutral", "smile", "open")

LIGHTS = (0.85, 1.15)
"""Weakest and strongest light."""

NEAREST = 60.0
"""RGB distance that skin and hair keep from the background in any light."""

PERSON_TRAVEL = 0.25
"""Share of the width or height a person moves across."""

PERSON_BOUNCE_HEIGHT = 0.20
"""Share of the height a person bounces to."""

REFERENCE_GROUND = (128, 128, 128)
REFERENCE_CENTRE = (0.50, 0.54)
REFERENCE_RADIUS = 0.32

_EYE_WHITE, _GLASSES, _MOUTH = (245, 245, 245), (20, 20, 25), (140, 30, 45)


@dataclass
class People:
    """A batch of people, one a clip.

    Attributes:
        skin (`torch.LongTensor` of shape `(batch,)`): index into `SKINS`.
        hair, iris (`torch.FloatTensor` of shape `(batch, 3)`): sRGB, 0-255, before the light.
        style (`torch.LongTensor` of shape `(batch,)`): index into `HAIR_STYLES`.
        glasses (`torch.BoolTensor` of shape `(batch,)`): whether the person wears glasses.
        expression (`torch.LongTensor` of shape `(batch,)`): index into `EXPRESSIONS`.
        tilt (`torch.FloatTensor` of shape `(batch,)`): clockwise turn of the figure about the face's centre, degrees.
        light (`torch.FloatTensor` of shape `(batch,)`): what the figure's colours are multiplied by.
        motion (`torch.LongTensor` of shape `(batch, 1)`): index into `MOTIONS`, one of `PERSON_MOTIONS`.
        background (`torch.LongTensor` of shape `(batch,)`): index into `BACKGROUNDS`.
        radius (`torch.FloatTensor` of shape `(batch, 1)`): half the face's height over the picture's shorter side.
        x, y (`torch.FloatTensor` of shape `(batch, 1)`): start of the face's centre over width and height.
        touch_rate, touch_phase (`torch.FloatTensor` of shape `(batch, 1)`): of "bounces", floor touches a second and
            the phase of the first.
    """

    skin: torch.Tensor
    hair: torch.Tensor
    style: torch.Tensor
    iris: torch.Tensor
    glasses: torch.Tensor
    expression: torch.Tensor
    tilt: torch.Tensor
    light: torch.Tensor
    motion: torch.Tensor
    background: torch.Tensor
    radius: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    touch_rate: torch.Tensor
    touch_phase: torch.Tensor

    def __len__(self) -> int:
        return self.skin.shape[0]

    def __getitem__(self, index) -> "People":
        """The people at a slice, list or index tensor; still a batch."""
        return People(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def _hsv_to_rgb(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """sRGB 0-255 of shape `(batch, 3)` from hues in degrees, saturations and values from 0 to 1, each `(batch,)`."""
    sextant = (torch.tensor([5.0, 3.0, 1.0]) + hue[:, None] / 60) % 6
    chroma = torch.minimum(sextant, 4 - sextant).clamp(0, 1)
    return 255 * value[:, None] * (1 - saturation[:, None] * chroma)


def _distance_from_ground(colour: torch.Tensor, ground: torch.Tensor) -> torch.Tensor:
    """Least RGB distance between a ground and a colour in any light, clipped at 255; all of shape `(batch, 3)`.

    Between the lights at which a channel starts to clip, the squared distance is a parabola in the light.
    """
    clips_at = (255 / colour)[:, None]
    ends = torch.tensor(LIGHTS).expand(len(colour), 2)
    ends = torch.cat([ends, clips_at[:, 0].clamp(*LIGHTS)], dim=1).sort(dim=1).values[..., None]
    unclipped = colour[:, None] * (clips_at >= ends[:, 1:])
    lowest = (unclipped * ground[:, None]).sum(-1) / unclipped.square().sum(-1).clamp(min=1e-6)
    light = torch.clamp(lowest[..., None], ends[:, :-1], ends[:, 1:])
    lit = (light * colour[:, None]).clamp(max=255)
    return torch.linalg.vector_norm(lit - ground[:, None], dim=-1).amin(dim=1)


def _draw_identities(grounds: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Draws one identity for every ground `(batch, 3)`, again until skin and hair stand out against it."""
    count = len(grounds)
    skins = torch.tensor(SKINS, dtype=torch.float32)
    identities = {
        "skin": torch.empty(count, dtype=torch.long),
        "hair": torch.empty(count, 3),
        "style": torch.empty(count, dtype=torch.long),
        "iris": torch.empty(count, 3),
        "glasses": torch.empty(count, dtype=torch.bool),
    }
    missing = torch.arange(count)
    while len(missing):
        number = len(missing)
        hair_hue, iris_hue = uniform((2, number), 0, 360, generator)
        drawn = {
            "skin": torch.randint(len(SKINS), (number,), generator=generator),
            "hair": _hsv_to_rgb(
                hair_hue, uniform((number,), 0.5, 0.9, generator), uniform((number,), 0.25, 0.9, generator)
            ),
            "style": torch.randint(len(HAIR_STYLES), (number,), generator=generator),
            "iris": _hsv_to_rgb(iris_hue, torch.full((number,), 0.85), torch.full((number,), 0.75)),
            "glasses": torch.rand(number, generator=generator) < 0.5,
        }
        for name, values in drawn.items():
            identities[name][missing] = values
        nearest = torch.minimum(
            _distance_from_ground(skins[drawn["skin"]], grounds[missing]),
            _distance_from_ground(drawn["hair"], grounds[missing]),
        )
        missing = missing[nearest <= NEAREST]
    return identities


def _draw_poses(count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "expression": torch.randint(len(EXPRESSIONS), (count,), generator=generator),
        "tilt": uniform((count,), -15, 15, generator),
        "light": uniform((count,), *LIGHTS, generator),
    }


def draw_people(words: list[tuple[str, str]], generator: torch.Generator) -> People:
    """Draws people, their poses and what else the words leave open.

    Args:
        words: `(motion, background)` for every person; a motion is one of `PERSON_MOTIONS`.
        generator: source of all randomness, on the CPU. An identity of which skin or hair comes within `NEAREST` of
            its background is drawn again.

    Raises:
        ValueError: if a motion or a background is unknown.
    """
    for motion, _ in words:
        if motion not in PERSON_MOTIONS:
            raise ValueError(f"a person cannot do {motion!r}: use one of {', '.join(PERSON_MOTIONS)}.")
    background = word_indices([background for _, background in words], BACKGROUNDS, "background")
    grounds, shape = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)[background], (len(words), 1)
    return People(
        **_draw_identities(grounds, generator),
        **_draw_poses(len(words), generator),
        motion=word_indices([motion for motion, _ in words], MOTIONS, "motion")[:, None],
        background=background,
        radius=uniform(shape, 0.24, 0.28, generator),
        x=uniform(shape, 0.42, 0.58, generator),
        y=uniform(shape, 0.42, 0.58, generator),
        touch_rate=uniform(shape, *TOUCH_RATES, generator),
        touch_phase=uniform(shape, 0.0, 1.0, generator),
    )


def redraw_pose(people: People, generator: torch.Generator) -> People:
    """The same people with expression, tilt and light drawn anew: what cross-paired reference images show."""
    return replace(people, **_draw_poses(len(people), generator))


def _ellipse(x: torch.Tensor, y: torch.Tensor, half_width: float, half_height: float) -> torch.Tensor:
    """Signed distance, to first order: exact on the outline and for circles.

    Within half a pixel of an outline it is off by less than 0.001 pixels for faces and hair and 0.004 for open mouths
    in pictures of 64 pixels, and by less in larger ones.
    """
    # A hair's breadth more than zero keeps the centre finite.
    level = ((x / half_width).square() + (y / half_height).square() + 1e-12).sqrt()
    slope = ((x / half_width**2).square() + (y / half_height**2).square() + 1e-12).sqrt()
    return level * (level - 1) / slope


def _box(x: torch.Tensor, y: torch.Tensor, half_width: float, half_height: float) -> torch.Tensor:
    dx, dy = x.abs() - half_width, y.abs() - half_height
    return torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0)


def _ring(x: torch.Tensor, y: torch.Tensor, radius: float, half_thickness: float) -> torch.Tensor:
    return (torch.hypot(x, y) - radius).abs() - half_thickness


def _triangle(x: torch.Tensor, y: torch.Tensor, corners: tuple[tuple[float, float], ...]) -> torch.Tensor:
    """Corners are clockwise as seen on the screen."""
    square, inside = None, None
    for (start_x, start_y), (end_x, end_y) in zip(corners, corners[1:] + corners[:1], strict=True):
        edge_x, edge_y = end_x - start_x, end_y - start_y
        from_x, from_y = x - start_x, y - start_y
        along = ((from_x * edge_x + from_y * edge_y) / (edge_x**2 + edge_y**2)).clamp(0, 1)
        edge_square = (from_x - along * edge_x).square() + (from_y - along * edge_y).square()
        edge_inside = edge_x * from_y > edge_y * from_x
        square = edge_square if square is None else torch.minimum(square, edge_square)
        inside = edge_inside if inside is None else inside & edge_inside
    return torch.where(inside, -1.0, 1.0) * square.sqrt()


def _spike(degrees: float) -> tuple[tuple[float, float], ...]:
    """Corners of the tuft of spiky hair that points `degrees` clockwise from the top: left foot, tip, right foot."""
    return tuple(
        (0.92 * reach * math.sin(math.radians(turn)), -1.15 * reach * math.cos(math.radians(turn)))
        for turn, reach in ((degrees - 13, 0.97), (degrees, 1.3), (degrees + 13, 0.97))
    )


def _around(x: float, y: float, half_width: float, half_height: float) -> tuple[float, float, float, float]:
    return x - half_width, y - half_height, x + half_width, y + half_height


# The parts of a figure, each painted over those before it, in units of the radius about the face's centre: who has it
# (a field of `People` and its value, or None for everybody), its colour, the box around it (left, top, right, bottom),
# and the signed distance from its outline.
_PARTS = (
    *(
        (
            ("style", HAIR_STYLES.index("long")),
            "hair",
            _around(side * 0.75, 0.385, 0.25, 0.615),
            lambda x, y, side=side: _box(x - side * 0.75, y - 0.385, 0.25, 0.615),
        )
        for side in (-1, 1)
    ),
    (None, "skin", _around(0, 0, 0.8, 1.0), lambda x, y: _ellipse(x, y, 0.8, 1.0)),
    *(
        (
            ("style", HAIR_STYLES.index("spiky")),
            "hair",
            tuple(pick(place) for pick in (min, max) for place in zip(*spike, strict=True)),
            lambda x, y, spike=spike: _triangle(x, y, spike),
        )
        for spike in map(_spike, (-60, -30, 0, 30, 60))
    ),
    (
        None,
        "hair",
        (-0.92, -1.15, 0.92, -0.23),
        lambda x, y: torch.maximum(_ellipse(x, y, 0.92, 1.15), y + 0.23),
    ),
    *(
        (
            None,
            colour,
            _around(side * 0.32, 0.08, radius, radius),
            lambda x, y, side=side, radius=radius: torch.hypot(x - side * 0.32, y - 0.08) - radius,
        )
        for colour, radius in (("eye white", 0.16), ("iris", 0.10))
        for side in (-1, 1)
    ),
    *(
        (
            ("glasses", True),
            "glasses",
            _around(side * 0.32, 0.08, 0.305, 0.305),
            lambda x, y, side=side: _ring(x - side * 0.32, y - 0.08, 0.26, 0.045),
        )
        for side in (-1, 1)
    ),
    (("glasses", True), "glasses", _around(0, 0.08, 0.06, 0.045), lambda x, y: _box(x, y - 0.08, 0.06, 0.045)),
    (
        ("expression", EXPRESSIONS.index("neutral")),
        "mouth",
        _around(0, 0.55, 0.22, 0.06),
        lambda x, y: _box(x, y - 0.55, 0.22, 0.06),
    ),
    (
        ("expression", EXPRESSIONS.index("smile")),
        "mouth",
        (-0.36, 0.46, 0.36, 0.74),
        lambda x, y: torch.maximum(_ring(x, y - 0.38, 0.30, 0.06), 0.46 - y),
    ),
    (
        ("expression", EXPRESSIONS.index("open")),
        "mouth",
        _around(0, 0.57, 0.17, 0.22),
        lambda x, y: _ellipse(x, y - 0.57, 0.17, 0.22),
    ),
)

# No box around a part reaches farther from the face's centre: the topmost tuft's has corners at (+-0.20, -1.495).
_REACH = 1.51


def _paint(
    people: People,
    offset: torch.Tensor,
    radius: torch.Tensor,
    grounds: torch.Tensor,
    half: int,
    device: str | torch.device,
) -> torch.Tensor:
    """Paints figures on squares of `2 * half` pixels, the face's centre `offset` `(batch, 2)` pixels from the middle.

    `radius` `(batch,)` is in pixels, `grounds` `(batch, 3)` sRGB. Returns uint8 `(batch, 3, 2 * half, 2 * half)`.
    """
    colours = {
        "skin": torch.tensor(SKINS)[people.skin],
        "hair": people.hair,
        "iris": people.iris,
        "eye white": torch.tensor(_EYE_WHITE),
        "glasses": torch.tensor(_GLASSES),
        "mouth": torch.tensor(_MOUTH),
    }
    colours = {
        name: (people.light[:, None] * colour).clamp(max=255)[..., None, None].to(device)
        for name, colour in colours.items()
    }
    tilt = torch.deg2rad(people.tilt)
    cosine, sine = torch.cos(tilt), torch.sin(tilt)
    # What each part can touch, in whole pixels: its box, turned, and the pixels its edge is blended over.
    corners = torch.tensor([[(box[i], box[j]) for i in (0, 2) for j in (1, 3)] for _, _, box, _ in _PARTS])
    corners = corners[:, :, None] * radius[:, None]
    turned_x = corners[..., 0] * cosine - corners[..., 1] * sine + offset[:, 0] + half
    turned_y = corners[..., 0] * sine + corners[..., 1] * cosine + offset[:, 1] + half
    windows = [
        ((turned.amin(dim=(1, 2)) - 1).floor().int().tolist(), (turned.amax(dim=(1, 2)) + 1).ceil().int().tolist())
        for turned in (turned_x, turned_y)
    ]

    cosine, sine, scale = (value[:, None, None].to(device) for value in (cosine, sine, radius))
    places = torch.arange(2 * half, dtype=torch.float32) + 0.5 - half
    places_x, places_y = ((places - offset[:, i, None]) / radius[:, None] for i in (0, 1))
    places_x, places_y = places_x[:, None].to(device), places_y[:, :, None].to(device)

    pixels = grounds[:, :, None, None].to(device).repeat(1, 1, 2 * half, 2 * half)
    for i, (owners, colour, _, distance) in enumerate(_PARTS):
        columns, rows = (slice(lows[i], highs[i]) for lows, highs in windows)
        members = slice(None)
        if owners is not None:
            has_part = getattr(people, owners[0]) == owners[1]
            if not has_part.any():
                continue
            if not has_part.all():
                members = torch.nonzero(has_part).flatten().to(device)
        x, y = places_x[members, :, columns], places_y[members, rows]
        x, y = x * cosine[members] + y * sine[members], y * cosine[members] - x * sine[members]
        alpha = (0.5 - scale[members] * distance(x, y)).clamp(0, 1)[:, None]
        window = pixels[members, :, rows, columns]
        pixels[members, :, rows, columns] = torch.lerp(window, colours[colour][members], alpha)
    return pixels.round_().to(torch.uint8)


def _render(
    people: People,
    x: torch.Tensor,
    y: torch.Tensor,
    radius: torch.Tensor,
    grounds: torch.Tensor,
    height: int,
    width: int,
    device: str | torch.device,
) -> torch.Tensor:
    """Video of people whose faces are centred at `x`, `y` `(batch, frames)` pixels, on `grounds` `(batch, 3)`."""
    batch, num_frames = x.shape
    left, top = x.floor(), y.floor()
    # Frames of a clip that show the face at the same place within a pixel show the same pixels: paint each once.
    clips = torch.arange(batch, dtype=x.dtype)[:, None].expand_as(x)
    places = torch.stack([clips, x - left, y - top], dim=-1).flatten(0, 1)
    places, figure = torch.unique(places, dim=0, return_inverse=True)
    clips, offsets = places[:, 0].long(), places[:, 1:]

    # Wide enough for nothing but ground to be at the border, wherever within a pixel the centre is.
    half = int(_REACH * radius.max()) + 3
    # A few figures at a time: what is computed in float32 stays small enough for the processor's cache.
    figures = torch.cat(
        [
            _paint(people[members], offset, radius[members], grounds[members], half, device)
            for members, offset in zip(clips.split(16), offsets.split(16), strict=True)
        ]
    )
    # Pixels beyond a square repeat its border, which is ground.
    columns = (torch.arange(width) - left[..., None] + half).long().clamp(0, 2 * half - 1).to(device)
    rows = (torch.arange(height) - top[..., None] + half).long().clamp(0, 2 * half - 1).to(device)
    figure = figure.reshape(batch, 1, num_frames, 1).to(device)
    video = figures[figure, torch.arange(3, device=device)[:, None, None], rows[:, None]]
    return video.gather(-1, columns[:, None, :, None].expand(-1, 3, -1, height, -1))


def render_people(
    people: People,
    num_frames: int = 16,
    frame_rate: float = 8,
    height: int = 128,
    width: int = 128,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Renders clips of people.

    Args:
        people: the batch.
        num_frames: frames a clip; 1 gives the picture at the start.
        frame_rate: frames a second: frame `t` shows the time `t / frame_rate`.
        height, width: picture size in pixels.
        device: where to compute.

    Returns:
        `torch.ByteTensor` of shape `(batch, 3, frames, height, width)`, sRGB.
    """
    tau = torch.arange(num_frames, dtype=torch.float32) / frame_rate
    x, y, radius, _ = trajectories(
        people, tau, height, width, travel=PERSON_TRAVEL, bounce_height=PERSON_BOUNCE_HEIGHT
    )
    grounds = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)[people.background]
    return _render(people, x[:, 0], y[:, 0], radius[:, 0, 0], grounds, height, width, device)


def render_references(people: People, side: int = 128, device: str | torch.device = "cpu") -> torch.Tensor:
    """Renders reference images: every figure alone on grey, with the expression, tilt and light `people` have.

    Paired with clips of the same people; cross-paired if `people` come from `redraw_pose`.

    Returns:
        `torch.ByteTensor` of shape `(batch, 3, side, side)`, sRGB.
    """
    batch = len(people)
    x, y = (torch.full((batch, 1), place * side) for place in REFERENCE_CENTRE)
    grounds = torch.tensor(REFERENCE_GROUND, dtype=torch.float32).expand(batch, 3)
    radius = torch.full((batch,), REFERENCE_RADIUS * side)
    return _render(people, x, y, radius, grounds, side, side, device)[:, :, 0]
