"""Trains the Movie Gen Audio backbone on latent caches: sound from video, text, both, and what was heard before.

    accelerate launch training_examples/train_audio.py \\
        --config training_examples/configs/toybox_audio.yaml --output_dir runs/audio \\
        --transformer_config training_examples/configs/toybox_audio_transformer.json \\
        --pipeline runs/audio_frozen --data runs/cache/sounds --validation_data runs/cache/heldout_sounds

The caches are those of precompute_audio.py, made with the frozen models of `--pipeline`. The result is a whole
pipeline folder, `pipeline/` below the output folder.
"""

import json
import math
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub import ModelCard, snapshot_download

from diffusers_moviegen import (
    AutoencoderDACVAE,
    FlowMatchMidpointScheduler,
    MovieGenAudioPipeline,
    MovieGenAudioTransformer1DModel,
)
from diffusers_moviegen.pipelines.audio_conditioning import shrink_to_known
from diffusers_moviegen.training import (
    LatentCache,
    RunState,
    ShardedEMA,
    begin_run,
    build_model_card,
    cache_loader,
    check_mixed_precision,
    check_model_folder,
    check_output_dir,
    check_positive,
    check_training_options,
    draw_flow_latents,
    end_training,
    flow_loss,
    load_caches,
    make_lr_scheduler,
    make_optimizer,
    prepare_sharding,
    push_folder_to_hub,
    run_script,
    step_generator,
    text_inputs,
    training_steps,
    validation_flow_loss,
    written_beside,
)


HUB_FILES = ["config.json", "diffusion_pytorch_model*", "model_index.json", "transformer/*"]
"""What `--transformer` needs of a repository, which holds the backbone alone or a whole pipeline."""


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "folder of the run; the result is written to its pipeline/"})
    pipeline: str = field(metadata={"help": "folder or Hub id of the frozen models, with or without a backbone"})
    data: list[str] = field(metadata={"help": "one or more caches that precompute_audio.py wrote"})
    validation_data: list[str] = field(
        default_factory=list, metadata={"help": "caches of samples that no training sees; none: no validation"}
    )
    transformer: str | None = field(
        default=None, metadata={"help": "backbone to start from: folder or Hub id, of the model or of a pipeline"}
    )
    transformer_config: str | None = field(
        default=None,
        metadata={
            "help": "size of a fresh backbone: a config.json, whose channels and widths of text and video give way to "
            "those of the caches"
        },
    )
    train_batch_size: int = field(default=8, metadata={"help": "samples of one pass on each process"})
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    text_dropout: float = field(default=0.1, metadata={"help": "share of samples that are trained without text"})
    video_dropout: float = field(default=0.3, metadata={"help": "share of samples that are trained without video"})
    condition_dropout: float = field(default=0.1, metadata={"help": "further share without text and video"})
    extension_share: float = field(
        default=0.2, metadata={"help": "share of samples of which a stretch is given, mostly the beginning"}
    )
    infilling_share: float = field(
        default=0.2, metadata={"help": "share of samples of which all but a stretch is given"}
    )
    logit_mean: float = field(
        default=0.0, metadata={"help": "of the logit-normal flow times of training; below 0 there is more noise"}
    )
    max_train_steps: int = 10000
    optimizer: str = field(
        default="adamw", metadata={"help": "muon orthogonalises the updates of layers", "choices": ["adamw", "muon"]}
    )
    learning_rate: float = 1e-4
    lr_scheduler: str = field(
        default="cosine", metadata={"choices": ["cosine", "constant_with_warmup", "halve_on_plateau"]}
    )
    lr_warmup_steps: int = 1000
    lr_patience: int = field(
        default=5,
        metadata={"help": "halve_on_plateau: validations without a new lowest loss before the rate is halved"},
    )
    min_learning_rate: float = field(default=0.0, metadata={"help": "halve_on_plateau: the rate is not halved below"})
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = field(default=0.999, metadata={"help": "ceiling of the decay of the averaged weights; 0: none"})
    mixed_precision: str = field(default="no", metadata={"choices": ["no", "bf16", "fp16"]})
    seed: int = 0
    num_workers: int = field(default=0, metadata={"help": "processes that read batches ahead; 0: this one reads"})
    segment_length_in_s: float | None = field(
        default=None,
        metadata={"help": "default of the saved pipeline: what is made at once; by default the longest of --data"},
    )
    guidance_scale: float = field(default=3.0, metadata={"help": "default of the saved pipeline"})
    validation_steps: int = field(default=500, metadata={"help": "steps between two lines of figures"})
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "a checkpoint folder or 'latest'"})
    max_shard_size: str = field(default="10GB", metadata={"help": "largest file of the result's weights"})
    report_to: str = field(default="none", metadata={"help": "a tracker that accelerate knows, such as tensorboard"})
    push_to_hub: bool = field(default=False, metadata={"help": "push the result to the Hub, with a model card"})
    hub_model_id: str | None = field(default=None, metadata={"help": "repository to push to, user/name"})
    hub_private: bool = field(default=False, metadata={"help": "whether only its owners may see a new repository"})

    def __post_init__(self):
        check_training_options(self)
        check_positive(self, ("train_batch_size", "lr_patience"))
        if (self.transformer is None) == (self.transformer_config is None):
            raise ValueError(
                "pass either --transformer, a backbone to start from, or --transformer_config, a fresh one's size."
            )
        if self.segment_length_in_s is not None and not 0 < self.segment_length_in_s < math.inf:
            raise ValueError(f"--segment_length_in_s is {self.segment_length_in_s}: it must be above 0.")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"--guidance_scale is {self.guidance_scale}: pass a number, such as 7.5.")
        if not math.isfinite(self.logit_mean):
            raise ValueError(f"--logit_mean is {self.logit_mean}: it must be finite.")
        for name in ("text_dropout", "video_dropout", "condition_dropout", "extension_share", "infilling_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: it must be from 0 to 1.")
        if self.extension_share + self.infilling_share > 1:
            raise ValueError(
                f"--extension_share and --infilling_share are {self.extension_share} and {self.infilling_share}: "
                "together they must be at most 1."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay is {self.ema_decay}: it must be at least 0 and below 1.")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"--min_learning_rate is {self.min_learning_rate}: it must be from 0 to --learning_rate, "
                f"{self.learning_rate}."
            )
        if self.min_learning_rate and self.lr_scheduler != "halve_on_plateau":
            raise ValueError("--min_learning_rate does nothing without --lr_scheduler halve_on_plateau: add it.")
        if self.lr_scheduler == "halve_on_plateau" and not self.validation_data:
            raise ValueError("--lr_scheduler halve_on_plateau follows the validation loss: add --validation_data.")
        if not re.fullmatch(r"\d+(\.\d+)? *[KMGT]B", self.max_shard_size, re.IGNORECASE):
            raise ValueError(f"--max_shard_size is '{self.max_shard_size}': pass a size such as 10GB or 14MB.")


