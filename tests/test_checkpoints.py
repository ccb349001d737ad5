"""What the package promises of the checkpoint it ships."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModelWithProjection

from diffusers_moviegen import MovieGenAudioPipeline, MovieGenPipeline, bundled_checkpoint
from diffusers_moviegen.toybox.captions import core_caption
from diffusers_moviegen.toybox.judges import compare, listen, see
from diffusers_moviegen.toybox.scenes import draw_scenes, render, sample_tuples
from tests.training_examples.scripts import load_script


@pytest.fixture(scope="module")
def folder():
    return Path(bundled_checkpoint("toybox"))


@pytest.fixture(scope="module")
def toybox(folder):
    pipeline = MovieGenPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no bundled checkpoint is named 'film'; there is "):
        bundled_checkpoint("film")


def test_it_is_small_enough_for_a_repository(folder):
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert {path.suffix for path in sizes} <= {".safetensors", ".json", ".md"}
    assert sum(sizes.values()) <= 26_000_000
    assert max(sizes.values()) < 15_000_000


def test_its_weights_are_half_precision(folder):
    files = list(folder.rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {
        *("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae", "image_encoder")
    }
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} <= {"BF16", "F16"}, file


def test_its_model_card_has_the_commands(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    for command in (
        "bash training_examples/train_toybox.sh MEDIA",
        "benchmarks/evaluate.py",
    ):
        assert command in card


def test_its_configs_name_no_folder_of_the_training_machine(folder):
    for file in folder.glob("*/config.json"):
        assert not json.loads(file.read_text()).get("_name_or_path"), file


def test_its_defaults(toybox):
    config = toybox.config
    assert (config.default_height, config.default_width, config.default_num_frames) == (64, 64, 16)
    assert config.default_frame_rate == 8
    assert toybox.vae.config.latents_mean is not None and toybox.vae.config.latents_std is not None
    assert toybox.transformer.dtype == torch.float32 and toybox.text_encoder.dtype == torch.bfloat16


def test_its_tokenizers_are_the_final_ones(folder):
    """Every checkpoint depends on the token ids."""
    for suffix, expected in zip(("", "_2", "_3"), load_script("train_text_encoders").build_tokenizers(), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(folder / f"tokenizer{suffix}")
        assert tokenizer.get_vocab() == expected.get_vocab()
        assert tokenizer.model_max_length == expected.model_max_length
        for text in ("crimson sphere", "Ein grüner Stern, très bien 🎉", 'a sign "</s>"'):
            assert tokenizer(text).input_ids == expected(text).input_ids
            assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@torch.no_grad()
def test_the_vision_half_of_its_clip_travels_along(folder):
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    processor = CLIPImageProcessor.from_pretrained(folder / "image_processor")
    generator = torch.Generator().manual_seed(0)
    pictures = render(draw_scenes(sample_tuples(2, generator), generator), num_frames=1)[:, :, 0]
    pixels = processor(list(pictures), return_tensors="pt").pixel_values
    embeds = encoder(pixels.to(encoder.dtype)).image_embeds
    assert embeds.isfinite().all() and not torch.allclose(embeds[0], embeds[1])


@pytest.mark.parametrize("num_frames", [1, 16])
def test_it_shows_what_a_held_out_prompt_says(toybox, num_frames):
    """A coarse check that the weights belong to the code; benchmarks/evaluate.py has the figures."""
    motions = {"motions": ("stays still",)} if num_frames == 1 else {}
    tuples = sample_tuples(8, torch.Generator().manual_seed(0), held_out=True, **motions)
    prompts = [core_caption(c, s, m if num_frames > 1 else None, b) for c, s, m, b in tuples]
    frames = toybox(
        prompts,
        num_frames=num_frames,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    rows = compare(see((frames.transpose(1, 2) * 255).round().to(torch.uint8), 8), tuples)
    for name in ("colour", "background"):
        assert sum(row[name] for row in rows) >= 5, name


@torch.no_grad()
def test_its_autoencoder_joins_tiles_without_a_jump(toybox):
    """On real clips: frames on either side of a tile's border differ no more than other neighbours."""
    generator = torch.Generator().manual_seed(0)
    moving = [words for words in sample_tuples(40, generator) if words[2].startswith("moves")][:3]
    video = render(draw_scenes(moving, generator), num_frames=64).float() / 127.5 - 1
    toybox.vae.enable_tiling()
    latents = toybox.vae.encode(video).latent_dist.mode()
    decoded = toybox.vae.decode(latents, num_frames=64).sample
    toybox.vae.disable_tiling()
    jumps = decoded.diff(dim=2).abs().mean(dim=(1, 3, 4))
    # The decoder's tiles of 32 frames start every 16 frames, the encoder's every 32.
    borders = torch.tensor([15, 31, 47])
    elsewhere = torch.ones(63, dtype=torch.bool)
    elsewhere[borders] = False
    assert (jumps[:, borders].amax(1) <= jumps[:, elsewhere].amax(1)).all()
    assert 10 * torch.log10(4 / (decoded - video).square().mean()) > 24


# --- Sound ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audio_folder():
    return Path(bundled_checkpoint("toybox-audio"))


@pytest.fixture(scope="module")
def toybox_audio(audio_folder, tmp_path_factory):
    """Loaded from a copy, so that nothing beside the folder can be part of it."""
    copy = tmp_path_factory.mktemp("bundle") / "audio"
    shutil.copytree(audio_folder, copy)
    pipeline = MovieGenAudioPipeline.from_pretrained(copy)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_sound_is_small_enough_for_a_repository(audio_folder):
    sizes = {path: path.stat().st_size for path in audio_folder.rglob("*") if path.is_file()}
    assert {path.suffix for path in sizes} <= {".safetensors", ".json", ".md"}
    assert sum(sizes.values()) <= 8_000_000
    for file in audio_folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
        # bfloat16 costs the autoencoder 10 dB.
        assert dtypes == ({"F16"} if file.parent.name == "vae" else {"BF16"}), file


def test_sound_has_its_own_copy_of_the_text_encoder_and_an_image_encoder_of_its_own(folder, audio_folder):
    for name in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        assert (audio_folder / name).read_bytes() == (folder / name).read_bytes()
    name = "image_encoder/model.safetensors"
    assert (audio_folder / name).read_bytes() != (folder / name).read_bytes()
    processor = json.loads((audio_folder / "image_processor/preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 64, "width": 64} and not processor["do_center_crop"]


def test_the_model_card_of_sound_has_the_commands(audio_folder):
    card = (audio_folder / "README.md").read_text(encoding="utf-8")
    for command in ("bash training_examples/train_toybox_audio.sh MEDIA", "benchmarks/evaluate.py --task audio"):
        assert command in card
    for file in audio_folder.glob("*/config.json"):
        assert not json.loads(file.read_text()).get("_name_or_path"), file


def test_all_checkpoints_together_leave_room(folder):
    assert sum(path.stat().st_size for path in folder.parent.rglob("*") if path.is_file()) < 46_000_000


def test_sound_says_what_its_prompt_says(toybox_audio):
    """A coarse check that the weights belong to the code; benchmarks/evaluate.py has the figures."""
    prompts = ["a buzzer glides up", "a flute warbles", "a bell glides down", "a chime knocks"]
    audios = toybox_audio(
        prompts,
        audio_length_in_s=2,
        num_inference_steps=16,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).audios
    assert audios.shape == (4, 1, 96000)
    heard = [hearing.voice for hearing in listen(audios)]
    assert sum(voice == prompt.split()[1] for voice, prompt in zip(heard, prompts, strict=True)) >= 2
