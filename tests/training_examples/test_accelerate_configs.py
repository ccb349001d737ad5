import functools

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import StateDictType

from diffusers_moviegen.models.transformer_moviegen import MovieGenTransformer3DModel, MovieGenTransformerBlock
from tests.tiny import tiny_transformer
from tests.training_examples.accelerate_configs import CONFIGS, launch_arguments


NAMES = sorted(path.stem for path in CONFIGS.iterdir())


def test_shipped_configs():
    assert NAMES == ["deepspeed_zero3", "fsdp2", "one_gpu"]


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_knows_every_field(name):
    # Unknown fields at the top stop the loader; below, they would be ignored.
    arguments, config = launch_arguments(name)
    assert arguments.mixed_precision == "bf16"
    assert (CONFIGS / f"{name}.yaml").read_text().startswith("# ")
    actions = {action.dest: action for action in launch_command_parser()._actions}
    for field, value in {**config.fsdp_config, **config.deepspeed_config}.items():
        choices = actions[field].choices
        assert choices is None or str(value) in choices, field
        assert getattr(arguments, field) == value


def test_number_of_processes_can_be_overruled():
    assert [launch_arguments(name)[0].num_processes for name in NAMES] == [8, 8, 1]
    assert launch_arguments("fsdp2", "--num_processes", "2")[0].num_processes == 2


def test_one_gpu_starts_one_plain_process():
    arguments, _ = launch_arguments("one_gpu")
    assert not (arguments.multi_gpu or arguments.use_fsdp or arguments.use_deepspeed or arguments.use_cpu)


def test_fsdp2_shards_and_recomputes_the_blocks(monkeypatch):
    arguments, config = launch_arguments("fsdp2", "--main_process_port", "0")
    assert arguments.use_fsdp and not arguments.use_deepspeed
    assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",") == (
        MovieGenTransformer3DModel._no_split_modules
    )
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(tiny_transformer())
    assert isinstance(plugin.auto_wrap_policy, functools.partial)
    assert plugin.auto_wrap_policy.keywords == {"transformer_layer_cls": {MovieGenTransformerBlock}}
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.activation_checkpointing is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    plugin.set_mixed_precision(arguments.mixed_precision)
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16


def test_deepspeed_shards_the_weights(monkeypatch):
    arguments, config = launch_arguments("deepspeed_zero3", "--main_process_port", "0")
    assert arguments.use_deepspeed and not arguments.use_fsdp
    arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    for name, value in prepare_deepspeed_cmd_env(arguments)[1].items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.is_zero3_init_enabled() is False
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "none"
