"""Drawing and rendering of Toybox scenes, batched in torch.

Parameters are drawn on the CPU from a `torch.Generator`, so that a seed gives the same scenes on every device; pixels
are computed on the device asked for. Lengths are fractions of the picture (`radius` of its shorter side, `x` of its
width, `y` of its height), so one scene can be rendered at any size and frame rate.
"""

import math
import string
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from .font import GLYPHS
from .vocabulary import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SPINNING_SHAPES,
    TEXT_MOTIONS,
    TWO_OBJECT_MOTIONS,
    core_tuples,
    is_held_out,
)


SIZES = ((64, 64), (96, 64), (64, 96), (128, 128), (192, 128), (128, 192))
"""Picture sizes `(height, width)` the world is defined at."""

TRAVEL = 0.5
"""Share of the width or height that "moves ..." covers in two seconds."""

BOUNCE_HEIGHT = 0.4
"""Share of the height that "bounces" rises to."""

TOUCH_RATES = (0.7, 1.6)
"""Range of the floor touches a second of "bounces"."""

UNIT_AREAS = {
    "circle": math.pi,
    "ring": 0.75 * math.pi,
    "square": 4 * 0.85**2,
    "triangle": 0.75 * math.sqrt(3),
    "star": 5 * 0.45 * math.sin(math.pi / 5),
}
"""Area of a shape of radius 1."""

_TEXT_COLOURS = {"black": "white", "navy": "white", "brown": "white", "grey": "black", "pink": "black"}

_DIRECTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}


