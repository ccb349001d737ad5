"""Trains the Movie Gen backbone on latent caches, stage by stage: pictures, then pictures and films, then larger ones.

    accelerate launch training_examples/train_text_to_video.py \\
        --config training_examples/configs/toybox_t2i.yaml --output_dir runs/t2i \\
        --pipeline runs/frozen --data runs/cache/images --validation_data runs/cache/heldout_images
    accelerate launch training_examples/train_text_to_video.py \\
        --config training_examples/configs/toybox_t2iv.yaml --output_dir runs/t2v --transformer runs/t2i/pipeline \\
        --pipeline runs/frozen --data runs/cache/images runs/cache/clips --validation_data runs/cache/heldout_clips

The caches are those of precompute.py, made with the frozen models of `--pipeline`. The result is a whole pipeline
folder, `pipeline/` below the output folder.
"""

import json
import math
import re
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub import ModelCard, snapshot_download

import diffusers_moviegen
from diffusers_moviegen import (
    AutoencoderKLMovieGen,
    FlowMatchLinearQuadraticScheduler,
    MovieGenPipeline,
    MovieGenTransformer3DModel,
)
from diffusers_moviegen.pipelines.prompt_encoding import TEXT_ENCODERS
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
    draw_flow_batch,
    end_training,
    flow_loss,
    load_caches,
    make_lr_scheduler,
    make_optimizer,
    prepare_sharding,
    push_folder_to_hub,
    run_script,
    save_sample_sheet,
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
    data: list[str] = field(metadata={"help": "one or more caches that precompute.py wrote"})
    validation_data: list[str] = field(
        default_factory=list, metadata={"help": "caches of samples that no training sees; none: no validation"}
    )
    transformer: str | None = field(
        default=None, metadata={"help": "backbone to start from: folder or Hub id, of the model or of a pipeline"}
    )
    transformer_config: str | None = field(
        default=None,
        metadata={
            "help": "size of a fresh backbone: 1b, 5b, 30b or a config.json, whose channels and text widths give way "
            "to those of the caches"
        },
    )
    max_grid_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "positions for time, height and width: 8 frames, 16 and 16 pixels each; tables are expanded"
        },
    )
    train_batch_size: int = field(default=8, metadata={"help": "samples of one pass on each process"})
    max_batch_positions: int | None = field(
        default=None,
        metadata={
            "help": "latent positions of one pass, frames / 8 x height / 8 x width / 8 of a sample, from which on it "
            "has fewer samples"
        },
    )
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    images_to_videos: list[int] = field(
        default_factory=lambda: [1, 10],
        metadata={"help": "batches of images to batches of videos, where there are both"},
    )
    prompt_dropout: float = field(default=0.1, metadata={"help": "share of prompts replaced by the empty one"})
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
    num_workers: int = field(default=2, metadata={"help": "processes that read batches ahead; 0: this one reads"})
    height: int | None = field(
        default=None,
        metadata={
            "help": "of the sample sheets and default of the saved pipeline; all four: the most frequent in --data"
        },
    )
    width: int | None = None
    num_frames: int | None = None
    frame_rate: float | None = None
    guidance_scale: float = field(default=7.5, metadata={"help": "of the sample sheets and of the saved pipeline"})
    num_inference_steps: int = field(default=50, metadata={"help": "of the sample sheets and of the saved pipeline"})
    validation_steps: int = field(default=500, metadata={"help": "steps between two lines of figures"})
    num_validation_samples: int = field(default=4, metadata={"help": "rows of the sample sheets; 0: none are drawn"})
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
        check_positive(self, ("train_batch_size", "lr_patience", "num_inference_steps"))
        if (self.transformer is None) == (self.transformer_config is None):
            raise ValueError(
                "pass either --transformer, a backbone to start from, or --transformer_config, a fresh one's size."
            )
        if self.max_batch_positions is not None and self.max_batch_positions < 1:
            raise ValueError(f"--max_batch_positions is {self.max_batch_positions}: it must be at least 1.")
        if self.max_grid_size is not None and (len(self.max_grid_size) != 3 or min(self.max_grid_size) < 1):
            raise ValueError(
                f"--max_grid_size is {self.max_grid_size}: pass three numbers of at least 1, such as 4 6 6."
            )
        for name in ("height", "width", "num_frames", "frame_rate"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} is {getattr(self, name)}: it must be above 0.")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"--guidance_scale is {self.guidance_scale}: pass a number, such as 7.5.")
        if not math.isfinite(self.logit_mean):
            raise ValueError(f"--logit_mean is {self.logit_mean}: it must be finite.")
        if not 0 <= self.prompt_dropout <= 1:
            raise ValueError(f"--prompt_dropout is {self.prompt_dropout}: it must be from 0 to 1.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay is {self.ema_decay}: it must be at least 0 and below 1.")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"--min_learning_rate is {self.min_learning_rate}: it must be from 0 to --learning_rate, "
                f"{self.learning_rate}."
            )
        if self.min_learning_rate and self.lr_scheduler != "halve_on_plateau":
            raise ValueError("--min_learning_rate does nothing without --lr_scheduler halve_on_plateau: add it.")
        if self.num_validation_samples < 0:
            raise ValueError(f"--num_validation_samples is {self.num_validation_samples}: pass 0 to draw none.")
        if self.lr_scheduler == "halve_on_plateau" and not self.validation_data:
            raise ValueError("--lr_scheduler halve_on_plateau follows the validation loss: add --validation_data.")
        if not re.fullmatch(r"\d+(\.\d+)? *[KMGT]B", self.max_shard_size, re.IGNORECASE):
            raise ValueError(f"--max_shard_size is '{self.max_shard_size}': pass a size such as 10GB or 14MB.")


