"""Fine-tunes a LoRA of the Movie Gen backbone on latent caches: a few megabytes instead of a second backbone.

    accelerate launch training_examples/train_text_to_video_lora.py \\
        --config training_examples/configs/lora_example_media.yaml --output_dir runs/lora \\
        --pipeline diffusers_moviegen/checkpoints/toybox \\
        --data runs/cache/train --validation_data runs/cache/validation

The caches are those of precompute.py, made with the frozen models of `--pipeline`. The result, `lora/` below the
output folder, is for `pipe.load_lora_weights`.
"""

import json
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from diffusers_moviegen import (
    FlowMatchLinearQuadraticScheduler,
    MovieGenPipeline,
    MovieGenTransformer3DModel,
    bundled_checkpoint,
)
from diffusers_moviegen.training import (
    LatentCache,
    RunState,
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
    push_folder_to_hub,
    run_script,
    step_generator,
    training_steps,
    validation_flow_loss,
    written_beside,
)


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "folder of the run; the result is written to its lora/"})
    pipeline: str = field(metadata={"help": "folder or Hub id of the pipeline whose backbone is adapted"})
    data: list[str] = field(metadata={"help": "one or more caches that precompute.py wrote"})
    validation_data: list[str] = field(
        default_factory=list, metadata={"help": "caches of samples that no training sees; none: no validation"}
    )
    lora_rank: int = field(default=16, metadata={"help": "rank of the update of each layer"})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "the update is scaled by lora_alpha / lora_rank; default: the rank"}
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"],
        metadata={"help": "names of the linear layers to adapt, such as those of the attentions"},
    )
    train_batch_size: int = field(default=1, metadata={"help": "samples of one pass on each process"})
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    images_to_videos: list[int] = field(
        default_factory=lambda: [1, 10],
        metadata={"help": "batches of images to batches of videos, where there are both"},
    )
    prompt_dropout: float = field(default=0.1, metadata={"help": "share of prompts replaced by the empty one"})
    max_train_steps: int = 1000
    learning_rate: float = 1e-4
    lr_scheduler: str = field(default="cosine", metadata={"choices": ["cosine", "constant_with_warmup"]})
    lr_warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    mixed_precision: str = field(
        default="no", metadata={"help": "also of the frozen weights", "choices": ["no", "bf16", "fp16"]}
    )
    seed: int = 0
    num_workers: int = field(default=2, metadata={"help": "processes that read batches ahead; 0: this one reads"})
    validation_steps: int = field(default=100, metadata={"help": "steps between two lines of figures"})
    checkpointing_steps: int = 100
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "a checkpoint folder or 'latest'"})
    report_to: str = field(default="none", metadata={"help": "a tracker that accelerate knows, such as tensorboard"})
    push_to_hub: bool = field(default=False, metadata={"help": "push the result to the Hub, with a model card"})
    hub_model_id: str | None = field(default=None, metadata={"help": "repository to push to, user/name"})
    hub_private: bool = field(default=False, metadata={"help": "whether only its owners may see a new repository"})

    def __post_init__(self):
        check_training_options(self)
        check_positive(self, ("lora_rank", "train_batch_size"))
        if self.lora_alpha is None:
            self.lora_alpha = float(self.lora_rank)
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"--lora_alpha is {self.lora_alpha}: it must be above 0.")
        if not 0 <= self.prompt_dropout <= 1:
            raise ValueError(f"--prompt_dropout is {self.prompt_dropout}: it must be from 0 to 1.")


def load_backbone(args: Arguments, frozen: Path, dtype: torch.dtype) -> MovieGenTransformer3DModel:
    """The frozen backbone of the pipeline, in `dtype` but for what it keeps in float32."""
    if Path(args.pipeline).is_dir():
        check_model_folder("pipeline", frozen / "transformer", MovieGenTransformer3DModel)
    # `frozen` comes from the Hub without the backbone.
    transformer, info = MovieGenTransformer3DModel.from_pretrained(
        args.pipeline, subfolder="transformer", torch_dtype=dtype, output_loading_info=True
    )
    if info["missing_keys"]:
        missing = info["missing_keys"][0]
        raise OSError(
            f"--pipeline: the weights of the backbone in '{args.pipeline}' lack '{missing}'; save them again."
        )
    return transformer.requires_grad_(False)


def check_sizes(transformer: MovieGenTransformer3DModel, caches: list[LatentCache]) -> None:
    """Raises a `ValueError` if the position tables are too small for a bucket."""
    have = transformer.config.max_grid_size
    for cache in caches:
        for bucket, index in {sample.bucket: index for index, sample in enumerate(cache.samples)}.items():
            latents = cache.read(index)["mean"].shape[1:]
            need = [size // part for size, part in zip(latents, transformer.config.patch_size, strict=True)]
            if any(positions > limit for positions, limit in zip(need, have, strict=True)):
                raise ValueError(
                    f"--pipeline: its backbone has positions for a grid of {' x '.join(map(str, have))}, but the "
                    f"caches hold samples of {bucket} (frames x height x width), a grid of "
                    f"{' x '.join(map(str, need))}: precompute them smaller or shorter."
                )


def add_adapter(args: Arguments, transformer: MovieGenTransformer3DModel) -> LoraConfig:
    """Adds LoRA layers in float32, which change nothing yet, to the backbone."""
    layers = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in args.lora_target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            # A name may end with a number, as to_out.0 does.
            known = sorted({re.search(r"[^.]+(\.\d+)?$", name)[0] for name in layers})
            raise ValueError(
                f"--lora_target_modules: the backbone has no linear layer '{target}'; it has {', '.join(known)}."
            )
    config = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=args.lora_target_modules)
    transformer.add_adapter(config)
    cast_training_params(transformer, torch.float32)
    return config


def save_adapter(transformer: MovieGenTransformer3DModel, folder: Path) -> None:
    """Writes the LoRA, with the adapter's configuration, for `load_lora_weights`."""
    MovieGenPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )


def load_adapter(transformer: MovieGenTransformer3DModel, folder: Path) -> None:
    """Restores what `save_adapter` wrote; raises an `OSError` or a `ValueError` if that was something else."""
    if not (folder / LORA_WEIGHT_NAME_SAFE).is_file():
        raise OSError(
            f"--resume_from_checkpoint: '{folder}' has no {LORA_WEIGHT_NAME_SAFE}; pass a checkpoint of this script."
        )
    weights, metadata = MovieGenPipeline.lora_state_dict(folder, return_lora_metadata=True, local_files_only=True)
    saved = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    there = {name: tuple(weight.shape) for name, weight in saved.items()}
    here = {name: tuple(weight.shape) for name, weight in get_peft_model_state_dict(transformer).items()}
    different = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
    difference = None
    if different:
        name = different[0]
        difference = f"'{name}' is {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
    elif metadata["transformer.lora_alpha"] != transformer.peft_config["default"].lora_alpha:
        difference = f"its lora_alpha is {metadata['transformer.lora_alpha']}"
    if difference is not None:
        raise ValueError(
            f"--resume_from_checkpoint: '{folder}' has another adapter: {difference}; resume with the --lora_rank, "
            "--lora_alpha and --lora_target_modules that it was saved with."
        )
    set_peft_model_state_dict(transformer, saved)


def model_card(
    args: Arguments, repo_id: str, cache: LatentCache, figures: dict[str, float], num_processes: int
) -> ModelCard:
    """What the run was, said where its result is pushed to."""
    images = sum(sample.bucket.num_frames == 1 for sample in cache.samples)
    videos = len(cache.samples) - images
    counts = Counter(sample.bucket for sample in cache.samples)
    common = max(counts, key=lambda bucket: (bucket.num_frames > 1, counts[bucket]))
    caption = next(sample.captions[0] for sample in cache.samples if sample.bucket == common)
    is_bundled = Path(args.pipeline).resolve() == Path(bundled_checkpoint()).resolve()
    base = Path(args.pipeline).name if Path(args.pipeline).is_dir() else args.pipeline
    names = ["MovieGenPipeline"] + (["bundled_checkpoint"] if is_bundled else [])
    imports = ["import torch", f"from diffusers_moviegen import {', '.join(names)}"]
    size = f"height={common.height}, width={common.width}, num_frames={common.num_frames}"
    if common.num_frames == 1:
        use = [f"pipe(prompt, {size}, generator=generator).frames[0][0]" + '.save("picture.png")']
    else:
        imports.append("from diffusers_moviegen.media import save_video")
        rate = f"frame_rate={cache.frame_rate:g}"
        use = [
            f"film = pipe(prompt, {size}, {rate}, generator=generator).frames[0]",
            f'save_video(film, "film.mp4", {rate})',
        ]
    snippet = [
        *imports,
        "",
        f"pipe = MovieGenPipeline.from_pretrained({'bundled_checkpoint()' if is_bundled else json.dumps(base)})",
        f'pipe.load_lora_weights("{repo_id}")',
        "generator = torch.Generator().manual_seed(0)",
        f"prompt = {json.dumps(caption, ensure_ascii=False)}",
        *use,
    ]
    # Folders tell about the machine and its user, so only their names are written.
    folders = {
        name: " ".join(Path(folder).name for folder in getattr(args, name)) for name in ("data", "validation_data")
    }
    return build_model_card(
        repo_id,
        summary=f"A LoRA of rank {args.lora_rank} for the Movie Gen backbone of {base}.",
        snippet="\n".join(snippet),
        data=f"{images} images and {videos} videos with captions, from latent caches of the names {folders['data']}."
        + (f" The figures are measured on others, {folders['validation_data']}." if args.validation_data else ""),
        recipe={**asdict(args), **folders, "processes": num_processes},
        figures=figures,
        figures_note="Measured by the run itself after its last step. `loss` is that of the last steps on the"
        " training data; `validation_loss` is the flow-matching loss at fixed times and noise, `base_validation_loss`"
        " the same without the LoRA.",
        base_model=args.pipeline,
        pipeline_tag="text-to-image" if common.num_frames == 1 else "text-to-video",
        tags=["lora"],
    )