@dataclass
class Scenes:
    """A batch of scenes with the same number of objects each.

    Attributes:
        colour, shape, motion (`torch.LongTensor` of shape `(batch, objects)`): indices into `COLOURS`, `SHAPES` and
            `MOTIONS`.
        background (`torch.LongTensor` of shape `(batch,)`): index into `BACKGROUNDS`.
        radius (`torch.FloatTensor` of shape `(batch, objects)`): radius over the shorter side of the picture.
        x, y (`torch.FloatTensor` of shape `(batch, objects)`): start of the centre over width and height.
        touch_rate, touch_phase (`torch.FloatTensor` of shape `(batch, objects)`): of "bounces", floor touches a second
            and the phase of the first.
        camera (`torch.LongTensor` of shape `(batch,)`): index into `CAMERAS`, -1 for none. The ground of a scene with
            a camera is checkered.
        checkered (`torch.BoolTensor` of shape `(batch,)`): whether the ground has cells of two colours.
        letters (`torch.LongTensor` of shape `(batch, 3)`): the written word as indices into the alphabet, filled up
            with -1.
    """

    colour: torch.Tensor
    shape: torch.Tensor
    motion: torch.Tensor
    background: torch.Tensor
    radius: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    touch_rate: torch.Tensor
    touch_phase: torch.Tensor
    camera: torch.Tensor | None = None
    checkered: torch.Tensor | None = None
    letters: torch.Tensor | None = None

    def __post_init__(self):
        if self.camera is None:
            self.camera = torch.full_like(self.background, -1)
        if self.checkered is None:
            self.checkered = self.camera >= 0
        if self.letters is None:
            self.letters = torch.full((len(self), 3), -1)

    def __len__(self) -> int:
        return self.colour.shape[0]

    def __getitem__(self, index) -> "Scenes":
        """The scenes at a slice, list or index tensor; still a batch."""
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def tuples(self, index: int) -> list[tuple[str, str, str, str]]:
        """`(colour, shape, motion, background)` in words, one for every object of scene `index`."""
        colours, backgrounds = list(COLOURS), list(BACKGROUNDS)
        return [
            (colours[colour], SHAPES[shape], MOTIONS[motion], backgrounds[self.background[index]])
            for colour, shape, motion in zip(
                self.colour[index].tolist(), self.shape[index].tolist(), self.motion[index].tolist(), strict=True
            )
        ]

    def word(self, index: int) -> str | None:
        """The word written in scene `index`, if any."""
        return (
            "".join(string.ascii_uppercase[letter] for letter in self.letters[index].tolist() if letter >= 0) or None
        )


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """Numbers between `low` and `high`."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def word_indices(words: list[str], known, what: str) -> torch.Tensor:
    """Places of words among those known, for fields of `Scenes`."""
    known = list(known)
    for word in words:
        if word not in known:
            raise ValueError(f"unknown {what} {word!r}: use one of {', '.join(map(str, known))}")
    return torch.tensor([known.index(word) for word in words], dtype=torch.long)


def sample_tuples(
    count: int,
    generator: torch.Generator,
    held_out: bool = False,
    motions: tuple[str, ...] = MOTIONS,
    weights: dict[str, float] | None = None,
) -> list[tuple[str, str, str, str]]:
    """Draws `count` one-object tuples of a split with replacement.

    All are equally likely, or as likely as the product of the weights of their shape and motion, 1 for those that
    `weights` does not name.
    """
    tuples = core_tuples(held_out, motions)
    if weights:
        likely = torch.tensor(
            [float(weights.get(shape, 1) * weights.get(motion, 1)) for _, shape, motion, _ in tuples]
        )
        picks = torch.multinomial(likely, count, replacement=True, generator=generator)
    else:
        picks = torch.randint(len(tuples), (count,), generator=generator)
    return [tuples[i] for i in picks.tolist()]


def sample_tuple_pairs(
    count: int,
    generator: torch.Generator,
    held_out: bool = False,
    motions: tuple[str, ...] = TWO_OBJECT_MOTIONS,
) -> list[tuple[tuple[str, str, str, str], tuple[str, str, str, str]]]:
    """Draws `count` pairs of tuples of different colours on one background, held out if either of the two is."""
    tuples = [words for split in (False, True) for words in core_tuples(split, motions)]
    pairs = []
    while len(pairs) < count:
        first, second = (tuples[i] for i in torch.randint(len(tuples), (2,), generator=generator).tolist())
        second = (*second[:3], first[3])
        if first[0] != second[0] and (is_held_out(*first) or is_held_out(*second)) == held_out:
            pairs.append((first, second))
    return pairs


def draw_scenes(
    tuples: list[tuple[str, str, str, str]],
    generator: torch.Generator,
    words: list[str | None] | None = None,
    cameras: list[str | None] | None = None,
    checkered: list[bool] | None = None,
) -> Scenes:
    """Draws what a caption leaves open: size, place and rhythm of one object.

    Any shape may spin here; [`sample_tuples`] has only those of which it can be seen.

    Args:
        tuples: `(colour, shape, motion, background)` in words, one a scene.
        generator: source of randomness.
        words: what is written in each scene, one to three capital letters, or None for nothing.
        cameras: how the camera moves in each scene, one of `CAMERAS`, or None. Its ground is checkered.
        checkered: whether a ground is checkered without a camera, too.

    Raises:
        ValueError: If a word of the vocabulary is unknown, a written word has other than one to three capital letters,
            or a motion leaves no room for it.
    """
    count = len(tuples)
    words, cameras, checkered = (given or [None] * count for given in (words, cameras, checkered))
    for word, (_, _, motion, _) in zip(words, tuples, strict=True):
        if word is not None and not (1 <= len(word) <= 3 and set(word) <= set(string.ascii_uppercase)):
            raise ValueError(f"cannot write {word!r}: use one to three capital letters, A to Z")
        if word is not None and motion not in TEXT_MOTIONS:
            raise ValueError(f"no room for a word where something {motion}: use one of {', '.join(TEXT_MOTIONS)}")
    colours, shapes, motions, backgrounds = ([parts[i] for parts in tuples] for i in range(4))
    shape = (count, 1)
    scenes = Scenes(
        colour=word_indices(colours, COLOURS, "colour")[:, None],
        shape=word_indices(shapes, SHAPES, "shape")[:, None],
        motion=word_indices(motions, MOTIONS, "motion")[:, None],
        background=word_indices(backgrounds, BACKGROUNDS, "background"),
        radius=uniform(shape, 0.14, 0.20, generator),
        x=uniform(shape, 0.35, 0.65, generator),
        y=uniform(shape, 0.35, 0.65, generator),
        touch_rate=uniform(shape, *TOUCH_RATES, generator),
        touch_phase=uniform(shape, 0.0, 1.0, generator),
        camera=word_indices(cameras, (*CAMERAS, None), "camera"),
    )
    scenes.camera[scenes.camera == len(CAMERAS)] = -1
    scenes.checkered = (scenes.camera >= 0) | torch.tensor([bool(value) for value in checkered])
    for letters, word in zip(scenes.letters, words, strict=True):
        for place, letter in enumerate(word or ""):
            letters[place] = string.ascii_uppercase.index(letter)
    # A word takes room from below: the start between 0.35 and 0.65 becomes one between 0.30 and 0.42.
    scenes.y = torch.where(scenes.letters[:, :1] >= 0, 0.30 + 0.4 * (scenes.y - 0.35), scenes.y)
    return scenes


def draw_two_object_scenes(
    pairs: list[tuple[tuple[str, str, str, str], tuple[str, str, str, str]]],
    generator: torch.Generator,
    height: int,
    width: int,
) -> Scenes:
    """Draws sizes and places of two objects a scene that never meet nor leave the picture.

    The scenes are for one picture shape, because the room left between the objects depends on it.

    Args:
        pairs: two `(colour, shape, motion, background)` in words a scene, of different colours on one background.
        generator: source of randomness.
        height, width: the picture in pixels.

    Raises:
        ValueError: If a motion is "bounces", which needs the whole height, or the colours of a pair are the same or
            its backgrounds are not.
    """
    for first, second in pairs:
        if first[0] == second[0] or first[3] != second[3]:
            raise ValueError(f"two objects need two colours and one background, not {first} and {second}")
        for _, _, motion, _ in (first, second):
            if motion not in TWO_OBJECT_MOTIONS:
                raise ValueError(f"no room for two objects if one {motion}: use {', '.join(TWO_OBJECT_MOTIONS)}")
    side, tries = min(height, width), 16
    colours, shapes, motions, backgrounds = ([words[i] for pair in pairs for words in pair] for i in range(4))
    scenes = Scenes(
        colour=word_indices(colours, COLOURS, "colour").unflatten(0, (-1, 2)),
        shape=word_indices(shapes, SHAPES, "shape").unflatten(0, (-1, 2)),
        motion=word_indices(motions, MOTIONS, "motion").unflatten(0, (-1, 2)),
        background=word_indices(backgrounds[::2], BACKGROUNDS, "background"),
        **{name: torch.zeros(len(pairs), 2) for name in ("radius", "x", "y", "touch_rate", "touch_phase")},
    )
    missing = torch.arange(len(pairs))
    while len(missing):
        tried = scenes[missing.repeat_interleave(tries)]
        tried.radius = uniform(tried.radius.shape, 0.10, 0.14, generator)
        tried.x = uniform(tried.x.shape, 0.2, 0.8, generator)
        tried.y = uniform(tried.y.shape, 0.2, 0.8, generator)
        x, y, radius, _ = trajectories(tried, torch.linspace(0, 2, 257), height, width)
        # Circumscribed circles: the corners of a square lie beyond its radius.
        is_square = tried.shape == SHAPES.index("square")
        reach = radius * torch.where(is_square, 0.85 * math.sqrt(2), 1.0)[..., None]
        apart = torch.hypot(x[:, 0] - x[:, 1], y[:, 0] - y[:, 1]) - reach.sum(1) >= side / 32
        inside = (x >= reach) & (x <= width - reach) & (y >= reach) & (y <= height - reach)
        good = (apart.all(1) & inside.all(2).all(1)).unflatten(0, (-1, tries))
        found = good.any(1)
        first_good = (torch.arange(len(missing)) * tries + good.int().argmax(1))[found]
        for name in ("radius", "x", "y"):
            getattr(scenes, name)[missing[found]] = getattr(tried, name)[first_good]
        missing = missing[~found]
    return scenes


def motion_share(tau: torch.Tensor) -> torch.Tensor:
    """How much of its motion an object has done at the times `tau` in seconds, 0 to 1.

    One motion takes two seconds, after which it runs backwards.
    """
    u = tau / 2 % 2
    return torch.where(u > 1, 2 - u, u)


def trajectories(
    scenes: Scenes,
    tau: torch.Tensor,
    height: int,
    width: int,
    travel: float = TRAVEL,
    bounce_height: float = BOUNCE_HEIGHT,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where every object is at the times `tau`, on the plane: before any camera.

    Args:
        scenes: the batch, or anything else with `motion`, `radius`, `x`, `y`, `touch_rate` and `touch_phase` of shape
            `(batch, objects)`.
        tau (`torch.FloatTensor` of shape `(frames,)`): seconds from the start of the clip.
        height, width: the picture in pixels.
        travel: share of the width or height that "moves ..." covers.
        bounce_height: share of the height that "bounces" rises to.

    Returns:
        `x`, `y`, `radius` in pixels and the clockwise `angle` in radians, each of shape `(batch, objects, frames)`.
    """
    u = motion_share(tau)
    motion, side = scenes.motion[..., None], min(height, width)
    x = (scenes.x * width)[..., None].expand(*scenes.x.shape, len(tau)).clone()
    y = (scenes.y * height)[..., None].expand_as(x).clone()
    radius = (scenes.radius * side)[..., None].expand_as(x)
    for name, (dx, dy) in _DIRECTIONS.items():
        moves = motion == MOTIONS.index(name)
        if dx:
            x = torch.where(moves, width / 2 + dx * (u - 0.5) * width * travel, x)
        if dy:
            y = torch.where(moves, height / 2 + dy * (u - 0.5) * height * travel, y)
    lift = torch.sin(math.pi * (scenes.touch_rate[..., None] * tau + scenes.touch_phase[..., None])).abs()
    y = torch.where(motion == MOTIONS.index("bounces"), 0.80 * height - radius - lift * bounce_height * height, y)
    radius = torch.where(motion == MOTIONS.index("grows"), radius * (0.5 + u), radius)
    radius = torch.where(motion == MOTIONS.index("shrinks"), radius * (1.5 - u), radius)
    angle = torch.where(motion == MOTIONS.index("spins"), 2 * math.pi * u, torch.zeros_like(x))
    return x, y, radius, angle


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels, negative inside, of the upright shape about the origin; y points down."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "ring":
        distance = torch.hypot(x, y)
        return torch.maximum(distance - radius, 0.5 * radius - distance)
    if shape == "square":
        dx, dy = x.abs() - 0.85 * radius, y.abs() - 0.85 * radius
        return torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0)
    if shape not in ("triangle", "star"):
        raise ValueError(f"unknown shape {shape!r}: use one of {', '.join(SHAPES)}.")
    # Both are made of mirror images of one edge, from a corner at the top to an inner corner half a turn / n away:
    # fold the plane onto that edge's wedge and measure to a single segment.
    corners, inner = (3, 0.5) if shape == "triangle" else (5, 0.45)
    wedge = math.pi / corners
    turn = torch.atan2(x, -y)
    turn = (turn - 2 * wedge * torch.round(turn / (2 * wedge))).abs()
    distance = torch.hypot(x, y)
    along, across = distance * torch.cos(turn), distance * torch.sin(turn)
    edge_along, edge_across = inner * math.cos(wedge) - 1, inner * math.sin(wedge)
    length = math.hypot(edge_along, edge_across)
    edge_along, edge_across = edge_along / length, edge_across / length
    along = along - radius
    position = torch.minimum((along * edge_along + across * edge_across).clamp(min=0), length * radius)
    outside = torch.where(across * edge_along - along * edge_across < 0, 1.0, -1.0)
    return torch.hypot(along - position * edge_along, across - position * edge_across) * outside


