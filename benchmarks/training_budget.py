"""Computes what a training step of a backbone needs: memory on each device, floating-point operations, and time.

    python benchmarks/training_budget.py --config 30b --num_devices 8 64 512 --sharding zero3 --context_parallel 8 \\
        --num_frames 256 --height 768 --width 768

Nothing is trained or allocated: the parameters are counted on the meta device, the rest are formulas, each beside its
reason below. `--check` measures small models on the CPU and prints the measurements beside the formulas' values.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import HfArgumentParser

import diffusers_moviegen
from diffusers_moviegen import MovieGenTransformer3DModel
from diffusers_moviegen.training import check_positive


CONFIGS = Path(diffusers_moviegen.__file__).parent / "configs"
GIB = 2**30
TAE_COMPRESSION = 8
"""Of the temporal autoencoder, in time, height and width."""

RESERVED_GIB = 8
"""Assumed for what no formula here covers: CUDA context, communication buffers, kernels' workspaces, fragmentation."""


@dataclass
class Arguments:
    config: str = field(default="30b", metadata={"help": "1b, 5b, 30b, a model folder, or a config.json"})
    num_devices: list[int] = field(default_factory=lambda: [1], metadata={"help": "each number gives a column"})
    sharding: str = field(
        default="none",
        metadata={
            "choices": ["none", "zero1", "zero2", "zero3"],
            "help": "none: DDP; zero1, zero2: DeepSpeed; zero3: FSDP2 full shard",
        },
    )
    context_parallel: int = field(default=1, metadata={"help": "devices that share one sequence (Ulysses)"})
    precision: str = field(
        default="bf16", metadata={"choices": ["bf16", "fp32"], "help": "bf16: autocast, float32 master weights"}
    )
    latents_dtype: str | None = field(
        default=None,
        metadata={
            "choices": ["fp32", "bf16"],
            "help": "of the latents that reach the model, and so of its residual stream; default: fp32, but bf16 for "
            "--precision bf16 with any --sharding, whose engines run the whole model in it",
        },
    )
    optimizer: str = field(default="adamw", metadata={"choices": ["adamw", "adamw8bit"]})
    ema: bool = True
    gradient_checkpointing: bool = True
    micro_batch_size: int = field(
        default=1, metadata={"help": "samples of a forward pass of a context-parallel group"}
    )
    gradient_accumulation_steps: int = 1
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "samples a step; chooses the largest micro batch that fits, and accumulation to fill it up"},
    )
    num_frames: int = field(default=256, metadata={"help": "frames of video; 1 is an image"})
    height: int = field(default=768, metadata={"help": "of the video, in pixels"})
    width: int = field(default=768, metadata={"help": "of the video, in pixels"})
    text_lengths: list[int] = field(
        default_factory=lambda: [512, 256, 256], metadata={"help": "tokens of the three text encoders"}
    )
    kernels: str = field(
        default="cuda", metadata={"choices": ["cuda", "cpu"], "help": "whose kernels decide what autograd keeps"}
    )
    memory_gib: float = field(default=80, metadata={"help": "of a device"})
    peak_tflops: float = field(
        default=989, metadata={"help": "dense peak of a device in this precision; an H100 SXM has 989 in bf16"}
    )
    utilization: float = field(
        default=0.4, metadata={"help": "assumed share of the peak at which the step runs, recomputation included"}
    )
    json: bool = field(default=False, metadata={"help": "print JSON instead of a table"})
    check: bool = field(default=False, metadata={"help": "compare formulas with measurements of small models instead"})

    def __post_init__(self):
        check_positive(self, ("context_parallel", "micro_batch_size", "gradient_accumulation_steps", "num_frames"))
        for num_devices in self.num_devices:
            if num_devices < 1 or num_devices % self.context_parallel:
                raise ValueError(
                    f"--num_devices {num_devices} is no positive multiple of --context_parallel "
                    f"{self.context_parallel}; every group of that many devices shares one sequence."
                )
        if self.latents_dtype is None:
            self.latents_dtype = "bf16" if self.precision == "bf16" and self.sharding != "none" else "fp32"
        if self.precision == "fp32" and self.latents_dtype == "bf16":
            raise ValueError("--latents_dtype bf16 needs --precision bf16: float32 weights do not take bf16 latents.")
        if self.global_batch_size is not None:
            if (self.micro_batch_size, self.gradient_accumulation_steps) != (1, 1):
                raise ValueError(
                    "--global_batch_size chooses --micro_batch_size and --gradient_accumulation_steps; pass either."
                )
            for num_devices in self.num_devices:
                groups = num_devices // self.context_parallel
                if self.global_batch_size < 1 or self.global_batch_size % groups:
                    raise ValueError(
                        f"--global_batch_size {self.global_batch_size} is no positive multiple of {groups}, the "
                        f"context-parallel groups of {num_devices} devices."
                    )
        if len(self.text_lengths) != 3 or min(self.text_lengths) < 1:
            raise ValueError(f"--text_lengths {self.text_lengths}: pass three lengths of at least 1.")
        for name in ("memory_gib", "peak_tflops", "utilization"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} is {getattr(self, name)}: it must be greater than 0.")


