"""The tokenizers of the Toybox checkpoint, and a short run of the script that trains its text encoders."""

import random

import pytest
import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
)

from diffusers_moviegen.toybox import captions, scenes
from diffusers_moviegen.toybox.vocabulary import is_held_out
from tests.training_examples.scripts import load_script, run_without_av_and_datasets


TEXTS = [
    "",
    " ",
    "a red circle bounces on a grey background",
    'FPS-16: Zoom in. an orange disc with the word "QXJ"',
    "crimson sphere",
    "RED Red rEd",
    "  leading, trailing and   several spaces  ",
    "\ttabs\nand lines\r\n",
    "don't, we've, it's 3.14 (or 1,000%)",
    "Ein grüner Stern hüpft, à côté d'un élève; Ελληνικά, 日本語, العربية",
    "e\u0301 is not \u00e9, and \u2581 or \u0120 are no spaces",
    "names of special tokens: </s> <pad> <mask> <|startoftext|> <|endoftext|> <unk> <extra_id_0>",
    "emoji 🎉👩‍🚀🏳️‍🌈",
    "A plump grey cartoon bird on a branch spreads its wings and sings.",
    "A slow camera move over a pink pond with grass, flowers and lily pads, birds singing.",
    "A red-haired girl among ruins at sunset turns, walks and shouts with her hands to her head.",
    "Dragons fly over a ruined city at sunset; a frightened girl's face in close-up.",
    "A wide desert of yellow dunes, a tiny figure walking along a crest.",
    "The camera rushes past ruined towers at sunset while a red dragon flies by.",
    "A girl in a hooded coat with a staff walks through a snow storm.",
    "A shallow stream runs around stones in bright sunlight, water murmuring.",
    "Violent camera shake through a battle in a ruined church, gun fire.",
    "Soldiers crouch in a great domed hall, then machine parts shake in close-up.",
    "A soldier stands at a railing with ropes, then lies wounded on the ground.",
    "A large black bee on a pink thistle takes off and flies away.",
    "A space shuttle turns slowly above a reddish desert planet surface, seen from orbit.",
    "A big grey rabbit crawls out of its burrow and stretches on green grass.",
    "A dragon crosses a ruined city at sunset.",
    "Men fight in a ruined church, gun fire and debris, fast camera.",
    "A black and orange butterfly opens and closes its wings on a thistle.",
    "Technicians on a lift inspect the golden mirrors of a space telescope.",
]


@pytest.fixture(scope="module")
def script():
    return load_script("train_text_encoders")


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory):
    """What a run of a few steps writes."""
    folder = tmp_path_factory.mktemp("text_encoders")
    arguments = script.Arguments(
        output_dir=str(folder), steps=2, steps_2=2, steps_3=2, batch_size=4, batch_size_2=4, log_every=1
    )
    script.main(arguments)
    return folder


@pytest.fixture(scope="module")
def tokenizers(folder):
    """The three tokenizers as a pipeline loads them."""
    return [AutoTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_decodes_to_itself(tokenizers, text):
    for tokenizer in tokenizers:
        input_ids = tokenizer(text).input_ids
        assert tokenizer.decode(input_ids, skip_special_tokens=True) == text
        assert input_ids[-1] == tokenizer.eos_token_id and input_ids.count(tokenizer.eos_token_id) == 1


def test_special_tokens_and_lengths(tokenizers):
    assert [tokenizer.model_max_length for tokenizer in tokenizers] == [512, 256, 128]
    for tokenizer in tokenizers:
        assert tokenizer.pad_token_id == 0
        batch = tokenizer(["a red circle", "red"], padding=True, return_tensors="pt")
        assert set(batch) == {"input_ids", "attention_mask"}
        assert (batch.input_ids.eq(0) == batch.attention_mask.eq(0)).all() and batch.attention_mask.min() == 0
    long = tokenizers[1]("red " * 400, truncation=True).input_ids
    assert len(long) == 256 and long[0] == tokenizers[1].bos_token_id and long[-1] == tokenizers[1].eos_token_id
    assert tokenizers[0]("a red circle").input_ids[:2] == tokenizers[0](" a red circle").input_ids[1:3]


def test_every_known_word_is_reached(script, tokenizers):
    """No entry of the vocabulary is dead: each is what its own text becomes."""
    for tokenizer in tokenizers[:2]:
        assert len(tokenizer) < 1500
        words = script.TOYBOX_WORDS + script.OTHER_WORDS
        assert len(set(words)) == len(words)
        for word in words + [word[0].upper() + word[1:] for word in words] + ["FPS"] + script.NUMBERS:
            assert tokenizer.tokenize(word) == [f"Ġ{word}"]
        for number in script.NUMBERS:
            assert tokenizer.tokenize(f"FPS-{number}: ")[2] == number
        for mark in script.PUNCTUATION:
            assert mark.replace(" ", "Ġ") in tokenizer.tokenize(f"red{mark}red" if mark[0] != " " else f"red{mark}")


@pytest.mark.parametrize("kind", captions.CAPTION_KINDS)
def test_toybox_captions_need_no_bytes(tokenizers, kind):
    """Each word is one token; only the letters of a written word are single bytes."""
    rng = random.Random(0)
    seen = {captions.sample_caption(kind, rng)[0] for _ in range(10000)}
    if kind != "text":
        words = {word.strip('.,:"') for text in seen for word in text.split()}
        for tokenizer in tokenizers[:2]:
            assert {word for word in words if len(tokenizer.tokenize(word)) != 1} == set()
    for tokenizer in tokenizers[:2]:
        for text in list(seen)[:500]:
            caption, _, word = text.partition(' with the word "')
            tokens = tokenizer.tokenize(text)
            assert "".join(token.replace("Ġ", " ") for token in tokens) == f" {text}"
            marks = sum(caption.count(mark) for mark in ".,:")
            assert len(tokens) == len(caption.split()) + marks + (4 + len(word) if word else 0)


def test_components_load_and_agree(folder, tokenizers):
    """The folder holds plain transformers components in bfloat16 whose sizes fit the tokenizers."""
    parameters = 0
    for suffix, encoder_class in (("", T5EncoderModel), ("_2", CLIPTextModel), ("_3", T5EncoderModel)):
        encoder = encoder_class.from_pretrained(folder / f"text_encoder{suffix}")
        tokenizer = tokenizers[len(suffix) and int(suffix[1:]) - 1]
        assert encoder.dtype == torch.bfloat16
        assert encoder.get_input_embeddings().num_embeddings == len(tokenizer)
        assert encoder.config.eos_token_id == tokenizer.eos_token_id and encoder.config.pad_token_id == 0
        batch = tokenizer(["a red circle", "CAT"], padding=True, return_tensors="pt")
        features = encoder(batch.input_ids, attention_mask=batch.attention_mask)
        assert features.last_hidden_state.isfinite().all()
        if suffix == "_2":
            assert encoder.config.max_position_embeddings == tokenizer.model_max_length
            ends = batch.attention_mask.sum(1) - 1
            torch.testing.assert_close(features.pooler_output, features.last_hidden_state[torch.arange(2), ends])
        parameters += encoder.num_parameters()

    image_encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    processor = CLIPImageProcessor.from_pretrained(folder / "image_processor")
    generator = torch.Generator().manual_seed(0)
    drawn = scenes.draw_scenes(scenes.sample_tuples(2, generator), generator)
    pictures = scenes.render(drawn, num_frames=1)[:, :, 0]
    pixels = processor(list(pictures), return_tensors="pt").pixel_values
    # The script normalises by itself while it trains.
    torch.testing.assert_close(pixels, pictures.float() / 127.5 - 1, atol=1e-5, rtol=0)
    assert image_encoder(pixels.to(image_encoder.dtype)).image_embeds.shape == (2, 64)
    assert parameters + image_encoder.num_parameters() < 3_000_000


def test_training_never_sees_a_held_out_tuple(script, monkeypatch):
    """Sentences and pictures of a run are all from training tuples, and the swapped captions are, too."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    rendered = []
    render = scenes.render
    monkeypatch.setattr(
        script.scenes, "render", lambda group, **kwargs: rendered.append(group) or render(group, **kwargs)
    )
    said = []
    for name in ("core_caption", "phrase", "two_object_caption", "phrase_two_objects"):
        function = getattr(captions, name)
        monkeypatch.setattr(
            script.captions, name, lambda *words, function=function: said.append(words) or function(*words)
        )
    swapped = []
    for _ in range(10):
        swapped += [text for text in script.draw_pictures(32, generator, rng)[2] if text is not None]
    assert len(said) > 320 + 50 and len(swapped) == len(said) - 320
    for group in rendered:
        assert not any(is_held_out(*words) for i in range(len(group)) for words in group.tuples(i))
    for words in said:
        if isinstance(words[0], list):
            tuples = [(*parts, words[1]) for parts in words[0]]
        else:
            tuples = [words[:4]]
        assert not any(is_held_out(parts[0], parts[1], parts[2] or "stays still", parts[3]) for parts in tuples)


def test_labels_bind_words_to_their_objects(script, tokenizers):
    bindings = script.Bindings(tokenizers[0])
    fields = {
        "objects": [
            {"colour": "red", "shape": "circle", "motion": "grows"},
            {"colour": "blue", "shape": "star", "motion": "spins"},
        ],
        "background": "navy",
        "single_frame": False,
    }
    token_ids = tokenizers[0]("a red ball grows and a blue star spins on a navy background").input_ids
    labels = set(bindings(token_ids, fields, causal=False))
    value = {name: values.index for name, values in script.FIELDS.items()}
    assert (2, "colour", value["colour"]("red")) in labels and (1, "shape", value["shape"]("circle")) in labels
    assert (6, "shape", value["shape"]("star")) in labels and (7, "motion", value["motion"]("spins")) in labels
    assert (script.POOLED, "background", value["background"]("navy")) in labels
    causal = set(bindings(token_ids, fields, causal=True))
    assert causal < labels and (1, "shape", value["shape"]("circle")) not in causal
    assert (2, "colour", value["colour"]("red")) in causal


def test_runs_repeat(script, folder, tmp_path):
    """The same seed gives the same weights; another gives others."""
    for seed in (0, 1):
        arguments = script.Arguments(
            output_dir=str(tmp_path / str(seed)),
            parts="text_encoder",
            steps=2,
            batch_size=4,
            log_every=1,
            seed=seed,
        )
        script.main(arguments)
    first, same, other = (
        T5EncoderModel.from_pretrained(path / "text_encoder").shared.weight.float()
        for path in (folder, tmp_path / "0", tmp_path / "1")
    )
    torch.testing.assert_close(first, same, atol=0, rtol=0)
    assert not torch.allclose(first, other)


def test_bad_arguments_are_named(script):
    for arguments, message in (
        ({"parts": "image_encoder"}, "--parts names .*image_encoder.*text_encoder_2"),
        ({"batch_size": 5}, "--batch_size is 5: use a multiple of 2"),
        ({"batch_size_2": 6}, "--batch_size_2 is 6: use a multiple of 4"),
        ({"steps_3": 0}, "--steps_3 is 0: it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            script.Arguments(output_dir="x", **arguments)


def test_trains_without_av_and_datasets(tmp_path):
    run_without_av_and_datasets(
        "train_text_encoders",
        tmp_path,
        output_dir=tmp_path / "run",
        **{"steps": 1, "steps_2": 1, "steps_3": 1, "batch_size": 4, "batch_size_2": 4},
    )
    assert len(list((tmp_path / "run").glob("*/*.safetensors"))) == 4
