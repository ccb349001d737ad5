"""Two processes on the CPU (gloo) compute what one does: sharded weights (FSDP2) and split sequences (Ulysses)."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from diffusers_moviegen.models.transformer_moviegen import MovieGenTransformer3DModel, MovieGenTransformerBlock
from tests.processes import run_processes
from tests.training_examples.accelerate_configs import launch_arguments


PROCESSES = 2
TIMEOUT = 600  # of all tests together in seconds; on a busy machine importing alone takes minutes
STEPS = 4
LATENTS = {"even": (2, 4, 6), "uneven": (3, 6, 10)}
TOKENS = {"even": 12, "uneven": 45}
SHARDINGS = ("fully_shard", "fully_shard_checkpointing", "fsdp2_config")


def make_model() -> MovieGenTransformer3DModel:
    torch.manual_seed(0)
    model = MovieGenTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=8,
        ffn_dim=48,
        freq_dim=16,
        text_embed_dim=10,
        text_embed_dim_2=9,
        text_embed_dim_3=7,
        max_grid_size=(3, 4, 5),
    )
    # An untrained transformer predicts zero and hides every mistake.
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def make_batch(size: tuple[int, int, int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Arguments of the model for a batch of four, with text masks, and the output to learn."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {
        "hidden_states": randn(4, 4, *size),
        "timestep": torch.tensor([987.65, 12.5, 400.0, 650.25]),
        "encoder_hidden_states": randn(4, 5, 10),
        "encoder_attention_mask": torch.rand(4, 5, generator=generator) > 0.4,
        "encoder_hidden_states_2": randn(4, 4, 9),
        "encoder_hidden_states_3": randn(4, 3, 7),
        # The half of the first process has no token for this encoder.
        "encoder_attention_mask_3": torch.tensor([[0, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 1]]).bool(),
    }
    return inputs, randn(4, 4, *size)


def flow_loss(model: torch.nn.Module, inputs: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return (model(**inputs).sample - target).square().mean()


def mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def optimise(model: torch.nn.Module, inputs: dict[str, torch.Tensor], target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and norm of the gradients of every step, and the averaged weights at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = EMAModel(model.parameters(), decay=0.9)
    losses, norms = [], []
    for _ in range(STEPS):
        loss = flow_loss(model, inputs, target)
        loss.backward()
        norms.append(full(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        losses.append(mean_over_processes(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
    averaged = torch.cat([full(parameter).flatten() for parameter in ema.shadow_params])
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), "averaged": averaged}


def shard_model(sharding: str, policy: MixedPrecisionPolicy | None = None) -> MovieGenTransformer3DModel:
    """A model sharded block by block; only `fsdp2_config` takes a `policy`."""
    model = make_model()
    if sharding == "fsdp2_config":
        # accelerate refuses FSDP on a CPU, so its functions run as `Accelerator.prepare` would run them.
        config = launch_arguments("fsdp2")[1].fsdp_config
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=config["fsdp_version"],
            auto_wrap_policy=config["fsdp_auto_wrap_policy"],
            transformer_cls_names_to_wrap=config["fsdp_transformer_layer_cls_to_wrap"],
            reshard_after_forward=config["fsdp_reshard_after_forward"],
            activation_checkpointing=config["fsdp_activation_checkpointing"],
            cpu_ram_efficient_loading=config["fsdp_cpu_ram_efficient_loading"],
            mixed_precision_policy=policy,
        )
        if policy is not None:
            plugin.set_mixed_precision("bf16")  # leaves the policy as it is
        parallelism = ParallelismConfig(dp_shard_size=PROCESSES)
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            parallelism_config=parallelism,
            torch_device_mesh=parallelism.build_device_mesh("cpu"),
            mixed_precision="no" if policy is None else "bf16",
            is_main_process=dist.get_rank() == 0,
        )
        plugin.set_auto_wrap_policy(model)
        assert plugin.activation_checkpointing
        return fsdp2_prepare_model(accelerator, fsdp2_apply_ac(accelerator, model))
    if sharding == "fully_shard_checkpointing":
        model.enable_gradient_checkpointing()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in list(model.modules()):
        if type(module).__name__ in MovieGenTransformer3DModel._no_split_modules:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_sharded(rank: int, sharding: str) -> dict[str, torch.Tensor]:
    model = shard_model(sharding)
    inputs, target = make_batch(LATENTS["even"])
    part = slice(2 * rank, 2 * rank + 2)
    results = optimise(model, {name: value[part] for name, value in inputs.items()}, target[part])
    parameters = dict(model.named_parameters())
    blocks = [module for module in model.modules() if isinstance(module, MovieGenTransformerBlock)]
    results["whole_parameters"] = torch.tensor(sum(not isinstance(p, DTensor) for p in parameters.values()))
    results["local_weights"] = torch.tensor(sum(p.to_local().numel() for p in parameters.values()))
    results["sharded_blocks"] = torch.tensor(sum(isinstance(block, FSDPModule) for block in blocks))
    return results


def predict_in_bf16() -> dict[str, torch.Tensor]:
    """Output in mixed precision with the policy that training_examples/README.md recommends."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    model = shard_model("fsdp2_config", policy)
    timesteps = []
    model.time_proj.register_forward_pre_hook(lambda module, args: timesteps.append(args[0]))
    inputs, target = make_batch(LATENTS["even"])
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs).sample
    (output.float() - target).square().mean().backward()
    gradients = torch.cat([full(parameter.grad).flatten() for parameter in model.parameters()])
    return {"bf16.timesteps": timesteps[0], "bf16.output": output.detach().float(), "bf16.gradients": gradients}