def load_backbone(args: Arguments, cache: LatentCache) -> MovieGenTransformer3DModel:
    """The backbone to train, in float32: the one to start from with its position tables expanded, or a fresh one."""
    reads = {"in_channels": cache.latent_channels, "out_channels": cache.latent_channels}
    reads |= {f"text_embed_dim{suffix}": cache.text_dims[suffix] for suffix in TEXT_ENCODERS}
    if args.transformer is None:
        folder = Path(diffusers_moviegen.__file__).parent / "configs" / f"transformer_{args.transformer_config}"
        config_file = folder / "config.json" if folder.is_dir() else Path(args.transformer_config)
        if not config_file.is_file():
            raise OSError(f"--transformer_config: '{args.transformer_config}' is not 1b, 5b, 30b or a config.json.")
        if args.max_grid_size is not None:
            reads["max_grid_size"] = tuple(args.max_grid_size)
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
            # Of another class's configuration most would be ignored, and the model have the largest size.
            if config.get("_class_name") != MovieGenTransformer3DModel.__name__:
                raise ValueError(f"its _class_name is {config.get('_class_name')}")
            return MovieGenTransformer3DModel.from_config(config, **reads)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"--transformer_config: '{config_file}' does not describe a {MovieGenTransformer3DModel.__name__}: "
                f"{error}."
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
    check_model_folder("transformer", folder, MovieGenTransformer3DModel)
    try:
        transformer, info = MovieGenTransformer3DModel.from_pretrained(
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
    if args.max_grid_size is not None:
        have = transformer.config.max_grid_size
        if any(new < old for new, old in zip(args.max_grid_size, have, strict=True)):
            raise ValueError(
                f"--max_grid_size is {args.max_grid_size}, smaller than the {list(have)} of '{args.transformer}': "
                "position tables only grow, and smaller inputs work as they are."
            )
        transformer.expand_position_tables(tuple(args.max_grid_size))
    return transformer


def load_pipeline(args: Arguments, folder: Path, transformer: MovieGenTransformer3DModel) -> MovieGenPipeline:
    """The pipeline around the backbone without its text encoders: what is to be encoded is in the caches."""
    check_model_folder("pipeline", folder / "vae", AutoencoderKLMovieGen)
    text = {f"{name}{suffix}": None for suffix in TEXT_ENCODERS for name in ("tokenizer", "text_encoder")}
    pipe = MovieGenPipeline(
        **text,
        transformer=transformer,
        vae=AutoencoderKLMovieGen.from_pretrained(folder / "vae"),
        scheduler=FlowMatchLinearQuadraticScheduler.from_pretrained(folder / "scheduler"),
        default_height=args.height,
        default_width=args.width,
        default_num_frames=args.num_frames,
        default_frame_rate=args.frame_rate,
        default_num_inference_steps=args.num_inference_steps,
        default_guidance_scale=args.guidance_scale,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_sizes(args: Arguments, pipe: MovieGenPipeline, caches: list[LatentCache]) -> None:
    """Raises a `ValueError` if the position tables are too small for a bucket or for the sample sheets."""
    patch, have = pipe.transformer.config.patch_size, pipe.transformer.config.max_grid_size
    temporal, spatial = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    for bucket in sorted({sample.bucket for cache in caches for sample in cache.samples}):
        need = [
            math.ceil(size / (factor * part))
            for size, factor, part in zip(bucket, (temporal, spatial, spatial), patch, strict=True)
        ]
        if any(positions > limit for positions, limit in zip(need, have, strict=True)):
            raise ValueError(
                f"the backbone has positions for a grid of {' x '.join(map(str, have))}, but the caches hold samples "
                f"of {bucket} (frames x height x width), a grid of {' x '.join(map(str, need))}: pass a larger "
                "--max_grid_size."
            )
    pipe.check_size(args.height, args.width, args.num_frames)


def sheet_samples(args: Arguments, cache: LatentCache) -> list[int]:
    """The samples whose prompts the sheets show: images for pictures, videos for films."""
    indices = [
        i for i, sample in enumerate(cache.samples) if (sample.bucket.num_frames == 1) == (args.num_frames == 1)
    ]
    if args.num_validation_samples and not indices:
        kind = "image" if args.num_frames == 1 else "video"
        raise ValueError(
            f"--num_frames is {args.num_frames}, but --validation_data has no {kind} whose prompt a sample could "
            "show; change one of them, or pass --num_validation_samples 0."
        )
    return indices[: args.num_validation_samples]


@torch.no_grad()
def draw_samples(
    args: Arguments,
    accelerator: Accelerator,
    pipe: MovieGenPipeline,
    cache: LatentCache,
    indices: list[int],
    path: Path,
) -> None:
    """Writes a sheet of samples for the prompts of `indices`. All processes sample, since weights may be sharded."""
    embeds = {}
    for prefix, texts in (
        ("", [cache.read(index)["text"] for index in indices]),
        ("negative_", [cache.unconditional] * len(indices)),
    ):
        inputs = text_inputs(texts, accelerator.device)
        for suffix in TEXT_ENCODERS:
            features, mask = (inputs[f"encoder_{name}{suffix}"] for name in ("hidden_states", "attention_mask"))
            embeds[f"{prefix}prompt_embeds{suffix}"] = features
            embeds[f"{prefix}prompt_attention_mask{suffix}"] = (
                torch.ones(features.shape[:2], dtype=torch.bool, device=features.device) if mask is None else mask
            )
    pipe.transformer.eval()
    generator = torch.Generator().manual_seed(args.seed)
    with accelerator.autocast():
        latents = pipe(
            **embeds, num_inference_steps=args.num_inference_steps, generator=generator, output_type="latent"
        ).frames
        if accelerator.is_main_process:
            save_sample_sheet(pipe.decode_latents(latents, args.num_frames), path)
    pipe.transformer.train()


def save_result(
    args: Arguments, pipe: MovieGenPipeline, frozen: Path, weights: dict[str, torch.Tensor], target: Path
) -> None:
    """Writes a pipeline folder: the files of the folder `frozen`, and `weights` in bfloat16 as the backbone."""
    with torch.device("meta"):
        transformer = MovieGenTransformer3DModel.from_config(pipe.transformer.config)
    weights = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in weights.items()}
    transformer.load_state_dict(weights, assign=True)
    # diffusers would write down the folder that the weights came from.
    transformer.register_to_config(_name_or_path="")
    index = json.loads((frozen / "model_index.json").read_text(encoding="utf-8"))
    index["transformer"] = ["diffusers_moviegen", MovieGenTransformer3DModel.__name__]
    index |= {name: value for name, value in pipe.config.items() if name.startswith("default_")}
    index.pop("_name_or_path", None)

    with written_beside(target) as folder:
        # The card of another model, and what git and the Hub keep beside a download, do not belong to the result.
        ignored = shutil.ignore_patterns("transformer", "README.md", ".*")
        shutil.copytree(frozen, folder, ignore=ignored, dirs_exist_ok=True)
        transformer.save_pretrained(folder / "transformer", max_shard_size=args.max_shard_size)
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / "model_index.json").write_text(f"{text}\n", encoding="utf-8")