def load_backbone(args: Arguments, cache: LatentCache) -> MovieGenAudioTransformer1DModel:
    """The backbone to train, in float32: the one to start from, or a fresh one."""
    reads = {"in_channels": cache.latent_channels, "out_channels": cache.latent_channels}
    reads |= {"text_embed_dim": cache.text_dims[""], "video_embed_dim": cache.video_dim}
    if args.transformer is None:
        config_file = Path(args.transformer_config)
        if not config_file.is_file():
            raise OSError(f"--transformer_config: there is no file '{config_file}'; pass a config.json.")
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
            # Of another class's configuration most would be ignored, and the model have the largest size.
            if config.get("_class_name") != MovieGenAudioTransformer1DModel.__name__:
                raise ValueError(f"its _class_name is {config.get('_class_name')}")
            return MovieGenAudioTransformer1DModel.from_config(config, **reads)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"--transformer_config: '{config_file}' does not describe a "
                f"{MovieGenAudioTransformer1DModel.__name__}: {error}."
            ) from error

    folder = Path(args.transformer)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(args.transformer, allow_patterns=HUB_FILES))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(
                f"--transformer: '{args.transformer}' is no folder, and cannot be loaded from the Hub: {reason}"
            ) from error
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    check_model_folder("transformer", folder, MovieGenAudioTransformer1DModel)
    try:
        transformer, info = MovieGenAudioTransformer1DModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise OSError(f"--transformer: '{folder}' cannot be loaded: {error}") from error
    if info["missing_keys"]:
        raise OSError(f"--transformer: the weights in '{folder}' lack '{info['missing_keys'][0]}'; save them again.")
    for name, value in reads.items():
        if transformer.config[name] != value:
            raise ValueError(
                f"--transformer: '{args.transformer}' has {name} {transformer.config[name]}, the caches need {value}; "
                "take a backbone that was trained with the models of --pipeline."
            )
    return transformer


# --- What a batch becomes -----------------------------------------------------------------------------------------


