"""Trains the audio autoencoder, DAC-VAE (Movie Gen, section 6.1.2): 48 kHz sound to 25 latents a second and back.

    accelerate launch training_examples/train_dac_vae.py --data sounds --output_dir runs/dac_vae

Spectrograms with several windows, those of the mel scale, the waveform itself, the divergence of the posterior and, on
request, an adversary. `--toybox` draws the sounds, `--data` reads them; with both they take turns. A fresh model
begins as a transform codec, see `initialize_transform_codec`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers.utils import logging
from huggingface_hub import ModelCard
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from diffusers_moviegen import AutoencoderDACVAE
from diffusers_moviegen.models.autoencoder_dac_vae import reliable_convolutions
from diffusers_moviegen.toybox.judges import listen
from diffusers_moviegen.toybox.scenes import draw_scenes
from diffusers_moviegen.toybox.sounds import MOTION_DURATION, SAMPLING_RATE, synthesize
from diffusers_moviegen.toybox.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SPINNING_SHAPES,
    is_sound_held_out,
)
from diffusers_moviegen.training import (
    RunState,
    ShardedEMA,
    SoundDataset,
    SpectralLoss,
    SpectrogramDiscriminator,
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
    latent_kl,
    latest_checkpoint,
    make_lr_scheduler,
    make_optimizer,
    parse_weights,
    push_folder_to_hub,
    run_script,
    step_generator,
    training_steps,
    written_beside,
)


logger = logging.get_logger(__name__)


# What the random numbers of a step are for, see `step_generator`.
SOUNDS, POSTERIOR, STATISTICS, VALIDATION, INITIALIZATION = range(5)

TONES = tuple(shape for shape in SHAPES if shape != "star")
"""Shapes whose voices have a pitch."""

VOICED_MOTIONS = ("bounces", "grows", "shrinks", "spins")
"""Motions that they are heard in."""


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "folder of the run; the trained model is written to its vae/"})
    data: str | None = field(
        default=None, metadata={"help": "table of files with sound, its folder, or a pattern of .tar shards"}
    )
    toybox: bool = field(default=False, metadata={"help": "draw the sounds, all of them or beside --data"})
    toybox_to_data: list[int] = field(
        default_factory=lambda: [3, 1], metadata={"help": "turns of Toybox to turns of --data, if both are given"}
    )
    tones: float = field(
        default=0.0, metadata={"help": "share of Toybox's sounds that are voices with a pitch and nothing else"}
    )
    degraded_share: float = field(default=0.0, metadata={"help": "share of Toybox's sounds of a quality below 5"})
    background_weights: list[str] = field(
        default_factory=list,
        metadata={"help": "how likely Toybox's backgrounds are, such as brown=4 for crickets; 1 for the others"},
    )
    shape_weights: list[str] = field(
        default_factory=list, metadata={"help": "the same of its shapes, such as star=4 for shakers"}
    )
    motion_weights: list[str] = field(
        default_factory=list, metadata={"help": "the same of its motions, such as bounces=2 for knocks"}
    )
    exclude: list[str] = field(default_factory=list, metadata={"help": "patterns of names to leave out of --data"})
    file_column: str = "file_name"
    caption_column: str = "caption"
    autoencoder: str | None = field(default=None, metadata={"help": "folder of an autoencoder to start from"})
    encoder_hidden_size: int = 64
    downsampling_ratios: list[int] = field(default_factory=lambda: [2, 8, 10, 12])
    decoder_hidden_size: int = 1536
    latent_channels: int = 128
    initialization_batches: int = field(
        default=16, metadata={"help": "batches that decide how a fresh model begins, see the guide; 0: at random"}
    )
    segment_latents: int = field(default=16, metadata={"help": "length of the segments to train on"})
    train_batch_size: int = field(default=4, metadata={"help": "segments of one pass on each process"})
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 400_000
    optimizer: str = field(
        default="adamw",
        metadata={"help": "muon orthogonalises the updates of convolutions", "choices": ["adamw", "muon"]},
    )
    learning_rate: float = 1e-4
    lr_scheduler: str = field(default="cosine", metadata={"choices": ["cosine", "linear", "constant_with_warmup"]})
    lr_warmup_steps: int = 1000
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    waveform_weight: float = field(default=100.0, metadata={"help": "of the mean squared difference of samples"})
    stft_weight: float = field(default=1.0, metadata={"help": "of the logarithms of spectrograms"})
    mel_weight: float = field(default=5.0, metadata={"help": "of the logarithms of mel spectrograms"})
    kl_weight: float = field(default=1e-4, metadata={"help": "of the divergence in nats a latent"})
    latent_noise: float = field(
        default=0.0,
        metadata={"help": "of --autoencoder: deviation of the noise in latents to decode, up to so many of theirs"},
    )
    adversarial_weight: float = field(default=0.0, metadata={"help": "0 trains without an adversary"})
    adversarial_start: int = field(default=50_000, metadata={"help": "step from which the adversary takes part"})
    discriminator_channels: int = 32
    discriminator_learning_rate: float = 1e-4
    ema_decay: float = 0.999
    statistics_batches: int = field(default=256, metadata={"help": "batches to measure the latents of, each process"})
    num_validation_samples: int = field(
        default=32, metadata={"help": "held-out sounds of Toybox to measure on, without --toybox of --data"}
    )
    mixed_precision: str = field(default="no", metadata={"choices": ["no", "fp16", "bf16"]})
    seed: int = 0
    validation_steps: int = 5000
    checkpointing_steps: int = 5000
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "a checkpoint folder or 'latest'"})
    report_to: str = field(default="none", metadata={"help": "tracker such as tensorboard or wandb"})
    push_to_hub: bool = field(default=False, metadata={"help": "push the result to the Hub, with a model card"})
    hub_model_id: str | None = field(default=None, metadata={"help": "repository to push to, user/name"})
    hub_private: bool = field(default=False, metadata={"help": "whether only its owners may see a new repository"})

    def __post_init__(self):
        check_training_options(self)
        check_positive(self, ("train_batch_size", "segment_latents", "statistics_batches", "num_validation_samples"))
        check_positive(self, ("latent_channels", "encoder_hidden_size", "decoder_hidden_size"))
        check_positive(self, ("discriminator_channels",))
        self.drawing_weights()
        if self.data is None and not self.toybox:
            raise ValueError("pass --data, what to train on, or --toybox, or both.")
        if self.data is None and self.exclude:
            raise ValueError("--exclude is for --data: leave it out, Toybox has held-out sounds of its own.")
        if len(self.toybox_to_data) != 2 or min(self.toybox_to_data) < 1:
            raise ValueError(f"--toybox_to_data is {self.toybox_to_data}: pass two numbers of turns such as 3 1.")
        if not self.toybox and (self.tones or self.degraded_share or self.drawing_weights()):
            raise ValueError(
                "--tones, --degraded_share, --background_weights, --shape_weights and --motion_weights say how "
                "Toybox's sounds are drawn: add --toybox."
            )
        for name in ("tones", "degraded_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: it must be from 0 to 1.")
        weights = [name for name in vars(self) if name.endswith("_weight")]
        for name in (*weights, "latent_noise", "initialization_batches"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name} is {getattr(self, name)}: it must be 0 or more.")
        if not 0 <= self.adversarial_start or not 0 <= self.discriminator_learning_rate < math.inf:
            raise ValueError("--adversarial_start and --discriminator_learning_rate must be 0 or more.")
        if self.adversarial_weight and self.adversarial_start >= self.max_train_steps:
            raise ValueError(
                f"--adversarial_start {self.adversarial_start} is after the last step: lower it, or pass "
                "--adversarial_weight 0."
            )
        if self.latent_noise and self.autoencoder is None:
            raise ValueError("--latent_noise is in deviations of the latents of an --autoencoder: pass one.")
        if self.adversarial_weight and self.mixed_precision == "fp16":
            raise ValueError("--mixed_precision fp16 has one loss scale, too few for an adversary: use bf16 or no.")

    def drawing_weights(self) -> dict[str, float]:
        """Weights by name of the backgrounds, shapes and motions that the options name."""
        return (
            parse_weights("background_weights", self.background_weights, list(BACKGROUNDS))
            | parse_weights("shape_weights", self.shape_weights, SHAPES)
            | parse_weights("motion_weights", self.motion_weights, MOTIONS)
        )

    def takes_toybox(self, step: int) -> bool:
        """Whether `step` is one of drawn sounds."""
        if not self.toybox or self.data is None:
            return self.toybox
        drawn, read = self.toybox_to_data
        return step % (drawn + read) < drawn


# --- Model ------------------------------------------------------------------------------------------------------


def set_weight(layer: torch.nn.Conv1d | torch.nn.ConvTranspose1d, weight: torch.Tensor) -> None:
    """Sets the weight of a layer under weight norm, which has no direction for a row of zeros."""
    layer.weight = weight + 1e-4 * weight.abs().max() * torch.randn_like(weight)


def block_taps(ratio: int) -> slice:
    """Taps of a strided convolution's kernel that cover the samples of its own stride, and not the neighbours'."""
    return slice(ratio // 2, ratio // 2 + ratio)


def choose_components(available: int, count: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which components of `available`, in descending order of variance, to keep, and how much louder to play them."""
    if count >= available:
        return torch.arange(available), torch.ones(available)
    strongest = count - round(spread * count)
    others = torch.linspace(strongest, available - 1, count - strongest).round().long()
    gain = torch.ones(count)
    gain[strongest:] = (len(range(strongest, available)) / max(count - strongest, 1)) ** 0.5
    return torch.cat([torch.arange(strongest), others]), gain


