"""Toybox as datasets: endless or finite streams of samples that are drawn and rendered while they are read.

A sample is a function of task, split, seed, its index and the sizes asked for, whatever the sharding and batching.
What is read first are bare indices; a batched map draws and renders them, so passing over samples costs next to
nothing.
"""

import colorsys
import hashlib
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass

import torch

from .captions import sample_caption, sound_caption, sound_prefix
from .edits import draw_edits, render_edits, task_of
from .people import EXPRESSIONS, HAIR_STYLES, PERSON_TRAVEL, draw_people, redraw_pose, render_people, render_references
from .scenes import SIZES, TOUCH_RATES, TRAVEL, draw_scenes, draw_two_object_scenes, render, trajectories
from .sounds import FILM_MOTIONS, MIN_DURATION, MOTION_DURATION, SAMPLING_RATE, strike_times, synthesize
from .vocabulary import AMBIENCES, COLOURS, EVENTS, MOTIONS, SHAPES, VOICES, is_held_out


TASKS = ("text_to_image", "text_to_video", "audio", "personalize", "edit", "upscale")

SPLITS = ("train", "held_out")

LOOKS = {"core": 4, "phrasing": 4, "two_objects": 2, "text": 2, "camera": 2, "checkered": 1, "person": 2}
"""What text_to_image, text_to_video and upscale can show, with the weights of the default mixture.

"core" and "phrasing" are one object in the words of the core caption and in others. "checkered" is a checkered ground
that stands still, "camera" one that the camera moves over. A single frame has no "camera", and a picture of which a
side is shorter than 128 pixels no "person".
"""

_BATCH_SIZE = 16


def _indices(shards: list[int], num_shards: int, num_samples: int | None) -> Iterator[dict[str, int]]:
    # `datasets` reads one shard after another and hands this function a list of one.
    (shard,) = shards
    numbers = itertools.count(shard, num_shards) if num_samples is None else range(shard, num_samples, num_shards)
    for index in numbers:
        yield {"index": index}


def _concatenate(parts: list):
    """One batch from several of the same dataclass, whose fields are tensors or such batches themselves."""
    if not is_dataclass(parts[0]):
        return torch.cat(parts)
    values = {field.name: _concatenate([getattr(part, field.name) for part in parts]) for field in fields(parts[0])}
    return type(parts[0])(**values)


def _tuple(words: dict[str, str], background: str) -> tuple[str, str, str, str]:
    return words["colour"], words["shape"], words["motion"], background


