"""What training needs from the engines that shard weights over processes."""

from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType


def prepare_sharding(accelerator: Accelerator) -> None:
    """Has FSDP2 hand the model its inputs as they are; to be called before `accelerator.prepare`.

    In mixed precision accelerate's policy would round them, timesteps included: 650.25 becomes 652 in bfloat16. It
    would also round what every block returns, and sum the gradients of all processes in that type. Forward passes then
    belong in `accelerator.autocast()`, which accelerate leaves to the caller under FSDP2. Without it nothing changes.

    Raises:
        ValueError: for DeepSpeed, which updates the weights before a loss can be refused, and for the first FSDP.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed cannot run this script: it updates the weights within the backward pass, before a loss that is "
            "not finite can be skipped; launch with accelerate_configs/fsdp2.yaml, which shards the same."
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise ValueError("fsdp_version is 1: set it to 2 in the configuration of accelerate.")
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )
