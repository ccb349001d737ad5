import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_moviegen import AutoencoderKLMovieGen, MovieGenPipeline, MovieGenTransformer3DModel
from tests.tiny import tiny_pipeline, tiny_transformer, tiny_vae
from tests.training_examples.scripts import EXAMPLES, ROOT, load_script


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def script():
    return load_script("average_checkpoints")


def fine_tuned(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of three transformers; the last is saved in several files."""
    folders = [tmp_path_factory.mktemp("models") / name for name in "abc"]
    for seed, folder in enumerate(folders):
        size = "20KB" if seed == 2 else "10GB"
        fine_tuned(tiny_transformer(), seed).save_pretrained(folder, max_shard_size=size)
    return folders


@pytest.fixture
def copies(models, tmp_path):
    return [Path(shutil.copytree(folder, tmp_path / "models" / folder.name)) for folder in models]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folders of two pipelines with different backbones, and with a folder that no pipeline loads."""
    folders = [tmp_path_factory.mktemp("pipelines") / name for name in "ab"]
    for seed, folder in enumerate(folders):
        tiny_pipeline(transformer=fine_tuned(tiny_transformer(), seed)).save_pretrained(folder)
        (folder / "image_processor").mkdir()
        (folder / "image_processor/preprocessor_config.json").write_text("{}")
        (folder / "README.md").write_text(f"The card of run {seed}")
    return folders


def arrays(model):
    return {name: tensor.to(torch.float64).numpy() for name, tensor in model.state_dict().items()}


def check_refused(script, capsys, arguments, output, *words):
    before = sorted(output.parent.rglob("*"))
    capsys.readouterr()
    assert script.main([*map(str, arguments), "--output_dir", str(output)]) == 2
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("average_checkpoints: error: ")
    for word in words:
        assert word in error
    assert captured.out == ""
    assert sorted(output.parent.rglob("*")) == before


@pytest.mark.parametrize("weights", [None, [1, 1, 6], [0.2, 0.5, 0.3]])
@pytest.mark.parametrize("sharded_first", [False, True])
def test_mean(script, models, tmp_path, capsys, weights, sharded_first):
    folders = models[::-1] if sharded_first else models
    output = tmp_path / "new" / "mean"
    arguments = [*folders, "--output_dir", output, *(["--weights", *weights] if weights else [])]
    assert script.main([*map(str, arguments)]) == 0
    num_parameters = tiny_transformer().num_parameters()
    assert capsys.readouterr().out == f"{output}: {num_parameters:,} parameters, the mean of 3 models\n"
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in folders[0].iterdir())
    assert len(list(output.glob("*.safetensors"))) == (
        len(list(models[2].glob("*.safetensors"))) if sharded_first else 1
    )
    assert [path.name for path in output.parent.iterdir()] == ["mean"]

    mean, info = MovieGenTransformer3DModel.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert json.loads((output / "config.json").read_text()) == json.loads((folders[0] / "config.json").read_text())
    sources = [arrays(MovieGenTransformer3DModel.from_pretrained(folder)) for folder in folders]
    for name, array in arrays(mean).items():
        expected = np.average([source[name] for source in sources], axis=0, weights=weights)
        np.testing.assert_allclose(array, expected, rtol=1e-7, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_are_kept_and_rounded_once(script, tmp_path, dtype):
    folders = [tmp_path / name for name in "abc"]
    for seed, folder in enumerate(folders):
        # As from_pretrained loads it: norms and tables in float32, the rest in half precision.
        fine_tuned(tiny_transformer(), seed).save_pretrained(folder / "full")
        model = MovieGenTransformer3DModel.from_pretrained(folder / "full", dtype=dtype)
        model.save_pretrained(folder)
    assert script.main([*map(str, folders), "--output_dir", str(tmp_path / "mean")]) == 0
    sources = [load_file(folder / WEIGHTS) for folder in folders]
    mean = load_file(tmp_path / "mean" / WEIGHTS)
    assert {tensor.dtype for tensor in mean.values()} == {torch.float32, dtype}
    for name, tensor in mean.items():
        expected = np.mean([source[name].to(torch.float64).numpy() for source in sources], axis=0)
        expected = torch.from_numpy(expected).to(sources[0][name].dtype)
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name


def test_autoencoders(script, tmp_path):
    models = [fine_tuned(tiny_vae(), seed) for seed in range(2)]
    for index, model in enumerate(models):
        model.save_pretrained(tmp_path / str(index))
    output = tmp_path / "mean"
    assert script.main([str(tmp_path / "0"), str(tmp_path / "1"), "--output_dir", str(output)]) == 0
    mean = arrays(AutoencoderKLMovieGen.from_pretrained(output))
    sources = [arrays(model) for model in models]
    for name, array in mean.items():
        np.testing.assert_allclose(array, (sources[0][name] + sources[1][name]) / 2, rtol=1e-7, err_msg=name)


def test_pipelines(script, pipelines, tmp_path):
    output = tmp_path / "mean"
    assert script.main([*map(str, pipelines), "--output_dir", str(output)]) == 0
    files, expected_files = (
        {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()} for folder in (output, pipelines[0])
    )
    assert files == expected_files - {Path("README.md")}
    for file in files:
        same = (output / file).read_bytes() == (pipelines[0] / file).read_bytes()
        assert same == (file != Path("transformer") / WEIGHTS), file

    mean = MovieGenPipeline.from_pretrained(output)
    sources = [arrays(MovieGenPipeline.from_pretrained(folder).transformer) for folder in pipelines]
    for name, array in arrays(mean.transformer).items():
        np.testing.assert_allclose(array, (sources[0][name] + sources[1][name]) / 2, rtol=1e-7, err_msg=name)
    mean.set_progress_bar_config(disable=True)
    assert mean("a circle", num_inference_steps=1, output_type="pt").frames.isfinite().all()


def test_numbers_may_be_written_differently(script, pipelines, tmp_path):
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in pipelines]
    for folder, frame_rate in zip(copies, (8, 8.0), strict=True):
        change_config(folder / "model_index.json", default_frame_rate=frame_rate)
    assert script.main([*map(str, copies), "--output_dir", str(tmp_path / "mean")]) == 0


