import logging
from fractions import Fraction

import pytest
import torch

from diffusers_moviegen.pipelines import add_frame_rate_prefix, encode_texts, frame_rate_prefix, quoted_text
from tests.tiny import CLIP_POSITIONS, TEXT_WIDTH, TEXT_WIDTH_2, TEXT_WIDTH_3, tiny_pipeline


SUFFIXES = ("", "_2", "_3")


@pytest.mark.parametrize(
    "frame_rate, expected",
    [(8, "FPS-8: "), (16.0, "FPS-16: "), (Fraction(24000, 1001), "FPS-23.976: "), (12.5, "FPS-12.5: ")],
)
def test_frame_rate_prefix(frame_rate, expected):
    assert frame_rate_prefix(frame_rate) == expected


@pytest.mark.parametrize(
    "prompt, num_frames, expected",
    [
        ("a circle", 9, "FPS-8: a circle"),
        ("Pan left. a circle", 9, "FPS-8: Pan left. a circle"),
        ("a circle", 1, "a circle"),
        ("", 9, ""),
        ("  ", 9, "  "),
        ("", 1, ""),
    ],
)
def test_add_frame_rate_prefix(prompt, num_frames, expected):
    assert add_frame_rate_prefix(prompt, 8, num_frames) == expected


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("a red circle", ""),
        ('a sign that says "STOP"', "STOP"),
        ('"ab" over "c d"', "ab c d"),
        ("a sign that says \u201cSTOP\u201d", "STOP"),
        ("it's a dog's 'bone'", ""),
        ('a 5" disc', ""),
        ('an empty "" sign', ""),
        ('a sign "unfinished', ""),
    ],
)
def test_quoted_text(prompt, expected):
    assert quoted_text(prompt) == expected


def test_encode_prompt_shapes_and_masks(pipeline):
    embeds = pipeline.encode_prompt(["a circle", 'a long blue square says "HI"'], num_frames=9, frame_rate=8)
    lengths = {"": ["FPS-8: a circle", 'FPS-8: a long blue square says "HI"'], "_3": ["", "HI"]}
    lengths["_2"] = lengths[""]
    for suffix, width, special_tokens in zip(
        SUFFIXES, (TEXT_WIDTH, TEXT_WIDTH_2, TEXT_WIDTH_3), (1, 2, 1), strict=True
    ):
        features, mask = embeds[f"prompt_embeds{suffix}"], embeds[f"prompt_attention_mask{suffix}"]
        longest = max(len(text) for text in lengths[suffix]) + special_tokens
        assert features.shape == (2, longest, width)
        assert mask.shape == (2, longest)
        assert mask.dtype == torch.bool
        # A prompt without text to draw has no token for ByT5, not even the one that ends a text.
        expected = [len(text) + special_tokens if text else 0 for text in lengths[suffix]]
        assert mask.sum(1).tolist() == expected
        assert not features.requires_grad


def test_each_encoder_reads_its_text(pipeline):
    prompt = 'a circle and "HI" and "ho"'
    embeds = pipeline.encode_prompt(prompt, "blurry", num_frames=9, frame_rate=12)
    texts = {
        "": ("FPS-12: " + prompt, "blurry"),
        "_2": ("FPS-12: " + prompt, "blurry"),
        "_3": ("HI ho", ""),
    }
    with torch.no_grad():
        for suffix, (text, negative_text) in texts.items():
            encode = (getattr(pipeline, f"tokenizer{suffix}"), getattr(pipeline, f"text_encoder{suffix}"))
            assert torch.equal(embeds[f"prompt_embeds{suffix}"], encode_texts([text], *encode)[0])
            assert torch.equal(embeds[f"negative_prompt_embeds{suffix}"], encode_texts([negative_text], *encode)[0])
    assert not embeds["negative_prompt_attention_mask_3"].any()


def test_image_prompt_has_no_prefix(pipeline):
    image = pipeline.encode_prompt("FPS-8: a circle", num_frames=1)
    video = pipeline.encode_prompt("a circle", num_frames=9, frame_rate=8)
    assert torch.equal(image["prompt_embeds"], video["prompt_embeds"])


def test_encode_prompt_takes_frames_and_rate_from_the_checkpoint():
    pipeline = tiny_pipeline(default_num_frames=9, default_frame_rate=24)
    default = pipeline.encode_prompt("a circle")
    explicit = pipeline.encode_prompt("a circle", num_frames=9, frame_rate=24)
    assert torch.equal(default["prompt_embeds"], explicit["prompt_embeds"])


