"""Train the vision half of the Toybox checkpoint's CLIP (the role of MetaCLIP) against its frozen text half.

Backbones are trained on the features of `text_encoder_2`, which therefore stays as it is. `image_encoder` goes on from
the one that was trained together with it and learns what later models read from a picture, never from a held-out
tuple:

- matching pictures with the frozen features of their captions, in batches with groups of pictures that differ in
  nothing but the shape or the colour of their object, and with captions of swapped colours;
- telling what captions leave out: auxiliary linear heads predict what was drawn (shape, colour, ground; place, size
  and turn; skin, hair, glasses and expression of people), from the embedding of a picture with one object or person,
  and for each object or person from the features of any patch inside it.

The heads, and the projection of the text features to the width of the embeddings, are thrown away: neither is part of
a pipeline.

    python training_examples/train_image_encoder.py --text_encoders text_encoders --output_dir image_encoder
"""

import math
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from diffusers_moviegen.toybox import captions, people, scenes
from diffusers_moviegen.toybox.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    PERSON_MOTIONS,
    SHAPES,
    core_tuples,
    is_held_out,
)
from diffusers_moviegen.training import check_positive, run_script


TUPLES = {motion: core_tuples(held_out=False, motions=(motion,)) for motion in MOTIONS}
"""Training tuples of one object, by motion."""

CLASSES = {
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "background": len(BACKGROUNDS),
    "checkered": 2,
    "skin": len(people.SKINS),
    "style": len(people.HAIR_STYLES),
    "glasses": 2,
    "expression": len(people.EXPRESSIONS),
}
"""What the auxiliary heads tell apart, and how many there are of each."""

SYMMETRIES = {"square": 4, "triangle": 3, "star": 5}
"""Turns after which a shape looks the same are one in so many of a full circle."""

VALUES = {"x": 1, "y": 1, "radius": 1, "tilt": 1, "hair": 3} | {f"turn of {shape}": 2 for shape in SYMMETRIES}
"""What the auxiliary heads estimate, with a variance near 1, and of how many numbers it consists."""

UNKNOWN = -100
"""Class of a picture that has none; an unknown value is NaN."""

MOMENTS = 4
"""Frames of a clip that are rendered for one to be taken, so that pictures of a batch are of different times."""

PERSON_SIDE = 128
"""Pixels of the pictures of people, before they are resized as users' pictures are."""


