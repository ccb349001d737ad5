"""The judge of sight: which objects move how in front of which background, under which camera, and what is written."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..font import GLYPHS
from ..scenes import UNIT_AREAS, signed_distance
from ..vocabulary import BACKGROUNDS, COLOURS, SHAPES, SPINNING_SHAPES


MAX_COLOUR_DISTANCE = 70.0
"""RGB distance beyond which a colour is none of the world's."""

MIN_CONTRAST = 40.0
"""RGB distance to the ground from which a pixel can belong to an object; the closest colours, white and the light
cells of a pink ground, are 60 apart."""

MIN_AREA = 0.004
"""Share of the picture that objects cover at least, a quarter of it in every frame; the smallest star in a picture of
3 : 2 covers 0.43 %, on average over its clip more."""

MAX_SHAPE_ERROR = 0.45
"""Pixels misjudged over the object's area beyond which a figure is none of the world's shapes."""

MAX_STRAY = 0.2
"""Pixels off the ground but away from the object, over its area, beyond which the figure is more than one shape."""

MIN_CHECKER_FIT = 0.5
"""Correlation of the ground with a checker pattern, 0 to 1, from which it is checkered."""

MIN_TEXT_FIT = 0.77
"""Share of the energy at the place of the text that letters explain, from which it is a word. Words blurred over 5 x 5
pixels give 0.79 and more, shapes that rest in their place up to 0.75."""

MAX_COLOUR_NOISE = 30.0
"""RGB distance from the line between ground and colour beyond which a pixel has another colour."""

MAX_SECOND_COLOUR = 0.03
"""Share of a figure off the line from ground to colour beyond which it may be two objects."""

MAX_OTHER_COLOURS = 0.07
"""The same share beyond which a figure in one place has many colours, as a person has."""

MIN_OBJECT_SHARE = 0.04
"""Share of the coloured pixels that make a second object; small stars that grow beside large squares have 8 %."""

MIN_TOUCH = 0.3
"""Neighbouring pixels of two colours over the root of the smaller area, from which they belong to one object."""

MIN_SIDE = 0.5
"""The same of two regions next to one another; objects that come close touch in a few blurred pixels."""

MIN_DISTANCE = 0.85
"""Distance of two regions over the sum of the radii of discs as large, up to which they belong to one object.
Circumscribed circles that do not meet give more than 1, the halves of a disc 0.6."""


