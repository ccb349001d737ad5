"""Trains the temporal autoencoder (Movie Gen, section 3.1.1): an image autoencoder inflated, then clips and pictures.

    accelerate launch training_examples/train_tae.py --config training_examples/configs/tae_256px.yaml \\
        --image_autoencoder black-forest-labs/FLUX.1-schnell/vae --data clips --validation_data held_out_clips \\
        --output_dir runs/tae

With `--stage image` it trains an image autoencoder to inflate, with `--stage decoder` it goes on with the decoder
alone, which sharpens pictures without moving the latents. `--toybox` draws the data, `--data` reads it; with both they
take turns.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import logging
from huggingface_hub import ModelCard
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from diffusers_moviegen import AutoencoderKLMovieGen
from diffusers_moviegen.toybox.pixels import draw_pixels
from diffusers_moviegen.toybox.scenes import SIZES
from diffusers_moviegen.toybox.vocabulary import MOTIONS, SHAPES
from diffusers_moviegen.training import (
    BucketLoader,
    Buckets,
    BucketSampler,
    LearnedPerceptualLoss,
    MediaDataset,
    MediaError,
    MediaStream,
    PatchDiscriminator3D,
    RunState,
    ShardedEMA,
    StreamLoader,
    adaptive_weight,
    add_latent_noise,
    begin_run,
    build_model_card,
    check_latent_noise,
    check_mixed_precision,
    check_model_folder,
    check_output_dir,
    check_positive,
    check_training_options,
    discriminator_loss,
    end_training,
    kl_divergence,
    latest_checkpoint,
    make_lr_scheduler,
    make_optimizer,
    multiscale_gradient_loss,
    outlier_penalty,
    parse_weights,
    push_folder_to_hub,
    run_script,
    save_sample_sheet,
    step_generator,
    training_steps,
    written_beside,
)


logger = logging.get_logger(__name__)


# What the random numbers of a step are for, see `step_generator`.
PIXELS, POSTERIOR, STATISTICS, VALIDATION, FORMATS = range(5)


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "folder of the run; the trained model is written to its vae/"})
    stage: str = field(
        default="video",
        metadata={
            "help": "image trains an AutoencoderKL, decoder goes on with the encoder frozen",
            "choices": ["image", "video", "decoder"],
        },
    )
    data: str | None = field(
        default=None, metadata={"help": "table of media, its folder or Hub id, or a pattern of .tar shards"}
    )
    toybox: bool = field(default=False, metadata={"help": "draw the data, all of it or beside --data"})
    toybox_to_data: list[int] = field(
        default_factory=lambda: [3, 1], metadata={"help": "turns of Toybox to turns of --data, if both are given"}
    )
    toybox_resolutions: list[int] = field(
        default_factory=list, metadata={"help": "shorter sides, 64 and 128, of all sizes of Toybox that are drawn"}
    )
    toybox_frame_rates: list[float] = field(
        default_factory=list, metadata={"help": "rates to draw Toybox at; without them --frame_rate"}
    )
    validation_data: str | None = field(default=None, metadata={"help": "table of media to measure PSNR and SSIM on"})
    exclude: list[str] = field(default_factory=list, metadata={"help": "patterns of names to leave out of --data"})
    file_column: str = "file_name"
    caption_column: str = "caption"
    resolution: int = field(default=256, metadata={"help": "pictures have about resolution * resolution pixels"})
    aspect_ratios: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "width over height"})
    lengths: list[int] = field(default_factory=lambda: [32], metadata={"help": "frames of the clips"})
    frame_rate: float = 16
    varied_share: float = field(
        default=1.0,
        metadata={
            "help": "share of Toybox's batches in all looks, edited, and with several objects in any colours; the "
            "others have single objects on flat grounds"
        },
    )
    shape_weights: list[str] = field(
        default_factory=list,
        metadata={"help": "how likely Toybox's single objects have this shape, such as ring=2; 1 for the others"},
    )
    motion_weights: list[str] = field(
        default_factory=list,
        metadata={"help": "how likely Toybox's single objects move so, such as spins=6 bounces=3; 1 for the others"},
    )
    images_to_videos: list[int] = field(
        default_factory=lambda: [1, 3], metadata={"help": "steps of pictures to steps of clips"}
    )
    image_autoencoder: str | None = field(
        default=None, metadata={"help": "AutoencoderKL to inflate: folder, or Hub id with its subfolder behind it"}
    )
    autoencoder: str | None = field(
        default=None, metadata={"help": "model of this stage to start from: folder, or Hub id with its subfolder"}
    )
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    layers_per_block: int = 2
    norm_num_groups: int = 32
    temporal_upsample_type: str = field(
        default="nearest",
        metadata={
            "help": "how a model that is inflated or fresh doubles frames: as the paper, or with a kernel for each",
            "choices": ["nearest", "subpixel"],
        },
    )
    image_batch_size: int = 8
    video_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    max_train_steps: int = 100_000
    optimizer: str = field(
        default="adamw",
        metadata={"help": "muon orthogonalises the updates of convolutions", "choices": ["adamw", "muon"]},
    )
    learning_rate: float = 1e-4
    lr_scheduler: str = field(default="cosine", metadata={"choices": ["cosine", "linear", "constant_with_warmup"]})
    lr_warmup_steps: int = 1000
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    l1_weight: float = 1.0
    perceptual_weight: float = 1.0
    perceptual_features: str | None = field(
        default=None, metadata={"help": "safetensors file of VGG16 and LPIPS; without it gradients at three scales"}
    )
    adversarial_weight: float = field(default=0.0, metadata={"help": "0 trains without an adversary"})
    adaptive_adversarial_weight: bool = field(
        default=True, metadata={"help": "scale it so that the adversary pulls as hard as the reconstruction"}
    )
    adversarial_start: int = field(default=20_000, metadata={"help": "step from which the adversary takes part"})
    discriminator_channels: int = 64
    discriminator_learning_rate: float = 1e-4
    latent_noise: float = field(
        default=0.0,
        metadata={"help": "of --stage decoder: deviation of the noise in its latents, up to so many of theirs"},
    )
    kl_weight: float = 1e-6
    outlier_weight: float = 0.0
    mse_weight: float = 0.0
    chroma_weight: float = field(default=0.0, metadata={"help": "of the squared error of what is not luminance"})
    colour_weight: float = field(default=0.0, metadata={"help": "of the first three latent channels being the colour"})
    ema_decay: float = 0.999
    statistics_batches: int = field(default=256, metadata={"help": "batches to measure the latents of, each process"})
    mixed_precision: str = field(default="no", metadata={"choices": ["no", "fp16", "bf16"]})
    seed: int = 0
    num_workers: int = field(default=2, metadata={"help": "processes that decode --data, on each rank"})
    validation_steps: int = 1000
    checkpointing_steps: int = 1000
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "a checkpoint folder or 'latest'"})
    report_to: str = field(default="none", metadata={"help": "tracker such as tensorboard or wandb"})
    push_to_hub: bool = field(default=False, metadata={"help": "push the result to the Hub, with a model card"})
    hub_model_id: str | None = field(default=None, metadata={"help": "repository to push to, user/name"})
    hub_private: bool = field(default=False, metadata={"help": "whether only its owners may see a new repository"})

    def __post_init__(self):
        check_training_options(self)
        check_positive(self, ("image_batch_size", "video_batch_size", "statistics_batches", "discriminator_channels"))
        check_positive(self, ("layers_per_block", "norm_num_groups"))
        if self.data is None and not self.toybox:
            raise ValueError("pass --data, what to train on, or --toybox, or both.")
        if self.data is None and (self.validation_data is not None or self.exclude):
            raise ValueError(
                "--validation_data and --exclude are for --data; --toybox has held-out scenes of its own."
            )
        if len(self.toybox_to_data) != 2 or min(self.toybox_to_data) < 1:
            raise ValueError(f"--toybox_to_data is {self.toybox_to_data}: pass two numbers of turns such as 3 1.")
        if not self.toybox and (self.toybox_frame_rates or self.toybox_resolutions or self.drawing_weights()):
            raise ValueError(
                "--toybox_frame_rates, --toybox_resolutions, --shape_weights and --motion_weights say how Toybox is "
                "drawn: add --toybox."
            )
        if not all(0 < rate < math.inf for rate in self.toybox_frame_rates):
            raise ValueError(f"--toybox_frame_rates {self.toybox_frame_rates}: they must be above 0 frames a second.")
        sides = sorted({min(size) for size in SIZES})
        if not set(self.toybox_resolutions) <= set(sides):
            known = " and ".join(map(str, sides))
            raise ValueError(f"--toybox_resolutions {self.toybox_resolutions}: Toybox is drawn at {known}.")
        if self.toybox and len(self.aspect_ratios) * len(self.lengths) != 1:
            raise ValueError("--toybox draws one size and length: pass one of --aspect_ratios and one of --lengths.")
        if not 0 <= self.varied_share <= 1:
            raise ValueError(f"--varied_share is {self.varied_share}: it must be from 0 to 1.")
        if self.drawing_weights() and self.varied_share == 1:
            raise ValueError(
                "--shape_weights and --motion_weights do nothing with --varied_share 1: lower it to draw single "
                "objects."
            )
        if self.toybox and self.image_batch_size % 2:
            raise ValueError(
                f"--image_batch_size is {self.image_batch_size}: use a multiple of 2, every scene gives two pictures."
            )
        if self.stage == "decoder" and self.autoencoder is None:
            raise ValueError("--stage decoder goes on from --autoencoder, the vae/ that --stage video wrote.")
        if self.latent_noise and self.stage != "decoder":
            raise ValueError(f"--latent_noise is for --stage decoder, not for {self.stage}: leave it out.")
        if self.image_autoencoder is not None and self.stage != "video":
            raise ValueError("--image_autoencoder is for --stage video; go on with --autoencoder.")
        if self.image_autoencoder is not None and self.autoencoder is not None:
            raise ValueError("--image_autoencoder and --autoencoder are both given; start from one of them.")
        if self.stage != "image" and min(self.lengths, default=0) < 2:
            raise ValueError(f"--lengths {self.lengths}: a clip has 2 frames or more; pictures come by themselves.")
        if self.stage != "image" and self.images_to_videos[1] == 0:
            raise ValueError(f"--images_to_videos {self.images_to_videos}: --stage {self.stage} needs steps of clips.")
        if not 0 < self.frame_rate < math.inf:
            raise ValueError(f"--frame_rate is {self.frame_rate}: it must be above 0 frames a second.")
        if any(channels < 1 or channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(
                f"--block_out_channels {self.block_out_channels}: use multiples of --norm_num_groups "
                f"{self.norm_num_groups}."
            )
        weights = [name for name in vars(self) if name.endswith("_weight")]
        for name in (*weights, "latent_noise", "discriminator_learning_rate", "adversarial_start"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name} is {getattr(self, name)}: it must be 0 or more.")
        if self.perceptual_features is not None and self.perceptual_weight == 0:
            raise ValueError("--perceptual_features does nothing with --perceptual_weight 0.")
        if self.adversarial_weight and self.adversarial_start >= self.max_train_steps:
            raise ValueError(
                f"--adversarial_start {self.adversarial_start} is after the last step: lower it, or pass "
                "--adversarial_weight 0."
            )
        if self.adversarial_weight and self.mixed_precision == "fp16":
            raise ValueError("--mixed_precision fp16 has one loss scale, too few for an adversary: use bf16 or no.")

    def takes_images(self, step: int) -> bool:
        """Whether `step` is one of pictures."""
        images, videos = self.images_to_videos
        return self.stage == "image" or step % (images + videos) < images

    def drawing_weights(self) -> dict[str, float]:
        """Weights by name of the shapes and motions that the options name."""
        shapes = parse_weights("shape_weights", self.shape_weights, SHAPES)
        return shapes | parse_weights("motion_weights", self.motion_weights, MOTIONS)

    def takes_toybox(self, step: int) -> bool:
        """Whether `step` is one of drawn scenes. A turn has the pictures and clips of `images_to_videos`."""
        if not self.toybox or self.data is None:
            return self.toybox
        drawn, read = self.toybox_to_data
        turn = step if self.stage == "image" else step // sum(self.images_to_videos)
        return turn % (drawn + read) < drawn


# --- Model ------------------------------------------------------------------------------------------------------


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


def load_autoencoder(option: str, name: str, model_class: type) -> AutoencoderKL | AutoencoderKLMovieGen:
    """The model in the folder `name`, or on the Hub, where `name` is user/name or user/name/subfolder."""
    if Path(name).exists() or "/" not in name:
        check_model_folder(option, name, model_class)
        return model_class.from_pretrained(name, torch_dtype=torch.float32)
    user, repository, *subfolder = name.split("/", 2)
    place = {"pretrained_model_name_or_path": f"{user}/{repository}", "subfolder": (subfolder or [None])[0]}
    try:
        found = model_class.load_config(**place).get("_class_name")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"--{option}: '{name}' is no folder here, and no model of the Hub could be loaded by this name: {reason}"
        ) from error
    if found != model_class.__name__:
        raise OSError(f"--{option}: '{name}' holds a {found}; pass a {model_class.__name__}.")
    return model_class.from_pretrained(**place, torch_dtype=torch.float32)


def make_autoencoder(args: Arguments) -> AutoencoderKL | AutoencoderKLMovieGen:
    model_class = AutoencoderKL if args.stage == "image" else AutoencoderKLMovieGen
    if args.autoencoder is not None:
        return load_autoencoder("autoencoder", args.autoencoder, model_class)
    if args.image_autoencoder is not None:
        image_model = load_autoencoder("image_autoencoder", args.image_autoencoder, AutoencoderKL)
        try:
            return AutoencoderKLMovieGen.from_autoencoder_kl(image_model, args.temporal_upsample_type)
        except ValueError as error:
            raise ValueError(f"--image_autoencoder: {error}") from error
    config = {
        "block_out_channels": tuple(args.block_out_channels),
        "layers_per_block": args.layers_per_block,
        "norm_num_groups": args.norm_num_groups,
        "latent_channels": 16,
    }
    if args.stage != "image":
        return AutoencoderKLMovieGen(**config, temporal_upsample_type=args.temporal_upsample_type)
    levels = len(args.block_out_channels)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    model = AutoencoderKL(**config, **blocks)
    initialize_near_linear(model)
    return model


class Reconstruction(torch.nn.Module):
    """Encoding and decoding as one forward pass, so that the training engine's hooks see it."""

    def __init__(self, autoencoder: AutoencoderKL | AutoencoderKLMovieGen, latent_noise: float = 0.0):
        super().__init__()
        self.autoencoder, self.latent_noise = autoencoder, latent_noise

    def forward(self, video: torch.Tensor, generator: torch.Generator | None = None):
        """Reconstruction, posterior and latents: a draw of the posterior with a `generator`, else its mean."""
        images = isinstance(self.autoencoder, AutoencoderKL)
        posterior = self.autoencoder.encode(video[:, :, 0] if images else video).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        if images:
            return self.autoencoder.decode(latents).sample[:, :, None], posterior, latents[:, :, None]
        decoded = latents
        if generator is not None and self.latent_noise:
            decoded = add_latent_noise(latents, self.autoencoder.config.latents_std, self.latent_noise, generator)
        return self.autoencoder.decode(decoded, num_frames=video.shape[2]).sample, posterior, latents

    @property
    def last_layer(self) -> torch.nn.Parameter:
        """What the pull of two losses is compared at."""
        conv_out = self.autoencoder.decoder.conv_out
        return conv_out.weight if isinstance(self.autoencoder, AutoencoderKL) else conv_out.spatial.weight