@dataclass(frozen=True)
class Sampler:
    """Draws and renders the samples of a dataset: the function that [`dataset`] maps over batches of indices.

    Attributes are the arguments of [`dataset`], with its defaults filled in, and `weights`: how likely the shape and
    motion of a sample's one object are, by name; 1 for those it does not name.
    """

    task: str
    split: str
    seed: int
    height: int
    width: int
    num_frames: int
    frame_rate: float
    looks: dict[str, float]
    paired: bool
    weights: dict[str, float] | None = None

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list]:
        """Samples of the indices `batch["index"]`, as columns of the keys that [`dataset`] lists."""
        words = [self.draw_words(index) for index in batch["index"]]
        generators = [torch.Generator().manual_seed(self.torch_seed(index)) for index in batch["index"]]
        # Below, `clone` keeps a sample that somebody holds on to from holding the rest of its batch in memory.
        render_task = {"audio": self._audio, "personalize": self._personalize, "edit": self._edit}
        return dict(batch) | render_task.get(self.task, self._sight)(words, generators)

    def _digest(self, index: int) -> bytes:
        return hashlib.sha256(f"{self.task}|{self.split}|{self.seed}|{index}".encode()).digest()

    def torch_seed(self, index: int) -> int:
        """Seed of everything that is drawn with torch; those of the two splits have no number in common.

        torch's generator on the CPU looks at no more than 32 bits of a seed; the highest of them is the split.
        """
        return int.from_bytes(self._digest(index)[:4]) >> 1 | (self.split == "held_out") << 31

    def draw_words(self, index: int) -> tuple[str, dict]:
        """Caption or instruction of a sample and its fields, as [`~captions.sample_caption`] returns them.

        Fields have the "look" of a sight and the "colour" of a sound on top. Whether a bounce is heard is known with
        its scene only, so the caption of a sound is not yet the one of the sample.
        """
        rng = random.Random(self._digest(index))
        held_out, single_frame = self.split == "held_out", self.num_frames == 1
        if self.task == "personalize":
            return sample_caption("person", rng, single_frame=single_frame)
        if self.task == "edit":
            while True:
                instruction, words = sample_caption("edit", rng, held_out)
                if not single_frame or words["motion"] == "stays still":
                    return instruction, words
        if self.task == "audio":
            is_film = self.num_frames / self.frame_rate > MOTION_DURATION
            while True:
                caption, words = sample_caption("sound", rng, held_out)
                if (not is_film or words["motion"] in FILM_MOTIONS) and self._accepts(words, rng):
                    break
            parts = words["shape"], words["motion"], words["background"]
            # Sounds are held out whatever the colour, but training must not see a held-out sight either.
            words["colour"] = rng.choice([name for name in COLOURS if held_out or not is_held_out(name, *parts)])
            return caption, words
        (look,) = rng.choices(list(self.looks), list(self.looks.values()))
        choice = None if look == "camera" else single_frame
        while True:
            caption, words = sample_caption(look, rng, held_out and look != "person", choice)
            if self._accepts(words, rng):
                break
        return caption, words | {"look": look}

    def _accepts(self, words: dict, rng: random.Random) -> bool:
        """Whether words that were drawn are used: as often as their shape and motion are likely."""
        if not self.weights or "shape" not in words:
            return True
        likelihood, likeliest = 1.0, 1.0
        for key, options in (("shape", SHAPES), ("motion", MOTIONS)):
            if key in words:
                likelihood *= self.weights.get(words[key], 1)
                likeliest *= max(self.weights.get(option, 1) for option in options)
        return rng.random() * likeliest < likelihood

    def _clip(self) -> dict[str, float]:
        sizes = {"num_frames": self.num_frames, "frame_rate": self.frame_rate}
        return sizes | {"height": self.height, "width": self.width}

    def _sight(self, drawn: list[tuple[str, dict]], generators: list[torch.Generator]) -> dict[str, list]:
        video, truth = [None] * len(drawn), [None] * len(drawn)
        groups = {"one_object": [], "two_objects": [], "person": []}
        for i, (_, words) in enumerate(drawn):
            groups[words["look"] if words["look"] in groups else "one_object"].append(i)

        scenes = {"one_object": [], "two_objects": []}
        for i in groups["one_object"]:
            words = drawn[i][1]
            extras = [words.get("word")], [words.get("camera")], [words["look"] == "checkered"]
            scene = draw_scenes([_tuple(words, words["background"])], generators[i], *extras)
            scenes["one_object"].append(scene)
        for i in groups["two_objects"]:
            words = drawn[i][1]
            pair = tuple(_tuple(parts, words["background"]) for parts in words["objects"])
            scenes["two_objects"].append(draw_two_object_scenes([pair], generators[i], self.height, self.width))
        for group, parts in scenes.items():
            if parts:
                batch = _concatenate(parts)
                x, y, _, _ = trajectories(batch, torch.zeros(1), self.height, self.width)
                starts = torch.cat([x, y], dim=2).tolist()
                for i, clip, start in zip(groups[group], render(batch, **self._clip()), starts, strict=True):
                    words = drawn[i][1]
                    objects = words.get("objects", [words])
                    # From left to right at the first frame; of two that start in one column the upper one first.
                    objects = [objects[k] for k in sorted(range(len(objects)), key=start.__getitem__)]
                    video[i], truth[i] = clip.clone(), self._sight_truth(words, objects)
        if groups["person"]:
            people = _concatenate([draw_people([_person(drawn[i][1])], generators[i]) for i in groups["person"]])
            for i, clip in zip(groups["person"], render_people(people, **self._clip()), strict=True):
                video[i], truth[i] = clip.clone(), self._sight_truth(drawn[i][1], [drawn[i][1]])

        columns = {"caption": [caption for caption, _ in drawn], "truth": truth}
        if self.task == "text_to_image":
            return {"image": [clip[:, 0] for clip in video]} | columns
        return {"video": video, "frame_rate": [float(self.frame_rate)] * len(drawn)} | columns

    def _sight_truth(self, words: dict, objects: list[dict]) -> dict:
        first, second = objects if len(objects) == 2 else (objects[0], {})
        speed = 0.0
        if second or first["motion"] == "bounces" or self.num_frames == 1:
            speed = math.nan
        elif first["motion"].startswith("moves "):
            # Half the picture in two seconds.
            speed = (PERSON_TRAVEL if words["look"] == "person" else TRAVEL) / MOTION_DURATION
        return {
            "look": words["look"],
            "colour": first.get("colour", ""),
            "shape": first.get("shape", ""),
            "motion": first["motion"],
            "colour_2": second.get("colour", ""),
            "shape_2": second.get("shape", ""),
            "motion_2": second.get("motion", ""),
            "background": words["background"],
            "checkered": words["look"] in ("camera", "checkered"),
            "text": words.get("word", ""),
            "camera": words.get("camera", ""),
            "speed": speed,
        }

    def _audio(self, drawn: list[tuple[str, dict]], generators: list[torch.Generator]) -> dict[str, list]:
        duration = self.num_frames / self.frame_rate
        tuples = [_tuple(words, words["background"]) for _, words in drawn]
        scenes = _concatenate([draw_scenes([parts], g) for parts, g in zip(tuples, generators, strict=True)])
        captions, truth = [], []
        for (_, words), (_, *parts), strikes in zip(drawn, tuples, strike_times(scenes, duration), strict=True):
            has_strike = words["motion"] != "bounces" or bool(strikes)
            captions.append(sound_prefix(words["quality"], words["music"]) + sound_caption(*parts, has_strike))
            event = EVENTS[words["motion"]] if has_strike else None
            # As many places for every clip of this length.
            places = torch.full((math.floor(TOUCH_RATES[1] * duration) + 1,), math.nan, dtype=torch.float64)
            places[: len(strikes)] = torch.tensor(strikes, dtype=torch.float64)
            truth.append(
                {name: words[name] for name in ("colour", "shape", "motion", "background")}
                | {
                    "voice": "" if event in (None, "passes") else VOICES[words["shape"]],
                    "event": event or "",
                    "ambience": AMBIENCES[words["background"]] or "",
                    "quality": words["quality"],
                    "music": words["music"],
                    "strikes": places,
                }
            )
        audio = synthesize(scenes, duration, generators, [words["quality"] for _, words in drawn])
        return {
            "video": [clip.clone() for clip in render(scenes, **self._clip())],
            "frame_rate": [float(self.frame_rate)] * len(drawn),
            "audio": [sound.clone() for sound in audio],
            "sampling_rate": [SAMPLING_RATE] * len(drawn),
            "caption": captions,
            "truth": truth,
        }

    def _personalize(self, drawn: list[tuple[str, dict]], generators: list[torch.Generator]) -> dict[str, list]:
        parts = [draw_people([_person(words)], g) for (_, words), g in zip(drawn, generators, strict=True)]
        people = _concatenate(parts)
        referred = people
        if not self.paired:
            referred = _concatenate([redraw_pose(part, g) for part, g in zip(parts, generators, strict=True)])
        truth = []
        for i, (_, words) in enumerate(drawn):
            red, green, blue = (people.hair[i] / 255).tolist()
            truth.append(
                {
                    "motion": words["motion"],
                    "background": words["background"],
                    "skin": people.skin[i].item(),
                    "hair_hue": 360 * colorsys.rgb_to_hsv(red, green, blue)[0],
                    "style": HAIR_STYLES[people.style[i]],
                    "glasses": people.glasses[i].item(),
                    "expression": EXPRESSIONS[people.expression[i]],
                    "tilt": people.tilt[i].item(),
                    "reference_expression": EXPRESSIONS[referred.expression[i]],
                    "reference_tilt": referred.tilt[i].item(),
                }
            )
        return {
            "video": [clip.clone() for clip in render_people(people, **self._clip())],
            "frame_rate": [float(self.frame_rate)] * len(drawn),
            "reference_image": [
                picture.clone() for picture in render_references(referred, side=min(self.height, self.width))
            ],
            "caption": [caption for caption, _ in drawn],
            "truth": truth,
        }

    def _edit(self, drawn: list[tuple[str, dict]], generators: list[torch.Generator]) -> dict[str, list]:
        edits = _concatenate([draw_edits([words], g) for (_, words), g in zip(drawn, generators, strict=True)])
        source, target, mask = render_edits(edits, **self._clip())
        names = ("edit", "colour", "shape", "motion", "background")
        new_names = ("new_colour", "new_shape", "new_background", "corner")
        return {
            "source": [clip.clone() for clip in source],
            "target": [clip.clone() for clip in target],
            "mask": [clip.clone() for clip in mask],
            "frame_rate": [float(self.frame_rate)] * len(drawn),
            "instruction": [instruction for instruction, _ in drawn],
            "task": [task_of(words["edit"]) for _, words in drawn],
            "truth": [{name: words.get(name, "") for name in names + new_names} for _, words in drawn],
        }


