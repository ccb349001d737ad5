import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from diffusers_moviegen import MovieGenPipeline
from tests.tiny import tiny_pipeline


WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


@pytest.fixture
def folder(pipeline_folder, tmp_path):
    return shutil.copytree(pipeline_folder, tmp_path / "pipeline")


def load_error(folder, **kwargs):
    with pytest.raises(OSError) as error:
        MovieGenPipeline.from_pretrained(folder, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message


def change_weights(file, change):
    state_dict = load_file(file)
    save_file(change(state_dict), file, metadata={"format": "pt"})


def test_folder_as_path_and_string(pipeline_folder):
    for folder in (pipeline_folder, str(pipeline_folder)):
        assert isinstance(MovieGenPipeline.from_pretrained(folder), MovieGenPipeline)


def test_no_model_index(folder):
    (folder / "model_index.json").unlink()
    assert load_error(folder) == f"'{folder}' has no model_index.json; pass the folder of a saved pipeline."


def test_damaged_model_index(folder):
    (folder / "model_index.json").write_text("{")
    assert load_error(folder).startswith(f"'{folder}/model_index.json' is not valid JSON (")


def change_json(file, change):
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def test_index_of_something_else(folder):
    index_file = folder / "model_index.json"
    change_json(index_file, lambda index: index | {"vae": ["AutoencoderKLMovieGen"]})
    assert load_error(folder).startswith(f"'{index_file}' has ['AutoencoderKLMovieGen'] for 'vae' instead of a lib")
    change_json(index_file, list)
    assert load_error(folder).startswith(f"'{index_file}' is not the index of a pipeline;")


@pytest.mark.parametrize(
    "name",
    [
        "transformer/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_damaged_json(folder, name):
    file = folder / name
    file.write_text(file.read_text()[:-20])
    assert load_error(folder).startswith(f"'{file}' is not valid JSON (")


@pytest.mark.parametrize(
    "component, change",
    [
        ("transformer", lambda config: config | {"num_layers": "two"}),
        ("vae", lambda config: config | {"norm_num_groups": 3}),
        ("text_encoder", lambda config: config | {"num_layers": "two"}),
    ],
)
def test_config_of_no_model(folder, component, change):
    file = folder / component / "config.json"
    change_json(file, change)
    message = load_error(folder)
    assert message.startswith(f"'{file}' does not describe a ")
    assert message.endswith("save or download the pipeline again.")


@pytest.mark.parametrize("name", ["{}/missing", "{}/model_index.json", "./missing", "~/missing", ""])
def test_not_a_folder(folder, name):
    name = name.format(folder)
    assert load_error(name).startswith(f"'{name}' is not a folder; pass a folder with a model_index.json")


def test_unknown_repository():
    message = load_error("nobody/nothing")
    assert message.startswith("'nobody/nothing' is not a folder, and cannot be loaded from the Hub: ")


@pytest.mark.parametrize("component", ["transformer", "text_encoder_2", "tokenizer_3", "scheduler"])
def test_missing_component(folder, component):
    shutil.rmtree(folder / component)
    assert load_error(folder).startswith(f"'{folder}' lacks the folder '{component}' of a component")


@pytest.mark.parametrize("component", WEIGHTS)
class TestWeights:
    def test_missing_config(self, folder, component):
        (folder / component / "config.json").unlink()
        assert load_error(folder).startswith(f"'{folder / component}' has no config.json")

    def test_missing(self, folder, component):
        file = folder / component / WEIGHTS[component]
        file.unlink()
        assert load_error(folder).startswith(f"The weights file '{file}' is missing")

    @pytest.mark.parametrize("size", [0, 5000, -1])
    def test_truncated(self, folder, component, size):
        file = folder / component / WEIGHTS[component]
        content = file.read_bytes()
        file.write_bytes(content[:size])
        assert load_error(folder).startswith(f"The weights file '{file}' is damaged (")

    def test_missing_tensor(self, folder, component):
        def drop(state_dict):
            dropped.append(sorted(state_dict)[2])
            del state_dict[dropped[0]]
            return state_dict

        dropped = []
        change_weights(folder / component / WEIGHTS[component], drop)
        message = load_error(folder)
        assert message.startswith(f"The weights in '{folder / component}' do not fit the ")
        assert f"`{dropped[0]}` is missing" in message

    def test_other_shape(self, folder, component):
        def reshape(state_dict):
            name = sorted(state_dict)[2]
            state_dict[name] = torch.zeros(3, 5)
            reshaped.append(name)
            return state_dict

        reshaped = []
        change_weights(folder / component / WEIGHTS[component], reshape)
        assert f"`{reshaped[0]}` has shape (3, 5) instead of (" in load_error(folder)

    def test_weights_of_another_model(self, folder, component):
        def rename(state_dict):
            return {f"other{name}": tensor for name, tensor in state_dict.items()}

        change_weights(folder / component / WEIGHTS[component], rename)
        assert "is missing; put the files of one model there" in load_error(folder)


def test_unexpected_tensor(folder):
    change_weights(folder / "vae" / WEIGHTS["vae"], lambda state_dict: state_dict | {"other": torch.zeros(2)})
    assert "`other` is not part of it" in load_error(folder)


def test_shards(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = MovieGenPipeline.from_pretrained(tmp_path)
    for name in WEIGHTS:
        state_dict = getattr(loaded, name).state_dict()
        expected = getattr(pipeline, name).state_dict()
        assert all(torch.equal(state_dict[key], expected[key]) for key in expected)
    for component in ("transformer", "text_encoder"):
        shard = sorted((tmp_path / component).glob("*-of-*.safetensors"))[1]
        content = shard.read_bytes()
        shard.unlink()
        assert load_error(tmp_path).startswith(f"The weights file '{shard}' is missing")
        shard.write_bytes(content)
    index = next((tmp_path / "vae").glob("*.index.json"))
    index.write_text(json.dumps({}))
    assert load_error(tmp_path).startswith(f"'{index}' is not a valid index of weights")


def test_given_components_need_no_files(folder):
    for name in ("text_encoder", "transformer"):
        shutil.rmtree(folder / name)
    transformer = tiny_pipeline().transformer
    pipeline = MovieGenPipeline.from_pretrained(folder, text_encoder=None, transformer=transformer)
    assert pipeline.text_encoder is None
    assert pipeline.transformer is transformer


def test_variant(tmp_path):
    tiny_pipeline().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    pipeline = MovieGenPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert pipeline.transformer.dtype == torch.float16
    (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    assert "is damaged" in load_error(tmp_path, variant="fp16")


def test_text_encoder_from_the_file_of_a_whole_clip(folder):
    """A checkpoint of the whole CLIP holds the text half under longer names, and the vision half besides."""
    text_encoder = tiny_pipeline().text_encoder_2
    config = CLIPConfig(
        text_config=text_encoder.config.to_dict(),
        vision_config={"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 48, "image_size": 32},
    )
    clip = CLIPModel(config)
    clip.text_model.load_state_dict(text_encoder.state_dict())
    shutil.rmtree(folder / "text_encoder_2")
    clip.save_pretrained(folder / "text_encoder_2")
    loaded = MovieGenPipeline.from_pretrained(folder).text_encoder_2
    expected = text_encoder.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_pickled_weights_are_not_read(folder):
    file = folder / "vae" / WEIGHTS["vae"]
    torch.save(load_file(file), folder / "vae" / "diffusion_pytorch_model.bin")
    file.unlink()
    assert load_error(folder).startswith(f"The weights file '{file}' is missing")
