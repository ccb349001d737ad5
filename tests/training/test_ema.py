"""Moving averages of weights: on one process, and on two that share (DDP) or shard (FSDP2) them."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from diffusers_moviegen.training import ShardedEMA
from tests.processes import run_processes
from tests.training.fsdp_on_cpu import enable_fsdp_on_cpu


PROCESSES = 2
TIMEOUT = 300  # in seconds; on a busy machine importing alone takes a minute
LAYOUTS = ("whole", "sharded")


def make_model(hidden: int = 5) -> torch.nn.Sequential:
    """Its first layer is frozen; the rows of the others cannot be shared out evenly."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4),
        torch.nn.Sequential(torch.nn.Linear(4, hidden), torch.nn.Tanh()),
        torch.nn.Linear(hidden, 3),
    )
    model[0].requires_grad_(False)
    return model


class Run:
    """A small training of averaged weights."""

    def __init__(self, decay: float = 0.9, model: torch.nn.Module | None = None, **accelerator_arguments):
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(cpu=True, **accelerator_arguments)
        model = make_model() if model is None else model
        trainable = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=0.05)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.ema = ShardedEMA(self.accelerator, self.model, decay)

    def step(self, number: int) -> None:
        inputs = torch.randn(PROCESSES, 6, 4, generator=torch.Generator().manual_seed(number))
        if self.accelerator.num_processes > 1:
            inputs = inputs[self.accelerator.process_index]
        self.accelerator.backward(self.model(inputs).square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step()

    def averages(self) -> dict[str, torch.Tensor]:
        with self.ema.applied():
            return self.weights()

    def weights(self) -> dict[str, torch.Tensor]:
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        return {
            name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
            for name, weight in named
        }


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float = 0) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)


def differ(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return any(not torch.allclose(first[name], second[name], rtol=0, atol=1e-3) for name in first)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict, dict]:
    """A checkpoint of one process after 3 steps, its averages then, and those after 3 more."""
    folder = tmp_path_factory.mktemp("one_process")
    run = Run()
    for number in range(3):
        run.step(number)
    run.accelerator.save_state(folder)
    saved = run.averages()
    for number in range(3, 6):
        run.step(number)
    return folder, saved, run.averages()


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_averages_are_those_of_diffusers(decay):
    run = Run(decay)
    reference = EMAModel(run.model.parameters(), decay=decay, use_ema_warmup=True, power=0.75)
    for number in range(8):
        run.step(number)
        reference.step(run.model.parameters())
        averages = run.averages()
        for average, expected in zip(averages.values(), reference.shadow_params, strict=True):
            torch.testing.assert_close(average, expected, rtol=0, atol=1e-6)
    assert run.ema.updates == 8
    assert differ(averages, run.weights())


def test_the_weights_come_back():
    run = Run()
    for number in range(3):
        run.step(number)
    before, inputs = run.weights(), torch.randn(2, 4)
    output = run.model(inputs)
    averages = run.averages()
    with pytest.raises(KeyboardInterrupt), run.ema.applied():
        assert not torch.equal(run.model(inputs), output)
        assert_equal(run.weights(), averages)
        raise KeyboardInterrupt
    assert_equal(run.weights(), before)
    assert torch.equal(run.model(inputs), output)
    assert_equal(run.averages(), averages)


def test_a_decay_of_zero_is_no_average(tmp_path):
    run = Run(decay=0)
    run.step(0)
    weights = run.weights()
    assert_equal(run.averages(), weights)
    run.accelerator.save_state(tmp_path)
    assert not (tmp_path / "ema.safetensors").exists()
    run.accelerator.load_state(tmp_path)


def test_frozen_weights_are_not_kept(trained):
    tensors = load_file(trained[0] / "ema.safetensors")
    assert sorted(tensors) == ["1.0.bias", "1.0.weight", "2.bias", "2.weight"]
    assert_equal(tensors, {name: trained[1][name] for name in tensors})
    with safe_open(trained[0] / "ema.safetensors", "pt") as file:
        assert file.metadata() == {"updates": "3"}


def test_a_restored_run_averages_on(trained):
    folder, saved, later = trained
    run = Run()
    run.step(7)
    run.accelerator.load_state(folder)
    assert run.ema.updates == 3
    assert_equal(run.averages(), saved)
    for number in range(3, 6):
        run.step(number)
    assert_equal(run.averages(), later)


@pytest.mark.parametrize("decay", [-0.1, 1])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=f"--ema_decay is {decay}: it must be at least 0.*below 1"):
        Run(decay)


def test_weights_too_coarse_to_average():
    with pytest.raises(ValueError, match="--ema_decay: '1.0.weight' is in torch.bfloat16.*--mixed_precision"):
        Run(model=make_model().bfloat16())
    frozen = make_model()
    frozen[0].bfloat16()
    Run(model=frozen)


