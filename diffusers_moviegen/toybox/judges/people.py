"""The judge of people: who is seen in a clip or picture, and with which expression.

Analysis by synthesis: the head is drawn once for every style, glasses and expression, soft-edged, in units of its own
radius. A picture is resampled into those units, and the drawing whose least-squares colours leave the least residual
says what is seen; Gauss-Newton steps find the place, size and tilt at which it does so best.
"""

import colorsys
import math
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F

from ..people import EXPRESSIONS, HAIR_STYLES, SKINS


_EYE_WHITE, _GLASSES, _MOUTH = (245, 245, 245), (20, 20, 25), (140, 30, 45)

MIN_CONTRAST = 20.0
"""RGB distance from the ground up to which a pixel is ground; from twice that on it is all figure. Skin and hair keep
60 away."""

MIN_AREA = 0.08
"""Share of the picture's shorter side, squared, that a figure covers at least, and half of it in every frame."""

MIN_EXPLAINED = 0.8
"""Share of what differs from the ground that the best drawing explains at least."""

MIN_FEATURE_CONTRAST = 12.0
"""Levels by which the pixels of eyes or mouth are off, on average, if skin is drawn in their place. The least visible
mouth differs from the skin around it by 40."""

MAX_COLOUR_ERROR = 60.0
"""Levels, weighted by `_TRUST`, by which skin, eye whites and mouth may differ from those of the closest person."""

MAX_SKIN_DISTANCE = 40.0
"""RGB distance beyond which a person's skin is none of the tones."""

_TRUST = (1.0, 0.2, 0.2)
"""Weights of skin, eye white and mouth in finding tone and light; the latter two cover few pixels."""

# The window in which heads are compared with drawings, in radii from the face's centre: the distance of its samples
# and its sides. The tallest tuft reaches up to -1.495.
_STEP = 1 / 30
_LEFT, _RIGHT, _TOP, _BOTTOM = -1.2, 1.2, -1.65, 1.15
_BLURS = (0.018, 0.028, 0.042, 0.063, 0.095)
"""Softness of the drawings' edges, the standard deviation in radii. At 128 pixels the first is as rendered, the second
as after a mean over 3 x 3 pixels."""

_PARTS = ("ground", "hair", "skin", "iris", "white", "glasses", "mouth")
_LOOKS = tuple(product((False, True), EXPRESSIONS))


@dataclass
class SeenPerson:
    """Who is seen; every attribute is None where nobody is.

    Attributes:
        skin: index of the skin tone, 0 (lightest) to 5; None also for a person whose skin is none of them.
        hair_hue: degrees, 0 to 360.
        style: "short", "long" or "spiky".
        glasses: whether they are worn.
        expression: "neutral", "smile" or "open".
        tilt: of the head, degrees, positive clockwise.
    """

    skin: int | None = None
    hair_hue: float | None = None
    style: str | None = None
    glasses: bool | None = None
    expression: str | None = None
    tilt: float | None = None