def split_sequence(rank: int, length: str, checkpointing: bool) -> dict[str, torch.Tensor]:
    """Output and gradients, summed over the processes, of a model whose tokens are split over the processes."""
    model = make_model()
    if checkpointing:
        model.enable_gradient_checkpointing()
    # As `enable_parallelism` does, which needs an accelerator.
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=PROCESSES))
    mesh = init_device_mesh("cpu", (1, PROCESSES), mesh_dim_names=("ring", "ulysses"))
    config.setup(rank, PROCESSES, torch.device("cpu"), mesh=mesh)
    model._parallel_config = config
    for processor in model.attn_processors.values():
        processor._parallel_config = config
    apply_context_parallel(model, config.context_parallel_config, model._cp_plan)

    local_tokens = []
    model.norm_out.register_forward_pre_hook(lambda module, args: local_tokens.append(args[0].shape[1]))
    inputs, target = make_batch(LATENTS[length])
    with torch.no_grad():
        results = {"output": model(**inputs).sample}
    flow_loss(model, inputs, target).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    results["own_gradients"] = gradients.clone()
    dist.all_reduce(gradients)
    return {**results, "gradients": gradients, "local_tokens": torch.tensor(local_tokens)}


def run_process(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    results = {}
    for sharding in SHARDINGS:
        results.update({f"{sharding}.{key}": value for key, value in train_sharded(rank, sharding).items()})
    results.update(predict_in_bf16())
    for length in LATENTS:
        for checkpointing in (False, True):
            for key, value in split_sequence(rank, length, checkpointing).items():
                results[f"{length}.{checkpointing}.{key}"] = value
    save_file({name: value.contiguous() for name, value in results.items()}, folder / f"{rank}.safetensors")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The results of both processes, which start once for all tests, since starting them is what takes time."""
    folder = tmp_path_factory.mktemp("two_processes")
    run_processes(run_process, folder, num_processes=PROCESSES, timeout=TIMEOUT)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def one_process():
    return optimise(make_model(), *make_batch(LATENTS["even"]))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_sharded_training_equals_one_process(sharding, two_processes, one_process):
    assert one_process["losses"][-1] < 0.9 * one_process["losses"][0]
    for results in two_processes:
        for key in ("losses", "norms"):
            torch.testing.assert_close(results[f"{sharding}.{key}"], one_process[key], rtol=0, atol=1e-5)
        # AdamW divides by the gradients' size, which makes much of rounding where they are nearly zero.
        torch.testing.assert_close(results[f"{sharding}.averaged"], one_process["averaged"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_every_weight_is_sharded(sharding, two_processes):
    model = make_model()
    total = sum(parameter.numel() for parameter in model.parameters())
    for results in two_processes:
        assert results[f"{sharding}.whole_parameters"] == 0
        assert results[f"{sharding}.sharded_blocks"] == len(model.transformer_blocks)
        # Rows are sharded, so a process holds up to one row more than half of each weight.
        assert results[f"{sharding}.local_weights"] < 0.55 * total
    assert sum(results[f"{sharding}.local_weights"] for results in two_processes) == total


def test_sharded_bf16_keeps_the_times_exact(two_processes):
    # accelerate's own policy rounds 987.65 to 988 and 650.25 to 652, and the output is far from that of one process.
    model = make_model()
    inputs, target = make_batch(LATENTS["even"])
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs).sample.float()
    (output - target).square().mean().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    for results in two_processes:
        assert torch.equal(results["bf16.timesteps"], inputs["timestep"])
        torch.testing.assert_close(results["bf16.output"], output, rtol=0, atol=1e-2)
        assert (results["bf16.gradients"] - gradients).norm() < 1e-2 * gradients.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("length", LATENTS)
def test_split_sequence_equals_one_process(length, checkpointing, two_processes):
    model = make_model()
    inputs, target = make_batch(LATENTS[length])
    with torch.no_grad():
        output = model(**inputs).sample
    flow_loss(model, inputs, target).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    prefix = f"{length}.{checkpointing}"
    for results in two_processes:
        torch.testing.assert_close(results[f"{prefix}.output"], output, rtol=0, atol=1e-5)
        torch.testing.assert_close(results[f"{prefix}.gradients"], gradients, rtol=0, atol=1e-5)
        # Each process has its part of the tokens, and its gradients alone are not the whole.
        assert set(results[f"{prefix}.local_tokens"].tolist()) == {-(-TOKENS[length] // PROCESSES)}
        assert (results[f"{prefix}.own_gradients"] - gradients).abs().max() > 1e-3
