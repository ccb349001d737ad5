"""The `moviegen` command."""

import argparse
import math
import os
import sys
import time

import diffusers
import torch
import transformers
from tqdm.auto import tqdm

from . import __version__
from .checkpoints import bundled_checkpoint
from .media import (
    AUDIO_EXTENSIONS,
    MAX_FRAME_RATE,
    MIN_FRAME_RATE,
    check_output_path,
    save_audio,
    save_video,
)
from .pipelines import MovieGenAudioPipeline, MovieGenPipeline
from .scoring import check_not_itself, probe_film, read_film, save_scored_film
from .toybox import data, previews


MAX_PREVIEWS, MAX_PREVIEW_FRAMES = 100, 2000

# One latent of the sound, and what a machine has memory for.
MIN_SECONDS, MAX_SECONDS = 0.04, 4 * 3600


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs):
        # Abbreviations would change their meaning, or become ambiguous, with every new option.
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(2, f"moviegen: error: {message}\n")


def _seed(text: str) -> int:
    # What `torch.Generator` takes.
    if not (text.isdecimal() and int(text) < 2**64):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**64 - 1, not {text!r}")
    return int(text)


def _frame_rate(text: str) -> float:
    try:
        frame_rate = float(text)
    except ValueError:
        frame_rate = math.nan
    if not MIN_FRAME_RATE <= frame_rate <= MAX_FRAME_RATE:
        raise argparse.ArgumentTypeError(f"must be a number from {MIN_FRAME_RATE} to {MAX_FRAME_RATE}, not {text!r}")
    return frame_rate


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"must be a number from {MIN_SECONDS} to {MAX_SECONDS}, not {text!r}")
    return seconds


def _text(text: str) -> str:
    # Bytes that the shell passes and Python cannot decode arrive as surrogates, which no tokenizer takes.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError("is not valid UTF-8")
    return text


def _prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; say what to show")
    return _text(text)


def _sound_prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; say what to hear")
    return _text(text)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    usable = ["cpu"]
    if accelerator is not None:
        usable += [accelerator.type] + [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    if name not in usable:
        raise ValueError(f"device {name!r} is not available here; use {' or '.join(usable)}")
    return torch.device(name)


def _load_pipeline(pipeline_class, checkpoint: str, model: str | None, dtype: str | None, device: str | None):
    """The pipeline in the folder `model`, or else the bundled `checkpoint`."""
    device = _device(device)
    # The bars of the two libraries count files and tensors; the only one shown is that of the denoising.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    if pipeline_class is MovieGenAudioPipeline and dtype == "bfloat16":
        # Decoding sound in bfloat16 costs 10 dB.
        options["dtype"] = {"default": torch.bfloat16, "vae": torch.float32}
    path = bundled_checkpoint(checkpoint) if model is None else model
    if os.path.isfile(os.path.join(path, "model_index.json")):
        saved_class = pipeline_class.load_config(path).get("_class_name")
        if saved_class != pipeline_class.__name__:
            raise ValueError(f"'{path}' holds a {saved_class}; this needs a {pipeline_class.__name__}")
    return pipeline_class.from_pretrained(path, **options).to(device)


def _generate(args: argparse.Namespace):
    check_output_path(args.output, overwrite=args.force)
    num_frames = args.num_frames
    if args.output.lower().endswith(".png"):
        if num_frames not in (None, 1):
            raise ValueError(f"a .png holds one frame, not {num_frames}; leave out --num-frames or use .mp4 or .gif")
        num_frames = 1
    if args.audio and not args.output.lower().endswith(".mp4"):
        raise ValueError(f"only an .mp4 holds sound, not {args.output}; leave out --audio or use .mp4")
    for name in ("audio_model", "audio_prompt", "audio_steps"):
        if getattr(args, name) is not None and not args.audio:
            raise ValueError(f"--{name.replace('_', '-')} is for films with sound; add --audio")

    pipeline = _load_pipeline(MovieGenPipeline, "toybox", args.model, args.dtype, args.device)
    audio_pipeline = None
    if args.audio:
        # Loaded before the work on the film, so that a wrong name does not waste it.
        audio_pipeline = _load_pipeline(
            MovieGenAudioPipeline, "toybox-audio", args.audio_model, args.dtype, args.device
        )
    options = {
        "negative_prompt": args.negative_prompt,
        "height": args.height,
        "width": args.width,
        "num_frames": num_frames,
        "frame_rate": args.frame_rate,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
    }
    start = time.perf_counter()
    video = pipeline(
        args.prompt,
        # Drawn on the CPU, so that a seed gives the same noise on every device.
        generator=torch.Generator("cpu").manual_seed(args.seed),
        output_type="np",
        **{name: value for name, value in options.items() if value is not None},
    ).frames[0]
    frame_rate = args.frame_rate or pipeline.config.default_frame_rate
    audio, sampling_rate = None, None
    if audio_pipeline is not None:
        options = {"prompt": args.audio_prompt, "num_inference_steps": args.audio_steps}
        # The prompt says what is seen; unless another one says what is heard, the frames alone decide.
        sound = audio_pipeline(
            video=video,
            video_frame_rate=frame_rate,
            generator=torch.Generator("cpu").manual_seed(args.seed),
            output_type="np",
            **{name: value for name, value in options.items() if value is not None},
        )
        audio, sampling_rate = sound.audios[0], sound.sampling_rate
    save_video(video, args.output, frame_rate, audio, sampling_rate)
    print(f"prompt: {args.prompt}")
    print(f"seed: {args.seed}")
    print(f"seconds: {time.perf_counter() - start:.1f}")
    print(f"path: {args.output}")


def _add_generate(commands):
    parser = commands.add_parser("generate", help="make a film or a picture from a prompt")
    parser.set_defaults(run=_generate)
    parser.add_argument("prompt", type=_prompt, help="what to show")
    parser.add_argument("-o", "--output", required=True, help=".mp4 or .gif for a film, .png for one frame")
    parser.add_argument("--model", help="diffusers folder or Hub id (default: the bundled toybox checkpoint)")
    parser.add_argument("--seed", type=_seed, default=0, help="of the starting noise (default: %(default)s)")
    parser.add_argument("--num-frames", type=int, help="default: as the checkpoint says")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 16 (default: as the checkpoint says)")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 16 (default: as the checkpoint says)")
    parser.add_argument("--frame-rate", type=_frame_rate, help="frames a second (default: as the checkpoint says)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: as the checkpoint says)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 for none (default: as the checkpoint says)")
    parser.add_argument("--negative-prompt", type=_text, help="what to keep out of the picture")
    parser.add_argument("--audio", action="store_true", help="give the film, an .mp4, a sound made for its frames")
    parser.add_argument("--audio-model", help="as --model, for the sound (default: the bundled toybox-audio)")
    parser.add_argument("--audio-prompt", type=_sound_prompt, help="what to hear (default: what the frames call for)")
    parser.add_argument("--audio-steps", type=int, help="as --steps, for the sound")
    _add_machine_options(parser)


