"""Pairs of clips that differ only in what an edit instruction names.

Source and target follow one trajectory. What an edit leaves alone is equal to the bit, so the mask of where it may
change pixels separates a good edit from a clip drawn anew.
"""

from dataclasses import dataclass, fields

import torch

from .captions import EDIT_INSTRUCTIONS
from .scenes import Scenes, coverage, draw_scenes, trajectories, word_indices
from .vocabulary import BACKGROUNDS, COLOURS, CORNERS, EDIT_TASKS, LUMA_WEIGHTS, SHAPES


EDITS = tuple(EDIT_INSTRUCTIONS)
"""All edits; "black and white" and "invert" share the task "style"."""

MAGENTA = (255, 0, 255)
"""What marks an object, sRGB 0-255."""

ADDED_RADIUS = 0.10
"""Radius of an added object over the picture's shorter side."""

ADDED_PLACE = 0.18
"""Distance of an added object's centre from both edges of its corner, over the picture's shorter side."""


@dataclass
class Edits:
    """A batch of edits.

    Attributes:
        edit (`torch.LongTensor` of shape `(batch,)`): index into `EDITS`.
        source (`Scenes`): one object on a flat ground each.
        target (`Scenes`): the same scenes with the new colour, shape or background where an edit names one. What is
            removed, added, marked or restyled is as in the source.
        added_colour, added_shape, corner (`torch.LongTensor` of shape `(batch,)`): indices into `COLOURS`, `SHAPES`
            and `CORNERS` of what is added, 0 where nothing is.
    """

    edit: torch.Tensor
    source: Scenes
    target: Scenes
    added_colour: torch.Tensor
    added_shape: torch.Tensor
    corner: torch.Tensor

    def __len__(self) -> int:
        return len(self.edit)

    def __getitem__(self, index) -> "Edits":
        """The edits at a slice, list or index tensor; still a batch."""
        return Edits(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def task_of(edit: str) -> str:
    """The task, one of `EDIT_TASKS`, of an edit, one of `EDITS`."""
    if edit not in EDITS:
        raise ValueError(f"unknown edit {edit!r}: use one of {', '.join(EDITS)}")
    return edit if edit in EDIT_TASKS else "style"


def draw_edits(edits: list[dict[str, str]], generator: torch.Generator) -> Edits:
    """Draws what the words of edits leave open: size, place and rhythm of the source's object.

    Args:
        edits: one dictionary an edit, as `captions.sample_caption("edit", ...)` returns: "edit", the source's
            "colour", "shape", "motion" and "background", and "new_colour", "new_shape", "new_background" and "corner"
            where the edit names them.
        generator: source of randomness.

    Raises:
        ValueError: If an edit or another word is unknown.
    """
    edit = word_indices([words["edit"] for words in edits], EDITS, "edit")
    source = draw_scenes(
        [(words["colour"], words["shape"], words["motion"], words["background"]) for words in edits], generator
    )
    target = source[:]
    for name, known in (("colour", COLOURS), ("shape", SHAPES), ("background", BACKGROUNDS)):
        # The new colour and shape of an addition are those of another object.
        new = [words[name] if words["edit"] == "add" else words.get(f"new_{name}", words[name]) for words in edits]
        setattr(target, name, word_indices(new, known, name).view_as(getattr(source, name)))
    nothing = {"new_colour": next(iter(COLOURS)), "new_shape": SHAPES[0], "corner": CORNERS[0]}
    added = [words if words["edit"] == "add" else nothing for words in edits]
    return Edits(
        edit=edit,
        source=source,
        target=target,
        added_colour=word_indices([words["new_colour"] for words in added], COLOURS, "colour"),
        added_shape=word_indices([words["new_shape"] for words in added], SHAPES, "shape"),
        corner=word_indices([words["corner"] for words in added], CORNERS, "corner"),
    )


def render_edits(
    edits: Edits,
    num_frames: int = 16,
    frame_rate: float = 8,
    height: int = 64,
    width: int = 64,
    device: str | torch.device = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Renders sources, targets and where they may differ.

    Args:
        edits: the batch.
        num_frames: frames a clip; 1 gives the picture at the start.
        frame_rate: frames a second: frame `t` shows the time `t / frame_rate`.
        height, width: picture size in pixels.
        device: where to compute.

    Returns:
        Source and target, `torch.ByteTensor` of shape `(batch, 3, frames, height, width)`, sRGB; and the mask,
        `torch.BoolTensor` of shape `(batch, 1, frames, height, width)`, true where the edit may change a pixel: where
        the object of source or target has any coverage ("recolour", "replace", "remove", "segmentation"), where it
        does not cover all of a pixel ("background"), where the new object has any coverage ("add"), or everywhere
        (styles). Everywhere else source and target are equal.
    """
    tau = torch.arange(num_frames, dtype=torch.float32) / frame_rate
    path = [value[:, 0].to(device) for value in trajectories(edits.source, tau, height, width)]
    side = min(height, width)
    # Where an added object is: x, y, radius and angle, the same in every frame.
    near, far_x, far_y = ADDED_PLACE * side, width - ADDED_PLACE * side, height - ADDED_PLACE * side
    places = [
        (near if "left" in corner else far_x, near if "top" in corner else far_y, ADDED_RADIUS * side, 0.0)
        for corner in CORNERS
    ]
    places = torch.tensor(places, device=device)[edits.corner.to(device), :, None]
    palette = torch.tensor([*COLOURS.values(), MAGENTA], dtype=torch.float32, device=device)
    grounds = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=device)
    luma_weights = torch.tensor(LUMA_WEIGHTS, device=device)[:, None, None, None]

    def ground(scenes: Scenes) -> torch.Tensor:
        return grounds[scenes.background.to(device)][:, :, None, None, None]

    def paint(pixels: torch.Tensor, colour: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return torch.lerp(pixels, palette[colour.to(device)][:, :, None, None, None], alpha[:, None])

    shape = (len(edits), 3, num_frames, height, width)
    source, target = torch.empty(2, *shape, dtype=torch.uint8, device=device)
    mask = torch.empty(shape[0], 1, *shape[2:], dtype=torch.bool, device=device)
    # A few clips at a time: what is computed in float32 stays small enough for the processor's cache.
    for start in range(0, len(edits), 8):
        chunk = slice(start, start + 8)
        part, now = edits[chunk], [value[chunk] for value in path]
        replaced, background, removed, added, grey, inverted, marked = (
            torch.nonzero(part.edit == EDITS.index(name)).flatten()
            for name in ("replace", "background", "remove", "add", "black and white", "invert", "segmentation")
        )
        alpha = coverage(part.source.shape[:, 0], *now, height, width)
        clips = paint(ground(part.source), part.source.colour[:, 0], alpha).round_()
        source[chunk] = clips

        new_alpha, new_colour = alpha.clone(), part.target.colour[:, 0].clone()
        new_alpha[removed] = 0
        if len(replaced):
            new_path = (value[replaced] for value in now)
            new_alpha[replaced] = coverage(part.target.shape[replaced, 0], *new_path, height, width)
        new_colour[marked] = len(COLOURS)
        new_clips = paint(ground(part.target), new_colour, new_alpha)
        changes = (alpha > 0) | (new_alpha > 0)
        changes[background] = alpha[background] < 1
        if len(added):
            added_alpha = coverage(part.added_shape[added], *places[chunk][added].unbind(1), height, width)
            new_clips[added] = paint(new_clips[added], part.added_colour[added], added_alpha)
            changes[added] = added_alpha > 0
        new_clips[grey] = (clips[grey] * luma_weights).sum(dim=1, keepdim=True).expand_as(clips[grey])
        new_clips[inverted] = 255 - clips[inverted]
        changes[grey], changes[inverted] = True, True
        target[chunk] = new_clips.round_()
        mask[chunk] = changes[:, None]
    return source, target, mask
