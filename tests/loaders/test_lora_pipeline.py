import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffusers_moviegen import MovieGenPipeline
from tests.tiny import tiny_pipeline


def generate(pipeline, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipeline("a red circle", num_inference_steps=2, generator=generator, output_type="pt", **kwargs).frames


def add_adapter(pipeline, seed=0, alpha=8, name="default"):
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    pipeline.transformer.add_adapter(config, name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in pipeline.transformer.named_parameters():
        if f".lora_B.{name}." in key:
            parameter.data.normal_(std=0.3, generator=generator)
    return config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a LoRA, the frames without it, and the frames with the adapter in memory."""
    folder = tmp_path_factory.mktemp("lora")
    pipeline = tiny_pipeline()
    without = generate(pipeline)
    config = add_adapter(pipeline)
    MovieGenPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    with_adapter = generate(pipeline)
    assert (with_adapter - without).abs().max() > 1e-3
    return folder, without, with_adapter


@pytest.mark.parametrize("source", ["folder", "file", "weight name", "state dict"])
def test_loaded_lora_is_the_adapter(saved, source):
    folder, _, with_adapter = saved
    file = folder / "pytorch_lora_weights.safetensors"
    pipeline = tiny_pipeline()
    if source == "folder":
        pipeline.load_lora_weights(folder)
    elif source == "file":
        pipeline.load_lora_weights(str(file))
    elif source == "weight name":
        pipeline.load_lora_weights(str(folder), weight_name=file.name)
    else:
        # Without the file's metadata alpha is the rank, half of what it was in training: scale it back.
        state_dict = load_file(file)
        copy = dict(state_dict)
        pipeline.load_lora_weights(state_dict, adapter_name="mine")
        assert state_dict.keys() == copy.keys()
        pipeline.set_adapters("mine", 2.0)
    torch.testing.assert_close(generate(pipeline), with_adapter, atol=1e-5, rtol=0)


def test_unload(saved):
    folder, without, with_adapter = saved
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(folder)
    assert not torch.allclose(generate(pipeline), without, atol=1e-3)
    pipeline.unload_lora_weights()
    assert torch.equal(generate(pipeline), without)
    assert not any("lora" in name for name, _ in pipeline.transformer.named_parameters())


def test_fuse_and_unfuse(saved):
    folder, without, with_adapter = saved
    pipeline = tiny_pipeline()
    weight = pipeline.transformer.transformer_blocks[0].attn1.to_q.weight.clone()
    pipeline.load_lora_weights(folder)

    pipeline.fuse_lora()
    assert not torch.equal(pipeline.transformer.transformer_blocks[0].attn1.to_q.base_layer.weight, weight)
    torch.testing.assert_close(generate(pipeline), with_adapter, atol=1e-5, rtol=0)
    assert pipeline.num_fused_loras == 1

    pipeline.unfuse_lora()
    assert pipeline.num_fused_loras == 0
    torch.testing.assert_close(generate(pipeline), with_adapter, atol=1e-5, rtol=0)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(generate(pipeline), without, atol=1e-5, rtol=0)


def test_scale(saved):
    folder, without, with_adapter = saved
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(folder, adapter_name="mine")
    assert torch.equal(generate(pipeline, attention_kwargs={"scale": 0.0}), without)
    half = generate(pipeline, attention_kwargs={"scale": 0.5})
    pipeline.set_adapters("mine", 0.5)
    torch.testing.assert_close(generate(pipeline), half, atol=1e-5, rtol=0)
    assert not torch.allclose(half, with_adapter, atol=1e-4)


def test_fuse_scale(saved):
    folder, _, _ = saved
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(folder)
    half = generate(pipeline, attention_kwargs={"scale": 0.5})
    pipeline.fuse_lora(components=["transformer"], lora_scale=0.5)
    torch.testing.assert_close(generate(pipeline), half, atol=1e-5, rtol=0)


def test_two_adapters(saved):
    folder, _, with_adapter = saved
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(folder, adapter_name="first")
    other = tiny_pipeline()
    add_adapter(other, seed=1)
    layers = {f"transformer.{key}": tensor for key, tensor in get_peft_model_state_dict(other.transformer).items()}
    pipeline.load_lora_weights(layers, adapter_name="second")
    assert pipeline.get_list_adapters() == {"transformer": ["first", "second"]}
    pipeline.set_adapters("first")
    torch.testing.assert_close(generate(pipeline), with_adapter, atol=1e-5, rtol=0)
    pipeline.set_adapters(["first", "second"], [1.0, 1.0])
    assert not torch.allclose(generate(pipeline), with_adapter, atol=1e-3)


def test_hotswap(saved):
    folder, _, with_adapter = saved
    pipeline = tiny_pipeline()
    other = tiny_pipeline()
    config = add_adapter(other, seed=1)
    layers = {f"transformer.{key}": tensor for key, tensor in get_peft_model_state_dict(other.transformer).items()}
    assert config.r == 4
    pipeline.load_lora_weights(layers, adapter_name="mine")
    pipeline.load_lora_weights(folder, adapter_name="mine", hotswap=True)
    torch.testing.assert_close(generate(pipeline), with_adapter, atol=1e-5, rtol=0)


def foreign_keys(state_dict):
    return {key.replace("transformer_blocks", "blocks"): tensor for key, tensor in state_dict.items()}


def kohya_keys(state_dict):
    return {f"lora_unet_{key.replace('.', '_')}": tensor for key, tensor in state_dict.items()}


def no_prefix(state_dict):
    return {key.removeprefix("transformer."): tensor for key, tensor in state_dict.items()}


@pytest.mark.parametrize("change", [foreign_keys, kohya_keys, no_prefix])
def test_keys_that_match_nothing_raise(saved, change):
    folder, without, _ = saved
    state_dict = change(load_file(folder / "pytorch_lora_weights.safetensors"))
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError) as error:
        pipeline.load_lora_weights(state_dict)
    message = str(error.value)
    assert message.startswith(f"{len(state_dict)} of {len(state_dict)} LoRA keys match nothing in the transformer (")
    assert next(iter(state_dict)) in message
    assert "\n" not in message
    assert torch.equal(generate(pipeline), without)


def test_keys_that_match_in_part_raise(saved, tmp_path):
    folder, without, _ = saved
    state_dict = load_file(folder / "pytorch_lora_weights.safetensors")
    total = len(state_dict)
    state_dict["transformer.transformer_blocks.7.attn1.to_q.lora_A.weight"] = torch.zeros(4, 32)
    save_file(state_dict, tmp_path / "lora.safetensors")
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match=rf"1 of {total + 1} LoRA keys .*transformer_blocks\.7\.attn1\.to_q\.lora_A"):
        pipeline.load_lora_weights(tmp_path)
    assert torch.equal(generate(pipeline), without)


def test_no_keys_raise(pipeline, tmp_path):
    with pytest.raises(ValueError, match="The LoRA holds no weights"):
        pipeline.load_lora_weights({})
    with pytest.raises(ValueError, match="`transformer_lora_layers` is empty"):
        pipeline.save_lora_weights(tmp_path, {})


def test_pickles_are_not_read(saved, tmp_path):
    state_dict = load_file(saved[0] / "pytorch_lora_weights.safetensors")
    torch.save(state_dict, tmp_path / "pytorch_lora_weights.bin")
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="`weight_name` must name a .safetensors file"):
        pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.bin")
    with pytest.raises(OSError, match="no file named pytorch_lora_weights.safetensors"):
        pipeline.load_lora_weights(tmp_path)
