"""Moving averages of weights that may be sharded over processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_canonicalize_names
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


FILE_NAME = "ema.safetensors"


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight, sharing its memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


class ShardedEMA:
    """Exponential moving average of the weights that a model trains, on the devices and in the shards they are in.

    The decay rises with the number of updates, `1 - (1 + updates) ** -0.75`, up to `decay`. Checkpoints of
    `accelerator` include the averages, whole and by name in `ema.safetensors`, so that any number of processes,
    sharded or not, resumes them.

    Args:
        accelerator: whose `save_state` and `load_state` are to save and load the averages.
        model: as `accelerator.prepare` returned it. Its trainable weights are in float32, which is what mixed
            precision keeps them in.
        decay: ceiling of the decay, 0 to below 1. With 0 there is no average: `step` does nothing, and `applied`
            leaves the weights alone.

    Raises:
        ValueError: if `decay` is out of range, if a trainable weight is not in float32, or if DeepSpeed holds the
            weights.
    """

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"--ema_decay is {decay}: it must be at least 0, which averages nothing, and below 1.")
        self.decay, self.updates = decay, 0
        self._accelerator = accelerator
        self._model = accelerator.unwrap_model(model, keep_torch_compile=False)
        self._weights, self._averages = {}, {}
        if decay == 0:
            return
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "--ema_decay: weights that DeepSpeed holds cannot be averaged; pass 0, or shard them with FSDP2."
            )
        # The names that they have without activation checkpointing and compilation.
        named_weights = fsdp2_canonicalize_names(dict(self._model.named_parameters()))
        for name, weight in named_weights.items():
            if not weight.requires_grad:
                continue
            if weight.dtype != torch.float32:
                raise ValueError(
                    f"--ema_decay: '{name}' is in {weight.dtype}, too coarse to average; load the model in float32 "
                    "and leave the rest to --mixed_precision, or pass 0."
                )
            self._weights[name] = weight
            self._averages[name] = weight.detach().clone()
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    @torch.no_grad()
    def step(self) -> None:
        """Takes the weights as they are now into the averages; to be called after every step of the optimizer."""
        if not self._averages:
            return
        decay = min(1 - (1 + self.updates) ** -0.75, self.decay)
        averages, weights = map(_local, self._averages.values()), map(_local, self._weights.values())
        torch._foreach_lerp_(list(averages), list(weights), 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the model has the averages as its weights; afterwards its own again.

        The two change places, so this takes no memory. Neither train nor save a checkpoint within it.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            weight, average = _local(weight), _local(self._averages[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        # Weights that a forward pass gathered and kept would be used again as they were.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _save(self, models: list[torch.nn.Module], weights: list[dict], output_dir: str) -> None:
        whole = {}
        for name, average in self._averages.items():
            if isinstance(average, DTensor):
                average = average.full_tensor()
            if self._accelerator.is_main_process:
                whole[name] = average.cpu().contiguous()
        if self._accelerator.is_main_process:
            save_file(whole, Path(output_dir) / FILE_NAME, metadata={"updates": str(self.updates)})

    @torch.no_grad()
    def _load(self, models: list[torch.nn.Module], input_dir: str) -> None:
        path = Path(input_dir) / FILE_NAME
        if not path.is_file():
            raise OSError(f"--ema_decay: '{input_dir}' has no {FILE_NAME}; resume that run with --ema_decay 0.")
        with safe_open(path, "pt") as file:
            saved = set(file.keys())
            if saved != set(self._averages):
                name = min(saved ^ set(self._averages))
                place = "only in it" if name in saved else "not in it"
                raise ValueError(
                    f"'{path}' averages other weights: '{name}' is {place}; resume the run that wrote it."
                )
            for name, average in self._averages.items():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(average.shape):
                    raise ValueError(
                        f"'{path}' is of another model: '{name}' is {shape} there, {tuple(average.shape)} here; "
                        "resume with the model options of that run, or start a new one."
                    )
                tensor = file.get_tensor(name).to(average.device)
                if isinstance(average, DTensor):
                    # Every process reads the file: none has to send anything.
                    tensor = distribute_tensor(tensor, average.device_mesh, average.placements, src_data_rank=None)
                _local(average).copy_(_local(tensor))
            self.updates = int(file.metadata()["updates"])
