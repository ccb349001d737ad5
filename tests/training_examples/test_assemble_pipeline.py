import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from diffusers_moviegen import MovieGenAudioPipeline, MovieGenPipeline
from diffusers_moviegen.training import models_fingerprint, run_script
from tests.tiny import tiny_audio_pipeline, tiny_audio_vae, tiny_tokenizer_2
from tests.training_examples.scripts import command_line, load_script, run


script = load_script("assemble_pipeline")

ENCODERS = ["text_encoder", "text_encoder_2", "text_encoder_3"]


@pytest.fixture
def singles(pipeline, tmp_path):
    """A folder for each text encoder with its tokenizer, as repositories of the Hub have them."""
    folders = {}
    for name in ENCODERS:
        folders[name] = tmp_path / "single" / name
        getattr(pipeline, name).save_pretrained(folders[name])
        getattr(pipeline, name.replace("text_encoder", "tokenizer")).save_pretrained(folders[name])
    return folders


def test_the_folder_of_all_encoders(pipeline, pipeline_folder, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(pipeline_folder, source)
    (source / "image_encoder").mkdir()
    (source / "image_encoder/config.json").write_text("{}")
    run(script, output_dir=tmp_path / "out", vae=source / "vae", text_encoders=source)
    lines = capsys.readouterr().out.splitlines()
    count = sum(parameter.numel() for parameter in pipeline.vae.parameters())
    assert lines[0] == f"vae: AutoencoderKLMovieGen, {count:,} parameters, torch.float32"
    assert lines[-1] == f"written to {tmp_path / 'out'}"
    # Bit for bit what it was made of, and the vision half beside it.
    assert models_fingerprint(tmp_path / "out") == models_fingerprint(source)
    assert (tmp_path / "out/image_encoder/config.json").is_file()
    assert not (tmp_path / "out/transformer").exists() and not (tmp_path / "partial-out").exists()
    assert "source" not in (tmp_path / "out/vae/config.json").read_text()

    assembled = MovieGenPipeline.from_pretrained(tmp_path / "out", transformer=None)
    prompt = 'a red circle says "HI"'
    embeds = [pipe.encode_prompt(prompt, frame_rate=8, dtype=torch.float32) for pipe in (assembled, pipeline)]
    torch.testing.assert_close(*embeds)
    # With a transformer it is whole.
    whole = MovieGenPipeline.from_pretrained(tmp_path / "out", transformer=pipeline.transformer)
    whole.set_progress_bar_config(disable=True)
    inputs = {"num_inference_steps": 2, "height": 32, "width": 48, "num_frames": 9, "frame_rate": 8}
    frames = [
        pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="pt", guidance_scale=3.0, **inputs).frames
        for pipe in (pipeline, whole)
    ]
    torch.testing.assert_close(*frames)


def test_encoders_one_by_one(pipeline_folder, singles, tmp_path):
    run(script, output_dir=tmp_path / "out", vae=pipeline_folder / "vae", **singles)
    made, expected = models_fingerprint(tmp_path / "out"), models_fingerprint(pipeline_folder)
    assert {name: made[name] for name in ("vae", *ENCODERS)} == {name: expected[name] for name in ("vae", *ENCODERS)}
    pipes = [MovieGenPipeline.from_pretrained(path, transformer=None) for path in (tmp_path / "out", pipeline_folder)]
    embeds = [pipe.encode_prompt('some "words"', frame_rate=8, dtype=torch.float32) for pipe in pipes]
    torch.testing.assert_close(*embeds)


def test_the_text_half_of_a_whole_clip(pipeline_folder, pipeline, singles, tmp_path):
    text_config = pipeline.text_encoder_2.config.to_dict() | {"dtype": None}
    vision = {"hidden_size": 16, "image_size": 16, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision, projection_dim=8)).half()
    clip.save_pretrained(tmp_path / "clip")
    tiny_tokenizer_2().save_pretrained(tmp_path / "clip")
    options = singles | {"text_encoder_2": tmp_path / "clip"}
    run(script, output_dir=tmp_path / "out", vae=pipeline_folder / "vae", **options)
    assert all(
        value.dtype == torch.float16 for value in load_file(tmp_path / "out/text_encoder_2/model.safetensors").values()
    )
    made = CLIPTextModel.from_pretrained(tmp_path / "out/text_encoder_2").eval()
    words = torch.tensor([[1, 20, 30, 40, 2]])
    expected = clip.float().eval().text_model(words).last_hidden_state
    torch.testing.assert_close(made.float()(words).last_hidden_state, expected)


