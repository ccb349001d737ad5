import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.hooks._helpers import AttentionProcessorRegistry, TransformerBlockRegistry
from diffusers.pipelines import pipeline_loading_utils

import diffusers_moviegen
from diffusers_moviegen import MovieGenPipeline
from diffusers_moviegen.registration import PUBLIC_CLASSES, register_with_diffusers
from tests.hub_server import HubServer
from tests.tiny import tiny_pipeline


REPOSITORY = Path(__file__).resolve().parent.parent


def generate(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline('a red "HI"', num_inference_steps=2, generator=generator, output_type="pt").frames


def run_python(code, *arguments, **environment):
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONWARNINGS": "error::FutureWarning",
        **environment,
    }
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_pipeline_model_and_scheduler_is_registered():
    bases = (diffusers.ModelMixin, diffusers.SchedulerMixin, diffusers.DiffusionPipeline)
    own = {
        value
        for value in vars(diffusers_moviegen).values()
        if isinstance(value, type) and issubclass(value, bases) and value not in bases
    }
    assert own == set(PUBLIC_CLASSES)
    assert {getattr(diffusers, public_class.__name__) for public_class in own} == own
    assert set(diffusers_moviegen.__all__) >= {public_class.__name__ for public_class in own}


def test_registration_is_idempotent():
    def state():
        return (
            {name: dict(value) for name, value in pipeline_loading_utils.LOADABLE_CLASSES.items()},
            dict(pipeline_loading_utils.ALL_IMPORTABLE_CLASSES),
            set(TransformerBlockRegistry._registry),
            set(AttentionProcessorRegistry._registry),
            {name: vars(diffusers)[name] for name in sorted(vars(diffusers))},
        )

    before = state()
    register_with_diffusers()
    assert state() == before
    assert "diffusers_moviegen" in before[0]


def test_model_index_names_the_package(pipeline_folder):
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    assert index["_class_name"] == "MovieGenPipeline"
    assert index["transformer"] == ["diffusers_moviegen", "MovieGenTransformer3DModel"]
    assert index["vae"] == ["diffusers_moviegen", "AutoencoderKLMovieGen"]
    assert index["scheduler"] == ["diffusers_moviegen", "FlowMatchLinearQuadraticScheduler"]
    assert index["default_num_frames"] == 9


def test_file_listing_check_of_downloads_accepts_the_model_index(pipeline_folder):
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    filenames = [str(file.relative_to(pipeline_folder)) for file in pipeline_folder.rglob("*") if file.is_file()]
    custom_components, folders = pipeline_loading_utils._get_custom_components_and_folders(
        "user/name", index, filenames
    )
    assert custom_components == {}
    assert set(folders) == set(tiny_pipeline().components)


@pytest.mark.parametrize("pipeline_class", [MovieGenPipeline, diffusers.DiffusionPipeline])
def test_round_trip(pipeline_class, pipeline_folder, tmp_path):
    original = tiny_pipeline()
    loaded = pipeline_class.from_pretrained(pipeline_folder)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is MovieGenPipeline
    for name, component in original.components.items():
        other = getattr(loaded, name)
        assert type(other) is type(component)
        if isinstance(component, torch.nn.Module):
            state_dict, other_state_dict = component.state_dict(), other.state_dict()
            assert state_dict.keys() == other_state_dict.keys()
            assert all(torch.equal(state_dict[key], other_state_dict[key]) for key in state_dict)
            assert not other.training
    ignored = ("_name_or_path", "_class_name")
    assert {k: v for k, v in loaded.config.items() if k not in ignored} == {
        k: v for k, v in original.config.items() if k not in ignored
    }
    # Tensors in a file are aligned in memory in another way, which changes the order of sums.
    torch.testing.assert_close(generate(loaded), generate(original), atol=1e-5, rtol=0)

    loaded.save_pretrained(tmp_path)
    again = pipeline_class.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(generate(again), generate(loaded))


