"""Pushes to the Hub and pulls from it, with the real client and a Hub of our own."""

import json
import os
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import http_get
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from diffusers_moviegen import MovieGenPipeline
from diffusers_moviegen.training import build_model_card, prepare_hub_repository, push_folder_to_hub
from tests.hub_server import READ_TOKEN, WRITE_TOKEN, HubServer
from tests.tiny import tiny_pipeline


ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running Hub that the client of this process talks to, with a token that may write."""
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home", WRITE_TOKEN)
        yield hub


@pytest.fixture
def folder(pipeline_folder, tmp_path):
    return shutil.copytree(pipeline_folder, tmp_path / "pipeline")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A folder of LoRA weights, and the frames of the pipeline with them."""
    folder, pipeline = tmp_path_factory.mktemp("lora"), tiny_pipeline()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"])
    pipeline.transformer.add_adapter(config)
    for name, parameter in pipeline.transformer.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    MovieGenPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    return folder, generate(pipeline)


def generate(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline("a red circle", num_inference_steps=2, generator=generator, output_type="pt").frames


def card(repo_id="user/tiny", **changes):
    arguments = {
        "summary": "A tiny pipeline.",
        "snippet": "frames = 1",
        "data": "None at all.",
        "recipe": {"seed": 0},
        "figures": {"validation_loss": 0.51239},
        "figures_note": "Made up.",
        "base_model": None,
        "pipeline_tag": "text-to-video",
        "tags": ["toybox"],
    }
    return build_model_card(repo_id, **(arguments | changes))


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run_python(code, *arguments, environment):
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_push_and_pull_in_processes_of_their_own(pipeline_folder, lora, tmp_path):
    push = """
import sys
from pathlib import Path
from huggingface_hub import ModelCard
from diffusers_moviegen.training import push_folder_to_hub
for name, folder, text in zip(("tiny", "user/tiny-lora"), sys.argv[1:3], sys.argv[3:5]):
    print(push_folder_to_hub(folder, name, ModelCard(text)))
"""
    snippet = """
from diffusers_moviegen import MovieGenPipeline
pipe = MovieGenPipeline.from_pretrained("user/tiny")
"""
    lora_snippet = snippet + 'pipe.load_lora_weights("user/tiny-lora")\n'
    pull = """
import re
import sys
import torch
from huggingface_hub import ModelCard
for name in ("user/tiny", "user/tiny-lora"):
    exec(re.search(r"```python\\n(.*?)```", ModelCard.load(name).text, re.S)[1])
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    frames = pipe("a red circle", num_inference_steps=2, generator=generator, output_type="pt").frames
    torch.save(frames, sys.argv[1] + name.replace("/", "-"))
"""
    folders = [shutil.copytree(source, tmp_path / source.name) for source in (pipeline_folder, lora[0])]
    cards = [str(card(snippet=snippet)), str(card("user/tiny-lora", snippet=lora_snippet, base_model="user/tiny"))]
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "pusher", WRITE_TOKEN)
        printed = run_python(push, *folders, *cards, environment=environment)
        assert printed.split() == [f"{hub.url}/user/tiny", f"{hub.url}/user/tiny-lora"]
        for name, folder in zip(("user/tiny", "user/tiny-lora"), folders, strict=True):
            pushed = {path: sha256(file.content).hexdigest() for path, file in hub.repositories[name].files.items()}
            del pushed[".gitattributes"]
            assert pushed == contents(folder)
        run_python(pull, f"{tmp_path}/frames-", environment=hub.environment(tmp_path / "puller"))
    frames, lora_frames = (torch.load(tmp_path / f"frames-user-{name}") for name in ("tiny", "tiny-lora"))
    torch.testing.assert_close(frames, generate(tiny_pipeline()), atol=1e-5, rtol=0)
    torch.testing.assert_close(lora_frames, lora[1], atol=1e-5, rtol=0)
    assert not torch.allclose(frames, lora_frames, atol=1e-3)