def test_weights_can_be_rounded(pipeline_folder, tmp_path):
    options = {"vae": pipeline_folder / "vae", "text_encoders": pipeline_folder, "dtype": "bfloat16"}
    run(script, output_dir=tmp_path / "out", **options)
    for name in ("vae/diffusion_pytorch_model", *(f"{name}/model" for name in ENCODERS)):
        made, exact = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path / "out", pipeline_folder))
        assert made.keys() == exact.keys()
        assert all(torch.equal(made[key], exact[key].to(torch.bfloat16)) for key in exact)
    # What is rounded stays so when it is put together once more.
    run(script, output_dir=tmp_path / "again", vae=tmp_path / "out/vae", text_encoders=tmp_path / "out")
    assert models_fingerprint(tmp_path / "again") == models_fingerprint(tmp_path / "out")


def test_what_does_not_fit_is_refused(pipeline_folder, singles, tmp_path, capsys):
    vae = pipeline_folder / "vae"
    output_dir = tmp_path / "out"

    def refuse(**arguments):
        with pytest.raises(SystemExit) as exit_code:
            run_script(script.main, script.Arguments, command_line({"output_dir": output_dir, "vae": vae} | arguments))
        assert exit_code.value.code == 2
        assert not output_dir.exists() and not (tmp_path / "partial-out").exists()
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: --")
        return line

    assert "--text_encoders and --text_encoder_2: pass the" in refuse(
        text_encoders=pipeline_folder, text_encoder_2=singles["text_encoder_2"]
    )
    assert "--text_encoder is missing: pass every text encoder, or --text_encoders" in refuse()
    two = {name: folder for name, folder in singles.items() if name != "text_encoder_3"}
    assert "--text_encoder_3 is missing: " in refuse(**two)
    assert "' has no text_encoder/; pass the folder that train_text_encoders.py wrote" in refuse(
        text_encoders=tmp_path / "single/text_encoder"
    )
    assert "' holds a MovieGenTransformer3DModel; pass the folder" in refuse(
        vae=pipeline_folder / "transformer", text_encoders=pipeline_folder
    )
    # Another architecture would be filled with random weights.
    assert "--text_encoder_3: " in refuse(**singles | {"text_encoder_3": singles["text_encoder_2"]})
    assert "--text_encoder_2: no CLIPTextModel could be loaded from 'owner/nothing': " in refuse(
        **singles | {"text_encoder_2": "owner/nothing"}
    )
    shutil.copytree(vae, tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"latents_std": None}))
    assert "has no latents_mean and latents_std" in refuse(vae=tmp_path / "vae", text_encoders=pipeline_folder)

    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"layers_per_block": 3}))
    assert "do not fit its config.json: `decoder." in refuse(vae=tmp_path / "vae", text_encoders=pipeline_folder)
    file = singles["text_encoder"] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"d_model": 40}))
    assert "--text_encoder: no T5EncoderModel could be loaded from '" in refuse(**singles)

    output_dir.mkdir()
    with pytest.raises(OSError, match="--output_dir: '.*out' is there already; pass a new folder"):
        run(script, output_dir=output_dir, vae=vae, text_encoders=pipeline_folder)


# --- Sound ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audio_folder(tmp_path_factory):
    """Folder of a tiny pipeline of sound. Tests that change files copy it first."""
    folder = tmp_path_factory.mktemp("audio")
    tiny_audio_pipeline().save_pretrained(folder)
    return folder


def audio_options(folder):
    return {"kind": "audio", "vae": folder / "vae", "text_encoders": folder, "image_encoder": folder}


def test_sound(audio_folder, tmp_path, capsys):
    run(script, output_dir=tmp_path / "out", **audio_options(audio_folder))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["vae", "text_encoder", "image_encoder"]
    assert not (tmp_path / "out/transformer").exists()
    config = json.loads((tmp_path / "out/model_index.json").read_text())
    assert config["default_control_prefix"] is None and config["segment_length_in_s"] == 10.0
    # Byte by byte, and no folder that it came from.
    for name in (
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "image_processor/preprocessor_config.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (audio_folder / name).read_bytes()
    assert str(audio_folder) not in (tmp_path / "out/vae/config.json").read_text()

    options = {"transformer": audio_folder / "transformer", "segment_length_in_s": 0.8}
    options |= {"default_control_prefix": "Quality: 9. Music: no. "}
    run(script, output_dir=tmp_path / "whole", **audio_options(audio_folder), **options)
    made = MovieGenAudioPipeline.from_pretrained(tmp_path / "whole")
    made.set_progress_bar_config(disable=True)
    # Longer than a segment, with all conditions: whatever differed would be heard.
    video = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"prompt": "a bell knocks", "video": video, "video_frame_rate": 8, "num_inference_steps": 2}
    sounds = [
        pipe(**inputs, generator=torch.Generator().manual_seed(0), output_type="pt").audios
        for pipe in (made, tiny_audio_pipeline())
    ]
    assert sounds[0].shape == (1, 1, 200)
    torch.testing.assert_close(*sounds)


