"""Trains the Movie Gen backbone on Toybox: pictures first, then pictures and clips together.

    accelerate launch training_examples/train_text_to_video.py --stage image --output_dir runs/t2i \\
        --vae runs/tae/vae --text_encoders runs/text_encoders
    accelerate launch training_examples/train_text_to_video.py --stage joint --output_dir runs/t2v \\
        --vae runs/tae/vae --text_encoders runs/text_encoders --transformer runs/t2i/pipeline/transformer

The result is a whole pipeline folder, `pipeline/` below the output folder.
"""

import json
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import ModelCard
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPTextModel, HfArgumentParser, T5EncoderModel

from diffusers_moviegen import (
    AutoencoderKLMovieGen,
    FlowMatchLinearQuadraticScheduler,
    MovieGenPipeline,
    MovieGenTransformer3DModel,
)
from diffusers_moviegen.pipelines.prompt_encoding import TEXT_ENCODERS
from diffusers_moviegen.toybox.captions import core_caption, phrase
from diffusers_moviegen.toybox.judges import compare, see
from diffusers_moviegen.toybox.scenes import draw_scenes, render, sample_tuples
from diffusers_moviegen.toybox.vocabulary import MOTIONS
from diffusers_moviegen.training import (
    build_model_card,
    check_model_folder,
    check_positive,
    prepare_hub_repository,
    push_folder_to_hub,
    restore_checkpoint,
    sample_timesteps,
    save_checkpoint,
    save_sample_sheet,
)


IMAGE_ENCODER = ("image_encoder", "image_processor")
"""The vision half of the CLIP, which no pipeline here loads."""


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "folder of the run; the result is written to its pipeline/"})
    vae: str = field(metadata={"help": "folder of the trained AutoencoderKLMovieGen"})
    text_encoders: str = field(metadata={"help": "folder that train_text_encoders.py wrote"})
    stage: str = field(default="joint", metadata={"help": "image, or joint", "choices": ["image", "joint"]})
    transformer: str | None = field(default=None, metadata={"help": "backbone folder to start from"})
    num_layers: int = 8
    num_attention_heads: int = 4
    attention_head_dim: int = 64
    ffn_dim: int = 512
    max_grid_size: list[int] = field(default_factory=lambda: [4, 6, 6])
    height: int = 64
    width: int = 64
    num_frames: int = 16
    frame_rate: float = 8
    num_cached_clips: int = field(default=16384, metadata={"help": "clips rendered and encoded before training"})
    num_cached_images: int = field(default=8192, metadata={"help": "pictures rendered and encoded before training"})
    train_batch_size: int = 64
    videos_per_image_batch: int = field(default=5, metadata={"help": "clip batches after every picture batch (joint)"})
    prompt_dropout: float = 0.1
    max_train_steps: int = 3000
    learning_rate: float = 6e-4
    lr_warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "no"
    seed: int = 0
    guidance_scale: float = field(default=5.0, metadata={"help": "guidance of the samples and of the saved pipeline"})
    validation_steps: int = 500
    num_validation_prompts: int = 32
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "a checkpoint folder or 'latest'"})
    push_to_hub: bool = field(default=False, metadata={"help": "push the result to the Hub, with a model card"})
    hub_model_id: str | None = field(default=None, metadata={"help": "repository to push to, user/name"})
    hub_private: bool = field(default=False, metadata={"help": "whether only its owners may see a new repository"})

    def __post_init__(self):
        check_positive(
            self,
            (
                "num_frames",
                "num_cached_clips",
                "num_cached_images",
                "train_batch_size",
                "videos_per_image_batch",
                "max_train_steps",
                "validation_steps",
                "num_validation_prompts",
                "checkpointing_steps",
                "checkpoints_total_limit",
            ),
        )
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("--push_to_hub: pass the repository to push to, --hub_model_id user/name.")
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private):
            raise ValueError("--hub_model_id and --hub_private do nothing without --push_to_hub: add it.")