def test_a_second_push_updates(hub, folder):
    before = contents(folder)
    transformer = tiny_pipeline().transformer
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
    sharded = contents(folder)
    assert push_folder_to_hub(folder, "user/tiny", card()) == f"{hub.url}/user/tiny"
    assert {name: value for name, value in contents(folder).items() if name != "README.md"} == sharded
    repository = hub.repositories["user/tiny"]
    first = repository.head
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" in repository.files
    # What its owner has added stays.
    repository.commit(repository.files | {"film.mp4": repository.files["README.md"]}, "by hand")

    # From shards to a single file: an index left behind would still be loaded.
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer")
    assert before == {name: value for name, value in contents(folder).items() if name != "README.md"}
    hub.requests.clear()
    push_folder_to_hub(folder, "tiny", card(figures={"validation_loss": 0.25}), commit_message="Better")
    assert repository.files.keys() == contents(folder).keys() | {".gitattributes", "film.mp4"}
    assert repository.titles == ["initial", "Upload weights", "by hand", "Better"]
    uploads = [request for request in hub.requests if request.startswith("PUT ")]
    assert uploads == [f"PUT /lfs/{before['transformer/diffusion_pytorch_model.safetensors']}"]
    assert "POST /api/repos/create" not in hub.requests

    texts = [Path(hf_hub_download("user/tiny", "README.md", revision=it)).read_text() for it in (first, "main")]
    assert ["0.5124" in text for text in texts] == [True, False]
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("user/tiny", "README.md", revision="v1")
    commits = len(repository.commits)
    push_folder_to_hub(folder, "user/tiny", card(figures={"validation_loss": 0.25}))
    assert len(repository.commits) == commits


def test_private_repositories_stay_private(hub, folder, monkeypatch):
    push_folder_to_hub(folder, "user/secret", card("user/secret"), private=True)
    push_folder_to_hub(folder, "user/secret", card("user/secret"))
    assert hub.repositories["user/secret"].private
    push_folder_to_hub(folder, "user/open", card("user/open"))
    assert not hub.repositories["user/open"].private
    monkeypatch.delenv("HF_TOKEN")
    assert hf_hub_download("user/open", "model_index.json")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("user/secret", "vae/config.json")


def test_an_interrupted_download_goes_on(hub, folder, tmp_path):
    hub.add_folder("user/tiny", folder)
    source = folder / "vae" / "diffusion_pytorch_model.safetensors"
    with open(tmp_path / "part", "wb") as file:
        file.write(source.read_bytes()[:1000])
        size = source.stat().st_size
        url = f"{hub.url}/user/tiny/resolve/main/vae/{source.name}"
        http_get(url, file, resume_size=1000, expected_size=size)
    assert (tmp_path / "part").read_bytes() == source.read_bytes()


def broken_shard(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def missing_shard(folder):
    shutil.rmtree(folder / "transformer")
    tiny_pipeline().transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
    (folder / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "scheduler"), "lacks its component 'scheduler'"),
        (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json or config.json and no LoRA"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json' is not valid JSON"),
        (lambda folder: (folder / "vae/diffusion_pytorch_model.safetensors").unlink(), "vae' has no .safetensors"),
        (lambda folder: (folder / "vae/a.safetensors.index.json").write_text("{}"), "index.json' names no weights"),
        (missing_shard, "00001-of-00002.safetensors' is missing"),
        (broken_shard, "vae/diffusion_pytorch_model.safetensors' is damaged"),
        (shutil.rmtree, "has no model_index.json"),
    ],
    ids=["component", "index", "json", "weights", "weights index", "shard", "truncated", "folder"],
)
def test_nothing_incomplete_is_pushed(hub, folder, damage, message):
    damage(folder)
    with pytest.raises(OSError, match=f"nothing is pushed: '.*{re.escape(message)}") as error:
        push_folder_to_hub(folder, "user/tiny", card())
    assert "\n" not in str(error.value)
    assert hub.requests == [] and not (folder / "README.md").exists()


@pytest.mark.parametrize("name", ["a b/c", "user/tiny/more", "user/-tiny", "user/" + "x" * 100, "", "user/a--b"])
def test_names_are_checked(hub, name):
    with pytest.raises(ValueError, match=f"'{name}' is not the name of a Hub repository; pass user/name"):
        prepare_hub_repository(name, "MovieGenPipeline")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "token", "private", "message"),
    [
        ("user/tiny", None, False, "there is no Hub token; run `hf auth login` or set HF_TOKEN"),
        ("user/tiny", "hf_old", False, "the Hub does not know the token"),
        ("tiny", "hf_old", False, "the Hub does not know the token"),
        ("user/tiny", READ_TOKEN, False, "the token may not write there; use one with write access"),
        ("user/pipeline", READ_TOKEN, False, "the token may not write there"),
        ("other/tiny", WRITE_TOKEN, False, "the token may not write there; .* or a name of your own"),
        ("other/pipeline", WRITE_TOKEN, False, "the token may not write there"),
        (
            "user/vae",
            WRITE_TOKEN,
            False,
            "it exists and holds a AutoencoderKLMovieGen, not a MovieGenPipeline; choose",
        ),
        ("user/lora", WRITE_TOKEN, False, "it exists and holds a different kind of files, not a MovieGenPipeline"),
        ("user/pipeline", WRITE_TOKEN, True, "it exists and is public; make it private in its settings"),
    ],
)
def test_refusals_come_before_anything_is_pushed(hub, folder, lora, monkeypatch, name, token, private, message):
    hub.add_folder("user/pipeline", folder)
    hub.add_folder("other/pipeline", folder)
    hub.add_folder("user/vae", folder / "vae")
    hub.add_folder("user/lora", lora[0])
    heads = {name: repository.head for name, repository in hub.repositories.items()}
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OSError, match=f"cannot push to '{name}': {message}") as error:
        push_folder_to_hub(folder, name, card(), private=private)
    assert "\n" not in str(error.value)
    assert {name: repository.head for name, repository in hub.repositories.items()} == heads
    assert not (folder / "README.md").exists()


