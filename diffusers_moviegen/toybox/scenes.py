"""Drawing and rendering of Toybox scenes, batched in torch.

Parameters are drawn on the CPU from a `torch.Generator`, so that a seed gives the same scenes on every device; pixels
are computed on the device asked for. Lengths are fractions of the picture (`radius` of its shorter side, `x` of its
width, `y` of its height), so one scene can be rendered at any size and frame rate.
"""

import math
from dataclasses import dataclass, fields

import torch

from .vocabulary import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SPINNING_SHAPES, core_tuples, is_held_out


SIZES = ((64, 64), (96, 64), (64, 96), (128, 128), (192, 128), (128, 192))
"""Picture sizes `(height, width)` the world is defined at."""

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


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def sample_tuples(
    count: int, generator: torch.Generator, held_out: bool = False, motions: tuple[str, ...] = MOTIONS
) -> list[tuple[str, str, str, str]]:
    """Draws `count` one-object tuples of a split with replacement, all equally likely."""
    tuples = core_tuples(held_out, motions)
    return [tuples[i] for i in torch.randint(len(tuples), (count,), generator=generator).tolist()]


def draw_scenes(tuples: list[tuple[str, str, str, str]], generator: torch.Generator) -> Scenes:
    """Draws what the words `(colour, shape, motion, background)` leave open: size, place and rhythm of one object."""
    colours, backgrounds = list(COLOURS), list(BACKGROUNDS)
    shape = (len(tuples), 1)
    return Scenes(
        colour=torch.tensor([[colours.index(words[0])] for words in tuples]),
        shape=torch.tensor([[SHAPES.index(words[1])] for words in tuples]),
        motion=torch.tensor([[MOTIONS.index(words[2])] for words in tuples]),
        background=torch.tensor([backgrounds.index(words[3]) for words in tuples]),
        radius=_uniform(shape, 0.14, 0.20, generator),
        x=_uniform(shape, 0.35, 0.65, generator),
        y=_uniform(shape, 0.35, 0.65, generator),
        touch_rate=_uniform(shape, 0.7, 1.6, generator),
        touch_phase=_uniform(shape, 0.0, 1.0, generator),
    )


def draw_two_object_scenes(count: int, generator: torch.Generator, height: int, width: int) -> Scenes:
    """Draws `count` training scenes with two objects of different colours that never meet nor leave the picture.

    Two-object scenes are accepted for one picture shape, because the room left between the objects depends on it.
    """
    side, background_names = min(height, width), list(BACKGROUNDS)
    motions = tuple(motion for motion in MOTIONS if motion != "bounces")
    accepted, missing = [], count
    while missing:
        first = sample_tuples(4 * missing, generator, motions=motions)
        second = sample_tuples(4 * missing, generator, motions=motions)
        pairs = [
            (a, b[:3] + a[3:])
            for a, b in zip(first, second, strict=True)
            if a[0] != b[0] and not is_held_out(*b[:3], a[3])
        ]
        colours, shape = list(COLOURS), (len(pairs), 2)
        scenes = Scenes(
            colour=torch.tensor([[colours.index(words[0]) for words in pair] for pair in pairs]),
            shape=torch.tensor([[SHAPES.index(words[1]) for words in pair] for pair in pairs]),
            motion=torch.tensor([[MOTIONS.index(words[2]) for words in pair] for pair in pairs]),
            background=torch.tensor([background_names.index(pair[0][3]) for pair in pairs]),
            radius=_uniform(shape, 0.10, 0.14, generator),
            x=_uniform(shape, 0.2, 0.8, generator),
            y=_uniform(shape, 0.2, 0.8, generator),
            touch_rate=_uniform(shape, 0.7, 1.6, generator),
            touch_phase=_uniform(shape, 0.0, 1.0, generator),
        )
        x, y, radius, _ = trajectories(scenes, torch.linspace(0, 2, 257), height, width)
        # Circumscribed circles: the corners of a square lie beyond its radius.
        is_square = scenes.shape == SHAPES.index("square")
        reach = radius * torch.where(is_square, 0.85 * math.sqrt(2), 1.0)[..., None]
        apart = torch.hypot(x[:, 0] - x[:, 1], y[:, 0] - y[:, 1]) - reach.sum(1) >= side / 32
        inside = (x >= reach) & (x <= width - reach) & (y >= reach) & (y <= height - reach)
        keep = torch.nonzero(apart.all(1) & inside.all(2).all(1)).flatten()[:missing]
        accepted.append(scenes[keep])
        missing -= len(keep)
    return Scenes(
        **{field.name: torch.cat([getattr(part, field.name) for part in accepted]) for field in fields(Scenes)}
    )


def trajectories(
    scenes: Scenes, tau: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where every object is at the times `tau`.

    Args:
        scenes: the batch.
        tau (`torch.FloatTensor` of shape `(frames,)`): seconds from the start of the clip.
        height, width: the picture in pixels.

    Returns:
        `x`, `y`, `radius` in pixels and the clockwise `angle` in radians, each of shape `(batch, objects, frames)`.
    """
    # One motion takes two seconds, after which it runs backwards.
    u = tau / 2 % 2
    u = torch.where(u > 1, 2 - u, u)
    motion, side = scenes.motion[..., None], min(height, width)
    x = (scenes.x * width)[..., None].expand(*scenes.x.shape, len(tau)).clone()
    y = (scenes.y * height)[..., None].expand_as(x).clone()
    radius = (scenes.radius * side)[..., None].expand_as(x)
    for name, (dx, dy) in _DIRECTIONS.items():
        moves = motion == MOTIONS.index(name)
        if dx:
            x = torch.where(moves, width / 2 + dx * (u - 0.5) * width / 2, x)
        if dy:
            y = torch.where(moves, height / 2 + dy * (u - 0.5) * height / 2, y)
    lift = torch.sin(math.pi * (scenes.touch_rate[..., None] * tau + scenes.touch_phase[..., None])).abs()
    y = torch.where(motion == MOTIONS.index("bounces"), 0.80 * height - radius - lift * 0.40 * height, y)
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
    path = [value.to(device) for value in trajectories(scenes, tau, height, width)]
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device)
    grounds = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=device)

    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None] + 0.5
    columns = torch.arange(width, dtype=torch.float32, device=device) + 0.5
    video = torch.empty(len(scenes), 3, num_frames, height, width, dtype=torch.uint8, device=device)
    # A few clips at a time: what is computed in float32 stays small enough for the processor's cache.
    for start in range(0, len(scenes), 8):
        part = scenes[start : start + 8]
        pixels = grounds[part.background.to(device)][:, :, None, None, None]
        pixels = pixels.expand(-1, -1, num_frames, height, width).clone()
        for i in range(part.colour.shape[1]):
            for shape_index, shape in enumerate(SHAPES):
                members = torch.nonzero(part.shape[:, i] == shape_index).flatten()
                if len(members) == 0:
                    continue
                colour = palette[part.colour[members, i].to(device)][:, :, None, None, None]
                members = members.to(device)
                centre_x, centre_y, radius, angle = (value[start + members, i][..., None, None] for value in path)
                x, y = columns - centre_x, rows - centre_y
                if shape in SPINNING_SHAPES and angle.any():
                    cosine, sine = torch.cos(angle), torch.sin(angle)
                    x, y = x * cosine + y * sine, y * cosine - x * sine
                alpha = (0.5 - signed_distance(shape, x, y, radius)).clamp(0, 1)[:, None]
                pixels[members] = torch.lerp(pixels[members], colour, alpha)
        video[start : start + 8] = pixels.round_()
    return video
