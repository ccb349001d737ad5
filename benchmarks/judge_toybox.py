"""How often the judges of Toybox are right, clean and degraded, and how fast the world is drawn and judged.

The tables give the share judged right of every field, in percent of held-out samples: of pictures and clips as drawn,
with noise of sigma 6, averaged over 3 x 3 pixels, and both; of sounds as synthesized, and with white noise 20 dB below
them. An edit is judged rightly when the target is found done and the source, left as it was, is not.

    python benchmarks/judge_toybox.py
    python benchmarks/judge_toybox.py --speed
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

from diffusers_moviegen import toybox
from diffusers_moviegen.toybox.judges import (
    compare_objects,
    compare_people,
    judge_edits,
    listen,
    recognize,
    see,
    strikes_f1,
)
from diffusers_moviegen.toybox.scenes import draw_scenes, render, sample_tuples
from diffusers_moviegen.toybox.sounds import synthesize


MAX_SPEED_ERROR = 0.1
"""Share within which a speed counts as right."""

SIGHT = [
    ("core, 64 px", {"looks": {"core": 1}}),
    ("core, 128 px, 16 fps", {"looks": {"core": 1}, "height": 128, "width": 128, "num_frames": 32, "frame_rate": 16}),
    ("pictures, 64 px", {"looks": {"core": 1}, "num_frames": 1}),
    ("2:3, 64 x 96", {"looks": {"core": 1}, "height": 96, "width": 64}),
    ("two objects, 64 px", {"looks": {"two_objects": 1}}),
    ("text, 64 px", {"looks": {"text": 1}}),
    ("camera, 64 px", {"looks": {"camera": 1}}),
    ("camera, 128 px", {"looks": {"camera": 1}, "height": 128, "width": 128}),
    ("checkered, 64 px", {"looks": {"checkered": 1}}),
]


def noise(video: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return (video + 6 * torch.randn(video.shape, generator=generator)).round().clamp(0, 255).to(torch.uint8)


def blur(video: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    frames = F.pad(video.float().transpose(1, 2).flatten(0, 1), (1, 1, 1, 1), mode="replicate")
    frames = F.avg_pool2d(frames, 3, stride=1).unflatten(0, (video.shape[0], video.shape[2])).transpose(1, 2)
    return frames.round().to(torch.uint8)


def hiss(audio: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    level = audio.square().mean(dim=(1, 2), keepdim=True).sqrt()
    return audio + 0.1 * level * torch.randn(audio.shape, generator=generator)


PICTURE_TREATMENTS = {
    "clean": lambda video, generator: video,
    "noise": noise,
    "blur": blur,
    "both": lambda video, generator: noise(blur(video, generator), generator),
}
SOUND_TREATMENTS = {"clean": lambda audio, generator: audio, "20 dB": hiss}


def batches(task: str, args: argparse.Namespace, **options):
    """Held-out samples of a task in batches, all of their truth by name."""
    samples = toybox.dataset(task, "held_out", args.seed, num_samples=args.num_samples, **options)
    rows = []
    for row in samples:
        rows.append(row)
        if len(rows) == 32:
            yield default_collate(rows)
            rows = []
    if rows:
        yield default_collate(rows)


def judge_sight(batch: dict, treat: Callable) -> list[dict[str, bool]]:
    truth, results = batch["truth"], []
    for i, sight in enumerate(see(treat(batch["video"]), batch["frame_rate"][0].item())):
        asked = [[truth[f"{name}{suffix}"][i] for name in ("colour", "shape", "motion")] for suffix in ("", "_2")]
        asked = [(*words, truth["background"][i]) for words in asked if words[0]]
        (row,) = compare_objects([sight], [asked])
        del row["all"]
        if len(asked) == 2:
            row["order"] = [seen.colour for seen in sight.objects] == [words[0] for words in asked]
        row["checkered"] = sight.checkered == truth["checkered"][i].item()
        row["text"] = (sight.text or "") == truth["text"][i]
        row["camera"] = (sight.camera or "") == truth["camera"][i]
        if truth["motion"][i].startswith("moves ") and len(asked) == 1:
            speed = truth["speed"][i].item()
            row["speed"] = sight.speed is not None and abs(sight.speed - speed) <= MAX_SPEED_ERROR * speed
        results.append(row)
    return results


def judge_sound(batch: dict, treat: Callable) -> list[dict[str, float]]:
    truth, results = batch["truth"], []
    for i, heard in enumerate(listen(treat(batch["audio"]))):
        strikes = [time for time in truth["strikes"][i].tolist() if not math.isnan(time)]
        row = {
            "voice": (heard.voice or "") == truth["voice"][i],
            "event": (heard.event or "") == truth["event"][i],
        }
        if truth["quality"][i] >= 5:
            row["ambience"] = (heard.ambience or "") == truth["ambience"][i]
        if truth["event"][i] == "knocks":
            row["strikes (F1)"] = strikes_f1(heard.strikes, strikes)
        results.append(row)
    return results


def judge_people(batch: dict, treat: Callable, reference: bool) -> list[dict[str, bool]]:
    truth, prefix = batch["truth"], "reference_" if reference else ""
    pictures = batch["reference_image"][:, :, None] if reference else batch["video"]
    asked = [
        {
            "skin": truth["skin"][i].item(),
            "hair_hue": truth["hair_hue"][i].item(),
            "style": truth["style"][i],
            "glasses": truth["glasses"][i].item(),
            "expression": truth[f"{prefix}expression"][i],
            "tilt": truth[f"{prefix}tilt"][i].item(),
        }
        for i in range(len(pictures))
    ]
    return compare_people(recognize(treat(pictures)), asked)


def judge_editing(batch: dict, treat: Callable) -> list[dict[str, bool]]:
    source, target, instructions = treat(batch["source"]), treat(batch["target"]), batch["instruction"]
    frame_rate = batch["frame_rate"][0].item()
    done = judge_edits(source, target, instructions, batch["mask"], frame_rate)
    left = judge_edits(source, treat(batch["source"]), instructions, batch["mask"], frame_rate)
    return [
        {edit: yes.done and not no.done, "motion kept": yes.motion_kept}
        for edit, yes, no in zip(batch["truth"]["edit"], done, left, strict=True)
    ]


def print_accuracy(sense: str, treatments: dict[str, Callable], cases: list[tuple[str, Iterable[dict], Callable]]):
    """Prints a table of one sense; a case is its title, its batches and the judge."""
    table = []
    for title, samples, judge in cases:
        results = {name: [] for name in treatments}
        generator = torch.Generator().manual_seed(0)
        for batch in samples:
            for name, treatment in treatments.items():
                results[name] += judge(batch, functools.partial(treatment, generator=generator))
        table += [(title, name, rows) for name, rows in results.items()]
    fields = list(dict.fromkeys(field for _, _, rows in table for row in rows for field in row))
    print(f"\n| {sense} | samples | treatment | {' | '.join(fields)} |\n| --- | --- | --- |{' --- |' * len(fields)}")
    for title, name, rows in table:
        values = [[row[field] for row in rows if field in row] for field in fields]
        shares = [f"{100 * sum(value) / len(value):.1f}" if value else "" for value in values]
        print(f"| {title} | {len(rows)} | {name} | {' | '.join(shares)} |", flush=True)


def seconds(function: Callable, repeats: int = 3) -> float:
    """Shortest time of a few."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def print_speed(args: argparse.Namespace):
    generator, count = torch.Generator().manual_seed(args.seed), 64
    scenes = draw_scenes(sample_tuples(count, generator), generator)
    audible = draw_scenes(sample_tuples(count, generator), generator)
    core = {"looks": {"core": 1}, "num_samples": count}
    clips, sounds = render(scenes), synthesize(audible, 2.0, generator)
    people = default_collate(list(toybox.dataset("personalize", num_samples=count)))["video"]
    edits = default_collate(list(toybox.dataset("edit", num_samples=count)))
    jobs = {
        "render core clips, 64 px, 16 frames": lambda: render(scenes),
        "render core clips, 128 px, 16 frames": lambda: render(scenes, height=128, width=128),
        "synthesize sounds of 2 s": lambda: synthesize(audible, 2.0, generator),
        "dataset text_to_video, core, 64 px": lambda: list(toybox.dataset("text_to_video", **core)),
        "dataset text_to_video, core, 128 px": lambda: list(
            toybox.dataset("text_to_video", height=128, width=128, **core)
        ),
        "dataset text_to_video, all looks, 64 px": lambda: list(toybox.dataset("text_to_video", num_samples=count)),
        "dataset audio, 2 s": lambda: list(toybox.dataset("audio", num_samples=count)),
        "dataset personalize, 128 px": lambda: list(toybox.dataset("personalize", num_samples=count)),
        "dataset edit, 64 px": lambda: list(toybox.dataset("edit", num_samples=count)),
        "judge core clips, 64 px": lambda: see(clips),
        "judge sounds of 2 s": lambda: listen(sounds),
        "judge people, 128 px, 16 frames": lambda: recognize(people),
        "judge edits, 64 px": lambda: judge_edits(edits["source"], edits["target"], edits["instruction"]),
    }
    print(f"\n| {torch.get_num_threads()} thread(s) | a second |\n| --- | --- |")
    for name, job in jobs.items():
        print(f"| {name} | {count / seconds(job):.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=500, help="samples a table (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--speed", action="store_true", help="measure speed instead, on one thread")
    args = parser.parse_args()
    if args.speed:
        torch.set_num_threads(1)
        print_speed(args)
        return
    sight = [(title, batches("text_to_video", args, **options), judge_sight) for title, options in SIGHT]
    print_accuracy("sight", PICTURE_TREATMENTS, sight)
    print_accuracy("sound", SOUND_TREATMENTS, [("2 s", batches("audio", args), judge_sound)])
    people = [("clips, 128 px", False), ("reference pictures, 128 px", True)]
    people = [
        (title, batches("personalize", args), functools.partial(judge_people, reference=reference))
        for title, reference in people
    ]
    print_accuracy("people", PICTURE_TREATMENTS, people)
    edits = [(f"{side} px", batches("edit", args, height=side, width=side), judge_editing) for side in (64, 128)]
    print_accuracy("edits", PICTURE_TREATMENTS, edits)


if __name__ == "__main__":
    main()