def load_pipeline(args: Arguments) -> MovieGenPipeline:
    """The pipeline of frozen encoders around the backbone to train."""
    folder = Path(args.text_encoders)
    names = [f"{name}{suffix}" for suffix in TEXT_ENCODERS for name in ("tokenizer", "text_encoder")]
    missing = [name for name in (*names, *IMAGE_ENCODER) if not (folder / name).is_dir()]
    if missing:
        raise OSError(
            f"--text_encoders: '{folder}' lacks {', '.join(missing)}; pass the folder train_text_encoders.py wrote."
        )
    components = {}
    for suffix, encoder_class in zip(TEXT_ENCODERS, (T5EncoderModel, CLIPTextModel, T5EncoderModel), strict=True):
        components[f"tokenizer{suffix}"] = AutoTokenizer.from_pretrained(folder / f"tokenizer{suffix}")
        components[f"text_encoder{suffix}"] = encoder_class.from_pretrained(folder / f"text_encoder{suffix}")
    check_model_folder("vae", args.vae, AutoencoderKLMovieGen)
    vae = AutoencoderKLMovieGen.from_pretrained(args.vae)
    if vae.config.latents_mean is None or vae.config.latents_std is None:
        raise ValueError(
            f"--vae: the config of '{args.vae}' has no latents_mean and latents_std; pass the vae/ that train_tae.py "
            "--stage video wrote."
        )
    if args.transformer is not None:
        check_model_folder("transformer", args.transformer, MovieGenTransformer3DModel)
        transformer = MovieGenTransformer3DModel.from_pretrained(args.transformer)
    else:
        transformer = MovieGenTransformer3DModel(
            in_channels=vae.config.latent_channels,
            out_channels=vae.config.latent_channels,
            num_layers=args.num_layers,
            num_attention_heads=args.num_attention_heads,
            attention_head_dim=args.attention_head_dim,
            ffn_dim=args.ffn_dim,
            text_embed_dim=components["text_encoder"].config.d_model,
            text_embed_dim_2=components["text_encoder_2"].config.hidden_size,
            text_embed_dim_3=components["text_encoder_3"].config.d_model,
            max_grid_size=tuple(args.max_grid_size),
        )
    pipe = MovieGenPipeline(
        **components,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchLinearQuadraticScheduler(),
        default_height=args.height,
        default_width=args.width,
        default_num_frames=args.num_frames,
        default_frame_rate=args.frame_rate,
        default_guidance_scale=args.guidance_scale,
    )
    # Before minutes go into encoding what the backbone has no positions for.
    pipe.check_size(args.height, args.width, args.num_frames)
    return pipe