@torch.no_grad()
def initialize_transform_codec(
    model: AutoencoderDACVAE, sounds: list[torch.Tensor], noise: float = 0.05, spread: float = 0.2
) -> None:
    """
    Starts a fresh model as a transform codec: from a random map it takes thousands of steps to find any phase.

    Level by level the strided convolutions take non-overlapping blocks to their principal components, the widths of
    the model decide how many, and the decoder's transpose them. Residual units begin as the identity and Snake, with
    small coefficients, as nearly so. The bottleneck scales each channel to a variance of one; its posterior has the
    same absolute noise in all of them, and at most half as much as of the component.

    The strongest components alone would hold no trace of what is much quieter than the rest, such as rain behind a
    bell. So a share of them is taken from all the others, evenly, and louder, so that they stand in for those left
    out.

    Args:
        model: fresh; changed in place.
        sounds: batches `(batch, 1, samples)` that the components are those of.
        noise: amplitude of all the noise together over that of the components.
        spread: share of the components that are not the strongest.
    """
    encoder, decoder = model.encoder, model.decoder
    for name, module in model.named_modules():
        if name.endswith(("res_unit1", "res_unit2", "res_unit3")):
            module.conv2.parametrizations.weight.original0.zero_()
        elif name.endswith("snake1") and "res_unit" not in name:
            module.alpha.fill_(1e-2)
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            module.bias.zero_()

    first = torch.zeros_like(encoder.conv1.weight)
    first[0, 0, 3] = 1
    set_weight(encoder.conv1, first)
    last = torch.zeros_like(decoder.conv2.weight)
    last[0, 0, 3] = 1
    set_weight(decoder.conv2, last)

    # Every sound counts alike, so that what is only heard in quiet ones has components, too.
    levels = [value.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-3) for value in sounds]
    features = [value / level for value, level in zip(sounds, levels, strict=True)]
    for level, ratio in enumerate(model.config.downsampling_ratios):
        down, up = encoder.block[level].conv1, decoder.block[-1 - level].conv_t1
        used = 1 if level == 0 else min(features[0].shape[1], up.out_channels)
        # (blocks, channels * ratio)
        blocks = torch.cat(
            [value[:, :used].unfold(2, ratio, ratio).transpose(1, 2).flatten(0, 1).flatten(1) for value in features]
        )
        moments = blocks.double().T @ blocks.double() / len(blocks)
        variances, directions = (values.flip(-1) for values in torch.linalg.eigh(moments))
        count = min(down.out_channels, up.in_channels, blocks.shape[1])
        chosen, gain = choose_components(blocks.shape[1], count, spread)
        scale = (count / variances[chosen].sum()).sqrt().item()
        kernel = directions[:, chosen].T.float().view(count, used, ratio)
        weight = torch.zeros_like(down.weight)
        weight[:count, :used, block_taps(ratio)] = scale * kernel
        set_weight(down, weight)
        weight = torch.zeros_like(up.weight)
        weight[:count, :used, block_taps(ratio)] = kernel * gain[:, None, None] / scale
        set_weight(up, weight)
        features = [torch.nn.functional.conv1d(value[:, :used], scale * kernel, stride=ratio) for value in features]

    channels = features[0].shape[1]
    # The latents are those of the sounds as loud as they are.
    features = [value * level for value, level in zip(features, levels, strict=True)]
    std = torch.cat([value.transpose(0, 1).flatten(1) for value in features], dim=1).std(dim=1).clamp(min=1e-4)
    kept = min(channels, model.config.latent_channels)
    chosen, gain = choose_components(channels, kept, spread)
    for layer in (encoder.conv2, decoder.conv1):
        weight = torch.zeros_like(layer.weight)
        for channel in range(min(weight.shape[:2])):
            weight[channel, channel, weight.shape[2] // 2] = 1
        set_weight(layer, weight)
    weight = torch.zeros_like(model.quant_conv.weight)
    rows = torch.arange(kept)
    weight[rows, chosen, 0] = 1 / std[chosen]
    set_weight(model.quant_conv, weight)
    relative = (noise * std[chosen].square().mean().sqrt() / std[chosen]).clamp(max=0.5)
    # The inverse of softplus; channels without a component are nothing but noise.
    model.quant_conv.bias[model.config.latent_channels :] = math.log(math.e - 1)
    model.quant_conv.bias[model.config.latent_channels + rows] = relative.expm1().log()
    weight = torch.zeros_like(model.post_quant_conv.weight)
    weight[chosen, rows, 0] = gain * std[chosen] / (1 + relative.square())
    set_weight(model.post_quant_conv, weight)


class Reconstruction(torch.nn.Module):
    """Encoding and decoding as one forward pass, so that the training engine's hooks see it."""

    def __init__(self, autoencoder: AutoencoderDACVAE, latent_noise: float = 0.0):
        super().__init__()
        self.autoencoder, self.latent_noise = autoencoder, latent_noise

    def forward(self, sound: torch.Tensor, generator: torch.Generator | None = None):
        """Reconstruction and posterior: of a draw of the posterior with a `generator`, else of its mean."""
        posterior = self.autoencoder.encode(sound).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        if generator is not None and self.latent_noise:
            latents = add_latent_noise(latents, self.autoencoder.config.latents_std, self.latent_noise, generator)
        return self.autoencoder.decode(latents, num_samples=sound.shape[-1]).sample, posterior

    @property
    def last_layer(self) -> torch.nn.Parameter:
        """What the pull of two losses is compared at."""
        return self.autoencoder.decoder.conv2.parametrizations.weight.original1


# --- Data -------------------------------------------------------------------------------------------------------


def draw_sounds(
    count: int,
    generator: torch.Generator,
    held_out: bool = False,
    tones: float = 0.0,
    degraded_share: float = 0.0,
    weights: dict[str, float] | None = None,
) -> torch.Tensor:
    """Sounds of Toybox `(count, 1, samples)` of 2 s, all shapes, motions and backgrounds of a split alike.

    Args:
        count: how many.
        generator: decides everything.
        held_out: which split.
        tones: share of voices with a pitch in front of nothing.
        degraded_share: share of a quality from 1 to 4.
        weights: how likely each background, shape and motion is, by name; 1 for those it does not name.
    """

    def choose(options: Sequence) -> Any:
        likely = torch.tensor([float((weights or {}).get(option, 1)) for option in options])
        return options[torch.multinomial(likely, 1, generator=generator).item()]

    tuples, quality = [], []
    while len(tuples) < count:
        is_tone = torch.rand((), generator=generator).item() < tones
        motion = choose(VOICED_MOTIONS if is_tone else MOTIONS)
        shapes = TONES if is_tone else SHAPES
        shape = choose([shape for shape in shapes if motion != "spins" or shape in SPINNING_SHAPES])
        background = "black" if is_tone else choose(list(BACKGROUNDS))
        if is_sound_held_out(shape, motion, background) != held_out:
            continue
        if motion == "stays still" and background == "black":
            continue
        tuples.append((next(iter(COLOURS)), shape, motion, background))
        is_degraded = torch.rand((), generator=generator).item() < degraded_share
        quality.append(choose((1, 2, 3, 4)) if is_degraded else 10)
    scenes = draw_scenes(tuples, generator)
    return synthesize(scenes, MOTION_DURATION, generator, quality)


def draw_segments(args: Arguments, samples: int, generator: torch.Generator, count: int) -> torch.Tensor:
    """Segments `(count, 1, samples)` of Toybox's sounds, as many of each sound as fit into it."""
    each = round(MOTION_DURATION * SAMPLING_RATE) // samples
    sounds = draw_sounds(
        math.ceil(count / each),
        generator,
        tones=args.tones,
        degraded_share=args.degraded_share,
        weights=args.drawing_weights(),
    )
    start = torch.randint(sounds.shape[-1] - each * samples + 1, (), generator=generator).item()
    segments = sounds[..., start : start + each * samples].unflatten(-1, (each, samples)).transpose(1, 2)
    return segments.flatten(0, 1)[:count]


def draw_batch(
    args: Arguments, dataset: SoundDataset | None, accelerator: Accelerator, samples: int, stream: int, number: int
) -> tuple[torch.Tensor, list[str]]:
    """A batch of segments and their names; its number alone decides what is in it."""
    generator = step_generator(args.seed, number, accelerator.process_index, stream)
    if args.takes_toybox(number // args.gradient_accumulation_steps):
        return draw_segments(args, samples, generator, args.train_batch_size), [f"Toybox batch {number}"]
    return dataset.draw(args.train_batch_size, samples, generator)


def validation_sounds(args: Arguments, dataset: SoundDataset | None, samples: int) -> dict[str, torch.Tensor]:
    """Fixed sounds `(count, 1, samples)` to measure on: held-out ones of Toybox, or those of --data."""
    generator = step_generator(0, 0, stream=VALIDATION)
    count = args.num_validation_samples
    if not args.toybox:
        return {"data": dataset.draw(count, samples, generator)[0]}
    return {
        "toybox": draw_sounds(count, generator, held_out=True),
        "tones": draw_sounds(count, generator, held_out=True, tones=1.0),
    }


# --- Figures ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(
    model: Reconstruction, sounds: dict[str, torch.Tensor], spectral: SpectralLoss, accelerator: Accelerator
) -> dict[str, float]:
    """Figures of fixed sounds, with the means of the posteriors decoded; to be called by all processes.

    SI-SDR in dB, mel distance, and for Toybox the share in percent whose voice, event and ambience are judged as
    before.
    """
    model.eval()
    totals = {}
    for kind, batch in sounds.items():
        for sound in batch[accelerator.process_index :: accelerator.num_processes].split(1):
            sound = sound.to(accelerator.device)
            found = model(sound)[0].float()
            values = {
                f"si_sdr_{kind}": scale_invariant_signal_distortion_ratio(found, sound).mean(),
                f"mel_{kind}": spectral(found, sound)["mel"],
            }
            if kind == "toybox":
                before, after = (listen(value.cpu())[0] for value in (sound, found))
                names = ("voice", "event", "ambience")
                same = {name: float(getattr(before, name) == getattr(after, name)) for name in names}
                values |= {f"same_{name}": 100 * value for name, value in same.items()}
                values["same"] = 100 * min(same.values())
            for name, value in values.items():
                totals.setdefault(name, []).append(float(value))
    model.train()
    sums = torch.tensor([[sum(values), len(values)] for values in totals.values()], device=accelerator.device)
    sums = accelerator.reduce(sums, "sum")
    return {name: (total / count).item() for name, (total, count) in zip(totals, sums, strict=True)}


@torch.no_grad()
def measure_latents(
    model: AutoencoderDACVAE, batches: list[torch.Tensor], accelerator: Accelerator
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the posteriors' draws over the batches of all processes."""
    rows = []
    for batch in batches:
        posterior = model.encode(batch.to(accelerator.device)).latent_dist
        mean, std = (value.float().transpose(0, 1).flatten(1) for value in (posterior.mean, posterior.std))
        rows.append(torch.stack([mean.mean(dim=1), (mean.square() + std.square()).mean(dim=1)]))
    first, second = accelerator.gather(torch.stack(rows)).double().mean(dim=0)
    return first.tolist(), (second - first.square()).sqrt().tolist()


def model_card(
    args: Arguments, repo_id: str, figures: dict[str, float], dataset: SoundDataset | None, num_processes: int
) -> ModelCard:
    """What the run was, said where its result is pushed to."""
    parts = ["Toybox, a procedural world whose sounds are drawn by the program itself."] if args.toybox else []
    if dataset is not None:
        parts.append(f"`{Path(args.data).name}`: {len(dataset.sounds)} sounds.")
    snippet = [
        "import torch",
        "from diffusers_moviegen import AutoencoderDACVAE",
        "",
        f'vae = AutoencoderDACVAE.from_pretrained("{repo_id}")',
        "sound = 0.1 * torch.randn(1, 1, 96000)",
        "with torch.no_grad():",
        "    latents = vae.encode(sound).latent_dist.mode()",
        "    print(latents.shape, vae.decode(latents).sample.shape)",
    ]
    return build_model_card(
        repo_id,
        summary="An audio autoencoder of Movie Gen (DAC-VAE) for diffusers: 48 kHz sound to latents and back.",
        snippet="\n".join(snippet),
        data=" ".join(parts),
        recipe={**asdict(args), "processes": num_processes},
        figures=figures,
        figures_note="Measured by the run itself after its last step, with the averaged weights and the posteriors' "
        "means: SI-SDR in dB, mean absolute difference of the decimal logarithms of mel spectrograms, and the share "
        "of Toybox's held-out sounds in percent that are judged as before. `loss` is that of the last steps on the "
        "training data.",
        base_model=args.autoencoder,
        pipeline_tag="audio-to-audio",
        tags=["autoencoder"],
    )


# --- The run ----------------------------------------------------------------------------------------------------


def make_autoencoder(args: Arguments) -> AutoencoderDACVAE:
    """The model to start from, or a fresh one with random weights."""
    if args.autoencoder is None:
        return AutoencoderDACVAE(
            args.encoder_hidden_size,
            tuple(args.downsampling_ratios),
            args.decoder_hidden_size,
            args.latent_channels,
            SAMPLING_RATE,
        )
    check_model_folder("autoencoder", args.autoencoder, AutoencoderDACVAE)
    model = AutoencoderDACVAE.from_pretrained(args.autoencoder, dtype=torch.float32)
    if model.config.sampling_rate != SAMPLING_RATE:
        raise ValueError(
            f"--autoencoder: '{args.autoencoder}' is for {model.config.sampling_rate} samples a second; pass one for "
            f"{SAMPLING_RATE}."
        )
    return model


def initialization_sounds(args: Arguments, dataset: SoundDataset | None, samples: int) -> list[torch.Tensor]:
    """The batches that a fresh model begins with, the same in all processes."""
    batches = []
    for number in range(args.initialization_batches):
        generator = step_generator(args.seed, number, stream=INITIALIZATION)
        if args.takes_toybox(number):
            batches.append(draw_segments(args, samples, generator, max(args.train_batch_size, 8)))
        else:
            batches.append(dataset.draw(max(args.train_batch_size, 8), samples, generator)[0])
    return batches


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
    if args.num_validation_samples < accelerator.num_processes:
        raise ValueError(
            f"--num_validation_samples is {args.num_validation_samples}: use one for each of the "
            f"{accelerator.num_processes} processes."
        )
    check_output_dir(output_dir, "vae", args.resume_from_checkpoint)
    # Every process starts from the same weights.
    set_seed(args.seed)

    # 1. Model and data
    model = make_autoencoder(args)
    if args.latent_noise:
        check_latent_noise(model, args.autoencoder)
    samples = args.segment_latents * model.hop_length
    if samples <= 4096:
        raise ValueError(f"--segment_latents {args.segment_latents} are {samples} samples: use more than 4096.")
    if args.toybox and samples > MOTION_DURATION * SAMPLING_RATE:
        raise ValueError(
            f"--segment_latents {args.segment_latents} are {samples / SAMPLING_RATE:g} s, and sounds of --toybox last "
            f"{MOTION_DURATION:g} s: use at most {int(MOTION_DURATION * SAMPLING_RATE) // model.hop_length}."
        )
    dataset = None
    if args.data is not None:
        dataset = SoundDataset(
            args.data,
            SAMPLING_RATE,
            samples,
            file_column=args.file_column,
            caption_column=args.caption_column,
            exclude=args.exclude,
        )
        accelerator.print(dataset.report)
    if args.autoencoder is None and args.initialization_batches:
        initialize_transform_codec(model, initialization_sounds(args, dataset, samples))
    model.train()
    spectral = SpectralLoss(SAMPLING_RATE).to(accelerator.device)

    # 2. Optimisation
    optimizer = make_optimizer(accelerator, args, model, betas=(0.8, 0.99))
    lr_scheduler, _ = make_lr_scheduler(args, optimizer)
    reconstruct, optimizer = accelerator.prepare(Reconstruction(model, args.latent_noise), optimizer)
    if args.adversarial_weight:
        adversary = SpectrogramDiscriminator(args.discriminator_channels)
        adversary_optimizer = torch.optim.AdamW(
            adversary.parameters(), lr=args.discriminator_learning_rate, betas=(0.8, 0.99), weight_decay=0.0
        )
        discriminate, adversary_optimizer = accelerator.prepare(adversary, adversary_optimizer)
    ema = ShardedEMA(accelerator, reconstruct, args.ema_decay)
    state = RunState()
    check_adversary(args)
    repo_id = begin_run(accelerator, args, "train_dac_vae", type(model).__name__, state, lr_scheduler)
    fixed = validation_sounds(args, dataset, samples)

    def measure() -> dict[str, float]:
        with ema.applied(), reliable_convolutions(accelerator.device):
            return validate(accelerator.unwrap_model(reconstruct), fixed, spectral, accelerator)

    # 3. Steps
    stepping = training_steps(accelerator, args, state, optimizer, lr_scheduler, measure, ema)
    with stepping as steps, reliable_convolutions(accelerator.device):
        while steps.go_on:
            adversarial = args.adversarial_weight > 0 and state.step >= args.adversarial_start
            parts, names = {}, []
            for micro_step in range(args.gradient_accumulation_steps):
                number = state.step * args.gradient_accumulation_steps + micro_step
                last = micro_step == args.gradient_accumulation_steps - 1
                sound, drawn = draw_batch(args, dataset, accelerator, samples, SOUNDS, number)
                sound, names = sound.to(accelerator.device), names + drawn
                generator = step_generator(args.seed, number, accelerator.process_index, POSTERIOR)
                reconstruct.require_backward_grad_sync = last

                # 3.1 The autoencoder
                with accelerator.autocast():
                    found, posterior = reconstruct(sound, generator)
                # Logarithms of what is 100 dB down need float32.
                found = found.float()
                terms = {"waveform": args.waveform_weight * torch.nn.functional.mse_loss(found, sound)}
                distances = spectral(found, sound)
                terms |= {"stft": args.stft_weight * distances["stft"], "mel": args.mel_weight * distances["mel"]}
                if adversarial:
                    # Only as a judge: its weights are not to move.
                    adversary.requires_grad_(False)
                    verdict = -adversary(found).float().mean()
                    adversary.requires_grad_(True)
                    last_layer = accelerator.unwrap_model(reconstruct).last_layer
                    weight = args.adversarial_weight * adaptive_weight(sum(terms.values()), verdict, last_layer)
                    terms["adversarial"] = weight * verdict
                terms["kl"] = args.kl_weight * latent_kl(posterior)
                accelerator.backward(sum(terms.values()) / args.gradient_accumulation_steps)

                # 3.2 Its adversary, which hears real and reconstructed sounds in one pass
                if adversarial:
                    discriminate.require_backward_grad_sync = last
                    scores = discriminate(torch.cat([sound, found.detach()])).float()
                    terms["discriminator"] = discriminator_loss(*scores.chunk(2))
                    accelerator.backward(terms["discriminator"] / args.gradient_accumulation_steps)
                for name, value in terms.items():
                    parts[name] = parts.get(name, 0) + value.detach() / args.gradient_accumulation_steps

            # 3.3 The step, unless a loss is not finite
            grad_norm = accelerator.clip_grad_norm_(reconstruct.parameters(), args.max_grad_norm)
            if adversarial:
                grad_norm = grad_norm + accelerator.clip_grad_norm_(discriminate.parameters(), args.max_grad_norm)
            accepted = steps.update(sum(parts.values()), grad_norm, names)
            if adversarial and accepted:
                # At a constant rate it would go on learning when the autoencoder hardly moves any more.
                for group in adversary_optimizer.param_groups:
                    group["lr"] = args.discriminator_learning_rate * lr_scheduler.lr_lambdas[0](state.step)
                adversary_optimizer.step()
            if args.adversarial_weight:
                adversary_optimizer.zero_grad()
            steps.end(parts)
    if not steps.finished:
        return

    # 4. The averaged weights are the result
    figures = steps.final_figures() if args.push_to_hub else None
    with ema.applied(), reliable_convolutions(accelerator.device):
        model.eval()
        batches = [
            draw_batch(args, dataset, accelerator, samples, STATISTICS, number)[0]
            for number in range(args.statistics_batches)
        ]
        mean, std = measure_latents(model, batches, accelerator)
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


if __name__ == "__main__":
    run_script(main, Arguments)