def load_config(name: str) -> dict:
    """The config of a shipped model, a model folder or a file.

    Raises:
        OSError: if there is no such config, or it is another class's.
    """
    path = CONFIGS / f"transformer_{name}"
    path = path if path.is_dir() else Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        shipped = ", ".join(
            sorted(folder.name.removeprefix("transformer_") for folder in CONFIGS.glob("transformer_*"))
        )
        raise OSError(f"--config: there is no '{path}'; pass one of {shipped}, a model folder or a config.json.")
    try:
        config = json.loads(path.read_text())
        found = config.get("_class_name")
    except (ValueError, AttributeError):
        raise OSError(f"--config: '{path}' is no model config; pass the config.json of a backbone.") from None
    if found != MovieGenTransformer3DModel.__name__:
        raise OSError(f"--config: '{path}' holds a {found}; pass a {MovieGenTransformer3DModel.__name__}.")
    return config


@dataclass
class Shape:
    """Sizes of one forward pass of one context-parallel group."""

    batch: int
    latent_numel: int
    """Numbers in one sample's latents."""
    tokens: int
    """Of one sample, over all the devices that share it."""
    text_lengths: list[int]
    dim: int
    ffn_dim: int
    heads: int
    layers: int
    patch_numel: int
    freq_dim: int
    text_dims: list[int]

    @classmethod
    def of(cls, model: MovieGenTransformer3DModel, args: Arguments) -> "Shape":
        config = model.config
        size = [math.ceil(args.num_frames / TAE_COMPRESSION)]
        for name in ("height", "width"):
            pixels = getattr(args, name)
            if pixels < 1 or pixels % TAE_COMPRESSION:
                raise ValueError(f"--{name} is {pixels}: it must be a positive multiple of {TAE_COMPRESSION} pixels.")
            size.append(pixels // TAE_COMPRESSION)
        if any(side % patch for side, patch in zip(size, config.patch_size, strict=True)):
            raise ValueError(
                f"--num_frames, --height, --width: latents of {' x '.join(map(str, size))} do not divide into the "
                f"model's patches of {' x '.join(map(str, config.patch_size))}."
            )
        grid = [side // patch for side, patch in zip(size, config.patch_size, strict=True)]
        if any(side > limit for side, limit in zip(grid, config.max_grid_size, strict=True)):
            raise ValueError(
                f"--num_frames, --height, --width: a grid of {' x '.join(map(str, grid))} patches exceeds the model's "
                f"position tables of {' x '.join(map(str, config.max_grid_size))}."
            )
        if config.num_attention_heads % args.context_parallel:
            raise ValueError(
                f"--context_parallel {args.context_parallel} does not divide the model's {config.num_attention_heads} "
                "heads; Ulysses gives every device the same number of them."
            )
        return cls(
            batch=args.micro_batch_size,
            latent_numel=config.in_channels * math.prod(size),
            tokens=math.prod(grid),
            text_lengths=args.text_lengths,
            dim=config.num_attention_heads * config.attention_head_dim,
            ffn_dim=config.ffn_dim,
            heads=config.num_attention_heads,
            layers=config.num_layers,
            patch_numel=config.in_channels * math.prod(config.patch_size),
            freq_dim=config.freq_dim,
            text_dims=[config.text_embed_dim, config.text_embed_dim_2, config.text_embed_dim_3],
        )


@dataclass
class Flops:
    """Floating-point operations of matrix products, convolutions and attention; 2 for a multiplication and addition.

    Left out: norms, activations, modulation, loss and optimizer, which are bound by memory bandwidth.
    """

    forward: int
    backward: int
    blocks_forward: int
    """What gradient checkpointing computes a second time."""


def count_flops(shape: Shape, tokens: int) -> Flops:
    """Of one forward and backward pass over `tokens` tokens of each sample, which attend to all of `shape.tokens`.

    A linear layer costs its forward twice in backward, for the gradients of input and weight; those that no gradient
    passes through cost it once. Fused attention computes two products forward and five backward, as it recomputes the
    scores.
    """
    batch, dim = shape.batch, shape.dim
    rows, text_rows = batch * tokens, batch * sum(shape.text_lengths)

    projections = 6 * 2 * rows * dim * dim  # q, k, v, out of the self-attention, q and out of the cross-attention
    projections += 2 * 2 * text_rows * dim * dim  # k and v of the cross-attention
    projections += 3 * 2 * rows * dim * shape.ffn_dim
    attention = 2 * 2 * rows * (shape.tokens + sum(shape.text_lengths)) * dim
    blocks_forward = shape.layers * (projections + attention)
    blocks_backward = shape.layers * (2 * projections + attention * 5 // 2)

    # Latents, sinusoids and text features come from outside and get no gradient.
    first = 2 * rows * shape.patch_numel * dim + 2 * batch * shape.freq_dim * dim
    lengths_and_dims = zip(shape.text_lengths, shape.text_dims, strict=True)
    first += sum(2 * batch * length * text_dim * dim for length, text_dim in lengths_and_dims)
    inner = 2 * batch * dim * 7 * dim + 2 * rows * dim * shape.patch_numel  # time embedding and modulation; output
    return Flops(blocks_forward + first + inner, blocks_backward + first + 2 * inner, blocks_forward)


@dataclass
class Activations:
    """Bytes on one device that autograd keeps, and that come and go on top of them during backward."""

    block: int
    """Kept by one block."""
    checkpoint: int
    """The input of one block, all that is kept of it under gradient checkpointing."""
    checkpoints_share: int
    """Inputs that every block gets, kept once under gradient checkpointing."""
    inputs: int
    """Kept by everything before the blocks and by the loss, until the end of backward."""
    head: int
    """Kept by the output layers, and gone when the backward of the blocks starts."""
    head_workspace: int
    """Gradients and temporaries alive at the same time in the backward of the head."""
    block_workspace: int
    """The same in the backward of a block, less what that block's backward has released."""

    def kept(self, layers: int, gradient_checkpointing: bool) -> int:
        """At the end of the forward."""
        if gradient_checkpointing:
            return self.inputs + layers * self.checkpoint + self.checkpoints_share + self.head
        return self.inputs + layers * self.block + self.head

    def peak(self, layers: int, gradient_checkpointing: bool) -> int:
        """In backward: in the head, or in the last block, whose inside checkpointing has computed again by then."""
        kept = self.kept(layers, gradient_checkpointing)
        recomputed = self.block if gradient_checkpointing else 0
        return max(kept + self.head_workspace, kept - self.head + recomputed + self.block_workspace)


def count_activations(shape: Shape, args: Arguments) -> Activations:
    """The tensors that autograd keeps of one forward pass, operation by operation."""
    batch, dim, ffn_dim = shape.batch, shape.dim, shape.ffn_dim
    rows = batch * math.ceil(shape.tokens / args.context_parallel)
    text_rows = batch * sum(shape.text_lengths)
    mixed, cuda = args.precision == "bf16", args.kernels == "cuda"
    product = 2 if mixed else 4  # bytes of a number in matrix products and attention
    residual = 2 if args.latents_dtype == "bf16" else 4
    # Autocast casts a float32 input anew for every layer that reads it, and each keeps its own copy.
    casts = residual != product
    # CUDA's autocast brings the operands of addcmul to float32 and keeps those copies; the CPU's lets it promote.
    gated = 4 if mixed and cuda else product

    # One number a row, one row of `dim` and one of `ffn_dim`, in float32 or the dtype of products.
    row, wide, product_wide, product_ffn = 4 * rows, 4 * rows * dim, product * rows * dim, product * rows * ffn_dim
    # The input in float32 (for a bf16 stream a copy) and the reciprocal root. Not fused, also the normalised input.
    norm = wide + row + (0 if cuda else wide)
    # q, k, v and output of fused attention, and the logarithm of each row's sum. The output is also the input of
    # `to_out`, except that the all-to-all of context parallelism comes between the two.
    self_attention = 4 * product_wide + row * shape.heads + (product_wide if args.context_parallel > 1 else 0)
    cross_attention = 2 * product_wide + 2 * product * text_rows * dim + row * shape.heads
    kept_by_block = {
        "norm1, norm2, norm3": 3 * norm,
        "outputs of norm1 and norm3, multiplied by a scale": 2 * wide,
        "modulation, and twice 1 + scale": 4 * batch * (6 + 2) * dim,
        "input of to_q, to_k, to_v": (3 if casts else 1) * product_wide,
        "self-attention": self_attention,
        "its output, multiplied by a gate": gated * rows * dim,
        "input of the cross-attention's to_q": product_wide,
        "cross-attention": cross_attention,
        "input of gate_proj, up_proj": (2 if casts else 1) * product_wide,
        "gate, silu(gate), up, their product": 4 * product_ffn,
        "output of the feed-forward, multiplied by a gate": gated * rows * dim,
    }

    features = sum(length * text_dim for length, text_dim in zip(shape.text_lengths, shape.text_dims, strict=True))
    kept_throughout = {
        "latents, prediction and target": (product + 4 + 4) * batch * shape.latent_numel,
        "text features": product * batch * features,
        "projected text, before its norm and after, and the norm's statistics": (4 + product) * text_rows * dim
        + 2 * 4 * text_rows,
        "sinusoids, and the inputs and outputs of two SiLUs of the time": product * batch * (shape.freq_dim + 4 * dim),
    }
    kept_by_head = {
        "norm_out and its output, multiplied by a scale": norm + wide,
        "input of proj_out": product_wide,
        "1 + scale": 4 * batch * dim,
    }
    # Context parallelism slices embedded patches inside the first block's checkpoint and positions before all of them,
    # and a slice keeps the whole alive. For a bf16 stream the positions' slice is cast, which copies only the slice.
    whole_positions = shape.tokens if residual == 4 else math.ceil(shape.tokens / args.context_parallel)
    given_to_blocks = {
        "patches outside the slice": residual * (batch * shape.tokens - rows) * dim,
        "positions": residual * whole_positions * dim,
        "modulation": product * batch * 6 * dim,
    }
    return Activations(
        block=sum(kept_by_block.values()),
        checkpoint=residual * rows * dim,
        checkpoints_share=sum(given_to_blocks.values()),
        inputs=sum(kept_throughout.values()),
        head=sum(kept_by_head.values()),
        head_workspace=3 * wide,
        # Either in the gated sum that ends the block: the stream's gradient, three products and the cast of one; or at
        # SwiGLU's product: the stream's gradient and those of the product and its two factors.
        block_workspace=max(
            4 * wide + (product_wide if mixed else 0),
            residual * rows * dim + 2 * product_ffn - gated * rows * dim,
        ),
    )


def count_state(model: MovieGenTransformer3DModel, args: Arguments, num_devices: int) -> dict[str, float]:
    """Bytes on one device of everything whose size does not depend on the batch."""
    total = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.transformer_blocks[0].parameters())
    outside = total - len(model.transformer_blocks) * block
    mixed = args.precision == "bf16"
    compute = 2 if mixed else 4
    # Two moments of four bytes, or of one and a float32 scale for every 256.
    moments = 2 * 4 if args.optimizer == "adamw" else 2 * (1 + 4 / 256)
    ema = 4 if args.ema else 0

    if args.sharding == "none":
        return {
            "weights": 4 * total,
            # Autocast's bf16 copies.
            "copies of weights": 2 * total if mixed else 0,
            "gradients": 4 * total,
            "optimizer": moments * total,
            "EMA": ema * total,
            # DDP's buckets, which hold every gradient a second time.
            "communication": 4 * total if num_devices > 1 else 0,
        }
    if args.sharding in ("zero1", "zero2"):
        return {
            "weights": compute * total,
            "copies of weights": 0,
            "gradients": compute * total / (num_devices if args.sharding == "zero2" else 1),
            # In bf16 the float32 weights belong to the optimizer.
            "optimizer": ((4 if mixed else 0) + moments) * total / num_devices,
            "EMA": ema * total,
            # DeepSpeed's buckets for reducing and gathering, of 5e8 numbers each by default.
            "communication": 2 * compute * min(total, 500_000_000),
        }
    return {
        "weights": 4 * total / num_devices,
        # This block's and the next one's, gathered, and those outside the blocks, which stay gathered.
        "copies of weights": compute * (2 * block + outside),
        "gradients": 4 * total / num_devices,
        "optimizer": moments * total / num_devices,
        "EMA": ema * total / num_devices,
        # A block's whole gradients and their copy in the buffer that is reduced, and those outside the blocks.
        "communication": compute * (2 * block + outside),
    }


def budget(model: MovieGenTransformer3DModel, args: Arguments, num_devices: int) -> dict[str, float]:
    """Everything the table shows for one number of devices; sizes in bytes, times in seconds."""
    shape = Shape.of(model, args)
    layers, checkpointing = shape.layers, args.gradient_checkpointing
    state = count_state(model, args, num_devices)

    def activations(micro_batch_size: int) -> int:
        return count_activations(replace(shape, batch=micro_batch_size), args).peak(layers, checkpointing)

    # Activations grow with the micro batch: double it, then halve the interval.
    available = (args.memory_gib - RESERVED_GIB) * GIB - sum(state.values())
    low, high = 0, 1
    while activations(high) <= available:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if activations(middle) <= available else (low, middle)

    groups = num_devices // args.context_parallel
    passes = args.gradient_accumulation_steps
    if args.global_batch_size is not None:
        share = args.global_batch_size // groups
        shape = replace(shape, batch=max(size for size in range(1, max(low, 1) + 1) if share % size == 0))
        passes = share // shape.batch
    of_step = count_flops(shape, shape.tokens)
    model_flops = groups * passes * (of_step.forward + of_step.backward)
    # Tokens are divided over the devices of a group; what belongs to a sample (its text, its time) is done by each.
    of_device = count_flops(shape, math.ceil(shape.tokens / args.context_parallel))
    recomputed = of_device.blocks_forward if checkpointing else 0
    device_flops = passes * (of_device.forward + of_device.backward + recomputed)
    seconds = device_flops / (args.utilization * args.peak_tflops * 1e12)

    samples = groups * passes * shape.batch
    total = sum(state.values()) + activations(shape.batch)
    return {
        "devices": num_devices,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens of a sample": shape.tokens,
        "micro batch": shape.batch,
        "accumulation": passes,
        "samples a step": samples,
        "tokens a step": samples * shape.tokens,
        **state,
        "activations": activations(shape.batch),
        "total": total,
        "fits": low >= shape.batch,
        "largest micro batch": low,
        "model FLOPs a step": model_flops,
        "executed FLOPs a step": num_devices * device_flops,
        "seconds a step": seconds,
        "samples a second": samples / seconds,
        "MFU": model_flops / (seconds * num_devices * args.peak_tflops * 1e12),
    }


def format_budget(rows: list[dict[str, float]], args: Arguments) -> str:
    """A markdown table, one column for each number of devices."""
    sizes = ("weights", "copies of weights", "gradients", "optimizer", "EMA", "communication", "activations", "total")
    counts = ("parameters", "tokens of a sample", "micro batch", "accumulation", "samples a step", "tokens a step")
    formats = {
        **{name: lambda value: f"{value:,}" for name in counts},
        **{name: lambda value: f"{value / GIB:.1f}" for name in sizes},
        "fits": lambda value: "yes" if value else "no",
        "largest micro batch": lambda value: f"{value:,}" if value else "none",
        "model FLOPs a step": lambda value: f"{value:.3e}",
        "executed FLOPs a step": lambda value: f"{value:.3e}",
        "seconds a step": lambda value: f"{value:,.2f}",
        "samples a second": lambda value: f"{value:,.2f}",
        "MFU": lambda value: f"{value:.1%}",
    }
    labels = {
        **{name: f"{name}, GiB a device" for name in sizes},
        "fits": f"fits {args.memory_gib - RESERVED_GIB:g} of {args.memory_gib:g} GiB",
        "seconds a step": f"seconds a step at {args.utilization:.0%} of {args.peak_tflops:g} TFLOP/s",
    }
    lines = [
        "| devices | " + " | ".join(f"{row['devices']}" for row in rows) + " |",
        "| --- |" + " ---: |" * len(rows),
    ]
    for name, text in formats.items():
        lines.append(f"| {labels.get(name, name)} | " + " | ".join(text(row[name]) for row in rows) + " |")
    return "\n".join(lines)


CHECK_CONFIG = {
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "ffn_dim": 352,
    "text_embed_dim": 24,
    "text_embed_dim_2": 16,
    "text_embed_dim_3": 8,
    "max_grid_size": (4, 12, 12),
}
CHECK_ARGUMENTS = {
    "micro_batch_size": 3,
    "num_frames": 32,
    "height": 192,
    "width": 192,
    "text_lengths": [40, 20, 10],
    "kernels": "cpu",
}


@contextmanager
def count_kept_bytes(model: MovieGenTransformer3DModel) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Collects the storages that autograd keeps, without the weights and their copies in another dtype."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    # Copies are known by their shapes, which no activation of the models measured here has.
    shapes = {tuple(sorted(parameter.shape)) for parameter in model.parameters() if parameter.ndim > 1}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and tuple(sorted(tensor.shape)) not in shapes:
            # Holding the storage keeps its address from being given to another.
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def measure(args: Arguments) -> dict[str, tuple[float, float]]:
    """Pairs of what is computed and what a small model with random weights measures on the CPU."""
    torch.manual_seed(0)
    model = MovieGenTransformer3DModel(**CHECK_CONFIG)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    shape = Shape.of(model, args)
    computed = count_activations(shape, args)
    mixed = args.precision == "bf16"

    config = model.config
    frames = math.ceil(args.num_frames / TAE_COMPRESSION)
    height, width = args.height // TAE_COMPRESSION, args.width // TAE_COMPRESSION
    dtype = torch.bfloat16 if args.latents_dtype == "bf16" else torch.float32
    latents = torch.randn(shape.batch, config.in_channels, frames, height, width)
    inputs = {"hidden_states": latents.to(dtype), "timestep": torch.rand(shape.batch) * 1000}
    for suffix, length, text_dim in zip(("", "_2", "_3"), shape.text_lengths, shape.text_dims, strict=True):
        inputs[f"encoder_hidden_states{suffix}"] = torch.randn(shape.batch, length, text_dim)
    target = torch.randn_like(latents)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            prediction = model(**inputs, return_dict=False)[0]
        return F.mse_loss(prediction.float(), target)

    # 1. FLOPs. The counter does not know the CPU's fused attention, whose products are those of the GPU's.
    def attention(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(
        gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_, **__
    ) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    aten = torch.ops.aten
    attention_flops = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=attention_flops) as counter:
        loss().backward()
    flops = count_flops(shape, shape.tokens)
    recomputed = flops.blocks_forward if args.gradient_checkpointing else 0

    # 2. What autograd keeps. The gradients are there from now on, so that the next backward allocates none.
    with count_kept_bytes(model) as storages:
        kept_loss = loss()
    kept = sum(storage.nbytes() for storage in storages.values())
    storages.clear()
    del kept_loss

    # 3. The peak of all that the CPU's allocator hands out. Inputs and target are there before.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss().backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    in_blocks = sum(parameter.numel() for parameter in model.transformer_blocks.parameters())
    copied = parameters - in_blocks * (1 - 1 / shape.layers) if args.gradient_checkpointing else parameters
    inputs_held = sum(tensor.nbytes for tensor in (*inputs.values(), target) if not mixed or tensor is target)

    checkpointing = args.gradient_checkpointing
    return {
        "FLOPs": (flops.forward + flops.backward + recomputed, counter.get_total_flops()),
        "kept by autograd, bytes": (computed.kept(shape.layers, checkpointing), kept),
        "peak of forward and backward, bytes": (
            computed.peak(shape.layers, checkpointing) - inputs_held + (2 * copied if mixed else 0),
            peak,
        ),
    }


def check() -> dict[str, dict[str, tuple[float, float]]]:
    """Measurements of all precisions, with and without gradient checkpointing."""
    results = {}
    for precision, latents_dtype in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
        for checkpointing in (False, True):
            args = Arguments(
                precision=precision,
                latents_dtype=latents_dtype,
                gradient_checkpointing=checkpointing,
                **CHECK_ARGUMENTS,
            )
            name = f"{precision}, {latents_dtype} latents, {'' if checkpointing else 'no '}checkpointing"
            results[name] = measure(args)
    return results


def main(args: Arguments) -> None:
    if args.check:
        results = check()
        if args.json:
            print(json.dumps(results, indent=2))
            return
        print("| model | quantity | computed | measured | difference |\n| --- | --- | ---: | ---: | ---: |")
        for name, quantities in results.items():
            for quantity, (computed, measured) in quantities.items():
                difference = computed / measured - 1
                print(f"| {name} | {quantity} | {computed:,.0f} | {measured:,} | {difference:+.1%} |")
        return
    with torch.device("meta"):
        model = MovieGenTransformer3DModel.from_config(load_config(args.config))
    rows = [budget(model, args, num_devices) for num_devices in args.num_devices]
    if args.json:
        print(json.dumps({"arguments": asdict(args), "budgets": rows}, indent=2))
    else:
        print(format_budget(rows, args))


if __name__ == "__main__":
    try:
        main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
    except (OSError, ValueError) as error:
        print(f"training_budget.py: {error}", file=sys.stderr)
        sys.exit(2)