class Cache:
    """Posteriors of rendered scenes and text features of their captions, computed once.

    Each scene has two captions, the core one and one of the other phrasings.
    """

    @torch.no_grad()
    def __init__(self, args: Arguments, pipe: MovieGenPipeline, count: int, images: bool, seed: int, held_out: bool):
        generator = torch.Generator().manual_seed(seed)
        rng = random.Random(seed)
        motions = ("stays still",) if images else MOTIONS
        self.tuples = sample_tuples(count, generator, held_out, motions)
        scenes = draw_scenes(self.tuples, generator)
        num_frames = 1 if images else args.num_frames
        config, device = pipe.vae.config, pipe.vae.device
        latents_mean = torch.tensor(config.latents_mean, device=device).view(1, -1, 1, 1, 1)
        latents_std = torch.tensor(config.latents_std, device=device).view(1, -1, 1, 1, 1)
        means, stds = [], []
        # 64 frames at a time: more do not fit a processor's cache and take twice as long.
        chunk = max(64 // num_frames, 1)
        description = "encoding pictures" if images else "encoding clips"
        for start in tqdm(range(0, count, chunk), desc=description, mininterval=10):
            part = scenes[torch.arange(start, min(start + chunk, count))]
            video = render(part, num_frames, args.frame_rate, args.height, args.width, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                posterior = pipe.vae.encode(video.float() / 127.5 - 1).latent_dist
            means.append(((posterior.mean.float() - latents_mean) / latents_std).half())
            stds.append((posterior.std.float() / latents_std).half())
        self.means, self.stds = torch.cat(means), torch.cat(stds)

        captions = []
        for colour, shape, motion, background in self.tuples:
            said = None if images else motion
            captions.append(core_caption(colour, shape, said, background))
            captions.append(phrase(colour, shape, said, background, rng))
        self.text = TextCache(pipe, sorted(set(captions)), num_frames, args.frame_rate)
        self.captions = list(zip(captions[::2], captions[1::2], strict=True))

    def __len__(self) -> int:
        return len(self.means)

    def latents(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Samples of the posteriors of the scenes `index`, normalised, float32."""
        means, stds = self.means[index.to(self.means.device)].float(), self.stds[index.to(self.means.device)].float()
        return means + stds * torch.randn(means.shape, generator=generator).to(means.device)


class TextCache:
    """Text features by caption; the empty caption is the unconditional one."""

    def __init__(self, pipe: MovieGenPipeline, captions: list[str], num_frames: int, frame_rate: float):
        self.features = {}
        captions = ["", *captions]
        for start in tqdm(range(0, len(captions), 256), desc="encoding captions", mininterval=10):
            part = captions[start : start + 256]
            embeds = pipe.encode_prompt(
                part,
                do_classifier_free_guidance=False,
                num_frames=num_frames,
                frame_rate=frame_rate,
                dtype=torch.float32,
            )
            for row, caption in enumerate(part):
                self.features[caption] = {
                    suffix: embeds[f"prompt_embeds{suffix}"][row][embeds[f"prompt_attention_mask{suffix}"][row]].half()
                    for suffix in TEXT_ENCODERS
                }

    def inputs(self, captions: list[str]) -> dict[str, torch.Tensor | None]:
        """Arguments of the backbone's `forward`; an encoder that has no token for any caption is left out."""
        inputs = {}
        for suffix in TEXT_ENCODERS:
            features = [self.features[caption][suffix] for caption in captions]
            lengths = torch.tensor([len(value) for value in features], device=features[0].device)
            if lengths.max() == 0:
                continue
            padded = pad_sequence(features, batch_first=True).float()
            mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
            inputs[f"encoder_hidden_states{suffix}"] = padded
            inputs[f"encoder_attention_mask{suffix}"] = None if mask.all() else mask
        return inputs


def draw_batch(args: Arguments, cache: Cache, seed: int):
    """Latents, noise, timesteps and text inputs that `seed` alone decides."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    index = torch.randint(len(cache), (args.train_batch_size,), generator=generator)
    latents = cache.latents(index, generator)
    captions = [
        "" if rng.random() < args.prompt_dropout else cache.captions[i][rng.random() < 0.5] for i in index.tolist()
    ]
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    timesteps = sample_timesteps(len(index), generator, device=latents.device)
    return latents, noise, timesteps, cache.text.inputs(captions)


def flow_loss(transformer, scheduler, latents, noise, timesteps, text) -> torch.Tensor:
    noisy = scheduler.scale_noise(latents, timesteps, noise)
    prediction = transformer(hidden_states=noisy, timestep=timesteps, **text, return_dict=False)[0]
    return torch.nn.functional.mse_loss(prediction.float(), scheduler.get_velocity(latents, noise))


@torch.no_grad()
def validate(args: Arguments, pipe: MovieGenPipeline, cache: Cache, accelerator: Accelerator, sheet: Path) -> dict:
    """Flow loss on held-out clips at fixed times and noise, and how often sampled clips show what was asked for."""
    pipe.transformer.eval()
    losses = []
    for batch in range(4):
        with accelerator.autocast():
            losses.append(flow_loss(pipe.transformer, pipe.scheduler, *draw_batch(args, cache, 3_000_000_000 + batch)))
    tuples = cache.tuples[: args.num_validation_prompts]
    with accelerator.autocast():
        frames = pipe(
            [captions[0] for captions in cache.captions[: args.num_validation_prompts]],
            num_frames=1 if args.stage == "image" else args.num_frames,
            num_inference_steps=25,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).frames
    video = frames.float().transpose(1, 2)
    save_sample_sheet(video[:12] * 2 - 1, sheet)
    rows = compare(see((video * 255).round().to(torch.uint8), args.frame_rate), tuples)
    pipe.transformer.train()
    accuracy = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return {"validation_loss": torch.stack(losses).mean().item(), **accuracy}


def model_card(args: Arguments, repo_id: str, figures: dict[str, float], num_processes: int) -> ModelCard:
    """What the run was, said where its result is pushed to."""
    images = args.stage == "image"
    prompt = f"a red circle{'' if images else ' bounces'} on a pink background"
    imports = ["import torch", "from diffusers_moviegen import MovieGenPipeline"]
    load = [
        f'pipe = MovieGenPipeline.from_pretrained("{repo_id}")',
        "generator = torch.Generator().manual_seed(0)",
    ]
    if images:
        use = [
            f'picture = pipe("{prompt}", num_frames=1, generator=generator).frames[0][0]',
            'picture.save("picture.png")',
        ]
    else:
        imports.append("from diffusers_moviegen.media import save_video")
        use = [
            f'film = pipe("{prompt}", generator=generator).frames[0]',
            f'save_video(film, "film.mp4", frame_rate={args.frame_rate:g})',
        ]
    shape = f"{args.width} x {args.height} pixels"
    clips = f"clips of {args.num_frames} frames at {args.frame_rate:g} frames a second"
    drawn = f"{args.num_cached_images} pictures" + ("" if images else f" and {args.num_cached_clips} clips")
    return build_model_card(
        repo_id,
        summary=f"A Movie Gen {'text-to-image' if images else 'text-to-video'} pipeline for diffusers, trained on"
        " Toybox, a procedural world of one coloured shape on a flat ground. It makes "
        + (f"pictures of {shape}." if images else f"{clips}, {shape}, and pictures of that size."),
        snippet="\n".join([*imports, "", *load, *use]),
        data=f"Toybox alone: {drawn}, {shape}, drawn and captioned by the program itself; this run used no picture,"
        " film or text of anyone else. One in ten combinations of colour, shape, motion and background is held out:"
        " the run trained on none of them, and its figures are measured on nothing else.",
        recipe={**asdict(args), "processes": num_processes},
        figures=figures,
        figures_note="Measured by the run itself after its last step, on the averaged weights, before they were"
        " rounded to bfloat16. `validation_loss` is the flow-matching loss on held-out scenes at fixed times and"
        f" noise; the others are the share of {args.num_validation_prompts} held-out prompts whose colour, shape,"
        " motion, background, and all of these, a program sees in the samples (25 steps, guidance"
        f" {args.guidance_scale:g}).",
        base_model=args.transformer,
        pipeline_tag="text-to-image" if images else "text-to-video",
        tags=["toybox"],
    )


def main(args: Arguments) -> None:
    # An encoder that has no token for any caption of a batch leaves its projection without a gradient.
    parallel = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=[parallel])
    set_seed(args.seed, device_specific=True)
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        if args.push_to_hub:
            # A missing token or a name that is taken is better known now than after the last step.
            repo_id = prepare_hub_repository(args.hub_model_id, MovieGenPipeline.__name__, args.hub_private)
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "arguments.json").write_text(json.dumps(asdict(args), indent=2))

    # 1. Models: only the backbone learns
    pipe = load_pipeline(args)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(accelerator.device)
    transformer, scheduler = pipe.transformer, pipe.scheduler
    if accelerator.device.type == "cpu":
        # The fused CPU kernel's backward is several times slower than plain matrix products at these lengths.
        transformer.set_attention_backend("_native_math")
    transformer.train()

    # 2. Optimisation
    ema = EMAModel(transformer.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
    )
    lr_scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    wrapped, optimizer = accelerator.prepare(transformer, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler, ema)
    first_step = restore_checkpoint(accelerator, output_dir, args.resume_from_checkpoint)
    # Only now, because a checkpoint restores it on the CPU.
    ema.to(accelerator.device)

    # 3. Data: everything the frozen models compute is computed once, by each process for scenes of its own
    processes, rank = accelerator.num_processes, accelerator.process_index
    seed = 2 * (args.seed * processes + rank)
    images = Cache(args, pipe, args.num_cached_images // processes, images=True, seed=seed, held_out=False)
    clips, held_out = None, None
    if args.stage == "joint":
        clips = Cache(args, pipe, args.num_cached_clips // processes, images=False, seed=seed + 1, held_out=False)
    if accelerator.is_main_process:
        held_out = Cache(args, pipe, 256, images=args.stage == "image", seed=0, held_out=True)
    accelerator.wait_for_everyone()

    # 4. Steps
    progress = tqdm(
        range(first_step, args.max_train_steps),
        initial=first_step,
        total=args.max_train_steps,
        disable=not accelerator.is_main_process,
        mininterval=10,
    )
    start, average, figures = time.perf_counter(), None, None
    for step in progress:
        on_images = clips is None or step % (1 + args.videos_per_image_batch) == 0
        # The step alone decides the batch, so a resumed run sees what an uninterrupted one would.
        seed = (args.seed * args.max_train_steps + step) * accelerator.num_processes + accelerator.process_index
        batch = draw_batch(args, images if on_images else clips, seed)
        loss = flow_loss(wrapped, scheduler, *batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), args.max_grad_norm)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(transformer.parameters())

        done = step + 1
        if not on_images or clips is None:
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if done % 10 == 0 and average is not None:
            progress.set_postfix(
                loss=f"{average:.4f}", s_step=f"{(time.perf_counter() - start) / (done - first_step):.2f}"
            )
        if done % args.validation_steps == 0 or done == args.max_train_steps:
            if accelerator.is_main_process:
                ema.store(transformer.parameters())
                ema.copy_to(transformer.parameters())
                sheet = output_dir / "samples" / f"step_{done:06d}.png"
                figures = validate(args, pipe, held_out, accelerator, sheet)
                ema.restore(transformer.parameters())
                accelerator.print(json.dumps({"step": done, "loss": average, **figures}))
            accelerator.wait_for_everyone()
        if done % args.checkpointing_steps == 0 or done == args.max_train_steps:
            save_checkpoint(accelerator, output_dir, done, args.checkpoints_total_limit)

    # 5. The averaged weights are the result
    ema.copy_to(transformer.parameters())
    if accelerator.is_main_process:
        if args.push_to_hub and figures is None:
            # A run that is resumed after its last step has the model card still to write.
            sheet = output_dir / "samples" / f"step_{args.max_train_steps:06d}.png"
            figures = validate(args, pipe, held_out, accelerator, sheet)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                # Rounds what is stored, past diffusers' warning about modules that compute in float32: they still do
                # once they are loaded.
                torch.nn.Module.to(component, torch.bfloat16)
            if isinstance(component, ModelMixin):
                # diffusers would write down the folder that the weights came from.
                component.register_to_config(_name_or_path="")
        pipe.save_pretrained(output_dir / "pipeline", max_shard_size="14MB")
        # The vision half of the CLIP travels with the checkpoint for the tasks that condition on pictures.
        for name in IMAGE_ENCODER:
            shutil.copytree(Path(args.text_encoders) / name, output_dir / "pipeline" / name, dirs_exist_ok=True)
    accelerator.end_training()

    # 6. The result goes to the Hub; it stays in its folder when it cannot
    if args.push_to_hub and accelerator.is_main_process:
        card = model_card(args, repo_id, figures, accelerator.num_processes)
        try:
            print(push_folder_to_hub(output_dir / "pipeline", repo_id, card, args.hub_private))
        except OSError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