SAME_COLUMN = 0.1
"""Pixels between the places of two objects below which they start in one column, as two that move left do."""


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
        objects: the objects seen, from left to right at the first frame, the upper one first where two start in one
            column; empty for an empty picture.
        background: word of the vocabulary, or None; of a checkered ground its darker colour.
        checkered: whether the ground is checkered.
        text: the word written, one to three capital letters, or None.
        camera: word of `CAMERAS`, or None if the camera stands still or there is no pattern that shows it move.
        speed: how fast the one object moves on the plane, in widths (up and down: heights) a second; None for a single
            frame and for any other number of objects.
    """

    objects: list[SeenObject]
    background: str | None
    checkered: bool = False
    text: str | None = None
    camera: str | None = None
    speed: float | None = None


@dataclass
class _Ground:
    """Ground of a clip. What differs from it is `clip - colour`; the plane's `x` lies at `centre + scale (x - centre +
    shift)` in the picture, with one shift in pixels and one scale a frame."""

    colour: torch.Tensor
    background: str | None
    checkered: bool = False
    camera: str | None = None
    shift: torch.Tensor | float = 0.0
    scale: torch.Tensor | float = 1.0


def _nearest(colour: torch.Tensor, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = torch.linalg.vector_norm(torch.tensor(list(palette.values())) - colour, dim=1)
    return list(palette)[distances.argmin()] if distances.min() <= MAX_COLOUR_DISTANCE else None


def _trend(values: torch.Tensor, time: torch.Tensor) -> tuple[float, float]:
    """Slope of the least-squares line through `(frames,)` values, and the RMS left beside it."""
    time = time - time.mean()
    slope = (values * time).sum() / time.square().sum().clamp(min=1e-6)
    residual = values - values.mean() - slope * time
    return slope.item(), residual.square().mean().sqrt().item()


def _smooth(values: torch.Tensor, size: int = 3) -> torch.Tensor:
    """Mean over `size` x `size` pixels of `(frames, height, width)`; several times faster than `avg_pool2d`."""
    _, height, width = values.shape
    values = F.pad(values[None], (size // 2,) * 4, mode="replicate")[0]
    values = sum(values[:, i : i + height] for i in range(size))
    return sum(values[:, :, i : i + width] for i in range(size)) / size**2


def _place(coverage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Area in pixels and centre `x`, `y` of `(frames, height, width)` coverage in every frame."""
    _, height, width = coverage.shape
    area = coverage.sum(dim=(1, 2)).clamp(min=1e-3)
    x = coverage.sum(dim=1) @ (torch.arange(width) + 0.5) / area
    y = coverage.sum(dim=2) @ (torch.arange(height) + 0.5) / area
    return area, x, y


def see(video: torch.Tensor, frame_rate: float = 8) -> list[Sight]:
    """Judges clips, or pictures (clips of one frame), of their first two seconds.

    Args:
        video (`torch.ByteTensor` of shape `(batch, 3, frames, height, width)`): sRGB.
        frame_rate: frames a second; how far something moves decides whether it moves.

    Returns:
        One `Sight` a clip. The motion of a single frame is "stays still". An object that is missing in some frames or
        turns counter-clockwise has no motion of the vocabulary, one beside which there is something else no shape, one
        of many colours neither colour nor shape.
    """
    # Clip by clip, the arrays stay in the processor's cache. After two seconds every motion runs backwards.
    return [_see_clip(clip.float(), frame_rate) for clip in video[:, :, : int(2 * frame_rate) + 1].cpu()]


def _find_ground(clip: torch.Tensor, frame_rate: float) -> _Ground | None:
    """The ground is what the rim of the picture shows; None if that is nothing in particular."""
    edges = (clip[:, :, :2], clip[:, :, -2:], clip[..., :2], clip[..., -2:])
    rim = torch.cat([edge.flatten(1) for edge in edges], dim=1)
    middle = rim.median(dim=1).values
    flat = (rim - middle[:, None]).square().sum(dim=0).sqrt() < MAX_COLOUR_DISTANCE

    # Of the two colours of every checkered ground, the nearer one counts.
    dark = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)
    light = dark + 0.25 * (255 - dark)
    sparse = rim[:, ::3].T
    distance = torch.minimum(torch.cdist(sparse, dark), torch.cdist(sparse, light)).clamp(max=MAX_COLOUR_DISTANCE)
    best = distance.mean(dim=0).argmin()
    step = (light - dark)[best]
    # The two colours may be a little off. Half the pixels have one and half the other, which leaves their mean and
    # deviation; without cells there is next to no deviation along the step from dark to light.
    ground = sparse[distance[:, best] < MAX_COLOUR_DISTANCE]
    if len(ground) > 0:
        middle_of_two = ground.mean(dim=0)
        deviation = ((ground - middle_of_two) @ step / step.square().sum()).square().mean().sqrt()
        if deviation > 0.28:
            checkers = _find_checkers(
                clip, frame_rate, middle_of_two - deviation * step, middle_of_two + deviation * step
            )
            if checkers is not None:
                return checkers
    if flat.float().mean() < 0.5:
        return None
    return _Ground(middle[:, None, None, None], _nearest(middle, BACKGROUNDS))


def _find_checkers(clip: torch.Tensor, frame_rate: float, dark: torch.Tensor, light: torch.Tensor) -> _Ground | None:
    """The checkered ground of two colours, and how the camera moves over it; None if there is no such pattern."""
    _, frames, height, width = clip.shape
    side = min(height, width)
    cell = side / 4
    share = torch.arange(frames) / frame_rate / 2

    # Pixels from -1 (dark) to 1 (light); those of other colours do not count.
    step = light - dark
    level = torch.tensordot(step / step.square().sum(), clip - dark[:, None, None, None], dims=1)
    nearest = dark[:, None, None, None] + level.clamp(0, 1) * step[:, None, None, None]
    weight = ((clip - nearest).square().sum(dim=0) < MAX_COLOUR_DISTANCE**2).float()
    pattern = (2 * level - 1).clamp(-1, 1) * weight

    def sign(coordinates):
        """1 in the even rows or columns of cells, -1 in the odd ones."""
        return 1.0 - 2.0 * ((coordinates / cell).floor() % 2)

    # Correlation of every frame with the plane at every shift and at every scale. Light cells are those of which one
    # coordinate is even and the other odd.
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    shifts = torch.arange(-int(0.6 * width), int(0.6 * width) + 1).float()
    scales = torch.linspace(0.7, 1.7, 101)
    along = -torch.einsum("tyx,y->tx", pattern, sign(rows))
    by_shift = along @ sign(columns[:, None] - shifts)
    by_row = torch.einsum("tyx,ys->tsx", pattern, sign((rows[:, None] - height / 2) / scales + height / 2))
    by_scale = -(by_row * sign((columns[:, None] - width / 2) / scales + width / 2).T).sum(dim=2)

    def best_line(table, values, starts, changes):
        """Of all straight lines through the table, the start, the change over u and the score of the highest one."""
        lines = starts[:, None, None] + changes[:, None] * share
        index = ((lines - values[0]) / (values[1] - values[0])).round().long().clamp(0, len(values) - 1)
        scores = table[torch.arange(frames), index].sum(dim=2)
        start, change = divmod(scores.argmax().item(), len(changes))
        return starts[start], changes[change] if frames > 1 else torch.tensor(0.0), scores.max()

    rates = torch.linspace(-1.5, 1.5, 61)
    pan_start, pan, pan_score = best_line(by_shift, shifts, torch.linspace(-0.5, 0.5, 17) * cell, rates * 0.25 * width)
    zoom_start, zoom, zoom_score = best_line(by_scale, scales, torch.linspace(0.9, 1.5, 31), rates * 0.4)
    # The largest objects leave almost half of the picture free.
    if max(pan_score, zoom_score) < MIN_CHECKER_FIT * weight.sum() or weight.mean() < 0.25:
        return None

    # Half of what the words mean decides whether the camera moves.
    camera = None
    shift, scale = torch.zeros(frames), torch.ones(frames)
    if pan_score >= zoom_score:
        shift = pan_start + pan * share
        if abs(pan) > 0.5 * 0.25 * width:
            camera = "Pan left" if pan > 0 else "Pan right"
    else:
        scale = zoom_start + zoom * share
        if abs(zoom) > 0.5 * 0.4:
            camera = "Zoom in" if zoom > 0 else "Zoom out"
    column_sign = sign((columns - width / 2) / scale[:, None] + width / 2 - shift[:, None])
    row_sign = sign((rows - height / 2) / scale[:, None] + height / 2)
    is_light = (column_sign[:, None, :] != row_sign[:, :, None]).float()

    # The two colours as they are in this clip, and between them everything wherever two cells meet.
    light = (clip * weight * is_light).sum(dim=(1, 2, 3)) / (weight * is_light).sum().clamp(min=1)
    dark = (clip * weight * (1 - is_light)).sum(dim=(1, 2, 3)) / (weight * (1 - is_light)).sum().clamp(min=1)
    step = light - dark
    level = torch.tensordot(step / step.square().sum().clamp(min=1), clip - dark[:, None, None, None], dims=1)
    seam = 1 + 2 * (side // 64)
    around = _smooth(is_light, seam)
    lowest, highest = (around > 1 - 1e-3).float(), (around > 1e-3).float()
    colour = dark[:, None, None, None] + level.clamp(lowest, highest) * step[:, None, None, None]
    return _Ground(colour, _nearest(dark, BACKGROUNDS), True, camera, shift, scale)


def _read_word(ground: _Ground, difference: torch.Tensor) -> tuple[str | None, tuple[slice, slice]]:
    """Reads what stands at the place of the text for the whole clip, and says which rows and columns that is."""
    _, _, height, width = difference.shape
    pixel = max(1, round(0.2 * min(height, width) / 7))
    bottom = math.floor(0.96 * height)
    lefts = [math.floor((width - (6 * count - 1) * pixel) / 2) for count in (1, 2, 3)]
    slack = 2
    rows = slice(bottom - 7 * pixel - slack, bottom + slack)
    columns = slice(lefts[2] - slack, lefts[2] + 17 * pixel + slack)
    found = difference[:, :, rows, columns].median(dim=1).values
    energy = found.square().sum()
    if (found.square().sum(dim=0) > MIN_CONTRAST**2).float().mean() < 0.03:
        return None, (rows, columns)
    # Ink is white on dark grounds and black on light ones; what has another colour tells against a word.
    paper = ground.colour.mean(dim=(1, 2, 3))
    ink = torch.tensor(COLOURS["white"] if paper.mean() < 95 else BACKGROUNDS["black"]) - paper
    band = F.pad(torch.tensordot(ink / ink.square().sum().sqrt(), found, dims=1), (slack,) * 4)
    glyphs = GLYPHS.float().repeat_interleave(pixel, 1).repeat_interleave(pixel, 2)
    glyphs = F.pad(glyphs, (slack,) * 4)
    best, word = MIN_TEXT_FIT * energy, None
    # Letters are read best by templates as soft as they are.
    for softness in (1, 3):
        templates = _smooth(glyphs, softness)
        templates = templates / templates.square().sum(dim=(1, 2), keepdim=True).sqrt()
        gains, letters = F.conv2d(band[None, None], templates[:, None])[0].clamp(min=0).max(dim=0)
        gains, letters = gains.tolist(), letters.tolist()
        for count, left in zip((1, 2, 3), lefts, strict=True):
            for row in range(2 * slack + 1):
                for column in range(left - lefts[2], left - lefts[2] + 2 * slack + 1):
                    slots = [column + 6 * pixel * position for position in range(count)]
                    strengths = [gains[row][slot] for slot in slots]
                    fit = sum(strength**2 for strength in strengths)
                    if fit > best and min(strengths) > 0.4 * max(strengths):
                        best, word = fit, "".join(chr(65 + letters[row][slot]) for slot in slots)
    return word, (rows, columns)


def _see_clip(clip: torch.Tensor, frame_rate: float) -> Sight:
    _, frames, height, width = clip.shape

    # 1. The ground, and what is written on the picture.
    ground = _find_ground(clip, frame_rate)
    if ground is None:
        return Sight([], None)
    difference = clip - ground.colour
    word, (rows, columns) = _read_word(ground, difference)
    if word is not None:
        difference[:, :, rows, columns] = 0
    sight = Sight([], ground.background, ground.checkered, word, ground.camera)

    # 2. What is not ground is one figure, unless that makes no sense and there are several colours in several places.
    square = difference.square().sum(dim=0)
    contrast = _smooth(square.sqrt())
    foreground = contrast > MIN_CONTRAST
    if foreground.float().mean() < MIN_AREA:
        return sight
    figures = [_see_figure(clip, ground, contrast, difference, foreground, frame_rate)]
    if figures[0].seen.shape is None or figures[0].strange > MAX_SECOND_COLOUR:
        regions = _tell_apart(ground, difference, square.sqrt() > MIN_CONTRAST)
        if len(regions) > 1:
            figures = [
                _see_figure(clip, ground, contrast * region, difference * region, foreground & region, frame_rate)
                for region in regions
                if (foreground & region).any()
            ]
    figures.sort(key=lambda figure: figure.x)
    if len(figures) == 2 and figures[1].x - figures[0].x < SAME_COLUMN and figures[1].y < figures[0].y:
        figures.reverse()
    sight.objects = [figure.seen for figure in figures]
    if len(figures) == 1 and frames > 1:
        sight.speed = figures[0].speed
    return sight


def _tell_apart(ground: _Ground, difference: torch.Tensor, foreground: torch.Tensor) -> list[torch.Tensor]:
    """Splits the picture into one region an object: every pixel is labelled with the colour of the vocabulary that it
    may be a mixture of, and labels that lie in one place belong to one object."""
    pixels = difference[:, foreground].T
    grounds = ground.colour.expand_as(difference)[:, foreground].T
    axes = torch.tensor(list(COLOURS.values()), dtype=torch.float32) - grounds[:, None]
    coverage = (axes * pixels[:, None]).sum(dim=2) / axes.square().sum(dim=2)
    residual, label = (pixels[:, None] - coverage[..., None] * axes).square().sum(dim=2).min(dim=1)
    solid = coverage.gather(1, label[:, None])[:, 0] > 0.5
    label[residual > MAX_COLOUR_DISTANCE**2] = len(COLOURS)
    labels = torch.full(foreground.shape, -1)
    labels[foreground] = torch.where(solid, label, -1)

    # From the most frequent label on, each starts a region of its own or joins the one it touches most.
    regions: list[torch.Tensor] = []
    for name in label[solid].bincount().argsort(descending=True).tolist():
        part = labels == name
        around = _smooth(part.float()) > 1e-3
        touching = [(around & region).sum() for region in regions]
        if touching and max(touching) > MIN_TOUCH * part.sum(dim=(1, 2)).float().sqrt().sum():
            regions[touching.index(max(touching))] |= part
        elif part.sum() > MIN_OBJECT_SHARE * solid.sum():
            regions.append(part)
    if len(regions) < 2:
        return regions
    owner = torch.stack([_smooth(region.float(), 5) for region in regions]).argmax(dim=0)

    # Regions of which whole sides meet, though not in pixels of clear colours, and those inside one another are one
    # figure too.
    objects: list[torch.Tensor] = []
    for index in range(len(regions)):
        region = foreground & (owner == index)
        near, area, x, y = _smooth(region.float()) > 1e-3, *_place(region.float())
        apart = []
        for other in objects:
            other_area, other_x, other_y = _place(other.float())
            touch = (near & other).sum() / torch.minimum(area, other_area).sqrt().sum()
            distance = torch.hypot(x - other_x, y - other_y) / (area.sqrt() + other_area.sqrt()) * math.sqrt(math.pi)
            if touch > MIN_SIDE or distance.median() < MIN_DISTANCE:
                region = region | other
            else:
                apart.append(other)
        objects = [*apart, region]
    # What surrounds an object belongs to its edge.
    nearest = torch.stack([_smooth(region.float(), 5) for region in objects]).argmax(dim=0)
    return [nearest == index for index in range(len(objects))]


@dataclass
class _Figure:
    seen: SeenObject
    strange: float
    x: float
    y: float
    speed: float


def _see_figure(
    clip: torch.Tensor,
    ground: _Ground,
    contrast: torch.Tensor,
    difference: torch.Tensor,
    foreground: torch.Tensor,
    frame_rate: float,
) -> _Figure:
    frames, height, width = contrast.shape

    # 1. The colour, which what is farthest from the ground shows best, and coverage of every pixel by it.
    clearest = contrast[foreground].kthvalue(max(1, int(0.9 * foreground.sum()))).values
    core = contrast >= (0.9 * clearest).clamp(min=MIN_CONTRAST)
    colour = clip[:, core].mean(dim=1)
    axis = colour[:, None, None, None] - ground.colour
    coverage = (axis * difference).sum(dim=0) / axis.square().sum(dim=0).clamp(min=1)
    off = difference - coverage * axis
    strange = (off[:, foreground].square().sum(dim=0).sqrt() > MAX_COLOUR_NOISE).float().mean().item()
    if strange > MAX_SECOND_COLOUR:
        # Unlike another colour, noise averages out.
        off = _smooth(off.flatten(0, 1)).view_as(off)
        strange = (off[:, foreground].square().sum(dim=0).sqrt() > MAX_COLOUR_NOISE).float().mean().item()
    is_person = strange > MAX_OTHER_COLOURS
    if is_person:
        coverage = foreground.float()

    # 2. Place and area, near the object only so that noise elsewhere does not add up.
    near = _smooth((_smooth(coverage) > 0.4).float(), 5) > 1e-3
    coverage = coverage * near
    area, x, y = _place(coverage)

    # 3. The frames that show all of it tell more about it than those it is leaving. Persons leave with their hair.
    cut = coverage[:, (0, -1)].sum(dim=(1, 2)) + coverage[:, :, (0, -1)].sum(dim=(1, 2))
    whole = cut < 1
    if is_person or whole.sum() < max(2, frames / 5):
        whole[:] = True
    chosen = torch.nonzero(whole)[:, 0]
    present = area.min() >= MIN_AREA / 4 * height * width
    first = x[0].item(), y[0].item()
    time = chosen / frame_rate
    coverage, near, area, x, y = coverage[chosen], near[chosen], area[chosen], x[chosen], y[chosen]

    # 4. The shape, upright or turning, whose outline fits best with the centre and area measured. Only pixels on the
    # object or within its largest possible outline matter.
    dx, dy = torch.arange(width) + 0.5 - x[:, None], torch.arange(height) + 0.5 - y[:, None]
    reach = (area / min(UNIT_AREAS.values())).sqrt() + 1
    within = dx.square()[:, None, :] + dy.square()[:, :, None] < reach.square()[:, None, None]
    frame, row, column = torch.nonzero(near | within, as_tuple=True)
    pixel_coverage, pixel_area = coverage[frame, row, column], area[frame]
    dx, dy = dx[frame, column], dy[frame, row]
    turn = math.pi * time
    cosine, sine = torch.cos(turn)[frame], torch.sin(turn)[frame]
    hypotheses = [(shape, 0) for shape in SHAPES]
    hypotheses += [(shape, turns) for shape in SPINNING_SHAPES for turns in (1, -1)] if frames > 1 else []
    errors = []
    for shape, turns in hypotheses:
        turned = (dx * cosine + turns * dy * sine, dy * cosine - turns * dx * sine) if turns else (dx, dy)
        outline = (0.5 - signed_distance(shape, *turned, (pixel_area / UNIT_AREAS[shape]).sqrt())).clamp(0, 1)
        errors.append((pixel_coverage - outline).abs().sum())
    error, best = torch.stack(errors).min(dim=0)
    shape, turns = hypotheses[best]
    stray = (foreground[chosen] & ~near).sum()
    if is_person or error > MAX_SHAPE_ERROR * area.sum() or stray > MAX_STRAY * area.sum():
        shape = None

    # 5. The motion, from how place and area on the plane change over the clip.
    if isinstance(ground.scale, torch.Tensor):
        scale, shift = ground.scale[chosen], ground.shift[chosen]
        x, y = (x - width / 2) / scale + width / 2 - shift, (y - height / 2) / scale + height / 2
        area = area / scale.square()
    speed_x, _ = _trend(x / width, time)
    speed_y, unsteady = _trend(y / height, time)
    growth, _ = _trend(area.clamp(min=1).log(), time)
    # A quarter of the picture a second is what "moves" means, an eighth for persons, whose colours are none of the
    # vocabulary; half of that decides.
    name = None if is_person else _nearest(colour, COLOURS)
    reluctance = 0.5 if name is None else 1.0
    if frames == 1:
        motion = "stays still"
    elif not present:
        motion = None
    elif unsteady > 0.03 * reluctance:
        motion = "bounces"
    elif max(abs(speed_x), abs(speed_y)) > 0.125 * reluctance:
        if abs(speed_x) > abs(speed_y):
            motion = "moves right" if speed_x > 0 else "moves left"
        else:
            motion = "moves down" if speed_y > 0 else "moves up"
    elif abs(growth) > 0.2:
        motion = "grows" if growth > 0 else "shrinks"
    else:
        motion = {0: "stays still", 1: "spins", -1: None}[turns]
    return _Figure(SeenObject(name, shape, motion), strange, *first, max(abs(speed_x), abs(speed_y)))