def model_card(
    args: Arguments, repo_id: str, cache: LatentCache, figures: dict[str, float], num_processes: int
) -> ModelCard:
    """What the run was, said where its result is pushed to."""
    images = sum(sample.bucket.num_frames == 1 for sample in cache.samples)
    videos = len(cache.samples) - images
    picture = args.num_frames == 1
    size = f"{args.width} x {args.height} pixels"
    film = f"films of {args.num_frames} frames at {args.frame_rate:g} frames a second, {size}"
    imports = ["import torch", "from diffusers_moviegen import MovieGenPipeline"]
    call = "pipe(prompt, generator=generator).frames[0]"
    if picture:
        use = [f'{call}[0].save("picture.png")']
    else:
        imports.append("from diffusers_moviegen.media import save_video")
        use = [f'save_video({call}, "film.mp4", frame_rate={args.frame_rate:g})']
    snippet = [
        *imports,
        "",
        f'pipe = MovieGenPipeline.from_pretrained("{repo_id}")',
        "generator = torch.Generator().manual_seed(0)",
        f"prompt = {json.dumps(cache.samples[0].captions[0], ensure_ascii=False)}",
        *use,
    ]
    # Folders tell about the machine and its user, so only their names are written.
    names = {
        name: " ".join(Path(folder).name for folder in getattr(args, name)) for name in ("data", "validation_data")
    }
    return build_model_card(
        repo_id,
        summary=f"A Movie Gen {'text-to-image' if picture else 'text-to-video'} pipeline for diffusers. It makes "
        + (f"pictures of {size}." if picture else f"{film}."),
        snippet="\n".join(snippet),
        data=f"{images} images and {videos} videos with captions, from latent caches of the names {names['data']}."
        + (f" The figures are measured on others, {names['validation_data']}." if args.validation_data else ""),
        recipe={**asdict(args), **names, "processes": num_processes},
        figures=figures,
        figures_note="Measured by the run itself after its last step, before the averaged weights were rounded to"
        " bfloat16. `loss` is that of the last steps on the training data; `validation_loss` is the flow-matching loss"
        " at fixed times and noise.",
        base_model=args.transformer,
        pipeline_tag="text-to-image" if picture else "text-to-video",
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

    # 1. Data: posteriors and text features that the frozen models computed once
    frozen, cache, validation_cache = load_caches(accelerator, args.pipeline, args.data, args.validation_data)
    # What is made by default is what there is most of to learn from, films before pictures.
    counts = Counter(sample.bucket for sample in cache.samples)
    common = max(counts, key=lambda bucket: (bucket.num_frames > 1, counts[bucket]))
    for name in ("num_frames", "height", "width"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(common, name))
    default_frame_rate = MovieGenPipeline.load_config(frozen)["default_frame_rate"]
    args.frame_rate = args.frame_rate or cache.frame_rate or default_frame_rate

    # 2. Models: only the backbone learns. Every process makes the same fresh weights
    set_seed(args.seed)
    transformer = load_backbone(args, cache)
    pipe = load_pipeline(args, frozen, transformer)
    check_sizes(args, pipe, [cache, validation_cache] if validation_cache else [cache])
    shown = sheet_samples(args, validation_cache) if validation_cache else []
    if shown:
        pipe.vae.to(accelerator.device)
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
    loader = cache_loader(
        accelerator,
        cache,
        args.train_batch_size,
        args.images_to_videos,
        args.seed,
        args.num_workers,
        args.max_batch_positions,
    )

    # 5. Where the run stands
    state = RunState()
    repo_id = begin_run(
        accelerator, args, "train_text_to_video", MovieGenPipeline.__name__, state, lr_scheduler, loader
    )

    def measure() -> dict[str, float]:
        """The figures of a step, of the averaged weights; draws a sheet, too."""
        if validation_cache is None:
            return {}
        with ema.applied():
            loss = validation_flow_loss(model, pipe.scheduler, validation_cache, accelerator, args.train_batch_size)
            if shown:
                sheet = output_dir / "samples" / f"step_{state.step:06d}.png"
                draw_samples(args, accelerator, pipe, validation_cache, shown, sheet)
        return {"validation_loss": loss}

    # 6. Steps
    batches = iter(loader)
    with training_steps(accelerator, args, state, optimizer, lr_scheduler, measure, ema, plateau) as steps:
        while steps.go_on:
            parts, names = [], []
            for _ in range(args.gradient_accumulation_steps):
                batch = next(batches)
                # The number of the batch alone decides what is drawn, so a resumed run draws the same.
                generator = step_generator(args.seed, loader.step, accelerator.process_index)
                inputs = draw_flow_batch(
                    batch, cache.unconditional, args.prompt_dropout, generator, accelerator.device, args.logit_mean
                )
                with accelerator.accumulate(model):
                    with accelerator.autocast():
                        loss = flow_loss(model, pipe.scheduler, *inputs)
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
            save_result(args, pipe, frozen, weights, output_dir / "pipeline")

    # 8. It goes to the Hub; it stays in its folder when it cannot
    if args.push_to_hub and accelerator.is_main_process:
        card = model_card(args, repo_id, cache, figures, accelerator.num_processes)
        print(push_folder_to_hub(output_dir / "pipeline", repo_id, card, args.hub_private))
    end_training(accelerator)


if __name__ == "__main__":
    run_script(main, Arguments)
