"""The judge of sight: which object moves how in front of which background."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..scenes import signed_distance
from ..vocabulary import BACKGROUNDS, COLOURS, SHAPES, SPINNING_SHAPES


MAX_COLOUR_DISTANCE = 70.0
"""RGB distance beyond which a colour is none of the world's."""

MIN_CONTRAST = 40.0
"""RGB distance to the background from which a pixel can belong to an object; the closest colours are 86 apart."""

MIN_AREA = 0.004
"""Share of the picture an object covers at least, half of it in every frame; the smallest star in a picture of 3 : 2
covers 0.43 %, on average over its clip more."""

MAX_SHAPE_ERROR = 0.45
"""Pixels misjudged over the object's area beyond which a figure is none of the world's shapes."""

MAX_STRAY = 0.2
"""Pixels off the ground but away from the object, over its area, beyond which the figure is more than one shape."""

_UNIT_AREAS = {
    "circle": math.pi,
    "ring": 0.75 * math.pi,
    "square": 4 * 0.85**2,
    "triangle": 0.75 * math.sqrt(3),
    "star": 5 * 0.45 * math.sin(math.pi / 5),
}


@dataclass
class SeenObject:
    """What an object looks like and does, in the words of the vocabulary; None where it is none of them."""

    colour: str | None
    shape: str | None
    motion: str | None


@dataclass
class Sight:
    """What a clip shows.

    Attributes:
        objects: the objects seen; empty for an empty picture.
        background: word of the vocabulary, or None.
    """

    objects: list[SeenObject]
    background: str | None


def _nearest(colour: torch.Tensor, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = torch.linalg.vector_norm(torch.tensor(list(palette.values())) - colour, dim=1)
    return list(palette)[distances.argmin()] if distances.min() <= MAX_COLOUR_DISTANCE else None


def _trend(values: torch.Tensor) -> tuple[float, float]:
    """Change over the clip of the least-squares line through `(frames,)`, and the RMS left beside it."""
    frames = len(values)
    time = torch.arange(frames, dtype=torch.float32) - (frames - 1) / 2
    slope = (values * time).sum() / time.square().sum().clamp(min=1)
    residual = values - values.mean() - slope * time
    return slope.item() * (frames - 1), residual.square().mean().sqrt().item()


def see(video: torch.Tensor, frame_rate: float = 8) -> list[Sight]:
    """Judges clips, or pictures (clips of one frame), of one object on a flat background.

    Args:
        video (`torch.ByteTensor` of shape `(batch, 3, frames, height, width)`): sRGB.
        frame_rate: frames a second; how far something moves decides whether it moves.

    Returns:
        One `Sight` a clip. The motion of a single frame is "stays still". An object that is missing in some frames or
        turns counter-clockwise has no motion of the vocabulary, one beside which there is something else no shape.
    """
    # Clip by clip, the arrays stay in the processor's cache.
    return [_see_clip(clip.float(), frame_rate) for clip in video.cpu()]


def _see_clip(clip: torch.Tensor, frame_rate: float) -> Sight:
    _, frames, height, width = clip.shape

    # 1. The ground is what the rim of the picture shows.
    edges = (clip[:, :, :2], clip[:, :, -2:], clip[..., :2], clip[..., -2:])
    rim = torch.cat([edge.flatten(1) for edge in edges], dim=1)
    ground = rim.median(dim=1).values
    background = _nearest(ground, BACKGROUNDS)

    # 2. Its opposite, the pixels farthest from the ground, give the colour.
    difference = clip - ground[:, None, None, None]
    contrast = difference.square().sum(dim=0).sqrt()
    contrast = F.avg_pool2d(contrast, 3, stride=1, padding=1, count_include_pad=False)
    foreground = contrast > MIN_CONTRAST
    if foreground.float().mean() < MIN_AREA:
        return Sight([], background)
    core = contrast >= (0.9 * contrast[foreground].median()).clamp(min=MIN_CONTRAST)
    colour = clip[:, core].mean(dim=1)

    # 3. Coverage of every pixel by that colour, near the object only so that noise elsewhere does not add up.
    axis = colour - ground
    coverage = torch.tensordot(axis / axis.square().sum().clamp(min=1), difference, dims=1)
    smooth = F.avg_pool2d(coverage, 3, stride=1, padding=1, count_include_pad=False)
    near = F.avg_pool2d((smooth > 0.4).float(), 5, stride=1, padding=2) > 0
    coverage = coverage * near
    area = coverage.sum(dim=(1, 2)).clamp(min=1e-3)
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    x, y = coverage.sum(dim=1) @ columns / area, coverage.sum(dim=2) @ rows / area

    # 4. The shape, upright or turning, whose outline fits best with the centre and area measured. Only pixels on the
    # object or within its largest possible outline matter.
    dx, dy = columns - x[:, None], rows - y[:, None]
    reach = (area / min(_UNIT_AREAS.values())).sqrt() + 1
    within = dx.square()[:, None, :] + dy.square()[:, :, None] < reach.square()[:, None, None]
    frame, row, column = torch.nonzero(near | within, as_tuple=True)
    pixel_coverage, pixel_area = coverage[frame, row, column], area[frame]
    dx, dy = dx[frame, column], dy[frame, row]
    turn = math.pi * torch.arange(frames) / frame_rate
    cosine, sine = torch.cos(turn)[frame], torch.sin(turn)[frame]
    hypotheses = [(shape, 0) for shape in SHAPES]
    hypotheses += [(shape, turns) for shape in SPINNING_SHAPES for turns in (1, -1)] if frames > 1 else []
    errors = []
    for shape, turns in hypotheses:
        turned = (dx * cosine + turns * dy * sine, dy * cosine - turns * dx * sine) if turns else (dx, dy)
        outline = (0.5 - signed_distance(shape, *turned, (pixel_area / _UNIT_AREAS[shape]).sqrt())).clamp(0, 1)
        errors.append((pixel_coverage - outline).abs().sum())
    error, best = torch.stack(errors).min(dim=0)
    shape, turns = hypotheses[best]
    if error > MAX_SHAPE_ERROR * area.sum() or (foreground & ~near).sum() > MAX_STRAY * area.sum():
        shape = None

    # 5. The motion, from how place and area change over the clip.
    duration = (frames - 1) / frame_rate
    change_x, _ = _trend(x / width)
    change_y, unsteady = _trend(y / height)
    change_area, _ = _trend(area.clamp(min=1).log())
    # A quarter of the picture a second is what "moves" means; half of that decides.
    if frames == 1:
        motion = "stays still"
    elif area.min() < 0.5 * MIN_AREA * height * width:
        motion = None
    elif unsteady > 0.03:
        motion = "bounces"
    elif max(abs(change_x), abs(change_y)) > 0.125 * duration:
        if abs(change_x) > abs(change_y):
            motion = "moves right" if change_x > 0 else "moves left"
        else:
            motion = "moves down" if change_y > 0 else "moves up"
    elif abs(change_area) > 0.2 * duration:
        motion = "grows" if change_area > 0 else "shrinks"
    else:
        motion = {0: "stays still", 1: "spins", -1: None}[turns]
    return Sight([SeenObject(_nearest(colour, COLOURS), shape, motion)], background)