def test_padding_does_not_change_features(pipeline):
    long_prompt = "a large yellow triangle spins and says " + '"HELLO"'
    batch = pipeline.encode_prompt(["a circle", long_prompt])
    single = pipeline.encode_prompt("a circle")
    for suffix in SUFFIXES:
        mask = batch[f"prompt_attention_mask{suffix}"][0]
        assert mask.sum() == single[f"prompt_attention_mask{suffix}"].sum()
        features = batch[f"prompt_embeds{suffix}"][0][mask]
        expected = single[f"prompt_embeds{suffix}"][0][: len(features)]
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_negative_prompts(pipeline):
    prompts = ["a circle", "a square"]
    default = pipeline.encode_prompt(prompts)
    empty = pipeline.encode_prompt(prompts, ["", ""])
    shared = pipeline.encode_prompt(prompts, "blurry")
    listed = pipeline.encode_prompt(prompts, ["blurry", "blurry"])
    assert torch.equal(default["negative_prompt_embeds"], empty["negative_prompt_embeds"])
    assert torch.equal(shared["negative_prompt_embeds"], listed["negative_prompt_embeds"])
    assert shared["negative_prompt_embeds"].shape[0] == 2
    without = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert not any(name.startswith("negative") for name in without)
    with pytest.raises(ValueError, match="`negative_prompt` has 1 entries for 2 prompts"):
        pipeline.encode_prompt(prompts, ["blurry"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_have_the_dtype_of_the_transformer(dtype):
    pipeline = tiny_pipeline()
    pipeline.transformer.to(dtype)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        encoder.to(torch.bfloat16)
    embeds = pipeline.encode_prompt("a circle")
    assert {embeds[f"prompt_embeds{suffix}"].dtype for suffix in SUFFIXES} == {dtype}
    embeds = pipeline.encode_prompt("a circle", dtype=torch.float16)
    assert {embeds[f"prompt_embeds{suffix}"].dtype for suffix in SUFFIXES} == {torch.float16}


def test_encoding_without_a_transformer():
    encoders_only = tiny_pipeline(transformer=None, vae=None)
    embeds = encoders_only.encode_prompt("a circle")
    expected = tiny_pipeline().encode_prompt("a circle")
    assert embeds.keys() == expected.keys()
    assert all(torch.equal(embeds[name], expected[name]) for name in embeds)


def test_names_of_special_tokens_are_text(pipeline):
    text = "a </s> b <pad>"
    for suffix, special_tokens in zip(SUFFIXES, (1, 2, 1), strict=True):
        encode = (getattr(pipeline, f"tokenizer{suffix}"), getattr(pipeline, f"text_encoder{suffix}"))
        for max_length in (None, 40):
            embeds, mask = encode_texts([text, ""], *encode, max_length=max_length)
            assert mask.sum(1).tolist() == [len(text) + special_tokens, special_tokens]
        assert embeds.shape[1] == len(text) + special_tokens


@pytest.mark.parametrize("prompt, message", [([], "is an empty list"), (3, "got int"), ([None], "list with NoneType")])
def test_what_is_no_text(pipeline, prompt, message):
    with pytest.raises(ValueError, match=f"`prompt` .*{message}"):
        pipeline.encode_prompt(prompt)
    with pytest.raises(ValueError, match=f"`negative_prompt` .*{message}"):
        pipeline.encode_prompt("a circle", prompt)


def test_encoder_of_another_checkpoint(pipeline):
    pipeline.text_encoder = pipeline.text_encoder_3
    with pytest.raises(ValueError, match=r"`text_encoder` \(UL2\) gives features of width 16, .* takes 32; load the"):
        pipeline.encode_prompt("a circle")


@pytest.mark.parametrize("component", ["tokenizer", "text_encoder_2", "tokenizer_3"])
def test_missing_encoder(component):
    pipeline = tiny_pipeline(**{component: None})
    with pytest.raises(ValueError, match=f"`{component}` .* is None"):
        pipeline.encode_prompt("a circle")


def test_truncation_names_the_lost_words(pipeline, caplog):
    prompt = "a red circle bounces"
    with caplog.at_level(logging.WARNING, logger="diffusers_moviegen"):
        embeds = pipeline.encode_prompt(prompt, num_frames=1, max_sequence_length=len("a red circle") + 1)
    assert "UL2 reads 13 tokens of a prompt; this part is cut off: 'bounces'" in caplog.text
    assert "MetaCLIP" not in caplog.text
    assert embeds["prompt_embeds"].shape[1] == 13
    # What is kept ends like every text.
    kept = pipeline.encode_prompt("a red circle", num_frames=1)
    assert torch.equal(embeds["prompt_embeds"], kept["prompt_embeds"])


def test_clip_and_byt5_limits(pipeline, caplog):
    drawn = "x" * 47
    prompt = "y" * (CLIP_POSITIONS - 2 - len(drawn) - 3) + f' "{drawn}'
    with caplog.at_level(logging.WARNING, logger="diffusers_moviegen"):
        pipeline.encode_prompt(prompt + '"', num_frames=1)
        assert caplog.text == ""
        embeds = pipeline.encode_prompt(prompt + 'Z" lost', num_frames=1)
    assert "MetaCLIP reads 64 tokens" in caplog.text and "lost" in caplog.text
    assert "ByT5 reads 48 tokens of a prompt; this part is cut off: 'Z'" in caplog.text
    assert "UL2" not in caplog.text
    assert embeds["prompt_embeds_2"].shape[1] == CLIP_POSITIONS
    assert embeds["prompt_embeds_3"].shape[1] == 48


def test_tokenizers_without_a_limit():
    pipeline = tiny_pipeline()
    pipeline.tokenizer_2.model_max_length = int(1e30)
    pipeline.tokenizer_3.model_max_length = int(1e30)
    embeds = pipeline.encode_prompt("x" * 100 + ' "' + "y" * 60 + '"', num_frames=1)
    assert embeds["prompt_embeds_2"].shape[1] == CLIP_POSITIONS
    assert embeds["prompt_embeds_3"].shape[1] == 61