@dataclass
class Arguments:
    """Arguments of this script."""

    text_encoders: str = field(
        metadata={"help": "Folder that train_text_encoders.py wrote, or of a pipeline with an image_encoder."}
    )
    output_dir: str = field(
        metadata={
            "help": "Folder to write image_encoder/ and image_processor/ in; may be that of --text_encoders itself."
        }
    )
    steps: int = field(default=2200, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=64, metadata={"help": "Pictures a step; a multiple of 8."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate; falls to zero by a cosine."})
    log_every: int = field(default=100, metadata={"help": "Steps between progress lines."})
    seed: int = field(default=0, metadata={"help": "Seed of captions and pictures."})

    def __post_init__(self):
        check_positive(self, ("steps", "batch_size", "log_every"))
        if self.batch_size % 8:
            raise ValueError(f"--batch_size is {self.batch_size}: use a multiple of 8, for the mixture of pictures.")


@dataclass
class Pictures:
    """
    A batch of pictures and what is known of each.

    Attributes:
        pixels (`torch.FloatTensor` of shape `(batch, 3, side, side)`): sRGB, 0-255.
        texts: captions; `None` for pictures that have none.
        swapped_texts: captions with the colours of two objects swapped; `None` where that would say nothing wrong.
        keys: equal for pictures of which captions say the same, but for motion and camera, which no picture shows.
        labels (`dict[str, torch.Tensor]`): by name, one of `CLASSES` of shape `(batch,)` or one of `VALUES` of shape
            `(batch, numbers)`; `UNKNOWN` or NaN where a picture has none.
        objects (`dict[str, torch.Tensor]`): labels of every object and person, of shape `(objects, ...)`, with the
            number of the "picture" it is in and the "circle" around it: centre and radius over the picture's side,
            NaN where they are not known.
    """

    pixels: torch.Tensor
    texts: list[str | None]
    swapped_texts: list[str | None]
    keys: list[tuple]
    labels: dict[str, torch.Tensor]
    objects: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.texts)


def join_labels(parts: list[dict[str, torch.Tensor]], counts: list[int]) -> dict[str, torch.Tensor]:
    """Labels of several batches of `counts` members, each of which may lack some that others have."""
    labels = {}
    for name in (*CLASSES, *VALUES):
        shape, unknown = ((), UNKNOWN) if name in CLASSES else ((VALUES[name],), math.nan)
        labels[name] = torch.cat(
            [part.get(name, torch.full((count, *shape), unknown)) for part, count in zip(parts, counts, strict=True)]
        )
    return labels


def join(parts: list[Pictures]) -> Pictures:
    """One batch of several."""
    objects = [part.objects for part in parts]
    starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
    return Pictures(
        pixels=torch.cat([part.pixels for part in parts]),
        texts=[text for part in parts for text in part.texts],
        swapped_texts=[text for part in parts for text in part.swapped_texts],
        keys=[key for part in parts for key in part.keys],
        labels=join_labels([part.labels for part in parts], [len(part) for part in parts]),
        objects=join_labels(objects, [len(part["picture"]) for part in objects])
        | {
            "picture": torch.cat([part["picture"] + start for part, start in zip(objects, starts, strict=True)]),
            "circle": torch.cat([part["circle"] for part in objects]),
        },
    )


def place_labels(circle: torch.Tensor) -> dict[str, torch.Tensor]:
    """Labels of places and sizes `(objects, 3)`: x, y and radius over the picture's side."""
    x, y, radius = circle[:, :, None].unbind(1)
    return {"x": (x - 0.5) / 0.1, "y": (y - 0.5) / 0.1, "radius": (radius - 0.16) / 0.05}


def photograph(
    drawn: scenes.Scenes, moments: list[int], side: int, rng: random.Random
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    One frame of a clip of each scene, at any time of its first two seconds.

    Args:
        drawn: the scenes.
        moments: which of `MOMENTS` frames to take of each scene.
        side: height and width in pixels.
        rng: source of the time between frames.

    Returns:
        Pictures `(batch, 3, side, side)`, their labels and those of their objects.
    """
    frame_rate = 1 / rng.uniform(0.1, 2 / (MOMENTS - 1))
    rows, moments = torch.arange(len(drawn)), torch.tensor(moments)
    pixels = scenes.render(drawn, MOMENTS, frame_rate, side, side)[rows, :, moments].float()
    paths = torch.stack(scenes.trajectories(drawn, torch.arange(MOMENTS) / frame_rate, side, side), dim=-1)
    x, y, radius, angle = paths[rows, :, moments].flatten(0, 1).unbind(-1)

    num_objects = drawn.colour.shape[1]
    circle = torch.stack([x, y, radius], dim=1) / side
    # A camera has moved the object from where it is on its plane.
    circle[(drawn.camera >= 0).repeat_interleave(num_objects)] = math.nan
    objects = {"colour": drawn.colour.flatten(), "shape": drawn.shape.flatten()} | place_labels(circle)
    for shape, symmetry in SYMMETRIES.items():
        turn = torch.stack([torch.cos(symmetry * angle), torch.sin(symmetry * angle)], dim=1)
        objects[f"turn of {shape}"] = torch.where(drawn.shape.reshape(-1, 1) == SHAPES.index(shape), turn, math.nan)
    labels = {"background": drawn.background, "checkered": drawn.checkered.long()}
    if num_objects == 1:
        labels |= objects
    return pixels, labels, objects | {"picture": rows.repeat_interleave(num_objects), "circle": circle}


def say_motion(motion: str, rng: random.Random) -> str | None:
    """What a caption says of a motion: half of those of what stays still are of pictures."""
    return None if motion == "stays still" and rng.random() < 0.5 else motion


def draw_groups(count: int, side: int, generator: torch.Generator, rng: random.Random) -> Pictures:
    """Pictures in groups of up to five that differ in the shape or the colour of their object alone."""
    tuples, firsts, moments = [], [], []
    while len(tuples) < count:
        # Turned shapes are rare otherwise, and the hardest to tell apart.
        known = TUPLES[rng.choice((*MOTIONS, "spins", "spins"))]
        colour, shape, motion, background = rng.choice(known)
        if rng.random() < 0.6:
            variants = [(colour, other, motion, background) for other in SHAPES]
        else:
            variants = [(other, shape, motion, background) for other in COLOURS]
        variants = [words for words in variants if words in known]
        variants = rng.sample(variants, min(5, len(variants), count - len(tuples)))
        firsts += [len(tuples)] * len(variants)
        moments += [rng.randrange(MOMENTS)] * len(variants)
        tuples += variants
    drawn = scenes.draw_scenes(tuples, generator)
    for name in ("x", "y", "radius", "touch_rate", "touch_phase"):
        setattr(drawn, name, getattr(drawn, name)[firsts])
    pixels, labels, objects = photograph(drawn, moments, side, rng)
    texts = []
    for colour, shape, motion, background in tuples:
        write = captions.core_caption if rng.random() < 0.5 else lambda *words: captions.phrase(*words, rng)
        texts.append(write(colour, shape, say_motion(motion, rng), background))
    keys = [(background, False, None, (colour, shape)) for colour, shape, _, background in tuples]
    return Pictures(pixels, texts, [None] * count, keys, labels, objects)


def draw_dressed(count: int, side: int, generator: torch.Generator, rng: random.Random) -> Pictures:
    """Pictures of one object with a written word, on a checkered ground, or from a clip with a moving camera."""
    texts, said = zip(
        *(captions.sample_caption(rng.choice(("text", "checkered", "camera")), rng) for _ in range(count)), strict=True
    )
    tuples = [(words["colour"], words["shape"], words["motion"], words["background"]) for words in said]
    cameras, written = ([words.get(name) for words in said] for name in ("camera", "word"))
    drawn = scenes.draw_scenes(tuples, generator, written, cameras, ["word" not in words for words in said])
    pixels, labels, objects = photograph(drawn, [rng.randrange(MOMENTS) for _ in range(count)], side, rng)
    keys = [
        (words["background"], "word" not in words, words.get("word"), (words["colour"], words["shape"]))
        for words in said
    ]
    return Pictures(pixels, list(texts), [None] * count, keys, labels, objects)


def draw_pairs(count: int, side: int, generator: torch.Generator, rng: random.Random) -> Pictures:
    """Pictures of two objects."""
    pairs = scenes.sample_tuple_pairs(count, generator)
    drawn = scenes.draw_two_object_scenes(pairs, generator, side, side)
    pixels, labels, objects = photograph(drawn, [rng.randrange(MOMENTS) for _ in range(count)], side, rng)
    texts, swapped_texts, keys = [], [], []
    for (colour, shape, motion, background), (colour_2, shape_2, motion_2, _) in pairs:
        still = motion == motion_2 == "stays still" and rng.random() < 0.5
        said, said_2 = (None, None) if still else (motion, motion_2)
        core, state = rng.random() < 0.5, rng.getstate()

        def write(first, second, core=core, background=background):
            if core:
                return captions.two_object_caption([first, second], background)
            return captions.phrase_two_objects([first, second], background, rng)

        texts.append(write((colour, shape, said), (colour_2, shape_2, said_2)))
        swapped_texts.append(None)
        if shape != shape_2 and not (
            is_held_out(colour_2, shape, motion, background) or is_held_out(colour, shape_2, motion_2, background)
        ):
            rng.setstate(state)  # so that both captions have the same phrasing
            swapped_texts[-1] = write((colour_2, shape, said), (colour, shape_2, said_2))
        keys.append((background, False, None, *sorted(((colour, shape), (colour_2, shape_2)))))
    return Pictures(pixels, texts, swapped_texts, keys, labels, objects)


def person_labels(drawn: people.People) -> dict[str, torch.Tensor]:
    """Labels of who people are and how they look at the moment."""
    return {
        "skin": drawn.skin,
        "style": drawn.style,
        "glasses": drawn.glasses.long(),
        "expression": drawn.expression,
        "tilt": drawn.tilt[:, None] / 15,
        "hair": drawn.hair / 127.5 - 1,
    }


def draw_people(count: int, side: int, generator: torch.Generator, rng: random.Random) -> Pictures:
    """Frames of clips of people, of whom captions say nothing but motion and ground, and as many reference images."""
    words = [(rng.choice(PERSON_MOTIONS), rng.choice(list(BACKGROUNDS))) for _ in range(count)]
    drawn = people.draw_people(words, generator)
    shown, referred = drawn[: count // 2], drawn[count // 2 :]
    # Frame 1 of a two-frame clip is at any time wanted.
    moment = rng.uniform(0.01, 2)
    path = scenes.trajectories(
        shown,
        torch.tensor([moment]),
        PERSON_SIDE,
        PERSON_SIDE,
        travel=people.PERSON_TRAVEL,
        bounce_height=people.PERSON_BOUNCE_HEIGHT,
    )
    circle = torch.stack([values[:, 0, 0] for values in path[:3]], dim=1) / PERSON_SIDE
    clips = people.render_people(shown, 2, 1 / moment, PERSON_SIDE, PERSON_SIDE)
    said = words[: count // 2]
    texts = [captions.person_caption(say_motion(motion, rng), background) for motion, background in said]
    keys = [(background, False, None, "person") for _, background in said]
    objects = person_labels(shown) | place_labels(circle)
    labels = objects | {"background": shown.background, "checkered": torch.zeros(len(shown), dtype=torch.long)}
    objects |= {"picture": torch.arange(len(shown)), "circle": circle}
    frames = Pictures(resize(clips[:, :, 1], side), texts, [None] * len(shown), keys, labels, objects)

    references = resize(people.render_references(referred, PERSON_SIDE), side)
    circle = torch.tensor((*people.REFERENCE_CENTRE, people.REFERENCE_RADIUS)).expand(len(referred), 3)
    labels = person_labels(referred)
    objects = labels | {"picture": torch.arange(len(referred)), "circle": circle}
    without = [None] * len(referred)
    return join([frames, Pictures(references, without, without, without, labels, objects)])


def resize(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Pictures in uint8 at `side` x `side` pixels as the image processor makes them, in float32."""
    pixels = F.interpolate(pixels.float(), size=(side, side), mode="bicubic", antialias=True)
    return pixels.clamp(0, 255)


def draw_pictures(count: int, side: int, generator: torch.Generator, rng: random.Random) -> Pictures:
    """
    A batch of training pictures: three eighths in groups, one dressed, two of pairs and two of people.

    Args:
        count: number of pictures, a multiple of 8.
        side: height and width in pixels.
        generator, rng: sources of randomness of the scenes and of the words.
    """
    part = count // 8
    return join(
        [
            draw_groups(3 * part, side, generator, rng),
            draw_dressed(part, side, generator, rng),
            draw_pairs(2 * part, side, generator, rng),
            draw_people(2 * part, side, generator, rng),
        ]
    )


class AttributeHeads(nn.Module):
    """Linear classifiers and estimators of what was drawn, on features of one width."""

    def __init__(self, width: int):
        super().__init__()
        self.classes = nn.ModuleDict({name: nn.Linear(width, count) for name, count in CLASSES.items()})
        self.values = nn.ModuleDict({name: nn.Linear(width, count) for name, count in VALUES.items()})

    def losses(self, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums over the labels of the mean cross-entropies and of the mean squared errors, for `(batch, width)`."""
        classes, values = features.new_zeros(()), features.new_zeros(())
        for name, head in self.classes.items():
            known = labels[name] != UNKNOWN
            if known.any():
                classes = classes + F.cross_entropy(head(features[known]), labels[name][known])
        for name, head in self.values.items():
            known = ~labels[name].isnan().any(1)
            if known.any():
                values = values + F.mse_loss(head(features[known]), labels[name][known])
        return {"classes": classes, "values": values}


def inside(circle: torch.Tensor, grid: int) -> torch.Tensor:
    """Which patches of a grid have their centre in circles `(objects, 3)`: boolean `(objects, grid * grid)`."""
    places = (torch.arange(grid, device=circle.device) + 0.5) / grid
    x, y, radius = circle[:, :, None, None].unbind(1)
    return (torch.hypot(places - x, places[:, None] - y) < radius).flatten(1)


def match_loss(image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor, keys: list[tuple]):
    """
    CLIP's contrastive loss in both directions, for embeddings of any length.

    Args:
        image_embeds (`torch.Tensor` of shape `(batch, width)`): embeddings of pictures.
        text_embeds (`torch.Tensor` of shape `(batch + wrong, width)`): of their captions, then of wrong ones.
        logit_scale: logarithm of the scale of the cosines, clipped at 100.
        keys: equal for pictures of the same content, whose captions are no wrong answers for each other.
    """
    count = len(keys)
    cosines = F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T
    same = torch.tensor([[a == b for b in keys] for a in keys], device=cosines.device)
    same.fill_diagonal_(False)
    logits = logit_scale.exp().clamp(max=100) * cosines
    logits = logits.masked_fill(F.pad(same, (0, len(text_embeds) - count)), float("-inf"))
    target = torch.arange(count, device=cosines.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :count].T, target)) / 2


def load(model_class: type[PreTrainedModel], folder: str, name: str) -> PreTrainedModel:
    """Component `name` of a folder in float32."""
    try:
        model, report = model_class.from_pretrained(
            folder, subfolder=name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise OSError(f"--text_encoders: no {model_class.__name__} in '{folder}/{name}': {error}") from error
    if report["missing_keys"]:
        # transformers fills them with random values and warns.
        key = sorted(report["missing_keys"])[0]
        raise OSError(f"--text_encoders: '{folder}/{name}' is no {model_class.__name__}: it lacks the weight `{key}`.")
    return model


def main(args: Arguments) -> None:
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"{accelerator.num_processes} processes: the encoder is small, launch one process")
    device = accelerator.device
    for name in ("text_encoder_2", "tokenizer_2", "image_encoder", "image_processor"):
        if not (Path(args.text_encoders) / name).is_dir():
            raise OSError(
                f"--text_encoders: '{args.text_encoders}' has no {name}/; pass the folder that "
                "train_text_encoders.py wrote."
            )

    # 1. The two halves
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.text_encoders, subfolder="tokenizer_2")
    processor = CLIPImageProcessor.from_pretrained(args.text_encoders, subfolder="image_processor")
    text_encoder = load(CLIPTextModel, args.text_encoders, "text_encoder_2").to(device).eval()
    encoder = load(CLIPVisionModelWithProjection, args.text_encoders, "image_encoder").to(device).train()
    text_encoder.requires_grad_(False)

    # 2. What is thrown away afterwards
    width, side = encoder.config.projection_dim, encoder.config.image_size
    grid = side // encoder.config.patch_size
    text_projection = nn.Linear(text_encoder.config.hidden_size, width, bias=False).to(device)
    heads = nn.ModuleDict(
        {"embedding": AttributeHeads(width), "patches": AttributeHeads(encoder.config.hidden_size)}
    ).to(device)
    logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), device=device))

    parameters = [*encoder.parameters(), *text_projection.parameters(), *heads.parameters(), logit_scale]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = min(100, args.steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
    )
    mean, std = (
        torch.tensor(values, device=device)[:, None, None] for values in (processor.image_mean, processor.image_std)
    )
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)

    # 3. Training
    started, since, running = time.perf_counter(), 0, {}
    for step in range(1, args.steps + 1):
        pictures = draw_pictures(args.batch_size, side, generator, rng)
        labels, objects = (
            {name: values.to(device) for name, values in told.items()} for told in (pictures.labels, pictures.objects)
        )
        pixels = pictures.pixels.to(device) / 255
        # Pictures may later come from a video decoder, which blurs.
        blurred = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
        pixels = torch.lerp(pixels, blurred, rng.random() * (rng.random() < 0.5))
        pixels = (pixels - mean) / std
        pixels = pixels + torch.randn(pixels.shape, generator=generator).to(device) * rng.uniform(0, 0.06)

        captioned = [row for row, text in enumerate(pictures.texts) if text is not None]
        texts = [pictures.texts[row] for row in captioned] + [text for text in pictures.swapped_texts if text]
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(device)
        with torch.no_grad():
            text_features = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output

        output = encoder(pixels)
        keys = [pictures.keys[row] for row in captioned]
        losses = {
            "match": match_loss(output.image_embeds[captioned], text_projection(text_features), logit_scale, keys)
        }
        rows, patches = inside(objects["circle"], grid).nonzero(as_tuple=True)
        told = {name: values[rows] for name, values in objects.items()}
        read = {
            "embedding": (output.image_embeds, labels),
            "patches": (output.last_hidden_state[told["picture"], 1 + patches], told),
        }
        for where, (features, known) in read.items():
            for name, loss in heads[where].losses(features, known).items():
                losses[f"{name} from {where}"] = loss
        with torch.no_grad():
            known = labels["shape"] != UNKNOWN
            guesses = heads["embedding"].classes["shape"](output.image_embeds[known]).argmax(1)
            shapes_right = (guesses == labels["shape"][known]).float().mean()

        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        since += 1
        for key, value in (losses | {"shapes right": shapes_right}).items():
            running[key] = running.get(key, 0.0) + value.detach()
        if step % args.log_every == 0 or step == args.steps:
            seconds = time.perf_counter() - started
            shown = ", ".join(f"{key} {value.item() / since:.3f}" for key, value in running.items())
            print(f"step {step}/{args.steps} {shown} | {seconds:.0f} s, {step / seconds:.2f} steps/s", flush=True)
            since, running = 0, {}

    # 4. Saving
    encoder.eval().to(torch.bfloat16).save_pretrained(os.path.join(args.output_dir, "image_encoder"))
    processor.save_pretrained(os.path.join(args.output_dir, "image_processor"))


if __name__ == "__main__":
    run_script(main, Arguments)
