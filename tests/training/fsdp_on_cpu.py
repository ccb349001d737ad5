"""Has accelerate shard on a CPU, where it would train with plain data parallelism without a word."""

from accelerate import PartialState
from accelerate.utils import DistributedType


def enable_fsdp_on_cpu() -> None:
    """To be called in each process before the `Accelerator` is made.

    accelerate looks for FSDP only among processes with accelerators. It is told that these are such processes; all
    else, gloo, the device and what it does once it has chosen FSDP, stays as it is.
    """
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