def _person(words: dict) -> tuple[str, str]:
    return words["motion"], words["background"]


def dataset(
    task: str,
    split: str = "train",
    seed: int = 0,
    *,
    num_samples: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    frame_rate: float | None = None,
    looks: dict[str, float] | None = None,
    paired: bool = False,
    num_shards: int = 960,
):
    """Streams samples of a task. Every sample has its own "index" and depends on nothing that was read before.

    | task | keys besides "index" |
    | --- | --- |
    | text_to_image | image, caption, truth |
    | text_to_video, upscale | video, frame_rate, caption, truth |
    | audio | video, frame_rate, audio, sampling_rate, caption, truth |
    | personalize | video, frame_rate, reference_image, caption, truth |
    | edit | source, target, mask, frame_rate, instruction, task, truth |

    An image is uint8 of shape `(3, height, width)`, a video, source or target uint8 of shape
    `(3, frames, height, width)`, a mask boolean of shape `(1, frames, height, width)`: true where the edit may change
    pixels. Audio is float32 of shape `(1, samples)`. "truth" is a flat dictionary of words and numbers with the same
    keys for all samples of a task: "" is a word that does not apply, NaN a number.

    No training sample shows or sounds like a tuple reserved for evaluation, and every held-out sample does. The
    persons of the two splits come from seeds that have no number in common.

    Args:
        task (`str`): One of `TASKS`.
        split (`str`, defaults to `"train"`): "train" or "held_out".
        seed (`int`, defaults to 0): Another seed gives other samples.
        num_samples (`int`, *optional*): Length; endless by default.
        height, width (`int`, *optional*):
            Pixels, one of `scenes.SIZES`; by default 64, or 128 for personalize and upscale. Personalize, and the look
            "person", need at least 128.
        num_frames (`int`, *optional*):
            Frames a clip, 16 by default. A clip of one frame shows what stays still, and its caption has no motion.
        frame_rate (`float`, *optional*): Frames a second, 8 by default.
        looks (`dict[str, float]`, *optional*):
            For text_to_image, text_to_video and upscale: weights of the `LOOKS` to draw from, all that fit by default.
        paired (`bool`, defaults to `False`):
            For personalize: whether the reference image has expression, tilt and light of the clip, instead of others.
        num_shards (`int`, defaults to 960):
            Parts that ranks and workers share out among them; at most `num_samples`. If it is no multiple of the
            number of ranks, every rank renders the samples of all of them.

    Returns:
        `datasets.IterableDataset`: resumable with `state_dict` and `load_state_dict`, shardable with
        `datasets.distributed.split_dataset_by_node` and by the workers of a `torch.utils.data.DataLoader`.

    Raises:
        ValueError: If a name is unknown, a number is out of range, or an argument does not belong to the task.
    """
    from datasets import IterableDataset

    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: use one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    for name, value in (("num_samples", num_samples), ("num_frames", num_frames), ("num_shards", num_shards)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"`{name}` must be a whole number of at least 1, not {value!r}")
    if not isinstance(seed, int):
        raise ValueError(f"`seed` must be a whole number, not {seed!r}")
    side = 128 if task in ("personalize", "upscale") else 64
    height, width = side if height is None else height, side if width is None else width
    sizes = [size for size in SIZES if task != "personalize" or min(size) >= 128]
    if (height, width) not in sizes:
        known = ", ".join(f"{height} x {width}" for height, width in sizes)
        raise ValueError(f"there is no {task} of {height} x {width} (height x width): use one of {known}")
    if task == "text_to_image" and (num_frames not in (None, 1) or frame_rate is not None):
        raise ValueError("text_to_image has single frames: leave `num_frames` and `frame_rate` out")
    num_frames = num_frames or (1 if task == "text_to_image" else 16)
    frame_rate = 8 if frame_rate is None else frame_rate
    if not 0 < frame_rate < math.inf:
        raise ValueError(f"`frame_rate` must be above 0 frames a second, not {frame_rate}")
    if task == "audio" and (num_frames == 1 or num_frames / frame_rate < MIN_DURATION):
        raise ValueError(
            f"too short for a sound: {num_frames} frame(s) at {frame_rate} frames a second; use at least 2 frames and "
            f"{MIN_DURATION} s"
        )
    if paired and task != "personalize":
        raise ValueError(f"`paired` is about the reference image of personalize: leave it out for {task}")
    if looks is not None and task in ("audio", "personalize", "edit"):
        raise ValueError(f"`looks` cannot be chosen for {task}: leave it out")
    missing = ["camera"] * (num_frames == 1) + ["person"] * (min(height, width) < 128)
    fitting = {name: weight for name, weight in LOOKS.items() if name not in missing}
    looks = fitting if looks is None else looks
    if not isinstance(looks, dict):
        raise ValueError(f"`looks` must map looks to weights, as {{'core': 1}} does, not be {looks!r}")
    if not set(looks) <= set(fitting):
        unfit = ", ".join(sorted(set(looks) - set(fitting)))
        raise ValueError(f"no {task} of this size and length looks like {unfit}: use some of {', '.join(fitting)}")
    if min(looks.values(), default=0) < 0 or not 0 < sum(looks.values()) < math.inf:
        raise ValueError(f"the weights of `looks` must be 0 or more, and some of them above 0, not {looks}")

    if num_samples is not None:
        num_shards = min(num_shards, num_samples)
    indices = IterableDataset.from_generator(
        _indices,
        gen_kwargs={"shards": list(range(num_shards)), "num_shards": num_shards, "num_samples": num_samples},
    )
    sampler = Sampler(task, split, seed, height, width, num_frames, frame_rate, looks, paired)
    return indices.map(sampler, batched=True, batch_size=_BATCH_SIZE)
