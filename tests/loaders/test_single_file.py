import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import GGUFQuantizationConfig
from safetensors.torch import load_file, save_file

from diffusers_moviegen import (
    AutoencoderKLMovieGen,
    MovieGenPipeline,
    MovieGenTransformer3DModel,
    bundled_checkpoint,
)
from tests.hub_server import HubServer
from tests.tiny import tiny_pipeline, tiny_transformer, tiny_vae


WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELS = {"transformer": (MovieGenTransformer3DModel, tiny_transformer), "vae": (AutoencoderKLMovieGen, tiny_vae)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny transformer and a tiny autoencoder, each in the folder of its name."""
    folder = tmp_path_factory.mktemp("models")
    for name, (_, build) in MODELS.items():
        build().save_pretrained(folder / name)
    return folder


@pytest.fixture
def state_dict(folder):
    return load_file(folder / "transformer" / WEIGHTS)


def check_equal(model, expected):
    assert not model.training
    state_dict, expected_state_dict = model.state_dict(), expected.state_dict()
    assert state_dict.keys() == expected_state_dict.keys()
    for name, tensor in state_dict.items():
        assert tensor.dtype == expected_state_dict[name].dtype, name
        assert torch.equal(tensor, expected_state_dict[name]), name
    values, expected_values = (
        {name: value for name, value in json.loads(m.to_json_string()).items() if name != "_name_or_path"}
        for m in (model, expected)
    )
    assert values == expected_values


def refusal(error_class, model_class, *args, **kwargs) -> str:
    with pytest.raises(error_class) as error:
        model_class.from_single_file(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("given", ["file in its folder", "config", "subfolder", "state dict"])
def test_round_trip(folder, tmp_path, name, given):
    model_class, build = MODELS[name]
    file = folder / name / WEIGHTS
    if given == "file in its folder":
        model = model_class.from_single_file(file)
    elif given == "state dict":
        model = model_class.from_single_file(load_file(file), config=str(folder / name))
    else:
        merged = shutil.copy(file, tmp_path / "some name.safetensors")
        where = {"config": folder / name} if given == "config" else {"config": folder, "subfolder": name}
        model = model_class.from_single_file(str(merged), **where)
    assert type(model) is model_class
    check_equal(model, build().eval())


@pytest.mark.parametrize("name", MODELS)
def test_bundled_checkpoint_merged_into_one_file(tmp_path, name):
    model_class = MODELS[name][0]
    source = tmp_path / "shards"
    bundled = model_class.from_pretrained(Path(bundled_checkpoint()) / name, dtype=torch.bfloat16)
    bundled.save_pretrained(source, max_shard_size="5MB")
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 1
    state_dict = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    save_file(state_dict, tmp_path / "model.safetensors")
    model = model_class.from_single_file(tmp_path / "model.safetensors", config=source, dtype=torch.float32)
    check_equal(model, model_class.from_pretrained(source))


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_dtype_is_that_of_from_pretrained(folder, name, dtype, argument):
    model_class = MODELS[name][0]
    model = model_class.from_single_file(folder / name / WEIGHTS, **{argument: dtype})
    assert model.dtype == dtype
    check_equal(model, model_class.from_pretrained(folder / name, dtype=dtype))
    kept = {key for key, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert ("transformer_blocks.1.norm2.weight" in kept) == (name == "transformer")


def test_half_precision_file_is_loaded_as_float32(tmp_path):
    tiny_vae().to(torch.bfloat16).save_pretrained(tmp_path)
    check_equal(
        AutoencoderKLMovieGen.from_single_file(tmp_path / WEIGHTS), AutoencoderKLMovieGen.from_pretrained(tmp_path)
    )


def test_without_low_cpu_mem_usage(folder):
    model = AutoencoderKLMovieGen.from_single_file(
        folder / "vae" / WEIGHTS, low_cpu_mem_usage=False, disable_mmap=True
    )
    check_equal(model, tiny_vae())


def test_loaded_models_make_the_films_of_the_pipeline(folder, pipeline_folder):
    models = {name: model_class.from_single_file(folder / name / WEIGHTS) for name, (model_class, _) in MODELS.items()}
    pipeline = MovieGenPipeline.from_pretrained(pipeline_folder, **models)
    films = []
    for pipe in (pipeline, tiny_pipeline()):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        films.append(pipe("a circle", num_inference_steps=2, generator=generator, output_type="pt").frames)
    torch.testing.assert_close(*films, atol=1e-5, rtol=0)


def test_arguments_replace_values_of_the_config(folder):
    model = AutoencoderKLMovieGen.from_single_file(folder / "vae" / WEIGHTS, latents_std=[2.0] * 16)
    assert model.config.latents_std == [2.0] * 16
    assert model.config.latents_mean == tiny_vae().config.latents_mean
    message = refusal(ValueError, AutoencoderKLMovieGen, folder / "vae" / WEIGHTS, latent_channels=4)
    assert "has shape (32, 16, 3, 3) instead of (8, 16, 3, 3)" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "it lacks `norm_out.weight`."),
        ("two missing", "it lacks `norm_out.weight` and 1 more."),
        ("unexpected", "it also holds `extra`."),
        ("shape", "`proj_out.bias` has shape (63,) instead of (64,)."),
        ("other model", "it holds another model, with tensors such as `decoder."),
        ("empty", "it holds no tensors."),
    ],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_weights_that_do_not_fit_are_refused(folder, state_dict, tmp_path, change, words, low_cpu_mem_usage):
    if "missing" in change:
        del state_dict["norm_out.weight"]
        if change == "two missing":
            del state_dict["proj_out.bias"]
    elif change == "unexpected":
        state_dict["extra"] = torch.zeros(1)
    elif change == "shape":
        state_dict["proj_out.bias"] = torch.zeros(63)
    else:
        state_dict = load_file(folder / "vae" / WEIGHTS) if change == "other model" else {}
    file = tmp_path / "broken.safetensors"
    save_file(state_dict, file)
    config = folder / "transformer"
    message = refusal(ValueError, MovieGenTransformer3DModel, file, config=config, low_cpu_mem_usage=low_cpu_mem_usage)
    assert message.startswith(f"'{file}' does not fit the MovieGenTransformer3DModel that '{config}' describes: ")
    assert words in message


def test_another_configuration_is_refused(folder, state_dict, tmp_path):
    tiny = tiny_transformer()
    MovieGenTransformer3DModel(**{**tiny.config, "num_layers": 3}).save_config(tmp_path)
    message = refusal(ValueError, MovieGenTransformer3DModel, state_dict, config=tmp_path)
    assert message.startswith("The state dict does not fit")
    assert "it lacks `transformer_blocks.2." in message

    message = refusal(ValueError, MovieGenTransformer3DModel, state_dict, config=folder / "vae")
    assert "describes a AutoencoderKLMovieGen; pass the folder of a MovieGenTransformer3DModel" in message


def test_config_is_needed(folder, tmp_path):
    file = shutil.copy(folder / "transformer" / WEIGHTS, tmp_path / WEIGHTS)
    message = refusal(ValueError, MovieGenTransformer3DModel, file)
    assert "needs a `config`" in message and "this MovieGenTransformer3DModel" in message

    message = refusal(OSError, MovieGenTransformer3DModel, file, config=folder)
    assert f"`config` is '{folder}'" in message and "`subfolder`" in message
    message = refusal(OSError, MovieGenTransformer3DModel, file, config=tmp_path / "nowhere")
    assert "nowhere" in message
    (tmp_path / "config.json").write_text("{")
    message = refusal(OSError, MovieGenTransformer3DModel, file)
    assert "not a valid JSON" in message


def test_quantization_is_refused(folder):
    config = GGUFQuantizationConfig()
    message = refusal(ValueError, AutoencoderKLMovieGen, folder / "vae" / WEIGHTS, quantization_config=config)
    assert message.startswith("`quantization_config` is not supported")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "bin", "gguf", "safetensors"])
def test_nothing_is_unpickled(folder, tmp_path, suffix):
    file = tmp_path / f"model.{suffix}"
    file.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    error_class = OSError if suffix == "safetensors" else ValueError
    message = refusal(error_class, AutoencoderKLMovieGen, file, config=folder / "vae")
    assert str(file) in message
    assert not (tmp_path / "executed").exists()
    pickle.loads(file.read_bytes())
    assert (tmp_path / "executed").exists()


def test_no_such_file(folder, tmp_path):
    config = folder / "vae"
    message = refusal(OSError, AutoencoderKLMovieGen, tmp_path / "no.safetensors", config=config)
    assert message.startswith("There is no file")
    assert "is a folder" in refusal(OSError, AutoencoderKLMovieGen, folder / "vae", config=config)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((folder / "vae" / WEIGHTS).read_bytes()[:5000])
    assert str(damaged) in refusal(OSError, AutoencoderKLMovieGen, damaged, config=config)


def test_file_and_config_on_the_hub(folder, tmp_path):
    code = """
import sys
from diffusers_moviegen import AutoencoderKLMovieGen
address = "https://huggingface.co/user/tiny/blob/main/vae/diffusion_pytorch_model.safetensors"
model = AutoencoderKLMovieGen.from_single_file(address, config="user/tiny", subfolder="vae")
model.save_pretrained(sys.argv[1])
for arguments in ({}, {"config": "user/tiny"}, {"config": "user/other"}):
    try:
        AutoencoderKLMovieGen.from_single_file(address, **arguments)
    except (OSError, ValueError) as error:
        print(error)
"""
    with HubServer() as hub:
        hub.add_folder("user/tiny", folder)
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "vae")],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **hub.environment(tmp_path / "home")},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr
    check_equal(AutoencoderKLMovieGen.from_pretrained(tmp_path / "vae"), tiny_vae())
    without_config, without_subfolder, other = result.stdout.splitlines()
    assert "needs a `config`" in without_config
    assert "`config` is 'user/tiny'" in without_subfolder and "with `subfolder`" in without_subfolder
    assert "`config` is 'user/other'" in other
