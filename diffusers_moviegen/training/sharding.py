"""What training needs from the engines that spread it over processes."""

import time
from dataclasses import replace

import torch
import torch.distributed as dist
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


def end_training(accelerator: Accelerator) -> None:
    """Ends the trackers and the process group; the last call of a script.

    Unlike `accelerator.end_training` alone, it cannot hang on a CPU. There a thread of gloo takes hold of the
    interpreter to free the tensors of the last collective, and PyTorch waits for that thread with the interpreter held
    when it frees the model: whoever comes second waits for ever.
    """
    if dist.is_initialized():
        # Long enough for the thread to have had its turn.
        time.sleep(0.5)
    accelerator.end_training()