def _add_machine_options(parser):
    parser.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of all weights (default: float32, text encoders as they are stored)",
    )
    parser.add_argument("--force", action="store_true", help="replace the output file if it exists")


def _sound_options(args: argparse.Namespace) -> dict:
    options = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
    }
    # Drawn on the CPU, so that a seed gives the same noise on every device.
    options["generator"] = torch.Generator("cpu").manual_seed(args.seed)
    return {name: value for name, value in options.items() if value is not None}


def _add_sound_options(parser):
    parser.add_argument("--model", help="diffusers folder or Hub id (default: the bundled toybox-audio checkpoint)")
    parser.add_argument("--seed", type=_seed, default=0, help="of the starting noise (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: as the checkpoint says)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 for none (default: as the checkpoint says)")
    parser.add_argument("--negative-prompt", type=_text, help="what to keep out of the sound")
    _add_machine_options(parser)


def _score(args: argparse.Namespace):
    check_not_itself(args.film, args.output)
    check_output_path(args.output, overwrite=args.force, extensions=(".mp4",))
    film = probe_film(args.film)
    if film.duration > MAX_SECONDS:
        raise ValueError(
            f"{args.film} lasts {film.duration:.0f} seconds; a sound lasts at most {MAX_SECONDS}, so cut it"
        )
    pipeline = _load_pipeline(MovieGenAudioPipeline, "toybox-audio", args.model, args.dtype, args.device)
    start = time.perf_counter()
    # Of a part of the film only the features are kept, so that a film of any length fits.
    embeds = []
    with tqdm(total=film.num_frames, desc="frames") as progress:
        for frames in read_film(film):
            embeds.append(pipeline.encode_video(frames))
            progress.update(len(frames))
    sound = pipeline(
        video_embeds=torch.cat(embeds, dim=1),
        video_frame_rate=film.frame_rate,
        audio_length_in_s=film.duration,
        output_type="np",
        **_sound_options(args),
    )
    save_scored_film(film, args.output, sound.audios[0], sound.sampling_rate)
    print(f"film: {args.film}")
    if args.prompt is not None:
        print(f"prompt: {args.prompt}")
    if film.sounds:
        print(f"replaced: the film's own sound ({', '.join(film.sounds)})")
    if film.other_streams:
        print(f"left out: {', '.join(film.other_streams)}")
    print(f"seed: {args.seed}")
    print(f"seconds: {time.perf_counter() - start:.1f}")
    print(f"path: {args.output}")


def _add_score(commands):
    parser = commands.add_parser("score", help="give a film a sound; its picture is copied as it is")
    parser.set_defaults(run=_score)
    parser.add_argument("film", help="a video file; sounds it has are replaced")
    parser.add_argument("-o", "--output", required=True, help=".mp4")
    parser.add_argument("--prompt", type=_sound_prompt, help="what to hear (default: what the frames call for)")
    _add_sound_options(parser)


def _sound(args: argparse.Namespace):
    check_output_path(args.output, overwrite=args.force, extensions=AUDIO_EXTENSIONS)
    pipeline = _load_pipeline(MovieGenAudioPipeline, "toybox-audio", args.model, args.dtype, args.device)
    start = time.perf_counter()
    sound = pipeline(audio_length_in_s=args.seconds, output_type="np", **_sound_options(args))
    save_audio(sound.audios[0], args.output, sound.sampling_rate, floating_point=args.float)
    print(f"prompt: {args.prompt}")
    print(f"seed: {args.seed}")
    print(f"seconds: {time.perf_counter() - start:.1f}")
    print(f"path: {args.output}")


def _add_sound(commands):
    parser = commands.add_parser("sound", help="make a sound from a prompt")
    parser.set_defaults(run=_sound)
    parser.add_argument("prompt", type=_sound_prompt, help="what to hear")
    parser.add_argument("-o", "--output", required=True, help=".wav")
    parser.add_argument("--seconds", type=_seconds, required=True, help="length of the sound")
    parser.add_argument("--float", action="store_true", help="write 32-bit floats instead of 16-bit integers")
    _add_sound_options(parser)


def _preview(args: argparse.Namespace):
    check_output_path(args.output, overwrite=args.force, extensions=(".png", ".mp4", ".wav"))
    extension = args.output.lower()[-4:]
    if extension == ".wav" and args.task != "audio":
        raise ValueError(f"{args.task} has no sound; use .png or .mp4")
    if extension == ".mp4" and (args.task == "text_to_image" or args.num_frames == 1):
        raise ValueError("single frames make no film; use .png")
    if not 1 <= args.num_samples <= MAX_PREVIEWS:
        raise ValueError(f"--num-samples must be 1 to {MAX_PREVIEWS}, not {args.num_samples}")
    if args.num_samples * (args.num_frames or 1) > MAX_PREVIEW_FRAMES:
        raise ValueError(
            f"{args.num_samples} samples of {args.num_frames} frames are too many to show: use at most "
            f"{MAX_PREVIEW_FRAMES} frames in all"
        )
    samples = list(
        data.dataset(
            args.task,
            args.split,
            args.seed,
            num_samples=args.num_samples,
            height=args.height,
            width=args.width,
            num_frames=args.num_frames,
            frame_rate=args.frame_rate,
        )
    )
    if extension == ".png":
        save_video([previews.sheet(samples)], args.output, MIN_FRAME_RATE)
    elif extension == ".mp4":
        frames, sound = previews.film(samples)
        sampling_rate = None if sound is None else samples[0]["sampling_rate"]
        save_video(frames, args.output, samples[0]["frame_rate"], sound, sampling_rate)
    else:
        save_audio(previews.sound(samples), args.output, samples[0]["sampling_rate"])
    for sample in samples:
        caption, truth = previews.describe(sample)
        print(f"{sample['index']}: {caption}\n   {truth}")
    print(f"path: {args.output}")


def _add_toybox(commands):
    commands = commands.add_parser("toybox", help="the world of the bundled checkpoint").add_subparsers(
        metavar="command", required=True
    )
    parser = commands.add_parser("preview", help="show samples of a data set with their captions and truth")
    parser.set_defaults(run=_preview)
    parser.add_argument("task", choices=data.TASKS, help=", ".join(data.TASKS), metavar="task")
    parser.add_argument("-o", "--output", required=True, help=".png for a sheet, .mp4 for a film, .wav for the sound")
    parser.add_argument("--split", choices=data.SPLITS, default="train", help="train (default) or held_out")
    parser.add_argument("--seed", type=_seed, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--height", type=int, help="pixels (default: as the task has it)")
    parser.add_argument("--width", type=int, help="pixels (default: as the task has it)")
    parser.add_argument("--num-frames", type=int, help="frames a clip (default: 16)")
    parser.add_argument("--frame-rate", type=_frame_rate, help="frames a second (default: 8)")
    parser.add_argument("--force", action="store_true", help="replace the output file if it exists")


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit status.

    A mistake of the user ends in one line on stderr and status 2, an interruption (Ctrl-C) in status 130.
    """
    parser = _Parser(prog="moviegen", description="Films, pictures and sounds with Movie Gen.")
    parser.add_argument("--version", action="version", version=f"moviegen {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    _add_generate(commands)
    _add_score(commands)
    _add_sound(commands)
    _add_toybox(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        # Some of the libraries' messages run over several lines.
        print(f"moviegen: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moviegen: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