def draw_given(
    count: int, num_latents: int, extension_share: float, infilling_share: float, generator: torch.Generator
) -> torch.Tensor:
    """Which latents of each sample are given, `(count, num_latents)`, boolean.

    For an extension one stretch is, in three of four cases the beginning; for infilling all but a stretch. Of the rest
    nothing is. Latents next to a cut are not given, as when the pipeline encodes a sound that breaks off there.
    """
    kinds, places = torch.rand(2, count, generator=generator), torch.rand(2, count, generator=generator)
    first, last = (places * num_latents).long().sort(dim=0).values[..., None]
    is_extension = (kinds[0] < extension_share)[:, None]
    is_infilling = (kinds[0] >= 1 - infilling_share)[:, None]
    first = torch.where(is_extension & (kinds[1] < 0.75)[:, None], 0, first)
    positions = torch.arange(num_latents)
    within = (positions >= first) & (positions <= last)
    return shrink_to_known((is_extension & within) | (is_infilling & ~within))


def draw_conditions(
    args: Arguments, batch: dict[str, Any], generator: torch.Generator, device: torch.device
) -> dict[str, torch.Tensor | None]:
    """The conditions of a batch that are left to the backbone, by the names of its arguments."""
    count, _, num_latents = batch["mean"].shape
    draws = torch.rand(3, count, generator=generator)
    without_both = draws[2] < args.condition_dropout
    without_video = (draws[1] < args.video_dropout) | without_both
    # A film that does not tell what is heard must not pass for one that does.
    needs_text = torch.tensor(batch["needs_text"]) & ~without_video
    without_text = ((draws[0] < args.text_dropout) & ~needs_text) | without_both
    texts = [
        {suffix: features[:0] if without else features for suffix, features in text.items()}
        for without, text in zip(without_text.tolist(), batch["text"], strict=True)
    ]
    given = draw_given(count, num_latents, args.extension_share, args.infilling_share, generator)
    return {
        **text_inputs(texts, device),
        "video_hidden_states": batch["video"].to(device),
        "video_mask": (~without_video)[:, None].expand(-1, num_latents).to(device),
        "audio_context": batch["mean"].to(device),
        "audio_context_mask": given.to(device),
    }


def all_conditions(batch: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor | None]:
    """Text and video as the caches have them, and no sound."""
    return {**text_inputs(batch["text"], device), "video_hidden_states": batch["video"].to(device)}


# --- The result ---------------------------------------------------------------------------------------------------


def save_result(
    args: Arguments, config: dict[str, Any], frozen: Path, weights: dict[str, torch.Tensor], target: Path
) -> None:
    """Writes a pipeline folder: the files of the folder `frozen`, and `weights` in bfloat16 as the backbone."""
    with torch.device("meta"):
        transformer = MovieGenAudioTransformer1DModel.from_config(config)
    weights = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in weights.items()}
    transformer.load_state_dict(weights, assign=True)
    # diffusers would write down the folder that the weights came from.
    transformer.register_to_config(_name_or_path="")
    index = json.loads((frozen / "model_index.json").read_text(encoding="utf-8"))
    index["transformer"] = ["diffusers_moviegen", MovieGenAudioTransformer1DModel.__name__]
    index |= {"default_guidance_scale": args.guidance_scale, "segment_length_in_s": args.segment_length_in_s}
    index.pop("_name_or_path", None)

    with written_beside(target) as folder:
        # The card of another model, and what git and the Hub keep beside a download, do not belong to the result.
        ignored = shutil.ignore_patterns("transformer", "README.md", ".*")
        shutil.copytree(frozen, folder, ignore=ignored, dirs_exist_ok=True)
        transformer.save_pretrained(folder / "transformer", max_shard_size=args.max_shard_size)
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / "model_index.json").write_text(f"{text}\n", encoding="utf-8")


def model_card(
    args: Arguments,
    repo_id: str,
    frozen: Path,
    cache: LatentCache,
    figures: dict[str, float],
    num_processes: int,
) -> ModelCard:
    """What the run was, said where its result is pushed to."""
    seconds = f"{args.segment_length_in_s:g}"
    sampling_rate = AutoencoderDACVAE.load_config(frozen / "vae")["sampling_rate"]
    snippet = [
        "import torch",
        "from diffusers_moviegen import MovieGenAudioPipeline",
        "from diffusers_moviegen.media import save_audio",
        "",
        f'pipe = MovieGenAudioPipeline.from_pretrained("{repo_id}")',
        "generator = torch.Generator().manual_seed(0)",
        f"prompt = {json.dumps(cache.samples[0].captions[0], ensure_ascii=False)}",
        f"output = pipe(prompt, audio_length_in_s={seconds}, generator=generator)",
        'save_audio(output.audios[0], "sound.wav", output.sampling_rate)',
    ]
    # Folders tell about the machine and its user, so only their names are written.
    names = {
        name: " ".join(Path(folder).name for folder in getattr(args, name)) for name in ("data", "validation_data")
    }
    return build_model_card(
        repo_id,
        summary="A Movie Gen Audio pipeline for diffusers. It makes sound for films and from text, at "
        f"{sampling_rate} samples a second, {seconds} seconds at once.",
        snippet="\n".join(snippet),
        data=f"{len(cache.samples)} sounds of films with captions, from latent caches of the names {names['data']}."
        + (f" The figures are measured on others, {names['validation_data']}." if args.validation_data else ""),
        recipe={**asdict(args), **names, "processes": num_processes},
        figures=figures,
        figures_note="Measured by the run itself after its last step, before the averaged weights were rounded to"
        " bfloat16. `loss` is that of the last steps on the training data; `validation_loss` is the flow-matching loss"
        " at fixed times and noise.",
        base_model=args.transformer,
        pipeline_tag="text-to-audio",
        tags=[],
    )