def test_weights_of_another_kind_do_not_take_the_place_of_a_pipeline(hub, folder, lora, tmp_path):
    hub.add_folder("user/pipeline", folder)
    copy = shutil.copytree(lora[0], tmp_path / "lora")
    with pytest.raises(OSError, match="it exists and holds a MovieGenPipeline, not a LoRA; choose another name"):
        push_folder_to_hub(copy, "user/pipeline", card())
    push_folder_to_hub(copy, "user/lora", card("user/lora"))
    (copy / "pytorch_lora_weights.safetensors").rename(copy / "second.safetensors")
    push_folder_to_hub(copy, "user/lora", card("user/lora"))
    assert {"pytorch_lora_weights.safetensors", "second.safetensors"} < hub.repositories["user/lora"].files.keys()
    push_folder_to_hub(folder / "vae", "user/vae", card("user/vae"))
    assert load_file(hf_hub_download("user/vae", "diffusion_pytorch_model.safetensors"))


def test_without_network(hub, folder, monkeypatch):
    prepare_hub_repository("user/tiny", "MovieGenPipeline")
    hub.__exit__()
    with pytest.raises(OSError, match=f"cannot push to 'user/tiny': {hub.url} cannot be reached .*network") as error:
        push_folder_to_hub(folder, "user/tiny", card())
    assert "\n" not in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match="cannot be reached .*offline mode is enabled.* check .* HF_HUB_OFFLINE"
    ) as error:
        push_folder_to_hub(folder, "user/tiny", card())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("route", ["/commit/", "/info/lfs/verify"])
def test_a_failed_upload_says_how_to_repeat_it(hub, folder, monkeypatch, route):
    hub.broken = route
    # The client waits up to 20 s for a broken Hub to recover.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with pytest.raises(OSError, match="cannot push to 'user/tiny': the Hub answered 500 .*try again later") as error:
        push_folder_to_hub(folder, "user/tiny", card())
    assert f"`hf upload user/tiny {folder} .`" in str(error.value) and "\n" not in str(error.value)
    assert hub.repositories["user/tiny"].titles == ["initial"]
    hub.broken = None
    push_folder_to_hub(folder, "user/tiny", card())
    assert "model_index.json" in hub.repositories["user/tiny"].files


def test_model_card(tmp_path):
    recipe = {"learning_rate": 6e-4, "vae": str(tmp_path / "vae"), "stage": "joint", "prompt": "a|b\nc"}
    text = str(card(recipe=recipe, figures={"validation_loss": 0.512345, "all": 1 / 3}, base_model="user/base"))
    metadata = ModelCard(text).data.to_dict()
    assert metadata == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "tags": ["diffusers", "movie-gen", "toybox"],
        "base_model": "user/base",
    }
    for line in (
        "# tiny",
        "A tiny pipeline.",
        "| validation_loss | 0.5123 |",
        "| all | 0.3333 |",
        "| learning_rate | 0.0006 |",
        "| vae | .../vae |",
        "| prompt | a\\|b c |",
        "None at all.",
        "Apache License 2.0.",
    ):
        assert line in text.splitlines()
    assert str(tmp_path) not in text
    assert f"torch {torch.__version__.split('+')[0]}" in text


@pytest.mark.parametrize("base_model", [None, "{folder}", "runs/t2i/pipeline", "a b/c"])
def test_a_base_model_that_is_not_on_the_hub_stays_out_of_the_metadata(hub, folder, base_model):
    if base_model is not None:
        base_model = base_model.format(folder=folder)
    push_folder_to_hub(folder, "user/tiny", card(base_model=base_model))
    text = (folder / "README.md").read_text()
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert (
        "fresh weights" in text if base_model is None else f"`{base_model.replace(str(folder.parent), '...')}`" in text
    )
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "MovieGenPipeline"
