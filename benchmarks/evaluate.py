"""Measures a checkpoint on held-out Toybox prompts, judged by the world's own judges, and prints a table.

    python benchmarks/evaluate.py --task video

Everything is decided by the seed: the prompts, drawn with replacement from the held-out tuples, and the noise of each.
"""

import json
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm.auto import tqdm

from diffusers_moviegen import MovieGenPipeline, bundled_checkpoint
from diffusers_moviegen.toybox.captions import core_caption
from diffusers_moviegen.toybox.judges import compare, see
from diffusers_moviegen.toybox.scenes import draw_scenes, render, sample_tuples
from diffusers_moviegen.toybox.vocabulary import MOTIONS
from diffusers_moviegen.training import run_script, save_sample_sheet


@dataclass
class Arguments:
    task: str = field(default="video", metadata={"choices": ["video"]})
    model: str = field(default_factory=lambda: bundled_checkpoint("toybox"), metadata={"help": "pipeline folder"})
    num_prompts: int = 64
    num_reconstructions: int = 64
    batch_size: int = 16
    num_inference_steps: int = 50
    guidance_scale: float | None = field(default=None, metadata={"help": "default: the checkpoint's"})
    seed: int = 0
    device: str = "cpu"
    sheet: str | None = field(default=None, metadata={"help": "PNG for a contact sheet of the first clips"})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures"})


def interval(values: list[float], groups: list, seed: int, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean and its 95 % interval, bootstrapped over groups: clips of one tuple succeed and fail together."""
    sums, counts = defaultdict(float), defaultdict(int)
    for value, group in zip(values, groups, strict=True):
        sums[group] += float(value)
        counts[group] += 1
    total, count = torch.tensor(list(sums.values())), torch.tensor([float(counts[group]) for group in sums])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(total), (resamples, len(total)), generator=generator)
    means = total[chosen].sum(1) / count[chosen].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return (total.sum() / count.sum()).item(), low, high


def generate(args: Arguments, pipe: MovieGenPipeline, tuples: list, num_frames: int) -> torch.Tensor:
    """Clips `(prompts, 3, frames, height, width)`, uint8, one noise seed a prompt."""
    clips = []
    for start in tqdm(range(0, len(tuples), args.batch_size), desc="generating"):
        part = tuples[start : start + args.batch_size]
        prompts = [core_caption(c, s, m if num_frames > 1 else None, b) for c, s, m, b in part]
        generators = [torch.Generator().manual_seed(args.seed + start + i) for i in range(len(part))]
        frames = pipe(
            prompts,
            num_frames=num_frames,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=generators,
            output_type="pt",
        ).frames
        clips.append((frames.float().transpose(1, 2) * 255).round().to(torch.uint8).cpu())
    return torch.cat(clips)


@torch.no_grad()
def reconstruction_psnr(args: Arguments, pipe: MovieGenPipeline, tuples: list, num_frames: int) -> list[float]:
    """PSNR in dB, on 8-bit values, of every clip decoded from the mean of its posterior."""
    config = pipe.config
    scenes = draw_scenes(tuples, torch.Generator().manual_seed(args.seed))
    video = render(scenes, num_frames, config.default_frame_rate, config.default_height, config.default_width)
    ratios = []
    for part in video.split(args.batch_size):
        pixels = part.to(args.device).to(pipe.vae.dtype) / 127.5 - 1
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode(), num_frames=num_frames).sample
        levels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().cpu()
        ratios += [
            peak_signal_noise_ratio(a, b.float(), data_range=255.0).item() for a, b in zip(levels, part, strict=True)
        ]
    return ratios


def main(args: Arguments) -> None:
    pipe = MovieGenPipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    num_frames, frame_rate = pipe.config.default_num_frames, pipe.config.default_frame_rate
    rows, notes = [], []

    for name, length, motions in (("clips", num_frames, MOTIONS), ("images", 1, ("stays still",))):
        generator = torch.Generator().manual_seed(args.seed)
        tuples = sample_tuples(args.num_reconstructions, generator, held_out=True, motions=motions)
        ratios = reconstruction_psnr(args, pipe, tuples, length)
        rows.append((f"TAE reconstruction, {name}, PSNR", "dB", *interval(ratios, tuples, args.seed)))

    for name, length, motions, fields in (
        ("text to video", num_frames, MOTIONS, ("colour", "background", "motion", "shape", "all")),
        ("text to image", 1, ("stays still",), ("colour", "background", "shape", "all")),
    ):
        generator = torch.Generator().manual_seed(args.seed)
        tuples = sample_tuples(args.num_prompts, generator, held_out=True, motions=motions)
        start = time.perf_counter()
        video = generate(args, pipe, tuples, length)
        seconds = (time.perf_counter() - start) / args.num_prompts
        verdicts = compare(see(video, frame_rate), tuples)
        for key in fields:
            mean, low, high = interval([verdict[key] for verdict in verdicts], tuples, args.seed)
            label = "all at once" if key == "all" else key
            rows.append((f"{name}: {label}", "%", 100 * mean, 100 * low, 100 * high))
        notes.append(f"{name}: {seconds:.2f} s a sample")
        for position, key in ((1, "shape"), (2, "motion")):
            if key not in fields:
                continue
            right, asked = Counter(), Counter()
            for words, verdict in zip(tuples, verdicts, strict=True):
                asked[words[position]] += 1
                right[words[position]] += verdict[key]
            counts = ", ".join(f"{word} {right[word]} of {asked[word]}" for word in sorted(asked))
            notes.append(f"{name}, {key} right: {counts}")
        if args.sheet is not None and length > 1:
            save_sample_sheet(video[:16].float() / 127.5 - 1, args.sheet)
            print("\n".join(f"seed {args.seed + i}: {core_caption(*words)}" for i, words in enumerate(tuples[:16])))

    print(
        f"{args.num_prompts} held-out prompts, seed {args.seed}, {args.num_inference_steps} steps, guidance"
        f" {pipe.config.default_guidance_scale if args.guidance_scale is None else args.guidance_scale:g}"
    )
    print("| figure | value | 95 % interval |\n| --- | --- | --- |")
    for name, unit, mean, low, high in rows:
        print(f"| {name} | {mean:.1f} {unit} | {low:.1f} to {high:.1f} |")
    print("\n".join(notes))
    if args.output is not None:
        figures = {name: {"value": mean, "low": low, "high": high} for name, _, mean, low, high in rows}
        with open(args.output, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    run_script(main, Arguments)