def test_squeezed_images_show_the_floor_of_an_upright_film(audio_folder, tmp_path):
    film = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    without_floor = film.clone()
    without_floor[:, :, -8:] = 0
    for squeeze in (False, True):
        options = {"squeeze_images": True} if squeeze else {}
        run(script, output_dir=tmp_path / f"{squeeze}", **audio_options(audio_folder), **options)
        pipe = MovieGenAudioPipeline.from_pretrained(tmp_path / f"{squeeze}", transformer=None)
        embeds = [pipe.encode_video(video) for video in (film, without_floor)]
        assert torch.equal(*embeds) == (not squeeze)


def test_sound_from_single_models(audio_folder, tmp_path):
    pipe = tiny_audio_pipeline()
    for name, parts in {"t5": ("text_encoder", "tokenizer"), "clip": ("image_encoder", "image_processor")}.items():
        for part in parts:
            getattr(pipe, part).save_pretrained(tmp_path / name)
    options = {"vae": audio_folder / "vae", "text_encoder": tmp_path / "t5", "image_encoder": tmp_path / "clip"}
    run(script, kind="audio", output_dir=tmp_path / "out", **options)
    made = MovieGenAudioPipeline.from_pretrained(tmp_path / "out", transformer=None)
    video = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made.encode_video(video), pipe.encode_video(video))
    ours, expected = (
        p.encode_prompt("Quality: 9. Music: no. rain", dtype=torch.float32)["prompt_embeds"] for p in (made, pipe)
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_codec_is_never_stored_in_bfloat16(audio_folder, tmp_path, dtype):
    run(script, output_dir=tmp_path / "out", dtype=dtype, **audio_options(audio_folder))
    wanted = {"vae/diffusion_pytorch_model": torch.float16}
    wanted |= dict.fromkeys(("text_encoder/model", "image_encoder/model"), getattr(torch, dtype))
    for name, stored in wanted.items():
        made, exact = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path / "out", audio_folder))
        assert made.keys() == exact.keys()
        assert all(torch.equal(made[key], exact[key].to(stored)) for key in exact)
    # What is rounded stays so when it is put together once more.
    run(script, output_dir=tmp_path / "again", **audio_options(tmp_path / "out"))
    for name in ("vae/diffusion_pytorch_model", "image_encoder/model"):
        made, exact = (tmp_path / folder / f"{name}.safetensors" for folder in ("again", "out"))
        assert made.read_bytes() == exact.read_bytes()


def test_what_does_not_fit_sound_is_refused(audio_folder, pipeline_folder, tmp_path, capsys):
    output_dir = tmp_path / "out"

    def refuse(**arguments):
        arguments = {"output_dir": output_dir, **audio_options(audio_folder), **arguments}
        line = command_line({name: value for name, value in arguments.items() if value is not None})
        with pytest.raises(SystemExit) as exit_code:
            run_script(script.main, script.Arguments, line)
        assert exit_code.value.code == 2 and not output_dir.exists()
        return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")

    assert refuse(image_encoder=None).startswith("--image_encoder is missing")
    assert refuse(text_encoders=None).startswith("--text_encoder is missing")
    assert refuse(text_encoder_2="clip") == "--text_encoder_2 does nothing with --kind audio: leave it out."
    assert refuse(kind="video").startswith("--image_encoder does nothing with --kind video")
    assert refuse(kind="video", image_encoder=None, default_control_prefix="Music: no. ").startswith(
        "--default_control_prefix does nothing"
    )
    assert refuse(segment_length_in_s=0).startswith("--segment_length_in_s is 0.0")
    assert "holds a AutoencoderKLMovieGen; pass the folder of a AutoencoderDACVAE" in refuse(
        vae=pipeline_folder / "vae"
    )
    assert refuse(transformer=audio_folder / "vae").startswith("--transformer: ")
    assert refuse(image_encoder=tmp_path).startswith("--image_encoder: no CLIPVisionModelWithProjection could be")
    tiny_audio_vae().to(torch.bfloat16).save_pretrained(tmp_path / "vae")
    assert "has weights in bfloat16, which costs 10 dB; pass float16 or float32" in refuse(vae=tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"latents_std": None}))
    assert "pass an autoencoder that train_dac_vae.py measured them for" in refuse(vae=tmp_path / "vae")