def test_runs_as_a_program(models):
    command = [sys.executable, EXAMPLES / "average_checkpoints.py", *models[:2], "--output_dir", models[0]]
    result = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    message = f"--output_dir: '{models[0]}' exists; name a new folder or remove it first."
    assert result.stderr == f"average_checkpoints: error: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a"], ["the only folder"]),
        (["a", "b", "--weights", "1"], ["--weights", "1 for 2 folders"]),
        (["a", "b", "--weights", "1", "0"], ["--weights", "0.0", "above 0"]),
        (["a", "b", "--weights", "1", "nan"], ["--weights", "nan"]),
        (["a", "b", "--weights", "1", "inf"], ["--weights", "inf"]),
        (["a", "nowhere"], ["nowhere/config.json' is missing"]),
    ],
)
def test_arguments_are_checked(script, copies, capsys, tmp_path, arguments, words):
    arguments = [
        copies[0].parent / name if name.isalpha() and name in ("a", "b", "nowhere") else name for name in arguments
    ]
    check_refused(script, capsys, arguments, tmp_path / "mean", *words)


def change_weights(folder, change):
    state_dict = load_file(folder / WEIGHTS)
    change(state_dict)
    save_file(state_dict, folder / WEIGHTS)


def change_config(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("proj_out.bias"), ["`proj_out.bias`", "has not"]),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), ["`extra`", "has not"]),
        (
            lambda tensors: tensors.update({"proj_out.bias": torch.zeros(63)}),
            ["`proj_out.bias`", "torch.float32 of shape (64,) in", "torch.float32 of shape (63,) in"],
        ),
        (
            lambda tensors: tensors.update({"proj_out.bias": tensors["proj_out.bias"].half()}),
            ["`proj_out.bias`", "torch.float32 of shape (64,) in", "torch.float16 of shape (64,) in"],
        ),
        (lambda tensors: tensors["proj_out.bias"].fill_(torch.nan), ["`proj_out.bias`", "not finite"]),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "nan"],
)
@pytest.mark.parametrize("changed", [0, 1])
def test_weights_that_differ_are_refused(script, copies, capsys, tmp_path, change, words, changed):
    change_weights(copies[changed], change)
    check_refused(script, capsys, copies, tmp_path / "mean", str(copies[changed]), *words)


