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
"""Share of the picture an object covers at least; the smallest one covers 0.6 %."""

MAX_SHAPE_ERROR = 0.45
"""Pixels misjudged over the object's area beyond which a figure is none of the world's shapes."""

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


def _nearest(colours: torch.Tensor, palette: dict[str, tuple[int, int, int]]) -> list[str | None]:
    distance, index = torch.cdist(colours, torch.tensor(list(palette.values()), dtype=torch.float32)).min(dim=1)
    names = list(palette)
    return [
        names[i] if d <= MAX_COLOUR_DISTANCE else None for i, d in zip(index.tolist(), distance.tolist(), strict=True)
    ]


def _trend(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Change over the clip of the least-squares line through `(batch, frames)`, and the RMS left beside it."""
    frames = values.shape[1]
    time = torch.arange(frames, dtype=torch.float32) - (frames - 1) / 2
    slope = (values * time).sum(1) / time.square().sum().clamp(min=1)
    residual = values - values.mean(1, keepdim=True) - slope[:, None] * time
    return slope * (frames - 1), residual.square().mean(1).sqrt()


def see(video: torch.Tensor, frame_rate: float = 8) -> list[Sight]:
    """Judges clips, or pictures (clips of one frame), of one object on a flat background.

    Args:
        video (`torch.ByteTensor` of shape `(batch, 3, frames, height, width)`): sRGB.
        frame_rate: frames a second; how far something moves decides whether it moves.

    Returns:
        One `Sight` a clip. The motion of a single frame is "stays still".
    """
    video = video.cpu().float()
    batch, _, frames, height, width = video.shape

    # 1. The ground is what the rim of the picture shows.
    rim = torch.zeros(height, width, dtype=torch.bool)
    rim[:2], rim[-2:], rim[:, :2], rim[:, -2:] = True, True, True, True
    ground = video[..., rim].flatten(2).median(dim=2).values
    backgrounds = _nearest(ground, BACKGROUNDS)

    # 2. Its opposite, the pixels farthest from the ground, give the colour.
    difference = video - ground[:, :, None, None, None]
    contrast = difference.square().sum(dim=1).sqrt()
    blurred = F.avg_pool2d(contrast, 3, stride=1, padding=1, count_include_pad=False)
    area_share = (blurred > MIN_CONTRAST).float().mean(dim=(1, 2, 3))
    shares = (1 - area_share / 2).tolist()
    strongest = 0.9 * torch.stack(
        [torch.quantile(values, share) for values, share in zip(blurred.flatten(1), shares, strict=True)]
    )
    core = (blurred >= strongest[:, None, None, None]) & (blurred > MIN_CONTRAST)
    weights = core.float() / core.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    colour = (video * weights[:, None]).sum(dim=(2, 3, 4))
    colours = _nearest(colour, COLOURS)

    # 3. Coverage of every pixel by that colour, near the object only so that noise elsewhere does not add up.
    axis = colour - ground
    coverage = (difference * axis[:, :, None, None, None]).sum(1)
    coverage = coverage / axis.square().sum(1).clamp(min=1)[:, None, None, None]
    smooth = F.avg_pool2d(coverage, 3, stride=1, padding=1, count_include_pad=False)
    near = F.max_pool2d((smooth > 0.4).float(), 5, stride=1, padding=2) > 0
    coverage = torch.where(near, coverage, torch.zeros_like(coverage))
    area = coverage.sum(dim=(2, 3)).clamp(min=1e-3)
    rows = torch.arange(height, dtype=torch.float32)[:, None] + 0.5
    columns = torch.arange(width, dtype=torch.float32) + 0.5
    x, y = (coverage * columns).sum(dim=(2, 3)) / area, (coverage * rows).sum(dim=(2, 3)) / area

    # 4. The shape, upright or turning, whose outline fits best with the centre and area measured.
    seconds = torch.arange(frames, dtype=torch.float32) / frame_rate
    turn = math.pi * seconds[:, None, None]
    dx, dy = columns - x[..., None, None], rows - y[..., None, None]
    turned = dx * torch.cos(turn) + dy * torch.sin(turn), dy * torch.cos(turn) - dx * torch.sin(turn)
    hypotheses = [(shape, False) for shape in SHAPES]
    hypotheses += [(shape, True) for shape in SPINNING_SHAPES] if frames > 1 else []
    errors = []
    for shape, spins in hypotheses:
        radius = (area / _UNIT_AREAS[shape]).sqrt()[..., None, None]
        outline = (0.5 - signed_distance(shape, *(turned if spins else (dx, dy)), radius)).clamp(0, 1)
        errors.append((coverage - outline).abs().sum(dim=(1, 2, 3)) / area.sum(1))
    error, best = torch.stack(errors).min(dim=0)

    # 5. The motion, from how place and area change over the clip.
    duration = (frames - 1) / frame_rate
    change_x, _ = _trend(x / width)
    change_y, unsteady = _trend(y / height)
    change_area, _ = _trend(area.clamp(min=1).log())
    sights = []
    for i in range(batch):
        if area_share[i] < MIN_AREA or not torch.isfinite(error[i]):
            sights.append(Sight([], backgrounds[i]))
            continue
        shape, spins = hypotheses[best[i]]
        # A quarter of the picture a second is what "moves" means; half of that decides.
        if frames == 1:
            motion = "stays still"
        elif unsteady[i] > 0.03:
            motion = "bounces"
        elif max(abs(change_x[i]), abs(change_y[i])) > 0.125 * duration:
            if abs(change_x[i]) > abs(change_y[i]):
                motion = "moves right" if change_x[i] > 0 else "moves left"
            else:
                motion = "moves down" if change_y[i] > 0 else "moves up"
        elif abs(change_area[i]) > 0.2 * duration:
            motion = "grows" if change_area[i] > 0 else "shrinks"
        else:
            motion = "spins" if spins else "stays still"
        sights.append(
            Sight([SeenObject(colours[i], shape if error[i] <= MAX_SHAPE_ERROR else None, motion)], backgrounds[i])
        )
    return sights
