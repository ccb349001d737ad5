"""Optimizers and schedules as the options of the training scripts name them."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .lr_schedules import HalveOnPlateau
from .muon import Muon


def make_optimizer(
    accelerator: Accelerator, args: Any, model: torch.nn.Module, betas: tuple[float, float] = (0.9, 0.95)
) -> Optimizer:
    """AdamW or Muon, as `--optimizer` says, for the weights of `model` that learn.

    Raises:
        ValueError: for Muon under FSDP.
    """
    options = {"lr": args.learning_rate, "betas": betas, "weight_decay": args.weight_decay}
    if args.optimizer == "adamw":
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        return torch.optim.AdamW(weights, **options, fused=True)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("--optimizer muon needs whole weights, which FSDP shards out: use adamw, or --multi_gpu.")
    return Muon(model, **options)


def make_lr_scheduler(args: Any, optimizer: Optimizer) -> tuple[LambdaLR, HalveOnPlateau | None]:
    """The schedule that `--lr_scheduler` names: one of diffusers, or `halve_on_plateau`.

    Returns:
        The scheduler, and for `halve_on_plateau` what it calls, which has to be told validation losses.
    """
    if args.lr_scheduler == "halve_on_plateau":
        min_factor = args.min_learning_rate / args.learning_rate if args.learning_rate else 0.0
        plateau = HalveOnPlateau(args.lr_warmup_steps, args.lr_patience, min_factor)
        return LambdaLR(optimizer, plateau), plateau
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    return lr_scheduler, None