def coverage(
    shape: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    radius: torch.Tensor,
    angle: torch.Tensor,
    height: int,
    width: int,
) -> torch.Tensor:
    """Share of every pixel that an object covers, anti-aliased over one pixel.

    Args:
        shape (`torch.LongTensor` of shape `(batch,)`): index into `SHAPES`.
        x, y, radius, angle (`torch.FloatTensor` of shape `(batch, frames)`): centre and radius in pixels, clockwise
            angle in radians; on the device to compute on.
        height, width: the picture in pixels.

    Returns:
        `torch.FloatTensor` of shape `(batch, frames, height, width)`, 0 to 1.
    """
    rows = torch.arange(height, dtype=torch.float32, device=x.device)[:, None] + 0.5
    columns = torch.arange(width, dtype=torch.float32, device=x.device) + 0.5
    alpha = torch.empty(*x.shape, height, width, device=x.device)
    for index, name in enumerate(SHAPES):
        members = torch.nonzero(shape == index).flatten().to(x.device)
        if len(members) == 0:
            continue
        centre_x, centre_y, size, turn = (value[members][..., None, None] for value in (x, y, radius, angle))
        across, down = columns - centre_x, rows - centre_y
        if name in SPINNING_SHAPES and turn.any():
            cosine, sine = torch.cos(turn), torch.sin(turn)
            across, down = across * cosine + down * sine, down * cosine - across * sine
        alpha[members] = (0.5 - signed_distance(name, across, down, size)).clamp(0, 1)
    return alpha


