"""Trains the temporal autoencoder on Toybox, the paper's way: an image autoencoder first, then inflated, then clips.

    accelerate launch training_examples/train_tae.py --stage image --output_dir runs/tae_image
    accelerate launch training_examples/train_tae.py --stage video --image_autoencoder runs/tae_image/vae \\
        --output_dir runs/tae
    accelerate launch training_examples/train_tae.py --stage decoder --autoencoder runs/tae/vae \\
        --output_dir runs/tae_decoder

The last one is optional: it sharpens the decoder without moving the latents.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from diffusers_moviegen import AutoencoderKLMovieGen
from diffusers_moviegen.toybox.judges.sight import MAX_COLOUR_DISTANCE
from diffusers_moviegen.toybox.scenes import (
    Scenes,
    draw_scenes,
    draw_two_object_scenes,
    render,
    sample_tuple_pairs,
    sample_tuples,
)
from diffusers_moviegen.toybox.vocabulary import BACKGROUNDS, COLOURS, core_tuples, is_held_out
from diffusers_moviegen.training import (
    check_model_folder,
    check_positive,
    kl_divergence,
    multiscale_gradient_loss,
    outlier_penalty,
    restore_checkpoint,
    save_checkpoint,
    save_sample_sheet,
)


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "folder of the run; the trained model is written to its vae/"})
    stage: str = field(
        default="image",
        metadata={"help": "decoder goes on with the encoder frozen", "choices": ["image", "video", "decoder"]},
    )
    image_autoencoder: str | None = field(default=None, metadata={"help": "AutoencoderKL folder to inflate (video)"})
    autoencoder: str | None = field(default=None, metadata={"help": "folder of a model of this stage to start from"})
    block_out_channels: list[int] = field(default_factory=lambda: [32, 48, 64, 64])
    layers_per_block: int = 1
    norm_num_groups: int = 8
    vary_scenes: bool = field(default=True, metadata={"help": "train on several objects in any colours too"})
    height: int = 64
    width: int = 64
    num_frames: int = 16
    frame_rate: float = 8
    image_batch_size: int = 32
    video_batch_size: int = 4
    videos_per_image_batch: int = field(default=3, metadata={"help": "video batches after every image batch (video)"})
    max_train_steps: int = 1500
    learning_rate: float = 1e-3
    lr_warmup_steps: int = 50
    max_grad_norm: float = 1.0
    l1_weight: float = 1.0
    mse_weight: float = 4.0
    chroma_weight: float = field(default=8.0, metadata={"help": "of the squared error of what is not luminance"})
    gradient_loss_weight: float = 1.0
    colour_weight: float = field(default=1.0, metadata={"help": "of the first three latent channels being the colour"})
    kl_weight: float = 1e-4
    outlier_weight: float = 0.0
    ema_decay: float = 0.995
    mixed_precision: str = "no"
    seed: int = 0
    validation_steps: int = 250
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "a checkpoint folder or 'latest'"})

    def __post_init__(self):
        check_positive(
            self,
            (
                "num_frames",
                "image_batch_size",
                "video_batch_size",
                "videos_per_image_batch",
                "max_train_steps",
                "validation_steps",
                "checkpointing_steps",
                "checkpoints_total_limit",
            ),
        )
        if self.image_batch_size % 2:
            raise ValueError(
                f"--image_batch_size is {self.image_batch_size}: use a multiple of 2, every scene gives two pictures."
            )
        if self.stage == "decoder" and self.autoencoder is None:
            raise ValueError("--stage decoder goes on from --autoencoder, the vae/ that --stage video wrote.")
        if self.image_autoencoder is not None and self.stage != "video":
            raise ValueError("--image_autoencoder is for --stage video; go on with --autoencoder.")
        if self.image_autoencoder is not None and self.autoencoder is not None:
            raise ValueError("--image_autoencoder and --autoencoder are both given; start from one of them.")


@torch.no_grad()
def initialize_near_linear(model: AutoencoderKL) -> None:
    """Starts a fresh image model as a variance-keeping linear map with a narrow posterior.

    Residual branches begin at zero, the other convolutions keep the scale of their input, and the noise of the
    posterior begins below the signal. From PyTorch's default initialisation the same model needs several times as many
    steps before it draws anything in front of a background.
    """
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            continue
        if name.endswith((".conv2", ".to_out.0")):
            torch.nn.init.zeros_(module.weight)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        torch.nn.init.zeros_(module.bias)
    latent_channels = model.config.latent_channels
    model.quant_conv.weight[latent_channels:] *= 0.1
    model.quant_conv.bias[latent_channels:] = -4


class Reconstruction(torch.nn.Module):
    """Encoding and decoding as one forward pass, so that the training engine's hooks see it."""

    def __init__(self, autoencoder: AutoencoderKL | AutoencoderKLMovieGen):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, video: torch.Tensor, sample_posterior: bool = True):
        if isinstance(self.autoencoder, AutoencoderKL):
            posterior = self.autoencoder.encode(video[:, :, 0]).latent_dist
            latents = posterior.sample() if sample_posterior else posterior.mode()
            return self.autoencoder.decode(latents).sample[:, :, None], posterior, latents[:, :, None]
        posterior = self.autoencoder.encode(video).latent_dist
        latents = posterior.sample() if sample_posterior else posterior.mode()
        return self.autoencoder.decode(latents, num_frames=video.shape[2]).sample, posterior, latents


