"""The judge of edits: whether a clip is its source with what the instruction names changed, and nothing else."""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..captions import EDIT_INSTRUCTIONS
from ..edits import ADDED_PLACE, ADDED_RADIUS, MAGENTA
from ..scenes import UNIT_AREAS, motion_share, signed_distance
from ..vocabulary import BACKGROUNDS, COLOURS, CORNERS, LUMA_WEIGHTS, SHAPES, SPINNING_SHAPES
from .sight import MAX_COLOUR_DISTANCE, MAX_SHAPE_ERROR, Sight, see


REACH = 1.35
"""How far from the object's centre, in units of its reach (the radius of the circle around it), an edit may show."""

EDGE = 1.5
"""Pixels beyond that for edges that are anti-aliased and blurred."""

MAX_OFF_GROUND = 0.002
"""Share of a third's pixels that may differ from the ground where nothing belongs."""

OFF_GROUND = 40.0
"""RGB distance from which a pixel is off the ground, or of another colour; the closest two are 61 apart."""

SAME_COLOUR = 10.0
"""RGB distance below which two colours cannot be told apart: white in black and white is still white."""

MAX_SOFTNESS = 2
"""How many times a clip may have been averaged over 3 x 3 pixels."""

MAX_DRIFT = 0.05
"""Distance over the picture's shorter side that the object may be off the source's place in any frame."""

MAX_GROWTH = 0.25
"""Difference of the logarithms of the radius in edited clip and source in any frame."""

_WORDS = {
    "shape": SHAPES,
    "new_colour": tuple(COLOURS),
    "new_shape": SHAPES,
    "new_background": tuple(BACKGROUNDS),
    "corner": CORNERS,
}

_PATTERNS = {
    edit: re.sub(r"{(\w+)}", lambda slot: f"(?P<{slot[1]}>{'|'.join(_WORDS[slot[1]])})", text)
    for edit, text in EDIT_INSTRUCTIONS.items()
}


@dataclass
class EditVerdict:
    """What became of an edit.

    Attributes:
        done: whether in every third of the clip what the instruction names is right, the other words of the source
            are unchanged and nothing else has appeared.
        psnr_outside: dB of the edited clip against the source outside the mask, infinite where they are equal; None
            without a mask, or with one that leaves no pixel.
        motion_kept: whether the object moves by the same word and along the same path as in the source. A removal
            leaves nothing that could move otherwise: always true.
    """

    done: bool
    psnr_outside: float | None
    motion_kept: bool


def judge_edits(
    source: torch.Tensor,
    edited: torch.Tensor,
    instructions: list[str],
    masks: torch.Tensor | None = None,
    frame_rate: float = 8,
) -> list[EditVerdict]:
    """Judges edited clips, or pictures (clips of one frame), by their pixels and the text of the instructions.

    Args:
        source (`torch.ByteTensor` of shape `(batch, 3, frames, height, width)`): sRGB; one object on a flat ground.
        edited (`torch.ByteTensor` of the shape of `source`): sRGB.
        instructions: one a clip, in the words of `captions.EDIT_INSTRUCTIONS`.
        masks (`torch.BoolTensor` of shape `(batch, 1, frames, height, width)`): true where the edit may change pixels;
            for `psnr_outside` only.
        frame_rate: frames a second.

    Raises:
        ValueError: If an instruction is none of the world's, or the shapes of the two clips differ.
    """
    if source.shape != edited.shape:
        raise ValueError(
            f"cannot compare clips of shapes {tuple(source.shape)} and {tuple(edited.shape)}: use one size and length"
        )
    source, edited = source.cpu(), edited.cpu()
    masks = [None] * len(source) if masks is None else masks.cpu()
    verdicts = []
    for clip, edited_clip, sight, instruction, mask in zip(
        source, edited, see(source, frame_rate), instructions, masks, strict=True
    ):
        edit, words = _parse(instruction)
        clip, edited_clip = clip.float(), edited_clip.float()
        done, motion_kept = _judge_clip(clip, edited_clip, sight, edit, words, frame_rate)
        psnr = None
        if mask is not None and not mask.all():
            error = (clip - edited_clip)[:, ~mask[0]].square().mean().item()
            psnr = 10 * math.log10(255**2 / error) if error else math.inf
        verdicts.append(EditVerdict(done, psnr, motion_kept))
    return verdicts