def test_save_without_text_encoders(tmp_path):
    nothing = dict.fromkeys(MovieGenPipeline._optional_components)
    pipeline = tiny_pipeline(**nothing)
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert all(getattr(loaded, name) is None for name in nothing)
    embeds = tiny_pipeline().encode_prompt('a red "HI"')
    generator = torch.Generator().manual_seed(0)
    frames = loaded(**embeds, num_inference_steps=2, generator=generator, output_type="pt").frames
    torch.testing.assert_close(frames, generate(tiny_pipeline()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_auto_model(pipeline_folder, name):
    component = getattr(tiny_pipeline(), name)
    for model in (
        diffusers.AutoModel.from_pretrained(str(pipeline_folder), subfolder=name),
        diffusers.AutoModel.from_pretrained(str(pipeline_folder / name)),
    ):
        assert type(model) is type(component)
        state_dict, expected = model.state_dict(), component.state_dict()
        assert all(torch.equal(state_dict[key], expected[key]) for key in expected)


def test_bfloat16_folder(tmp_path):
    tiny_pipeline().to(torch.bfloat16).save_pretrained(tmp_path)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.dtype == torch.float32
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    assert {encoder.dtype for encoder in encoders} == {torch.bfloat16}
    embeds = pipeline.encode_prompt('a red "HI"')
    features = [tensor for name, tensor in embeds.items() if "mask" not in name]
    assert len(features) == 6 and {tensor.dtype for tensor in features} == {torch.float32}
    assert generate(pipeline).dtype == torch.float32

    half = MovieGenPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    assert generate(half).isfinite().all()


def test_import_is_all_it_takes_and_needs_neither_av_nor_datasets(pipeline_folder):
    code = """
import sys
sys.modules["av"] = sys.modules["datasets"] = None
import diffusers_moviegen
import diffusers
folder = sys.argv[1]
print(type(diffusers.AutoModel.from_pretrained(folder, subfolder="transformer")).__name__)
print(type(diffusers.AutoModel.from_pretrained(folder + "/vae")).__name__)
for pipeline_class in (diffusers.DiffusionPipeline, diffusers.MovieGenPipeline):
    pipeline = pipeline_class.from_pretrained(folder)
    print(type(pipeline).__name__, pipeline("a circle", num_inference_steps=1, output_type="np").frames.shape)
"""
    printed = run_python(code, pipeline_folder).splitlines()
    assert printed == [
        "MovieGenTransformer3DModel",
        "AutoencoderKLMovieGen",
        "MovieGenPipeline (1, 9, 32, 48, 3)",
        "MovieGenPipeline (1, 9, 32, 48, 3)",
    ]


def test_layer_skip(pipeline):
    expected = generate(pipeline)
    apply_layer_skip(pipeline.transformer, LayerSkipConfig([1], "transformer_blocks", skip_ff=False))
    skipped = generate(pipeline)
    assert skipped.isfinite().all()
    assert not torch.allclose(skipped, expected, atol=1e-4)


def test_download_from_the_hub(pipeline_folder, tmp_path):
    code = """
import sys
import diffusers_moviegen, diffusers
for pipeline_class in (diffusers.DiffusionPipeline, diffusers_moviegen.MovieGenPipeline):
    pipeline = pipeline_class.from_pretrained("user/tiny-moviegen")
    print(type(pipeline).__name__, pipeline("a circle", num_inference_steps=1, output_type="np").frames.shape)
print(type(diffusers.AutoModel.from_pretrained("user/tiny-moviegen", subfolder="transformer")).__name__)
try:
    diffusers_moviegen.MovieGenPipeline.from_pretrained("user/other")
except OSError as error:
    print(error)
"""
    with HubServer() as hub:
        hub.add_folder("user/tiny-moviegen", pipeline_folder)
        printed = run_python(code, **hub.environment(tmp_path)).splitlines()
    assert printed[:3] == ["MovieGenPipeline (1, 9, 32, 48, 3)"] * 2 + ["MovieGenTransformer3DModel"]
    assert len(printed) == 4
    assert printed[3].startswith("'user/other' is not a folder, and cannot be loaded from the Hub: ")