def draw_crowd(count: int, generator: torch.Generator, num_objects: int = 4) -> Scenes:
    """Training scenes of several objects anywhere, overlapping too, so that most of the picture has to be coded."""
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


def draw_varied_scenes(args: Arguments, count: int, generator: torch.Generator) -> Scenes:
    """Training scenes: core ones, two objects or crowds."""
    kind = torch.rand((), generator=generator)
    if kind < 0.4:
        return draw_scenes(sample_tuples(count, generator), generator)
    if kind < 0.6:
        return draw_two_object_scenes(sample_tuple_pairs(count, generator), generator, args.height, args.width)
    return draw_crowd(count, generator)


def looks_held_out(words: tuple[str, str, str, str], recolour: Callable[[torch.Tensor], torch.Tensor]) -> bool:
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
    """
    clips = []
    for clip, objects in zip(video, tuples, strict=True):
        swap = torch.rand((), generator=generator) < 0.5
        order = torch.randperm(3, generator=generator) if swap else torch.arange(3)
        invert = torch.rand((), generator=generator) < 0.25

        def recolour(colours: torch.Tensor, order=order, invert=invert) -> torch.Tensor:
            colours = colours[order.to(colours.device)]
            return 255 - colours if invert else colours

        clips.append(clip if any(looks_held_out(words, recolour) for words in objects) else recolour(clip))
    return torch.stack(clips)


def draw_pixels(
    args: Arguments, images: bool, seed: int, device: torch.device, vary: bool = False, held_out: bool = False
) -> torch.Tensor:
    """A batch of pictures `(batch, 3, 1, height, width)` or clips `(batch, 3, frames, height, width)` in [-1, 1].

    With `vary` there are several objects in any colours, else the core scenes of one split.
    """
    generator = torch.Generator().manual_seed(seed)
    # A picture batch is two frames of half as many scenes, the second anywhere in the motion.
    count = args.image_batch_size // 2 if images else args.video_batch_size
    if vary:
        scenes = draw_varied_scenes(args, count, generator)
    else:
        scenes = draw_scenes(sample_tuples(count, generator, held_out=held_out), generator)
    if images:
        moment = 2 * torch.rand((), generator=generator).item() + 1e-3
        video = render(scenes, 2, 1 / moment, args.height, args.width, device)
        video = video.transpose(1, 2).flatten(0, 1)[:, :, None]
    else:
        video = render(scenes, args.num_frames, args.frame_rate, args.height, args.width, device)
    if vary:
        frames_a_scene = len(video) // count
        tuples = [scenes.tuples(i) for i in range(count) for _ in range(frames_a_scene)]
        video = vary_colours(video, tuples, generator)
    return video.float() / 127.5 - 1


@torch.no_grad()
def validate(args: Arguments, model: Reconstruction, accelerator: Accelerator, sheet: Path) -> dict[str, float]:
    """PSNR in dB on held-out scenes, posterior means decoded; writes a sheet of originals above reconstructions."""
    figures = {}
    for kind, images in {"images": True, "clips": False}.items():
        if not images and args.stage == "image":
            continue
        ratios, rows = [], []
        for batch in range(8):
            video = draw_pixels(args, images, 1_000_000_000 + batch, accelerator.device, held_out=True)
            with accelerator.autocast():
                reconstruction = model(video, sample_posterior=False)[0]
            levels, expected = (
                (value.float().clamp(-1, 1).add(1).mul(127.5).round()) for value in (reconstruction, video)
            )
            ratios += [
                peak_signal_noise_ratio(a, b, data_range=255.0).item() for a, b in zip(levels, expected, strict=True)
            ]
            if images:
                video, reconstruction = (value[:8].permute(2, 1, 0, 3, 4) for value in (video, reconstruction))
            rows += [video[0], reconstruction[0].float()]
        figures[f"psnr_{kind}"] = sum(ratios) / len(ratios)
        save_sample_sheet(torch.stack(rows), sheet.with_name(f"{sheet.name}_{kind}.png"))
    return figures


@torch.no_grad()
def measure_latents(args: Arguments, model: AutoencoderKLMovieGen, accelerator: Accelerator) -> None:
    """Writes mean and standard deviation of each latent channel, over clips and pictures alike, to the config."""
    latents = []
    for batch in range(48):
        video = draw_pixels(args, batch % 3 == 0, 2_000_000_000 + batch, accelerator.device)
        sample = model.encode(video).latent_dist.sample(torch.Generator(accelerator.device).manual_seed(batch))
        latents.append(sample.transpose(0, 1).flatten(1))
    std, mean = torch.std_mean(torch.cat(latents, dim=1).float(), dim=1)
    model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def main(args: Arguments) -> None:
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed, device_specific=True)
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "arguments.json").write_text(json.dumps(asdict(args), indent=2))

    # 1. Model
    config = {
        "block_out_channels": tuple(args.block_out_channels),
        "layers_per_block": args.layers_per_block,
        "norm_num_groups": args.norm_num_groups,
        "latent_channels": 16,
    }
    if args.stage == "image":
        levels = len(args.block_out_channels)
        config["down_block_types"] = ("DownEncoderBlock2D",) * levels
        config["up_block_types"] = ("UpDecoderBlock2D",) * levels
        model_class = AutoencoderKL
    else:
        model_class = AutoencoderKLMovieGen
    if args.autoencoder is not None:
        check_model_folder("autoencoder", args.autoencoder, model_class)
        model = model_class.from_pretrained(args.autoencoder)
    elif args.image_autoencoder is not None:
        check_model_folder("image_autoencoder", args.image_autoencoder, AutoencoderKL)
        model = AutoencoderKLMovieGen.from_autoencoder_kl(AutoencoderKL.from_pretrained(args.image_autoencoder))
    else:
        model = model_class(**config)
        if args.stage == "image":
            initialize_near_linear(model)
    multiple = 2 ** (len(model.config.block_out_channels) - 1)
    if args.height % multiple or args.width % multiple:
        raise ValueError(f"--height {args.height} and --width {args.width} must be multiples of {multiple}.")
    model.train()
    if args.stage == "decoder":
        # The latents stay what a backbone may already be learning.
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)

    # 2. Optimisation
    ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    lr_scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    reconstruct, optimizer = accelerator.prepare(Reconstruction(model), optimizer)
    accelerator.register_for_checkpointing(lr_scheduler, ema)
    first_step = restore_checkpoint(accelerator, output_dir, args.resume_from_checkpoint)
    # Only now, because a checkpoint restores it on the CPU.
    ema.to(accelerator.device)

    # 3. Steps
    progress = tqdm(
        range(first_step, args.max_train_steps),
        initial=first_step,
        total=args.max_train_steps,
        disable=not accelerator.is_main_process,
        mininterval=10,
    )
    start = time.perf_counter()
    for step in progress:
        images = args.stage == "image" or step % (1 + args.videos_per_image_batch) == 0
        # The step alone decides the batch, so a resumed run sees what an uninterrupted one would.
        seed = (args.seed * args.max_train_steps + step) * accelerator.num_processes + accelerator.process_index
        video = draw_pixels(args, images, seed, accelerator.device, vary=args.vary_scenes)
        with accelerator.autocast():
            reconstruction, posterior, latents = reconstruct(video)
        reconstruction = reconstruction.float()
        losses = {
            "l1": args.l1_weight * F.l1_loss(reconstruction, video),
            "mse": args.mse_weight * F.mse_loss(reconstruction, video),
            "chroma": args.chroma_weight * F.mse_loss(*(v - v.mean(1, keepdim=True) for v in (reconstruction, video))),
            "gradient": args.gradient_loss_weight * multiscale_gradient_loss(reconstruction, video),
            "kl": args.kl_weight * kl_divergence(posterior),
        }
        if args.colour_weight:
            # Without an anchor the least varied of the three colour axes is found thousands of steps after the others.
            colour = 3 * F.adaptive_avg_pool3d(video, latents.shape[2:])
            losses["colour"] = args.colour_weight * F.mse_loss(latents[:, :3].float(), colour)
        if args.outlier_weight:
            losses["outlier"] = args.outlier_weight * outlier_penalty(latents.float())
        accelerator.backward(sum(losses.values()))
        accelerator.clip_grad_norm_(reconstruct.parameters(), args.max_grad_norm)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())

        done = step + 1
        if done % 10 == 0:
            values = {name: f"{value.item():.4f}" for name, value in losses.items()}
            progress.set_postfix(values, s_step=f"{(time.perf_counter() - start) / (done - first_step):.2f}")
        if done % args.validation_steps == 0 or done == args.max_train_steps:
            if accelerator.is_main_process:
                ema.store(model.parameters())
                ema.copy_to(model.parameters())
                sheet = output_dir / "samples" / f"step_{done:06d}"
                figures = validate(args, accelerator.unwrap_model(reconstruct), accelerator, sheet)
                ema.restore(model.parameters())
                accelerator.print(json.dumps({"step": done, **figures}))
            accelerator.wait_for_everyone()
        if done % args.checkpointing_steps == 0 or done == args.max_train_steps:
            save_checkpoint(accelerator, output_dir, done, args.checkpoints_total_limit)

    # 4. The averaged weights are the result
    ema.copy_to(model.parameters())
    model.eval()
    if accelerator.is_main_process:
        if args.stage == "video":
            measure_latents(args, model, accelerator)
        # diffusers would write down the folder that the weights came from.
        model.register_to_config(_name_or_path="")
        model.save_pretrained(output_dir / "vae")
    accelerator.end_training()


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