def _grid(step: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample positions `(columns,)` and `(rows,)` in radii."""
    columns, rows = round((_RIGHT - _LEFT) / step), round((_BOTTOM - _TOP) / step)
    return _LEFT + step * (torch.arange(columns) + 0.5), _TOP + step * (torch.arange(rows) + 0.5)


def _draw(style: str, glasses: bool, expression: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Index into `_PARTS` of what is in front at every point; `x` and `y` in radii about the face's centre."""
    drawing = torch.zeros(torch.broadcast_shapes(x.shape, y.shape), dtype=torch.long)

    def paint(part, inside):
        drawing[inside.expand_as(drawing)] = _PARTS.index(part)

    if style == "long":
        paint("hair", ((x.abs() - 0.75).abs() <= 0.25) & (y >= -0.23) & (y <= 1.0))
    paint("skin", torch.hypot(x / 0.8, y) <= 1)
    if style == "spiky":
        base, half_base = 0.97 * math.cos(math.radians(13)), 0.97 * math.sin(math.radians(13))
        for degrees in (-60, -30, 0, 30, 60):
            # In the plane where the cap is a circle every spike is the same isosceles triangle, turned.
            cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            across, up = x / 0.92 * cosine + y / 1.15 * sine, x / 0.92 * sine - y / 1.15 * cosine
            paint("hair", (up >= base) & (across.abs() <= half_base * (1.3 - up) / (1.3 - base)))
    paint("hair", (torch.hypot(x / 0.92, y / 1.15) <= 1) & (y < -0.23))
    eye = torch.hypot(x.abs() - 0.32, y - 0.08)
    paint("white", eye <= 0.16)
    paint("iris", eye <= 0.10)
    if glasses:
        paint("glasses", ((eye - 0.26).abs() <= 0.045) | ((x.abs() <= 0.06) & ((y - 0.08).abs() <= 0.045)))
    if expression == "neutral":
        paint("mouth", (x.abs() <= 0.22) & ((y - 0.55).abs() <= 0.06))
    elif expression == "smile":
        paint("mouth", ((torch.hypot(x, y - 0.38) - 0.30).abs() <= 0.06) & (y >= 0.46))
    else:
        paint("mouth", torch.hypot(x / 0.17, (y - 0.57) / 0.22) <= 1)
    return drawing


@cache
def _drawings(blur: float) -> torch.Tensor:
    """Share of every part in every sample, `(styles, looks, parts, samples)`, edges softened by `blur` radii."""
    columns, rows = _grid(_STEP)
    fine_columns, fine_rows = _grid(_STEP / 4)
    across = torch.softmax(-0.5 * ((columns[:, None] - fine_columns) / blur).square(), dim=1)
    down = torch.softmax(-0.5 * ((rows[:, None] - fine_rows) / blur).square(), dim=1)
    drawings = []
    for style, (glasses, expression) in product(HAIR_STYLES, _LOOKS):
        parts = _draw(style, glasses, expression, fine_columns, fine_rows[:, None])
        shares = F.one_hot(parts, len(_PARTS)).permute(2, 0, 1).float()
        drawings.append((down @ shares @ across.T).flatten(1))
    return torch.stack(drawings).unflatten(0, (len(HAIR_STYLES), len(_LOOKS)))


def _span(drawings: torch.Tensor) -> torch.Tensor:
    """Orthonormal bases `(styles, channels, looks, 5, samples)` of all pictures that drawings can give.

    Ground, hair, skin and iris take any colour; eye white, glasses and mouth have theirs, under any light.
    """
    free, known = drawings.split((4, 3), dim=2)
    palette = torch.tensor([_EYE_WHITE, _GLASSES, _MOUTH]) / 255
    painted = torch.einsum("slpn,pc->scln", known, palette)[..., None]
    free = free.mT[:, None].expand(-1, 3, -1, -1, -1)
    return torch.linalg.qr(torch.cat([free, painted], dim=-1)).Q.mT.contiguous()


@cache
def _bases(blur: float) -> torch.Tensor:
    return _span(_drawings(blur))


@cache
def _silhouettes() -> tuple[torch.Tensor, torch.Tensor]:
    """Area in squared radii, `(styles,)`, and centroid in radii, `(styles, 2)`, of the styles' outlines."""
    outline = 1 - _drawings(_BLURS[0])[:, 0, 0]
    columns, rows = _grid(_STEP)
    area = outline.sum(dim=1)
    points = torch.stack([columns.repeat(len(rows)), rows.repeat_interleave(len(columns))], dim=1)
    return area * _STEP**2, outline @ points / area[:, None]


def _rotation(tilt: torch.Tensor) -> torch.Tensor:
    """Matrices `(poses, 2, 2)` from the head's axes to the picture's."""
    cosine, sine = torch.cos(tilt), torch.sin(tilt)
    return torch.stack([torch.stack([cosine, -sine], dim=-1), torch.stack([sine, cosine], dim=-1)], dim=-2)


def _sample(picture: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Pictures `(batch, 3, height, width)` at points `(batch, rows, columns, 2)` in pixels; 0 outside."""
    size = torch.tensor([picture.shape[-1], picture.shape[-2]])
    return F.grid_sample(picture, 2 * points / size - 1, align_corners=False)


def _straighten(picture, centre, radius, tilt):
    """A picture `(3, height, width)` in the head's axes and units, `(poses, 3, rows, columns)`."""
    columns, rows = _grid(_STEP)
    points = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    points = points.flatten(0, 1) @ (radius[:, None, None] * _rotation(tilt)).mT + centre[:, None]
    points = points.unflatten(1, (len(rows), len(columns)))
    return _sample(picture.expand(len(points), -1, -1, -1), points)


def recognize(video: torch.Tensor) -> list[SeenPerson]:
    """Judges clips, or pictures (clips of one frame), of one person on a flat ground of any colour.

    Args:
        video (`torch.ByteTensor` of shape `(batch, 3, frames, height, width)`): sRGB.

    Returns:
        One `SeenPerson` a clip: what its frames, laid over one another, show. Nobody is seen where the figure is none
        of a person's, or missing in some frames.
    """
    # Clip by clip, the arrays stay in the processor's cache.
    return [_recognize_clip(clip.float()) for clip in video.cpu()]


def _recognize_clip(clip: torch.Tensor) -> SeenPerson:
    _, frames, height, width = clip.shape

    # 1. The ground is what the rim of the picture shows; the figure is what differs from it.
    edges = (clip[:, :, :2], clip[:, :, -2:], clip[..., :2], clip[..., -2:])
    ground = torch.cat([edge.flatten(1) for edge in edges], dim=1).median(dim=1).values[:, None, None]
    figure = clip.transpose(0, 1) - ground
    contrast = F.avg_pool2d(figure, 2).square().sum(dim=1).sqrt()
    mask = (contrast / MIN_CONTRAST - 1).clamp(0, 1)
    areas = 4 * mask.sum(dim=(1, 2))
    if areas.mean() < MIN_AREA * min(height, width) ** 2 or areas.min() < 0.5 * areas.mean():
        return SeenPerson()

    # 2. All frames laid over one another at the figure's centroid, but for those in which the rim cuts it off.
    rows, columns = 2 * torch.arange(mask.shape[1]) + 1.0, 2 * torch.arange(mask.shape[2]) + 1.0
    centroids = torch.stack([mask.sum(dim=1) @ columns, mask.sum(dim=2) @ rows], dim=1) * 4 / areas[:, None]
    rim = mask[:, [0, -1]].sum(dim=(1, 2)) + mask[:, :, [0, -1]].sum(dim=(1, 2))
    whole = rim <= rim.min() + 1
    style_areas, style_centroids = _silhouettes()
    radii = (areas[whole].mean() / style_areas).sqrt()
    reach = math.ceil(2 * radii.max().item())
    offsets = torch.arange(2 * reach) + 0.5 - reach
    offsets = torch.stack(torch.meshgrid(offsets, offsets, indexing="xy"), dim=-1)
    picture = _sample(figure[whole], offsets + centroids[whole][:, None, None]).mean(dim=0) / 255
    ground = ground / 255

    # 3. For every style the place, size and tilt that fit best.
    tilts = torch.deg2rad(torch.tensor([-10.0, 0.0, 10.0]))
    styles, starts = len(HAIR_STYLES), len(tilts)
    tilt, radius = tilts.repeat(styles), radii.repeat_interleave(starts)
    lever = (_rotation(tilt) @ style_centroids.repeat_interleave(starts, dim=0)[..., None])[..., 0]
    centre = reach - radius[:, None] * lever
    straight = _straighten(picture, centre, radius, tilt)
    bases = _bases(_BLURS[3])
    explained = _explain(bases, straight.unflatten(0, (styles, starts)), radius.view(styles, starts), ground)
    best = explained.amax(dim=1).argmax(dim=1) + starts * torch.arange(styles)
    centre, radius, tilt = centre[best], radius[best], tilt[best]
    bases = _bases(_BLURS[2])
    columns, rows = _grid(_STEP)
    for _ in range(5):
        straight = _straighten(picture, centre, radius, tilt)
        explained = _explain(bases, straight[:, None], radius[:, None], ground)
        basis = bases[torch.arange(styles), :, explained[..., 0].argmax(dim=1)]
        down, across = torch.gradient(straight, spacing=_STEP, dim=(2, 3))
        x, y = columns, rows[:, None]
        moves = (across, down, x * across + y * down, x * down - y * across)
        system = torch.stack([straight + ground, *moves], dim=-1).flatten(2, 3)
        system = (system - basis.mT @ (basis @ system)).flatten(1, 2)
        normal = system.mT @ system
        # A flat picture has no slope to follow.
        step = -torch.linalg.solve(normal[:, 1:, 1:] + 1e-6 * torch.eye(4), normal[:, 1:, 0]).clamp(-0.1, 0.1)
        centre = centre + radius[:, None] * (_rotation(tilt) @ step[:, :2, None])[..., 0]
        radius = radius * (1 + step[:, 2])
        tilt = tilt + step[:, 3]

    # 4. The drawing that fits best, its edges as soft as the picture's.
    straight = _straighten(picture, centre, radius, tilt)
    explained = torch.stack(
        [_explain(_bases(blur), straight[:, None], radius[:, None], ground)[..., 0] for blur in _BLURS]
    )
    blur, style, look = (index.item() for index in torch.unravel_index(explained.argmax(), explained.shape))
    if explained.max() < MIN_EXPLAINED * picture.square().sum():
        return SeenPerson()

    # 5. A face has eyes and a mouth, so that one without does not explain it as well.
    drawing = _drawings(_BLURS[blur])[style, look]
    hair, skin, iris, white, mouth = (_PARTS.index(part) for part in ("hair", "skin", "iris", "white", "mouth"))
    for feature in ((iris, white), (mouth,)):
        bare = drawing.clone()
        bare[skin] += bare[list(feature)].sum(dim=0)
        bare[list(feature)] = 0
        span = _span(bare[None, None])
        gain = explained.max() - _explain(span, straight[style][None, None], radius[style].view(1, 1), ground)
        area = drawing[list(feature)].sum() * (radius[style] * _STEP).square()
        if gain < area * (MIN_FEATURE_CONTRAST / 255) ** 2:
            return SeenPerson()

    # 6. Its colours, and the tone and light they come closest to.
    seen = (straight[style] + ground).flatten(1)
    normal = drawing @ drawing.T + 1e-3 * torch.eye(len(drawing))
    colours = 255 * torch.linalg.solve(normal, drawing @ seen.T)
    palette = torch.tensor([(tone, _EYE_WHITE, _MOUTH) for tone in SKINS], dtype=torch.float32)
    expected = (torch.linspace(0.8, 1.2, 41)[:, None, None] * palette[:, None]).clamp(max=255)
    distance = torch.linalg.vector_norm(colours[[skin, white, mouth]] - expected, dim=3) * torch.tensor(_TRUST)
    error = distance.square().sum(dim=2).sqrt()
    tone, light = (index.item() for index in torch.unravel_index(error.argmin(), error.shape))
    if error[tone, light] > MAX_COLOUR_ERROR:
        return SeenPerson()
    if distance[tone, light, 0] > MAX_SKIN_DISTANCE:
        tone = None
    hue = 360 * colorsys.rgb_to_hsv(*colours[hair].clamp(0, 255).tolist())[0]
    glasses, expression = _LOOKS[look]
    return SeenPerson(tone, hue, HAIR_STYLES[style], glasses, expression, math.degrees(tilt[style].item()))


def _explain(bases, straight, radius, ground):
    """How much of what differs from the ground each drawing explains, `(styles, looks, poses)`.

    The unit is squared levels summed over the pixels, whatever part of the picture a pose makes the window cover.

    Args:
        bases: as `_bases` returns them.
        straight: pictures without ground, `(styles, poses, 3, rows, columns)`.
        radius: in pixels, `(styles, poses)`.
        ground: `(3, 1, 1)`.
    """
    seen = (straight + ground).flatten(3)
    matched = (bases.flatten(2, 3) @ seen.permute(0, 2, 3, 1)).unflatten(2, bases.shape[2:4]).square().sum(dim=(1, 3))
    energy = straight.square().sum(dim=(2, 3, 4)) - seen.square().sum(dim=(2, 3))
    return (energy[:, None] + matched) * (radius * _STEP).square()[:, None]
