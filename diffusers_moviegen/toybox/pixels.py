"""Batches of Toybox pictures and clips without words, for an autoencoder to learn from.

Varied ones are of every look, before and after edits, and of crowds in any colours, from which a fresh autoencoder
learns several times faster than from the world as it is: most of such a picture has to be coded.
"""

from collections.abc import Callable
from dataclasses import fields

import torch

from .data import LOOKS, Sampler
from .judges.sight import MAX_COLOUR_DISTANCE
from .scenes import Scenes, draw_scenes, draw_two_object_scenes, render, sample_tuple_pairs, sample_tuples
from .vocabulary import BACKGROUNDS, COLOURS, LUMA_WEIGHTS, core_tuples, is_held_out


# The edits that change object and ground at once, on an RGB colour.
_STYLES = {
    "invert": lambda colour: 255 - colour,
    "black and white": lambda colour: (torch.tensor(LUMA_WEIGHTS) @ colour.float()).expand(3),
}


def draw_crowd(count: int, generator: torch.Generator, num_objects: int = 4) -> Scenes:
    """Training scenes of several objects anywhere, overlapping too."""
    by_background = {
        name: [words for words in core_tuples(held_out=False) if words[3] == name] for name in BACKGROUNDS
    }
    backgrounds = [words[3] for words in sample_tuples(count, generator)]
    layers = []
    for _ in range(num_objects):
        choices = [by_background[name] for name in backgrounds]
        picks = torch.rand(count, generator=generator).tolist()
        layers.append(
            draw_scenes([words[int(pick * len(words))] for words, pick in zip(choices, picks, strict=True)], generator)
        )
    crowd = {
        part.name: torch.cat([getattr(layer, part.name) for layer in layers], dim=1)
        for part in fields(Scenes)
        if part.name not in ("background", "camera", "checkered", "letters")
    }
    crowd["x"], crowd["y"] = (torch.rand(count, num_objects, generator=generator) for _ in range(2))
    return Scenes(**crowd, background=layers[0].background)


def draw_varied_scenes(count: int, generator: torch.Generator, height: int, width: int) -> Scenes:
    """Training scenes for pictures of `height` x `width` pixels: core ones, two objects or crowds."""
    kind = torch.rand((), generator=generator)
    if kind < 0.15:
        return draw_scenes(sample_tuples(count, generator), generator)
    if kind < 0.35:
        return draw_two_object_scenes(sample_tuple_pairs(count, generator), generator, height, width)
    return draw_crowd(count, generator)


def draw_looks(
    count: int, num_frames: int, height: int, width: int, frame_rate: float, generator: torch.Generator
) -> torch.Tensor:
    """Training clips with what one object on flat ground has not: words, cameras, checks, persons; or edited ones.

    Where an edit of the whole picture would make an object look like one of a held-out tuple, the clip is the source.
    """
    edited = torch.rand((), generator=generator) < 0.4
    looks = [
        look for look in ("text", "camera", "checkered", "person") if look != "person" or min(height, width) >= 128
    ]
    sampler = Sampler(
        task="edit" if edited else "text_to_video",
        split="train",
        seed=torch.randint(2**31, (), generator=generator).item(),
        height=height,
        width=width,
        num_frames=num_frames,
        frame_rate=frame_rate,
        looks={look: LOOKS[look] for look in looks},
        paired=False,
    )
    columns = sampler({"index": list(range(count))})
    if not edited:
        return torch.stack(columns["video"])
    clips = []
    for source, target, truth in zip(columns["source"], columns["target"], columns["truth"], strict=True):
        words = truth["colour"], truth["shape"], truth["motion"], truth["background"]
        style = _STYLES.get(truth["edit"])
        clips.append(source if style is not None and _looks_held_out(words, style) else target)
    return torch.stack(clips)


def _looks_held_out(words: tuple[str, str, str, str], recolour: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether an object on its ground would be judged, once recoloured, to be one of a held-out tuple."""
    colour, shape, motion, background = words
    seen = []
    for name, palette in ((colour, COLOURS), (background, BACKGROUNDS)):
        distances = torch.tensor(list(palette.values())) - recolour(torch.tensor(palette[name]))
        distances = distances.float().norm(dim=1)
        seen.append(list(palette)[distances.argmin()] if distances.min() <= MAX_COLOUR_DISTANCE else None)
    return None not in seen and is_held_out(seen[0], shape, motion, seen[1])


def vary_colours(video: torch.Tensor, tuples: list[list], generator: torch.Generator) -> torch.Tensor:
    """Half of the clips with their colour channels swapped, a quarter inverted: no hue of the world is favoured.

    A clip in which an object would come to look like one of a held-out tuple stays as it is.

    Args:
        video (`torch.Tensor` of shape `(batch, 3, frames, height, width)`): uint8.
        tuples: for each clip, colour, shape, motion and background of each of its objects.
        generator: on the CPU.
    """
    clips = []
    for clip, objects in zip(video, tuples, strict=True):
        swap = torch.rand((), generator=generator) < 0.5
        order = torch.randperm(3, generator=generator) if swap else torch.arange(3)
        invert = torch.rand((), generator=generator) < 0.25

        def recolour(colours: torch.Tensor, order=order, invert=invert) -> torch.Tensor:
            colours = colours[order.to(colours.device)]
            return 255 - colours if invert else colours

        clips.append(clip if any(_looks_held_out(words, recolour) for words in objects) else recolour(clip))
    return torch.stack(clips)


def draw_pixels(
    count: int,
    num_frames: int,
    height: int,
    width: int,
    frame_rate: float,
    generator: torch.Generator,
    device: str | torch.device,
    varied: bool = False,
    held_out: bool = False,
    weights: dict[str, float] | None = None,
) -> torch.Tensor:
    """Pictures or clips of scenes that `generator` alone decides.

    Args:
        count: how many. Pictures come in pairs, two moments of one scene, so their number is even.
        num_frames: of a clip; 1 draws pictures.
        height, width: pixels.
        frame_rate: frames a second; pictures have none.
        generator: on the CPU.
        device: where to render.
        varied: all looks and edits, and several objects in any colours, of the training split, instead of the core
            scenes of one split.
        held_out: the split of those.
        weights: of those, see [`~scenes.sample_tuples`].

    Returns:
        `torch.Tensor` of shape `(count, 3, num_frames, height, width)`, uint8.
    """
    images = num_frames == 1
    num_scenes = count // 2 if images else count
    if images:
        # The first moment of the motion and another one of its first two seconds.
        moment = 2 * torch.rand((), generator=generator).item() + 1e-3
        num_frames, frame_rate = 2, 1 / moment
    if varied and torch.rand((), generator=generator) < 0.3:
        video = draw_looks(num_scenes, num_frames, height, width, frame_rate, generator).to(device)
    else:
        if varied:
            scenes = draw_varied_scenes(num_scenes, generator, height, width)
        else:
            tuples = sample_tuples(num_scenes, generator, held_out=held_out, weights=weights)
            scenes = draw_scenes(tuples, generator)
        video = render(scenes, num_frames, frame_rate, height, width, device)
        if varied:
            video = vary_colours(video, [scenes.tuples(i) for i in range(num_scenes)], generator)
    return video.transpose(1, 2).flatten(0, 1)[:, :, None] if images else video