def main(args: Arguments) -> None:
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir, "lora", args.resume_from_checkpoint)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=str(output_dir / "logs"),
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "this script keeps the whole backbone on every process: launch it without FSDP and DeepSpeed; with "
            "--mixed_precision bf16 the frozen weights take two bytes each."
        )
    check_mixed_precision(accelerator)

    # 1. Data: posteriors and text features that the frozen models computed once
    frozen, cache, validation_cache = load_caches(accelerator, args.pipeline, args.data, args.validation_data)

    # 2. Model: only the adapter learns. Every process makes the same fresh one
    set_seed(args.seed)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision]
    transformer = load_backbone(args, frozen, dtype)
    scheduler = FlowMatchLinearQuadraticScheduler.from_pretrained(frozen / "scheduler")
    check_sizes(transformer, [cache, validation_cache] if validation_cache else [cache])
    add_adapter(args, transformer)
    if accelerator.device.type == "cpu":
        # The fused CPU kernel's backward is several times slower than plain matrix products at these lengths.
        transformer.set_attention_backend("_native_math")
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()

    # 3. Optimisation
    optimizer = torch.optim.AdamW(
        [parameter for parameter in transformer.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
        fused=True,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    model, optimizer = accelerator.prepare(transformer, optimizer)

    # 4. Batches of one shape, the same on every process
    loader = cache_loader(
        accelerator, cache, args.train_batch_size, args.images_to_videos, args.seed, args.num_workers
    )

    # 5. Where the run stands. Checkpoints have the adapter, but not the backbone
    def save_hook(models: list, weights: list, folder: str) -> None:
        if accelerator.is_main_process:
            save_adapter(transformer, Path(folder))
        weights.clear()

    def load_hook(models: list, folder: str) -> None:
        load_adapter(transformer, Path(folder))
        models.clear()

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)
    state = RunState()
    repo_id = begin_run(accelerator, args, "train_text_to_video_lora", None, state, lr_scheduler, loader)

    # What the backbone alone can do with the data, to compare with
    baseline = {}

    def measure() -> dict[str, float]:
        if validation_cache is None:
            return {}
        loss = validation_flow_loss(model, scheduler, validation_cache, accelerator, args.train_batch_size)
        return {"validation_loss": loss} | baseline

    if validation_cache is not None:
        transformer.disable_adapters()
        baseline = {"base_validation_loss": measure()["validation_loss"]}
        transformer.enable_adapters()
        accelerator.print(json.dumps({"step": state.step, **baseline}), flush=True)

    # 6. Steps
    batches = iter(loader)
    with training_steps(accelerator, args, state, optimizer, lr_scheduler, measure) as steps:
        while steps.go_on:
            parts, names = [], []
            for _ in range(args.gradient_accumulation_steps):
                batch = next(batches)
                # The number of the batch alone decides what is drawn, so a resumed run draws the same.
                generator = step_generator(args.seed, loader.step, accelerator.process_index)
                inputs = draw_flow_batch(
                    batch, cache.unconditional, args.prompt_dropout, generator, accelerator.device
                )
                with accelerator.accumulate(model):
                    with accelerator.autocast():
                        loss = flow_loss(model, scheduler, *inputs)
                    accelerator.backward(loss)
                parts.append(loss.detach())
                names += batch["name"]
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            steps.update(torch.stack(parts).mean(), grad_norm, names)
            steps.end()
    if not steps.finished:
        return

    # 7. The result, written beside and renamed, so that what lora/ holds is whole
    figures = steps.final_figures() if args.push_to_hub else None
    if accelerator.is_main_process:
        target = output_dir / "lora"
        with written_beside(target) as folder:
            save_adapter(transformer, folder)

        # 8. It goes to the Hub; it stays in its folder when it cannot
        if args.push_to_hub:
            card = model_card(args, repo_id, cache, figures, accelerator.num_processes)
            print(push_folder_to_hub(target, repo_id, card, args.hub_private))
    end_training(accelerator)


if __name__ == "__main__":
    run_script(main, Arguments)
