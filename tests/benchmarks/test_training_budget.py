"""The script that computes memory, FLOPs and time of training, against measurements and closed forms."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from transformers import HfArgumentParser

from diffusers_moviegen import MovieGenTransformer3DModel
from tests.training_examples.scripts import ROOT, load_script


SCRIPT = load_script("training_budget", "benchmarks")
GUIDE = ROOT / "docs" / "scaling.md"


@pytest.fixture(scope="module")
def small_model():
    return MovieGenTransformer3DModel(**SCRIPT.CHECK_CONFIG)


def arguments(**options):
    return SCRIPT.Arguments(**{**SCRIPT.CHECK_ARGUMENTS, **options})


@pytest.fixture(scope="module")
def measurements():
    return SCRIPT.check()


def test_formulas_equal_measurements_on_the_cpu(measurements):
    assert len(measurements) == 6
    for quantities in measurements.values():
        for name in ("FLOPs", "kept by autograd, bytes"):
            computed, measured = quantities[name]
            assert computed == measured > 0
        computed, measured = quantities["peak of forward and backward, bytes"]
        assert computed == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_formulas_hold_for_another_shape(checkpointing):
    results = SCRIPT.measure(
        arguments(
            num_frames=1,
            height=128,
            micro_batch_size=5,
            text_lengths=[3, 30, 11],
            precision="bf16",
            gradient_checkpointing=checkpointing,
        )
    )
    for name in ("FLOPs", "kept by autograd, bytes"):
        computed, measured = results[name]
        assert computed == measured


class FusedRMSNorm(torch.autograd.Function):
    """Keeps what PyTorch's CUDA kernel keeps; its gradient is not needed here."""

    @staticmethod
    def forward(ctx, hidden_states, weight, eps):
        reciprocal_root = (hidden_states.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(hidden_states, weight, reciprocal_root)
        return hidden_states * reciprocal_root * weight

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None


@pytest.mark.parametrize("precision, latents_dtype", [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_what_cuda_kernels_keep(small_model, monkeypatch, precision, latents_dtype):
    # The two differences to the CPU, imitated: the fused norm, and autocast's rule for addcmul.
    addcmul = torch.addcmul
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight, eps))
    monkeypatch.setattr(torch, "addcmul", lambda *tensors: addcmul(*(tensor.float() for tensor in tensors)))
    args = arguments(kernels="cuda", precision=precision, latents_dtype=latents_dtype, gradient_checkpointing=False)
    latents = torch.randn(3, 16, 4, 24, 24, dtype=torch.bfloat16 if latents_dtype == "bf16" else torch.float32)
    text = {
        f"encoder_hidden_states{suffix}": torch.randn(3, length, dim)
        for suffix, length, dim in (("", 40, 24), ("_2", 20, 16), ("_3", 10, 8))
    }
    with SCRIPT.count_kept_bytes(small_model) as storages:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            sample = small_model(latents, torch.rand(3), **text).sample
        loss = F.mse_loss(sample.float(), torch.zeros(3, 16, 4, 24, 24))
    measured = sum(storage.nbytes() for storage in storages.values())
    shape = SCRIPT.Shape.of(small_model, args)
    assert SCRIPT.count_activations(shape, args).kept(4, False) == measured
    assert loss.requires_grad


def test_context_parallelism_divides_the_tokens_and_repeats_the_rest(small_model):
    args = arguments(kernels="cuda", context_parallel=4, num_devices=[4])
    alone = arguments(kernels="cuda")
    shape = SCRIPT.Shape.of(small_model, args)
    whole, quarter = SCRIPT.count_flops(shape, 576), SCRIPT.count_flops(shape, 144)
    text, dim, layers = 3 * 70, 128, 4
    repeated = layers * 2 * 2 * text * dim * dim  # keys and values of the cross-attention
    repeated += 2 * 3 * dim * (40 * 24 + 20 * 16 + 10 * 8)  # projections of the text
    repeated += 2 * 3 * dim * (256 + 7 * dim)  # time
    assert 4 * quarter.forward - whole.forward == 3 * repeated

    activations, reference = SCRIPT.count_activations(shape, args), SCRIPT.count_activations(shape, alone)
    text_keys_and_values = 2 * 2 * text * dim
    modulation = 4 * 3 * 8 * dim
    second_output = 2 * 3 * 576 * dim  # on both sides of the all-to-all
    fixed = text_keys_and_values + modulation
    assert 4 * (activations.block - fixed) == reference.block - fixed + second_output
    assert 4 * activations.checkpoint == reference.checkpoint


def test_state_equals_what_optimizer_and_ema_hold(small_model):
    args = arguments(precision="fp32")
    state = SCRIPT.count_state(small_model, args, num_devices=1)
    model = MovieGenTransformer3DModel(**SCRIPT.CHECK_CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    moments = [tensor for values in optimizer.state.values() for name, tensor in values.items() if name != "step"]
    assert state["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    assert state["gradients"] == sum(parameter.grad.nbytes for parameter in model.parameters())
    assert state["optimizer"] == sum(tensor.nbytes for tensor in moments)
    assert state["EMA"] == sum(tensor.nbytes for tensor in EMAModel(model.parameters()).shadow_params)
    assert state["copies of weights"] == state["communication"] == 0


# Bytes of a parameter on 8 devices, in bf16: whole (times 1) and sharded (over 8) parts.
@pytest.mark.parametrize(
    "options, expected",
    [
        ({"sharding": "none"}, {"weights": 4, "gradients": 4, "optimizer": 8, "EMA": 4, "communication": 4}),
        ({"sharding": "zero1"}, {"weights": 2, "gradients": 2, "optimizer": 12 / 8, "EMA": 4}),
        ({"sharding": "zero2"}, {"weights": 2, "gradients": 2 / 8, "optimizer": 12 / 8, "EMA": 4}),
        ({"sharding": "zero3"}, {"weights": 4 / 8, "gradients": 4 / 8, "optimizer": 8 / 8, "EMA": 4 / 8}),
        ({"sharding": "zero3", "optimizer": "adamw8bit", "ema": False}, {"optimizer": 2.03125 / 8, "EMA": 0}),
        ({"sharding": "zero1", "precision": "fp32"}, {"weights": 4, "gradients": 4, "optimizer": 1}),
    ],
)
def test_state_of_layouts(small_model, options, expected):
    state = SCRIPT.count_state(small_model, arguments(**options), num_devices=8)
    parameters = sum(parameter.numel() for parameter in small_model.parameters())
    assert {name: state[name] / parameters for name in expected} == pytest.approx(expected)


def run(capsys, command: str) -> str:
    SCRIPT.main(HfArgumentParser(SCRIPT.Arguments).parse_args_into_dataclasses(shlex.split(command))[0])
    return capsys.readouterr().out


def test_parameters_and_relations_of_the_json_output(capsys):
    command = (
        "--config 30b --num_devices 64 512 --sharding zero3 --context_parallel 8 --utilization 0.5 "
        "--gradient_accumulation_steps 3 --micro_batch_size 2 --json"
    )
    output = json.loads(run(capsys, command))
    assert output["arguments"]["latents_dtype"] == "bf16"
    dim, ffn_dim, layers = 6144, 16384, 48
    block = 8 * dim * dim + 3 * dim * ffn_dim + (3 + 6) * dim
    patch = 16 * 4
    outside = (patch + 1) * dim + (32 + 96 + 96) * dim + (256 + 1) * dim + (dim + 1) * 7 * dim
    outside += (4096 + 1280 + 1472 + 3 * 3) * dim + dim + 2 * dim + (dim + 1) * patch
    for budget, devices in zip(output["budgets"], (64, 512), strict=True):
        assert budget["parameters"] == layers * block + outside
        assert budget["tokens of a sample"] == 73728
        assert budget["samples a step"] == 2 * 3 * devices // 8
        assert budget["seconds a step"] * 0.5 * 989e12 * devices == pytest.approx(budget["executed FLOPs a step"])
        assert budget["MFU"] / 0.5 == pytest.approx(budget["model FLOPs a step"] / budget["executed FLOPs a step"])
        parts = ("weights", "copies of weights", "gradients", "optimizer", "EMA", "communication", "activations")
        assert budget["total"] == pytest.approx(sum(budget[name] for name in parts))


def test_global_batch_size_takes_the_largest_micro_batch_that_fits():
    with torch.device("meta"):
        model = MovieGenTransformer3DModel.from_config(SCRIPT.load_config("1b"))
    args = SCRIPT.Arguments(config="1b", sharding="zero3", num_devices=[16], height=256, width=256)
    limit = SCRIPT.budget(model, args, 16)["largest micro batch"]
    sizes = [SCRIPT.budget(model, replace(args, micro_batch_size=limit + more), 16) for more in (0, 1)]
    assert [size["fits"] for size in sizes] == [True, False]
    assert [size["total"] <= 72 * 2**30 for size in sizes] == [True, False]
    row = SCRIPT.budget(model, replace(args, global_batch_size=16 * limit * 6), 16)
    assert (row["micro batch"], row["accumulation"]) == (limit, 6)
    # Nothing larger than 1 divides a prime.
    row = SCRIPT.budget(model, replace(args, global_batch_size=16 * 10007), 16)
    assert (row["micro batch"], row["accumulation"], row["samples a step"]) == (1, 10007, 160112)
    row = SCRIPT.budget(model, replace(args, memory_gib=9), 16)
    assert (row["fits"], row["largest micro batch"]) == (False, 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_devices": [12], "context_parallel": 8}, "--num_devices 12 .* --context_parallel 8"),
        ({"num_devices": [0]}, "--num_devices 0"),
        ({"micro_batch_size": 0}, "--micro_batch_size is 0"),
        ({"precision": "fp32", "latents_dtype": "bf16"}, "--latents_dtype bf16"),
        ({"global_batch_size": 8, "micro_batch_size": 2}, "pass either"),
        ({"global_batch_size": 9, "num_devices": [2]}, "--global_batch_size 9 .* 2"),
        ({"text_lengths": [1, 2]}, "--text_lengths"),
        ({"utilization": 0.0}, "--utilization"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SCRIPT.Arguments(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"height": 100}, "--height is 100"),
        ({"height": 200}, "do not divide"),
        ({"num_frames": 41}, "6 x 12 x 12 patches exceeds .* 4 x 12 x 12"),
        ({"context_parallel": 3, "num_devices": [3]}, "--context_parallel 3 does not divide .* 4 heads"),
    ],
)
def test_refused_sizes(small_model, options, message):
    with pytest.raises(ValueError, match=message):
        SCRIPT.budget(small_model, arguments(**options), 3)


def test_configs(tmp_path, small_model, capsys):
    small_model.save_config(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert SCRIPT.load_config(str(path))["num_layers"] == 4
    command = f"--config {tmp_path} --num_frames 32 --height 192 --width 192 --json"
    (row,) = json.loads(run(capsys, command))["budgets"]
    assert row["parameters"] == sum(parameter.numel() for parameter in small_model.parameters())
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(OSError, match="holds a AutoencoderKL"):
        SCRIPT.load_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(OSError, match="no model config"):
        SCRIPT.load_config(str(tmp_path))


def test_a_mistake_ends_in_one_line():
    command = [sys.executable, str(ROOT / "benchmarks" / "training_budget.py"), "--config", "7b"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        "training_budget.py: --config: there is no '7b'; pass one of 1b, 30b, 5b, a model folder or a config.json.\n"
    )


def test_tables_of_the_guide_are_the_outputs_of_its_commands(capsys, monkeypatch, measurements):
    text = GUIDE.read_text(encoding="utf-8")
    parts = re.findall(
        r"```bash\npython benchmarks/training_budget\.py (.*?)\n```\n\n(\|.*?\n)(?!\|)", text, re.DOTALL
    )
    assert len(parts) == text.count("python benchmarks/training_budget.py") > 5
    monkeypatch.setattr(SCRIPT, "check", lambda: measurements)
    for command, table in parts:
        printed = run(capsys, command.replace("\\\n", " "))
        if command == "--check":
            # The allocator's peak differs between versions of PyTorch.
            printed, table = (re.sub(r"(\| peak [^|]*\| [\d,]+) .*", r"\1", part) for part in (printed, table))
        assert printed == table, command


def test_summary_of_the_guide_repeats_its_tables():
    text = GUIDE.read_text(encoding="utf-8")
    micro_batches, accumulations = (
        [cell.strip() for row in re.findall(rf"^\| {name} \|(.*)\|$", text, re.MULTILINE) for cell in row.split("|")]
        for name in ("micro batch", "accumulation")
    )
    summary = re.findall(r"\| (\d+) x (\d+)(?= \|)", text)
    assert len(summary) == 9
    assert set(summary) <= set(zip(micro_batches, accumulations, strict=True))


@pytest.mark.parametrize(
    "precision, latents_dtype, per_dim, per_ffn_dim",
    [("bf16", "bf16", 46, 8), ("bf16", "fp32", 52, 8), ("fp32", "fp32", 64, 16)],
)
def test_bytes_a_token_that_the_guide_states(small_model, precision, latents_dtype, per_dim, per_ffn_dim):
    args = arguments(kernels="cuda", precision=precision, latents_dtype=latents_dtype)
    shape = SCRIPT.Shape.of(small_model, args)
    larger = replace(shape, tokens=shape.tokens + 1)
    activations, more = SCRIPT.count_activations(shape, args), SCRIPT.count_activations(larger, args)
    a_token = (more.block - activations.block) / shape.batch
    assert a_token == per_dim * shape.dim + per_ffn_dim * shape.ffn_dim + 12 + 8 * shape.heads
    assert f"**{per_dim} d + {per_ffn_dim} f**" in GUIDE.read_text(encoding="utf-8")


def test_the_guide_names_existing_files():
    for path in re.findall(r"\]\(([^)#]+)\)", GUIDE.read_text(encoding="utf-8")):
        assert path.startswith("http") or (GUIDE.parent / Path(path)).exists(), path