def pixels(video: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 as values in [-1, 1]."""
    return video.to(device).float() / 127.5 - 1


# --- Data -------------------------------------------------------------------------------------------------------


def toybox_shapes(args: Arguments, buckets: Buckets) -> list[tuple[int, int, float]]:
    """Height, width and frame rate that Toybox is drawn at."""
    sizes = [size for size in SIZES if min(size) in args.toybox_resolutions] or buckets.sizes
    return [(*size, rate) for size in sizes for rate in args.toybox_frame_rates or [args.frame_rate]]


def draw_batch(args: Arguments, buckets: Buckets, accelerator: Accelerator, stream: int, number: int) -> dict:
    """A batch of drawn scenes; its number alone decides what they show.

    It has about as many pixels as one at --resolution, so that smaller scenes are more.
    """
    shapes = toybox_shapes(args, buckets)
    # All processes draw the same shape, so that none has to wait.
    generator = step_generator(args.seed, number, stream=FORMATS)
    height, width, frame_rate = shapes[torch.randint(len(shapes), (), generator=generator).item()]
    varied_draw = torch.rand((), generator=generator).item()
    share = math.prod(buckets.sizes[0]) / (height * width)
    images = args.takes_images(number // args.gradient_accumulation_steps)
    if images:
        count, num_frames = 2 * max(round(share * args.image_batch_size / 2), 1), 1
    else:
        count, num_frames = max(round(share * args.video_batch_size), 1), buckets.lengths[0]
    generator = step_generator(args.seed, number, accelerator.process_index, stream)
    # Statistics are those of single objects, all motions alike.
    trains = stream == PIXELS
    video = draw_pixels(
        *(count, num_frames, height, width, frame_rate, generator, accelerator.device),
        varied=trains and varied_draw < args.varied_share,
        weights=args.drawing_weights() if trains else None,
    )
    return {"video": video, "name": [f"Toybox batch {number}"]}


def is_shards(source: str) -> bool:
    return source.endswith(".tar") or any(Path(source).glob("*.tar"))


def make_loaders(
    args: Arguments, buckets: Buckets, accelerator: Accelerator, dataset: MediaDataset | None, seed: int
) -> dict[str, BucketLoader | StreamLoader]:
    """Loaders of pictures and of clips, or one of shards, which come as they are mixed."""
    ranks = {"rank": accelerator.process_index, "num_replicas": accelerator.num_processes}
    if dataset is None:
        shards = args.data if args.data.endswith(".tar") else str(Path(args.data) / "*.tar")
        columns = {"caption_column": args.caption_column, "exclude": args.exclude}
        stream = MediaStream(shards, args.frame_rate, buckets, seed=seed, **columns, **ranks)
        batch_size = args.image_batch_size if args.stage == "image" else args.video_batch_size
        return {"shards": StreamLoader(stream, batch_size, args.num_workers, accelerator.device)}
    loaders = {}
    for kind, batch_size in (("images", args.image_batch_size), ("clips", args.video_batch_size)):
        part = copy(dataset)
        part.samples = [sample for sample in dataset.samples if (sample.bucket.num_frames == 1) == (kind == "images")]
        unwanted = args.stage != "image" and args.images_to_videos[kind == "clips"] == 0
        if unwanted or not part.samples:
            continue
        try:
            sampler = BucketSampler(
                [sample.bucket for sample in part.samples], batch_size, seed=seed, images_to_videos=None, **ranks
            )
        except ValueError as error:
            option = "--image_batch_size" if kind == "images" else "--video_batch_size"
            raise ValueError(f"{option} and --data: {error}") from error
        loaders[kind] = BucketLoader(part, sampler, args.num_workers)
    if args.stage != "image" and "clips" not in loaders:
        raise ValueError(f"--data: '{args.data}' has no videos to train --stage {args.stage} on.")
    return loaders


def training_batches(
    args: Arguments,
    buckets: Buckets,
    accelerator: Accelerator,
    loaders: dict[str, BucketLoader | StreamLoader],
    stream: int = PIXELS,
    start: int = 0,
) -> Iterator[dict]:
    """Batches without end: of files from the position of their loaders on, of Toybox by their number."""
    iterators = {kind: iter(loader) for kind, loader in loaders.items()}
    for number in itertools.count(start):
        step = number // args.gradient_accumulation_steps
        if args.takes_toybox(step):
            yield draw_batch(args, buckets, accelerator, stream, number)
        else:
            kind = "images" if args.takes_images(step) else "clips"
            yield next(iterators[kind if kind in iterators else next(iter(iterators))])


def validation_batches(
    args: Arguments, buckets: Buckets, dataset: MediaDataset | None, accelerator: Accelerator
) -> Iterator[tuple[str, torch.Tensor]]:
    """The share of this process of the fixed batches to measure on, each with its kind, images or clips.

    Of a film the window in its middle; of Toybox eight batches of held-out scenes of each kind, which are of kinds of
    their own beside files.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    if dataset is not None:
        for index in range(rank, len(dataset.samples), processes):
            try:
                video = dataset.read(index, position=0.5)["video"][None]
            except MediaError as error:
                # Damage that was not seen at the start; the other samples still tell how the run is doing.
                logger.warning(f"--validation_data: '{dataset.samples[index].name}' is left out: {error}")
                continue
            yield "images" if video.shape[2] == 1 else "clips", video
    if not args.toybox:
        return
    prefix = "" if dataset is None else "toybox_"
    shapes = toybox_shapes(args, buckets)
    kinds = [("images", args.image_batch_size, 1)]
    if args.stage != "image":
        kinds.append(("clips", args.video_batch_size, buckets.lengths[0]))
    for kind, count, num_frames in kinds:
        for number in range(rank, 8, processes):
            generator = step_generator(0, number, stream=VALIDATION)
            # All sizes have their share of the eight, however many there are.
            height, width, frame_rate = shapes[number * len(shapes) // 8]
            yield (
                prefix + kind,
                draw_pixels(
                    count, num_frames, height, width, frame_rate, generator, accelerator.device, held_out=True
                ),
            )


# --- Losses -----------------------------------------------------------------------------------------------------


def reconstruction_terms(
    args: Arguments, reconstruction: torch.Tensor, video: torch.Tensor, perceptual_loss: Callable
) -> dict[str, torch.Tensor]:
    """The weighted losses between pixels."""
    terms = {"l1": args.l1_weight * F.l1_loss(reconstruction, video)}
    if args.perceptual_weight:
        terms["perceptual"] = args.perceptual_weight * perceptual_loss(reconstruction, video)
    if args.mse_weight:
        terms["mse"] = args.mse_weight * F.mse_loss(reconstruction, video)
    if args.chroma_weight:
        chroma = [value - value.mean(dim=1, keepdim=True) for value in (reconstruction, video)]
        terms["chroma"] = args.chroma_weight * F.mse_loss(*chroma)
    return terms


def latent_terms(
    args: Arguments, posterior: DiagonalGaussianDistribution, latents: torch.Tensor, video: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The weighted losses of the latents."""
    terms = {"kl": args.kl_weight * kl_divergence(posterior)}
    if args.outlier_weight:
        terms["outlier"] = args.outlier_weight * outlier_penalty(latents.float())
    if args.colour_weight:
        # Without an anchor the least varied of the three colour axes is found thousands of steps after the others.
        colour = 3 * F.adaptive_avg_pool3d(video, latents.shape[2:])
        terms["colour"] = args.colour_weight * F.mse_loss(latents[:, :3].float(), colour)
    return terms


# --- Figures ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(
    model: Reconstruction, batches: Iterator[tuple[str, torch.Tensor]], accelerator: Accelerator, sheet: Path
) -> dict[str, float]:
    """PSNR in dB and SSIM of fixed clips and pictures, means of the posteriors decoded. To be called by all processes.

    The first process writes sheets of its first eight batches of one size, originals above reconstructions.
    """
    kinds = ("images", "clips", "toybox_images", "toybox_clips")
    totals = {kind: torch.zeros(3, device=accelerator.device) for kind in kinds}
    rows = {kind: [] for kind in kinds}
    model.eval()
    for kind, video in batches:
        video = pixels(video, accelerator.device)
        with accelerator.autocast():
            reconstruction = model(video)[0]
        levels = [value.float().clamp(-1, 1).add(1).mul(127.5).round() for value in (reconstruction, video)]
        for found, expected in zip(*levels, strict=True):
            psnr = peak_signal_noise_ratio(found, expected, data_range=255.0)
            frames = [value.transpose(0, 1) for value in (found, expected)]
            ssim = structural_similarity_index_measure(*frames, data_range=255.0)
            totals[kind] += torch.stack([psnr, ssim, torch.ones_like(psnr)])
        shown = [value.float() / 127.5 - 1 for value in reversed(levels)]
        if video.shape[2] == 1:
            shown = [value[:8].permute(2, 1, 0, 3, 4) for value in shown]
        # At most sixteen frames of a clip, which is as much as a picture viewer shows side by side.
        shown = [value[0][:, :: math.ceil(value.shape[2] / 16)] for value in shown]
        if len(rows[kind]) < 16 and (not rows[kind] or shown[0].shape == rows[kind][0].shape):
            rows[kind] += shown
    model.train()
    figures = {}
    for kind, total in totals.items():
        psnr, ssim, count = accelerator.reduce(total, "sum").tolist()
        if count:
            figures |= {f"psnr_{kind}": psnr / count, f"ssim_{kind}": ssim / count}
        if rows[kind] and accelerator.is_main_process:
            save_sample_sheet(torch.stack(rows[kind]), sheet.with_name(f"{sheet.name}_{kind}.png"))
    return figures


@torch.no_grad()
def measure_latents(
    model: AutoencoderKLMovieGen, batches: Iterator[dict], count: int, accelerator: Accelerator
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the posteriors' draws over `count` batches of each process."""
    rows = []
    for batch in itertools.islice(batches, count):
        with accelerator.autocast():
            posterior = model.encode(pixels(batch["video"], accelerator.device)).latent_dist
        mean, var = (value.float().transpose(0, 1).flatten(1) for value in (posterior.mean, posterior.var))
        centre = mean.mean(dim=1)
        spread = ((mean - centre[:, None]).square() + var).mean(dim=1)
        rows.append(torch.cat([centre, spread, centre.new_tensor([mean.shape[1]])]))
    # Draws vary with their means and around them; so do the batches.
    rows = accelerator.gather(torch.stack(rows)).cpu().double()
    weights = rows[:, -1:] / rows[:, -1].sum()
    centres, spreads = rows[:, :-1].chunk(2, dim=1)
    mean = (weights * centres).sum(dim=0)
    std = (weights * (spreads + (centres - mean).square())).sum(dim=0).sqrt()
    return mean.tolist(), std.tolist()


def model_card(
    args: Arguments, repo_id: str, figures: dict[str, float], dataset: MediaDataset | None, num_processes: int
) -> ModelCard:
    """What the run was, said where its result is pushed to."""
    parts = []
    if args.toybox:
        parts.append("Toybox, a procedural world of coloured shapes, drawn by the program itself.")
    if dataset is not None:
        report = dataset.report
        parts.append(f"`{Path(args.data).name}`: {report.num_images} images and {report.num_videos} videos.")
    elif args.data is not None:
        parts.append(f"The shards `{Path(args.data).name}`.")
    data = " ".join(parts)
    images = args.stage == "image"
    module, class_name = ("diffusers", "AutoencoderKL") if images else ("diffusers_moviegen", "AutoencoderKLMovieGen")
    shape = "1, 3, 64, 64" if images else "1, 3, 16, 64, 64"
    snippet = [
        "import torch",
        f"from {module} import {class_name}",
        "",
        f'vae = {class_name}.from_pretrained("{repo_id}")',
        f"pixels = 2 * torch.rand({shape}) - 1",
        "with torch.no_grad():",
        "    latents = vae.encode(pixels).latent_dist.mode()",
        "    print(latents.shape, vae.decode(latents).sample.shape)",
    ]
    base_model = args.autoencoder or args.image_autoencoder
    if base_model is not None and not Path(base_model).exists():
        base_model = "/".join(base_model.split("/")[:2])
    seen = "held-out Toybox scenes"
    if args.validation_data is not None:
        seen = f"the data set `{Path(args.validation_data).name}`" + (" and on " + seen if args.toybox else "")
    return build_model_card(
        repo_id,
        summary="An image autoencoder for diffusers, made to be inflated to Movie Gen's temporal autoencoder."
        if images
        else "A temporal autoencoder of Movie Gen for diffusers: it compresses clips and pictures in time, height and"
        " width.",
        snippet="\n".join(snippet),
        data=data,
        recipe={**asdict(args), "processes": num_processes},
        figures=figures,
        figures_note="Measured by the run itself after its last step. `loss` is that of the last steps on the training"
        " data."
        + (
            f" PSNR, in dB, and SSIM are those of the averaged weights on {seen}, decoded from the posteriors' means."
            if len(figures) > 1
            else ""
        ),
        base_model=base_model,
        pipeline_tag="image-to-image" if images else "video-to-video",
        tags=["autoencoder"],
    )


# --- The run ----------------------------------------------------------------------------------------------------


def check_adversary(args: Arguments) -> None:
    """Raises a `ValueError` if a run is to go on with an adversary that its checkpoint does not have."""
    if not args.adversarial_weight or args.resume_from_checkpoint is None:
        return
    latest = args.resume_from_checkpoint == "latest"
    checkpoint = latest_checkpoint(args.output_dir) if latest else Path(args.resume_from_checkpoint)
    if checkpoint is not None and (checkpoint / "model.safetensors").is_file():
        if not (checkpoint / "model_1.safetensors").is_file():
            raise ValueError(
                f"--adversarial_weight: '{checkpoint}' is of a run without an adversary: go on without, and give the "
                "vae/ of that run to a new one with --autoencoder."
            )


def main(args: Arguments) -> None:
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=str(output_dir / "logs"),
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "every process holds the whole autoencoder: launch it with --multi_gpu instead of --use_fsdp, "
            "--use_deepspeed or a --config_file that says so."
        )
    check_mixed_precision(accelerator)
    check_output_dir(output_dir, "vae", args.resume_from_checkpoint)
    check_adversary(args)
    # Every process starts from the same weights.
    set_seed(args.seed)

    # 1. Models
    model = make_autoencoder(args)
    multiple = 2 ** (len(model.config.block_out_channels) - 1)
    lengths = (1,) if args.stage == "image" else tuple(args.lengths)
    try:
        buckets = Buckets(args.resolution, tuple(args.aspect_ratios), lengths, multiple)
    except ValueError as error:
        raise ValueError(f"--resolution, --aspect_ratios, --lengths: {error}") from error
    shortest = min(min(size) for size in buckets.sizes)
    if shortest < 16 and (args.adversarial_weight or args.perceptual_features is not None):
        raise ValueError(
            f"--resolution {args.resolution} gives sides of {shortest} pixels, and --adversarial_weight and "
            "--perceptual_features need 16: raise it."
        )
    model.train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.stage == "decoder":
        if args.latent_noise:
            check_latent_noise(model, args.autoencoder)
        # The latents stay what a backbone may already be learning.
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    perceptual_loss = multiscale_gradient_loss
    if args.perceptual_features is not None:
        try:
            perceptual_loss = LearnedPerceptualLoss(args.perceptual_features).to(accelerator.device)
        except (OSError, ValueError) as error:
            raise type(error)(f"--perceptual_features: {error}") from error

    # 2. Data
    dataset, validation_dataset, loaders = None, None, {}
    if args.data is not None:
        columns = {"file_column": args.file_column, "caption_column": args.caption_column}
        if not is_shards(args.data):
            dataset = MediaDataset(args.data, args.frame_rate, buckets, exclude=args.exclude, **columns)
        loaders = make_loaders(args, buckets, accelerator, dataset, args.seed)
        if args.validation_data is not None:
            validation_dataset = MediaDataset(args.validation_data, args.frame_rate, buckets, **columns)

    # 3. Optimisation
    optimizer = make_optimizer(accelerator, args, model, betas=(0.9, 0.99))
    lr_scheduler, _ = make_lr_scheduler(args, optimizer)
    reconstruct, optimizer = accelerator.prepare(Reconstruction(model, args.latent_noise), optimizer)
    if args.adversarial_weight:
        adversary = PatchDiscriminator3D(model.config.out_channels, args.discriminator_channels)
        adversary_optimizer = torch.optim.AdamW(
            adversary.parameters(), lr=args.discriminator_learning_rate, betas=(0.5, 0.9), weight_decay=0.0
        )
        discriminate, adversary_optimizer = accelerator.prepare(adversary, adversary_optimizer)
    ema = ShardedEMA(accelerator, reconstruct, args.ema_decay)
    state = RunState()
    repo_id = begin_run(accelerator, args, "train_tae", type(model).__name__, state, lr_scheduler, *loaders.values())

    def measure() -> dict[str, float]:
        """The figures of a step, of the averaged weights; draws sheets, too."""
        if not args.toybox and validation_dataset is None:
            return {}
        fixed = validation_batches(args, buckets, validation_dataset, accelerator)
        sheet = output_dir / "samples" / f"step_{state.step:06d}"
        with ema.applied():
            return validate(accelerator.unwrap_model(reconstruct), fixed, accelerator, sheet)

    # 4. Steps
    first_batch = state.step * args.gradient_accumulation_steps
    batches = training_batches(args, buckets, accelerator, loaders, start=first_batch)
    with training_steps(accelerator, args, state, optimizer, lr_scheduler, measure, ema) as steps:
        while steps.go_on:
            adversarial = args.adversarial_weight > 0 and state.step >= args.adversarial_start
            parts, names = {}, []
            for micro_step in range(args.gradient_accumulation_steps):
                number = state.step * args.gradient_accumulation_steps + micro_step
                last = micro_step == args.gradient_accumulation_steps - 1
                batch = next(batches)
                names += batch["name"]
                video = pixels(batch["video"], accelerator.device)
                generator = step_generator(args.seed, number, accelerator.process_index, POSTERIOR)

                # 4.1 The autoencoder
                with nullcontext() if last else accelerator.no_sync(reconstruct):
                    with accelerator.autocast():
                        reconstruction, posterior, latents = reconstruct(video, generator)
                        reconstruction = reconstruction.float()
                        terms = reconstruction_terms(args, reconstruction, video, perceptual_loss)
                    if adversarial:
                        # Only as a judge: neither its weights nor the estimates of their norms are to move.
                        adversary.eval().requires_grad_(False)
                        with accelerator.autocast():
                            verdict = -adversary(reconstruction).float().mean()
                        adversary.train().requires_grad_(True)
                        weight = args.adversarial_weight
                        if args.adaptive_adversarial_weight:
                            last_layer = accelerator.unwrap_model(reconstruct).last_layer
                            weight = weight * adaptive_weight(sum(terms.values()), verdict, last_layer)
                        terms["adversarial"] = weight * verdict
                    terms |= latent_terms(args, posterior, latents, video)
                    accelerator.backward(sum(terms.values()) / args.gradient_accumulation_steps)

                # 4.2 Its adversary, which sees real and reconstructed clips in one pass
                if adversarial:
                    with nullcontext() if last else accelerator.no_sync(discriminate):
                        with accelerator.autocast():
                            scores = discriminate(torch.cat([video, reconstruction.detach()])).float()
                        terms["discriminator"] = discriminator_loss(*scores.chunk(2))
                        accelerator.backward(terms["discriminator"] / args.gradient_accumulation_steps)
                for name, value in terms.items():
                    parts[name] = parts.get(name, 0) + value.detach() / args.gradient_accumulation_steps

            # 4.3 The step, unless a loss is not finite
            grad_norm = accelerator.clip_grad_norm_(reconstruct.parameters(), args.max_grad_norm)
            if adversarial:
                grad_norm = grad_norm + accelerator.clip_grad_norm_(discriminate.parameters(), args.max_grad_norm)
            accepted = steps.update(sum(parts.values()), grad_norm, names)
            if adversarial and accepted:
                # At a constant rate it would go on learning when the autoencoder hardly moves any more.
                factor = lr_scheduler.lr_lambdas[0](state.step)
                for group in adversary_optimizer.param_groups:
                    group["lr"] = args.discriminator_learning_rate * factor
                adversary_optimizer.step()
            if args.adversarial_weight:
                adversary_optimizer.zero_grad()
            steps.end(parts)
    if not steps.finished:
        return

    # 5. The averaged weights are the result
    figures = steps.final_figures() if args.push_to_hub else None
    with ema.applied():
        model.eval()
        if args.stage == "video":
            if args.data is not None:
                loaders = make_loaders(args, buckets, accelerator, dataset, args.seed + 1)
            batches = training_batches(args, buckets, accelerator, loaders, STATISTICS)
            mean, std = measure_latents(model, batches, args.statistics_batches, accelerator)
            model.register_to_config(latents_mean=mean, latents_std=std)
        if accelerator.is_main_process:
            # diffusers would write down the folder that the weights came from.
            model.register_to_config(_name_or_path="")
            with written_beside(output_dir / "vae") as folder:
                model.save_pretrained(folder)
    if accelerator.is_main_process and args.push_to_hub:
        card = model_card(args, repo_id, figures, dataset, accelerator.num_processes)
        print(push_folder_to_hub(output_dir / "vae", repo_id, card, args.hub_private))
    accelerator.wait_for_everyone()
    end_training(accelerator)


if __name__ == "__main__":
    run_script(main, Arguments)