def _camera_views(scenes: Scenes, tau: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale of the plane about the picture's centre, and its shift to the right in pixels: `(batch, frames)` each."""
    u, camera = motion_share(tau), scenes.camera[:, None]
    scale, shift = torch.ones(len(scenes), len(tau)), torch.zeros(len(scenes), len(tau))
    scale = torch.where(camera == CAMERAS.index("Zoom in"), 1 + 0.4 * u, scale)
    scale = torch.where(camera == CAMERAS.index("Zoom out"), 1.4 - 0.4 * u, scale)
    shift = torch.where(camera == CAMERAS.index("Pan left"), 0.25 * width * u, shift)
    shift = torch.where(camera == CAMERAS.index("Pan right"), -0.25 * width * u, shift)
    return scale, shift


def _write(clip: torch.Tensor, word: str, colour: torch.Tensor):
    """Writes a word at the bottom of a clip `(3, frames, height, width)`, in place and over everything."""
    height, width = clip.shape[-2:]
    pixel = max(1, round(0.2 * min(height, width) / 7))
    glyphs = GLYPHS[[string.ascii_uppercase.index(letter) for letter in word]].to(clip.device)
    ink = F.pad(glyphs, (0, 1)).transpose(0, 1).flatten(1)[:, :-1]
    ink = ink.repeat_interleave(pixel, 0).repeat_interleave(pixel, 1)
    top, left = math.floor(0.96 * height) - ink.shape[0], (width - ink.shape[1]) // 2
    area = clip[:, :, top : top + ink.shape[0], left : left + ink.shape[1]]
    area.copy_(torch.where(ink, colour[:, None, None, None], area))


def render(
    scenes: Scenes,
    num_frames: int = 16,
    frame_rate: float = 8,
    height: int = 64,
    width: int = 64,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Renders a batch of scenes.

    Args:
        scenes: the batch.
        num_frames: frames a clip; 1 gives the picture at the start.
        frame_rate: frames a second: frame `t` shows the time `t / frame_rate`.
        height, width: picture size in pixels.
        device: where to compute.

    Returns:
        `torch.ByteTensor` of shape `(batch, 3, frames, height, width)`, sRGB.
    """
    tau = torch.arange(num_frames, dtype=torch.float32) / frame_rate
    x, y, radius, angle = trajectories(scenes, tau, height, width)
    scale, shift = _camera_views(scenes, tau, width)
    x = (x - width / 2) * scale[:, None] + width / 2 + shift[:, None]
    y = (y - height / 2) * scale[:, None] + height / 2
    path = [value.to(device) for value in (x, y, radius * scale[:, None], angle)]
    scale, shift = scale.to(device)[..., None, None], shift.to(device)[..., None, None]
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device)
    grounds = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=device)

    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None] + 0.5
    columns = torch.arange(width, dtype=torch.float32, device=device) + 0.5
    cell = min(height, width) / 4
    video = torch.empty(len(scenes), 3, num_frames, height, width, dtype=torch.uint8, device=device)
    # A few clips at a time: what is computed in float32 stays small enough for the processor's cache.
    for start in range(0, len(scenes), 8):
        part = scenes[start : start + 8]
        pixels = grounds[part.background.to(device)][:, :, None, None, None]
        pixels = pixels.expand(-1, -1, num_frames, height, width).clone()
        members = torch.nonzero(part.checkered).flatten().to(device)
        if len(members):
            across = (columns - width / 2 - shift[start + members]) / scale[start + members] + width / 2
            down = (rows - height / 2) / scale[start + members] + height / 2
            odd = ((across / cell).floor() + (down / cell).floor())[:, None] % 2
            pixels[members] += 0.25 * (255 - pixels[members]) * odd
        for i in range(part.colour.shape[1]):
            alpha = coverage(part.shape[:, i], *(value[start : start + 8, i] for value in path), height, width)
            colour = palette[part.colour[:, i].to(device)][:, :, None, None, None]
            pixels = torch.lerp(pixels, colour, alpha[:, None])
        for i in torch.nonzero(part.letters[:, 0] >= 0).flatten().tolist():
            name = _TEXT_COLOURS[list(BACKGROUNDS)[part.background[i]]]
            _write(pixels[i], part.word(i), palette.new_tensor((COLOURS | BACKGROUNDS)[name]))
        video[start : start + 8] = pixels.round_()
    return video