def _parse(instruction: str) -> tuple[str, dict[str, str]]:
    """The edit, and the words it names."""
    for edit, pattern in _PATTERNS.items():
        if match := re.fullmatch(pattern, instruction):
            return edit, match.groupdict()
    raise ValueError(f"unknown edit instruction {instruction!r}: use one of {', '.join(EDIT_INSTRUCTIONS.values())}")


def _reach(shape: str) -> float:
    """Radius of the circle around a shape, in units of its own."""
    return 0.85 * math.sqrt(2) if shape == "square" else 1.0


def _smooth(clip: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(clip, 3, stride=1, padding=1, count_include_pad=False)


def _is(colour: torch.Tensor, right: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether a colour is near the right one, and nearer than to all others that differ from the right one."""
    others = others[torch.linalg.vector_norm(others - right, dim=1) > SAME_COLOUR]
    nearest_other = torch.linalg.vector_norm(others - colour, dim=1).min()
    return bool(torch.dist(colour, right) < nearest_other.clamp(max=MAX_COLOUR_DISTANCE))


def _peak(clip: torch.Tensor, contrast: torch.Tensor, region: torch.Tensor, count: float) -> torch.Tensor:
    """Mean colour of the `count` pixels of a region that stand out most: the inside of what is there."""
    colours, contrast = clip[:, region], contrast[region]
    return colours[:, contrast.topk(min(max(int(count), 1), len(contrast))).indices].mean(dim=1)


def _fit(
    coverage: torch.Tensor,
    dx: torch.Tensor,
    dy: torch.Tensor,
    area: torch.Tensor,
    angle: torch.Tensor | None = None,
) -> tuple[str, float]:
    """The shape whose outline is nearest to a coverage, both averaged over 3 x 3 pixels against noise.

    Args:
        coverage (`torch.FloatTensor` of shape `(frames, height, width)`): what pixels show.
        dx, dy (`torch.FloatTensor` of shape `(frames, height, width)`, or with one frame for all): pixels to the right
            of and below the centre.
        area (`torch.FloatTensor` of shape `(frames, 1, 1)` or `()`): of the figure in pixels.
        angle (`torch.FloatTensor` of shape `(frames, 1, 1)`): how far what spins clockwise has turned; shapes may then
            be upright or spin either way.

    Returns:
        The shape, and the sum of the coverage misjudged.
    """
    coverage = _smooth(coverage)
    fits = []
    for shape in SHAPES:
        radius = (area / UNIT_AREAS[shape]).sqrt()
        for turns in (0, 1, -1) if angle is not None and shape in SPINNING_SHAPES else (0,):
            x, y = dx, dy
            if turns:
                cosine, sine = torch.cos(angle), turns * torch.sin(angle)
                x, y = dx * cosine + dy * sine, dy * cosine - dx * sine
            outline = (0.5 - signed_distance(shape, x, y, radius)).clamp(0, 1)
            for _ in range(1 + MAX_SOFTNESS):
                outline = _smooth(outline)
                fits.append(((coverage - outline).abs().sum().item(), shape))
    error, shape = min(fits)
    return shape, error


def _place(coverage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centre x, y and area in pixels, `(frames,)` each, of what covers `(frames, height, width)`."""
    rows, columns = (torch.arange(size) + 0.5 for size in coverage.shape[1:])
    area = coverage.sum(dim=(1, 2)).clamp(min=1e-3)
    return coverage.sum(dim=1) @ columns / area, coverage.sum(dim=2) @ rows / area, area


def _judge_clip(
    source: torch.Tensor, edited: torch.Tensor, sight: Sight, edit: str, words: dict[str, str], frame_rate: float
) -> tuple[bool, bool]:
    """`done` and `motion_kept` of float clips `(3, frames, height, width)`; `sight` is what the source shows."""
    seen = sight.objects[0] if len(sight.objects) == 1 else None
    if seen is None or None in (seen.colour, seen.shape, seen.motion, sight.background):
        return False, False
    _, frames, height, width = source.shape
    side = min(height, width)
    thirds = torch.arange(frames).tensor_split(min(3, frames))

    # 1. Ground and object of the source, and what becomes of them.
    grounds, colours = torch.tensor(list(BACKGROUNDS.values())), torch.tensor([*COLOURS.values(), MAGENTA])
    grounds, colours = grounds.float(), colours.float()
    ground, colour = grounds[list(BACKGROUNDS).index(sight.background)], colours[list(COLOURS).index(seen.colour)]
    new_ground, new_colour, new_shape = ground, colour, seen.shape
    if edit == "recolour":
        new_colour = colours[list(COLOURS).index(words["new_colour"])]
    elif edit == "replace":
        new_shape = words["new_shape"]
    elif edit == "background":
        new_ground = grounds[list(BACKGROUNDS).index(words["new_background"])]
    elif edit == "segmentation":
        new_colour = colours[-1]
    elif edit in ("black and white", "invert"):
        weights = torch.tensor(LUMA_WEIGHTS)
        grounds, colours = (torch.stack([c, (c @ weights).expand(3), 255 - c]) for c in (ground, colour))
        style = 1 if edit == "black and white" else 2
        new_ground, new_colour = grounds[style], colours[style]

    # 2. The object's path in the source, the region where the edit may show it, and what has to be bare ground.
    axis = (colour - ground) / (colour - ground).square().sum()
    coverage = torch.tensordot(axis, source - ground[:, None, None, None], dims=1)
    near = F.avg_pool2d((_smooth(coverage) > 0.4).float(), 5, stride=1, padding=2) > 0
    x, y, area = _place(coverage * near)
    radius = (area / UNIT_AREAS[seen.shape]).sqrt()
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    distance = torch.hypot(columns - x[:, None, None], rows - y[:, None, None])
    region = distance < (REACH * _reach(seen.shape) * radius + EDGE)[:, None, None]
    bare = torch.ones_like(region) if edit == "remove" else ~region
    done = words.get("shape") in (None, seen.shape)
    if edit == "add":
        disc = _added_disc(words, height, width)
        done = all(_shows_addition(source[:, third], edited[:, third], words) for third in thirds)
        # The rest is judged as if nothing were hidden behind the new object.
        edited = torch.where(disc, source, edited)
        bare = bare & ~disc

    # 3. Third by third: the ground, what is on it, and the object's colour and shape.
    angle = 2 * math.pi * motion_share(torch.arange(frames) / frame_rate)
    figure = torch.zeros(frames, height, width)
    new_x, new_y, new_radius = torch.zeros(3, frames)
    for third in thirds:
        clip = edited[:, third]
        third_ground = clip[:, bare[third]].median(dim=1).values
        difference = clip - third_ground[:, None, None, None]
        off_ground = (difference.square().sum(dim=0) > OFF_GROUND**2) & bare[third]
        done = done and _is(third_ground, new_ground, grounds) and bool(off_ground.float().mean() <= MAX_OFF_GROUND)
        if edit == "remove":
            continue
        contrast = _smooth(difference).square().sum(dim=0).sqrt()
        third_colour = _peak(clip, contrast, region[third], 0.3 * area[third].sum())
        right_colour = _is(third_colour, new_colour, torch.cat([colours, new_ground[None]]))
        done = done and right_colour
        # Where a blur leaves no pixel its full colour, the right one measures areas better than the seen one.
        axis = (new_colour if right_colour else third_colour) - third_ground
        axis = axis / axis.square().sum().clamp(min=1)
        figure[third] = torch.tensordot(axis, difference, dims=1) * region[third]
        new_x[third], new_y[third], new_area = _place(figure[third])
        # Only the part of the picture where it can be, for speed.
        box = tuple(slice(int(index.min()), int(index.max()) + 1) for index in torch.nonzero(region[third].any(0)).T)
        third_shape, error = _fit(
            figure[third][:, *box],
            columns[box[1]] - new_x[third][:, None, None],
            rows[box[0]] - new_y[third][:, None, None],
            new_area[:, None, None],
            angle[third][:, None, None] if frames > 1 else None,
        )
        done = done and third_shape == new_shape and error <= MAX_SHAPE_ERROR * new_area.sum().item()
        new_radius[third] = (new_area / UNIT_AREAS[third_shape]).sqrt()
    if edit == "remove":
        return done, True

    # 4. The motion of that figure, whatever its colours, and its path.
    (figure_sight,) = see((255 * figure.clamp(0, 1)).to(torch.uint8).expand(1, 3, -1, -1, -1), frame_rate)
    same_motion = [found.motion for found in figure_sight.objects] == [seen.motion]
    drift = torch.hypot(new_x - x, new_y - y) / side
    growth = (new_radius / radius).log().abs()
    same_path = bool((drift <= MAX_DRIFT).all() and (growth <= MAX_GROWTH).all())
    return done and same_motion, same_motion and same_path


def _added_place(words: dict[str, str], height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How far every pixel `(height, width)` is right of and below the centre of an added object."""
    inset = ADDED_PLACE * min(height, width)
    x = width - inset if "right" in words["corner"] else inset
    y = height - inset if "bottom" in words["corner"] else inset
    dy, dx = torch.meshgrid(torch.arange(height) + 0.5 - y, torch.arange(width) + 0.5 - x, indexing="ij")
    return dx, dy


def _added_disc(words: dict[str, str], height: int, width: int) -> torch.Tensor:
    """Pixels `(height, width)` where an added object may be seen."""
    reach = REACH * _reach(words["new_shape"]) * ADDED_RADIUS * min(height, width) + EDGE
    return torch.hypot(*_added_place(words, height, width)) < reach


def _shows_addition(source: torch.Tensor, edited: torch.Tensor, words: dict[str, str]) -> bool:
    """Whether float clips `(3, frames, height, width)` differ by the new object, in front of what the source has."""
    _, frames, height, width = source.shape
    radius, shape = ADDED_RADIUS * min(height, width), words["new_shape"]
    disc = _added_disc(words, height, width).expand(frames, -1, -1)

    # The colour of what stands out from the source, which may show the other object here.
    palette = torch.tensor(list(COLOURS.values())).float()
    colour = palette[list(COLOURS).index(words["new_colour"])]
    contrast = _smooth(edited - source).square().sum(dim=0).sqrt()
    if not _is(_peak(edited, contrast, disc, 0.3 * UNIT_AREAS[shape] * radius**2 * frames), colour, palette):
        return False

    # Coverage by that colour; where the source has it already, nothing can be seen and all is taken to be right.
    dx, dy = _added_place(words, height, width)
    outline = (0.5 - signed_distance(shape, dx, dy, torch.tensor(radius))).clamp(0, 1)
    axis = colour[:, None, None, None] - source
    length = axis.square().sum(dim=0)
    coverage = ((edited - source) * axis).sum(dim=0) / length.clamp(min=1) * disc
    coverage = torch.where(length > OFF_GROUND**2, coverage, outline)
    area, right_area = coverage.sum(dim=(1, 2)).mean().clamp(min=1e-3), outline.sum()
    if 0.5 * (area / right_area).log().abs() > MAX_GROWTH:
        return False
    shift_x, shift_y = ((coverage.mean(dim=0) * offset).sum() / area for offset in (dx, dy))
    if torch.hypot(shift_x, shift_y) > MAX_DRIFT * min(height, width):
        return False
    seen_shape, error = _fit(coverage, dx[None] - shift_x, dy[None] - shift_y, area)
    return seen_shape == shape and error <= MAX_SHAPE_ERROR * frames * area.item()
