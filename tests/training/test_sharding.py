import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from diffusers_moviegen.training import prepare_sharding
from tests.training.fsdp_on_cpu import enable_fsdp_on_cpu


@pytest.fixture
def fsdp(monkeypatch):
    """Makes accelerators that shard; what they leave behind in the process is removed."""
    for name, value in {"ACCELERATE_USE_FSDP": "false", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)  # accelerate sets the first by itself

    def make(version: int, mixed_precision: str) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        enable_fsdp_on_cpu()
        plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
        return Accelerator(cpu=True, mixed_precision=mixed_precision, fsdp_plugin=plugin)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def test_inputs_stay_as_they_are(fsdp):
    accelerator = fsdp(2, "bf16")
    assert accelerator.state.fsdp_plugin.mixed_precision_policy.cast_forward_inputs
    prepare_sharding(accelerator)
    assert accelerator.state.fsdp_plugin.mixed_precision_policy == MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def test_nothing_to_do_in_float32(fsdp):
    accelerator = fsdp(2, "no")
    prepare_sharding(accelerator)
    assert accelerator.state.fsdp_plugin.mixed_precision_policy is None


def test_the_first_version_is_refused(fsdp):
    with pytest.raises(ValueError, match="fsdp_version is 1: set it to 2"):
        prepare_sharding(fsdp(1, "no"))


def test_deepspeed_is_refused():
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    prepare_sharding(accelerator)
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(ValueError, match="DeepSpeed cannot run this script: .*fsdp2.yaml"):
        prepare_sharding(accelerator)
    AcceleratorState._reset_state(reset_partial_state=True)