def test_integers_are_refused(script, copies, capsys, tmp_path):
    for folder in copies[:2]:
        change_weights(folder, lambda tensors: tensors.update(steps=torch.ones(1, dtype=torch.int64)))
    check_refused(script, capsys, copies[:2], tmp_path / "mean", "`steps`", "torch.int64")


def test_configs_that_differ_are_refused(script, copies, capsys, tmp_path):
    output = tmp_path / "mean"
    change_config(copies[1] / "config.json", _diffusers_version="0.1", _name_or_path="elsewhere")
    assert script.main([*map(str, copies), "--output_dir", str(output)]) == 0
    shutil.rmtree(output)
    change_config(copies[1] / "config.json", num_layers=3)
    check_refused(script, capsys, copies, output, "`num_layers` is 2 in", "and 3 in", str(copies[1] / "config.json"))
    shutil.rmtree(copies[1])
    tiny_vae().save_pretrained(copies[1])
    check_refused(script, capsys, copies, output, '`_class_name` is "MovieGenTransformer3DModel" in')


def test_damaged_folders_are_refused(script, copies, capsys, tmp_path):
    output, (first, second, sharded) = tmp_path / "mean", copies
    index = sharded / f"{WEIGHTS}.index.json"
    text = index.read_text()
    for broken in ("[", "{}", text.replace('"diffusion', '"../diffusion')):
        index.write_text(broken)
        check_refused(script, capsys, copies, output, str(index))
    index.write_text(text)
    min(sharded.glob("*-00002-*")).unlink()
    check_refused(script, capsys, copies, output, "-00002-", "is missing")
    (second / WEIGHTS).write_bytes((second / WEIGHTS).read_bytes()[:-1])
    check_refused(script, capsys, [first, second], output, str(second / WEIGHTS), "damaged")
    (second / WEIGHTS).unlink()
    check_refused(script, capsys, [first, second], output, str(second / WEIGHTS), "is missing")
    (second / "config.json").write_text("{")
    check_refused(script, capsys, [first, second], output, "not valid JSON")


@pytest.mark.parametrize("file", ["vae/config.json", f"vae/{WEIGHTS}", "tokenizer/tokenizer.json", "model_index.json"])
def test_pipelines_that_differ_in_more_than_the_backbone_are_refused(script, pipelines, capsys, tmp_path, file):
    folders = [Path(shutil.copytree(folder, tmp_path / "runs" / folder.name)) for folder in pipelines]
    output = tmp_path / "mean"
    changed = folders[1] / file
    if file == "vae/config.json":
        change_config(changed, latents_std=[2.0] * 16)
        words = ["`latents_std` is [1.0, "]
    elif file == "model_index.json":
        change_config(changed, default_guidance_scale=9.0)
        words = ["`default_guidance_scale` is 3.0 in", "and 9.0 in"]
    else:
        changed.write_bytes(changed.read_bytes()[:-1] + b"!")
        words = ["differ; only the backbones"]
    check_refused(script, capsys, folders, output, str(changed), *words)
    changed.unlink()
    if file != "model_index.json":
        check_refused(script, capsys, folders, output, f"'{folders[0]}' has '{file}' and '{folders[1]}' has not")
    check_refused(script, capsys, [folders[0], folders[1] / "transformer"], output, "folders of one kind")


def test_a_full_disk_leaves_nothing(script, pipelines, capsys, tmp_path, monkeypatch):
    output = tmp_path / "mean"
    seen = []

    def save(tensors, file, metadata):
        seen.append(file)
        assert not output.exists()
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "save_file", save)
    check_refused(script, capsys, pipelines, output, "No space left on device")
    assert [file.name for file in seen] == [WEIGHTS]