def test_deepspeed_is_refused():
    run = Run()
    run.accelerator.state.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(ValueError, match="--ema_decay: .*DeepSpeed.*FSDP2"):
        ShardedEMA(run.accelerator, run.model, 0.9)
    assert ShardedEMA(run.accelerator, run.model, 0).updates == 0


def test_checkpoints_of_another_run(trained, tmp_path):
    without = Run(decay=0)
    without.accelerator.save_state(tmp_path)
    with pytest.raises(OSError, match=f"--ema_decay: '{tmp_path}' has no ema.safetensors; .* --ema_decay 0"):
        Run().accelerator.load_state(tmp_path)
    unfrozen = make_model()
    unfrozen.requires_grad_(True)
    with pytest.raises(ValueError, match="ema.safetensors' averages other weights: '0.bias' is not in it"):
        Run(model=unfrozen).accelerator.load_state(trained[0])
    frozen = make_model()
    frozen[2].requires_grad_(False)
    with pytest.raises(ValueError, match="ema.safetensors' averages other weights: '2.bias' is only in it"):
        Run(model=frozen).accelerator.load_state(trained[0])
    with pytest.raises(ValueError, match=r"another model: '1.0.weight' is \(5, 4\) there, \(6, 4\) here"):
        Run(model=make_model(6)).accelerator.load_state(trained[0])


def start_run(sharded: bool) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)
    if not sharded:
        return Run()
    enable_fsdp_on_cpu()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap="Sequential",
        activation_checkpointing=True,
    )
    return Run(fsdp_plugin=plugin)


def train_in_layout(sharded: bool, folder: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Averages after 3 steps, after 6, and after 6 with a restart between; what validation does to the weights."""
    run = start_run(sharded)
    assert run.accelerator.num_processes == PROCESSES
    assert all(isinstance(weight, DTensor) == sharded for weight in run.model.parameters())
    for number in range(3):
        run.step(number)
    run.accelerator.save_state(folder)
    results = {f"saved.{name}": value for name, value in run.averages().items()}

    inputs = torch.randn(2, 4, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        results["output_before"] = run.model(inputs)
        with run.ema.applied():
            results["output_averaged"] = run.model(inputs)
        results["output_after"] = run.model(inputs)

    for number in range(3, 6):
        run.step(number)
    results.update({f"later.{name}": value for name, value in run.averages().items()})

    restored = start_run(sharded)
    restored.step(7)
    restored.accelerator.load_state(folder)
    assert restored.ema.updates == 3
    for number in range(3, 6):
        restored.step(number)
    results.update({f"restored.{name}": value for name, value in restored.averages().items()})

    restored.ema._load([], str(checkpoint))
    results.update({f"loaded.{name}": value for name, value in restored.averages().items()})
    return results


def run_process(rank: int, folder: Path, checkpoint: Path) -> None:
    processes = str(PROCESSES)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    for layout in LAYOUTS:
        results = train_in_layout(layout == "sharded", folder / layout, checkpoint)
        save_file(
            {name: value.contiguous() for name, value in results.items()}, folder / f"{layout}-{rank}.safetensors"
        )


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, trained) -> Path:
    """The folder that both processes wrote; they start once, since starting them is what takes time."""
    folder = tmp_path_factory.mktemp("two_processes")
    run_processes(run_process, folder, trained[0], num_processes=PROCESSES, timeout=TIMEOUT)
    return folder


def load_results(folder: Path, layout: str, rank: int) -> dict[str, dict[str, torch.Tensor]]:
    results = {}
    for name, value in load_file(folder / f"{layout}-{rank}.safetensors").items():
        part, _, weight = name.partition(".")
        results.setdefault(part, {})[weight.replace("_checkpoint_wrapped_module.", "")] = value
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_average_as_one_does(layout, two_processes, trained):
    checkpoint, saved, later = trained
    for rank in range(PROCESSES):
        results = load_results(two_processes, layout, rank)
        assert_equal(results["saved"], saved, 1e-4)
        assert_equal(results["later"], later, 1e-4)
        assert_equal(results["restored"], results["later"])
        # A checkpoint of one process.
        assert_equal(results["loaded"], saved)
    written = load_file(two_processes / layout / "ema.safetensors")
    assert_equal(written, {name: results["saved"][name] for name in load_file(checkpoint / "ema.safetensors")})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_leaves_no_average_behind(layout, two_processes):
    # FSDP2 keeps the gathered weights of the outermost module after a forward pass without gradients.
    for rank in range(PROCESSES):
        results = load_results(two_processes, layout, rank)
        assert not torch.allclose(results["output_averaged"][""], results["output_before"][""], rtol=0, atol=1e-3)
        assert torch.equal(results["output_after"][""], results["output_before"][""])