def main(args: Arguments) -> None:
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir, "pipeline", args.resume_from_checkpoint)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=str(output_dir / "logs"),
    )
    prepare_sharding(accelerator)
    check_mixed_precision(accelerator)

    # 1. Data: posteriors, frame and text features that the frozen models computed once
    frozen, cache, validation_cache = load_caches(
        accelerator, args.pipeline, args.data, args.validation_data, MovieGenAudioPipeline.__name__
    )
    scheduler = FlowMatchMidpointScheduler.from_pretrained(frozen / "scheduler")
    if args.segment_length_in_s is None:
        args.segment_length_in_s = max(sample.bucket.num_frames for sample in cache.samples) / cache.frame_rate

    # 2. Models: only the backbone learns. Every process makes the same fresh weights
    set_seed(args.seed)
    transformer = load_backbone(args, cache)
    if accelerator.device.type == "cpu":
        # The fused CPU kernel's backward is several times slower than plain matrix products at these lengths.
        transformer.set_attention_backend("_native_math")
    # FSDP2 may be configured to recompute the blocks by itself.
    recomputes = accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.activation_checkpointing
    if args.gradient_checkpointing and not recomputes:
        transformer.enable_gradient_checkpointing()
    transformer.train()

    # 3. Optimisation. The moving average is made of the weights as they are sharded
    optimizer = make_optimizer(accelerator, args, transformer)
    lr_scheduler, plateau = make_lr_scheduler(args, optimizer)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    ema = ShardedEMA(accelerator, model, args.ema_decay)

    # 4. Batches of one shape, the same on every process
    loader = cache_loader(accelerator, cache, args.train_batch_size, None, args.seed, args.num_workers)

    # 5. Where the run stands
    state = RunState()
    repo_id = begin_run(accelerator, args, "train_audio", MovieGenAudioPipeline.__name__, state, lr_scheduler, loader)

    def measure() -> dict[str, float]:
        """The figures of a step, of the averaged weights."""
        if validation_cache is None:
            return {}
        data = (validation_cache, accelerator, args.train_batch_size)
        with ema.applied():
            return {"validation_loss": validation_flow_loss(model, scheduler, *data, conditions=all_conditions)}

    # 6. Steps
    batches = iter(loader)
    with training_steps(accelerator, args, state, optimizer, lr_scheduler, measure, ema, plateau) as steps:
        while steps.go_on:
            parts, names = [], []
            for _ in range(args.gradient_accumulation_steps):
                batch = next(batches)
                # The number of the batch alone decides what is drawn, so a resumed run draws the same.
                generator = step_generator(args.seed, loader.step, accelerator.process_index)
                inputs = draw_flow_latents(batch, generator, accelerator.device, args.logit_mean)
                conditions = draw_conditions(args, batch, generator, accelerator.device)
                with accelerator.accumulate(model):
                    with accelerator.autocast():
                        loss = flow_loss(model, scheduler, *inputs, conditions)
                    accelerator.backward(loss)
                parts.append(loss.detach())
                names += batch["name"]
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            steps.update(torch.stack(parts).mean(), grad_norm, names)
            steps.end()
    if not steps.finished:
        return

    # 7. The averaged weights are the result, in a pipeline that is whole
    figures = steps.final_figures() if args.push_to_hub else None
    with ema.applied():
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            save_result(args, transformer.config, frozen, weights, output_dir / "pipeline")

    # 8. It goes to the Hub; it stays in its folder when it cannot
    if args.push_to_hub and accelerator.is_main_process:
        card = model_card(args, repo_id, frozen, cache, figures, accelerator.num_processes)
        print(push_folder_to_hub(output_dir / "pipeline", repo_id, card, args.hub_private))
    end_training(accelerator)


if __name__ == "__main__":
    run_script(main, Arguments)
