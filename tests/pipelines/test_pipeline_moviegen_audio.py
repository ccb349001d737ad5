import copy
import logging

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler

from diffusers_moviegen import AutoencoderDACVAE, MovieGenAudioPipeline
from diffusers_moviegen.pipelines import add_control_prefix, resample_frame_features, triangular_window
from tests.tiny import (
    AUDIO_HOP,
    AUDIO_RATE,
    AUDIO_SEGMENT,
    TEXT_WIDTH,
    VIDEO_WIDTH,
    tiny_audio_pipeline,
    tiny_audio_vae,
    tiny_image_encoder,
    tiny_t5_encoder,
)


PROMPT = "a bell knocks"
PREFIX = "Quality: 9. Music: no. "
FRAME_RATE = 10


@pytest.fixture
def pipe():
    return tiny_audio_pipeline()


def seed(value=0):
    return torch.Generator().manual_seed(value)


def film(num_frames=4, value=0):
    """`num_frames` of noise, uint8 `(frames, 3, height, width)`."""
    return torch.randint(256, (num_frames, 3, 18, 24), dtype=torch.uint8, generator=seed(value))


def noise(num_samples, value=0, channels=1):
    return torch.rand(channels, num_samples, generator=seed(value)) - 0.5


def generate(pipe, prompt=PROMPT, output_type="latent", **kwargs):
    arguments = {"num_inference_steps": 2, "generator": seed(), "output_type": output_type, **kwargs}
    if arguments.get("video") is None and arguments.get("video_embeds") is None:
        arguments.setdefault("audio_length_in_s", 0.4)
    else:
        arguments.setdefault("video_frame_rate", FRAME_RATE)
    return pipe(prompt, **arguments).audios


def text_features(pipe, text):
    return pipe.text_encoder(pipe.tokenizer(text, return_tensors="pt").input_ids).last_hidden_state


def midpoint(velocity, latents, num_steps):
    """The midpoint method from sigma 1 to 0, written out."""
    with torch.no_grad():
        for step in range(num_steps):
            sigma = 1 - step / num_steps
            middle = latents - 0.5 / num_steps * velocity(latents, torch.tensor([1000 * sigma]))
            latents = latents - 1 / num_steps * velocity(middle, torch.tensor([1000 * (sigma - 0.5 / num_steps)]))
    return latents


# 1. Output


def test_output_types(pipe):
    arrays = generate(pipe, output_type="np")
    assert arrays.shape == (1, 1, 80) and arrays.dtype == np.float32
    tensors = generate(pipe, output_type="pt")
    np.testing.assert_array_equal(tensors.numpy(), arrays)
    latents = generate(pipe)
    assert latents.shape == (1, 6, 10) and latents.dtype == torch.float32
    config = pipe.vae.config
    mean, std = (torch.tensor(values)[:, None] for values in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        decoded = pipe.vae.decode(latents * std + mean).sample
    torch.testing.assert_close(tensors, decoded, atol=1e-5, rtol=1e-4)


def test_output_object_and_tuple(pipe):
    output = pipe(PROMPT, audio_length_in_s=0.2, num_inference_steps=1)
    assert isinstance(output.audios, np.ndarray) and output.sampling_rate == AUDIO_RATE
    audios = pipe(PROMPT, audio_length_in_s=0.2, num_inference_steps=1, return_dict=False)
    assert isinstance(audios, tuple) and audios[0].shape == (1, 1, 40)


@pytest.mark.parametrize(
    "num_frames, frame_rate, num_samples",
    [(1, 25, 8), (5, 24000 / 1001, 42), (7, 8, 175), (3, 12.5, 48), (4, 29.97, 27), (2, np.float32(3), 133)],
)
def test_sound_lasts_as_long_as_the_video(pipe, num_frames, frame_rate, num_samples):
    audios = generate(pipe, None, video=film(num_frames), video_frame_rate=frame_rate, output_type="np")
    assert audios.shape == (1, 1, num_samples)


@pytest.mark.parametrize(
    "num_frames, frame_rate, num_samples", [(5, 30000 / 1001, 8008), (3, 23.976, 6006), (7, 60, 5600), (1, 15, 3200)]
)
def test_length_at_48_khz(num_frames, frame_rate, num_samples):
    vae = AutoencoderDACVAE(encoder_hidden_size=2, decoder_hidden_size=16, latent_channels=6)
    pipe = tiny_audio_pipeline(vae=vae, segment_length_in_s=10)
    audios = generate(pipe, "", video=film(num_frames), video_frame_rate=frame_rate, output_type="np")
    assert audios.shape == (1, 1, num_samples)


def test_length_that_a_file_states(pipe):
    audios = generate(pipe, None, video=film(4), audio_length_in_s=0.43, output_type="np")
    assert audios.shape == (1, 1, 86)


@pytest.mark.parametrize("seconds, num_samples", [(0.005, 1), (0.04, 8), (0.333, 67), (1.0, 200)])
def test_any_length_without_a_video(pipe, seconds, num_samples):
    assert generate(pipe, audio_length_in_s=seconds, output_type="np").shape == (1, 1, num_samples)


def test_defaults_come_from_the_checkpoint(pipe):
    assert torch.equal(generate(pipe), generate(pipe, guidance_scale=3.0))
    assert pipe.guidance_scale == 3.0
    other = tiny_audio_pipeline(default_guidance_scale=1.0, default_num_inference_steps=1)
    latents = generate(other, num_inference_steps=None)
    assert other.num_timesteps == 2
    assert torch.equal(latents, generate(pipe, guidance_scale=1.0, num_inference_steps=1))
    assert pipe.config.default_num_inference_steps == 64


# 2. What is computed


def test_against_a_plain_loop(pipe):
    guidance_scale, video = 4.0, film()
    latents = torch.randn(1, 6, 10, generator=seed(5))
    result = generate(
        pipe,
        video=video,
        negative_prompt="music",
        guidance_scale=guidance_scale,
        num_inference_steps=3,
        latents=latents,
    )
    with torch.no_grad():
        pixels = pipe.image_processor(list(video), return_tensors="pt").pixel_values
        features = pipe.image_encoder(pixels).image_embeds[None]
        cond = {
            "encoder_hidden_states": text_features(pipe, PREFIX + PROMPT),
            "video_hidden_states": resample_frame_features(features, FRAME_RATE, 10),
        }
        uncond = {"encoder_hidden_states": text_features(pipe, "music")}

    def velocity(sample, timestep):
        predictions = [pipe.transformer(sample, timestep, **condition).sample for condition in (cond, uncond)]
        return predictions[1] + guidance_scale * (predictions[0] - predictions[1])

    torch.testing.assert_close(result, midpoint(velocity, latents, 3), atol=1e-4, rtol=1e-4)


def test_unconditional_branch_knows_neither_text_nor_video(pipe):
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    generate(pipe, video=film(), num_inference_steps=1)
    assert len(calls) == 4
    for call in calls[::2]:
        assert call["encoder_hidden_states"] is not None and call["video_hidden_states"].shape == (1, 10, VIDEO_WIDTH)
    for call in calls[1::2]:
        assert call["encoder_hidden_states"] is None and call.get("video_hidden_states") is None


@pytest.mark.parametrize("guidance_scale, calls", [(1.0, 6), (0.0, 6), (1.5, 12)])
def test_model_calls(pipe, guidance_scale, calls):
    count = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: count.append(1))
    generate(pipe, guidance_scale=guidance_scale, num_inference_steps=3)
    assert len(count) == calls
    assert pipe.num_timesteps == 6


def test_progress_counts_steps(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    generate(pipe, num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(pipe, dtype):
    expected = generate(pipe, video=film(), audio=noise(40))
    calls = []
    pipe.to(dtype).transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    latents = generate(pipe, video=film(), audio=noise(40))
    for call in calls:
        assert call["hidden_states"].dtype == call["audio_context"].dtype == dtype
        assert call["timestep"].dtype == torch.float32
    assert calls[0]["encoder_hidden_states"].dtype == calls[0]["video_hidden_states"].dtype == dtype
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, atol=0.1, rtol=0.05)


def test_batch_gives_what_single_calls_give(pipe):
    prompts = [PROMPT, "a much longer prompt about rain", ""]
    negative_prompts = ["music", "", "a very long negative prompt"]
    videos = torch.stack([film(value=i) for i in range(3)])
    arguments = {"generator": [seed(i) for i in range(3)]}
    batch = generate(pipe, prompts, negative_prompt=negative_prompts, video=videos, **arguments)
    for i, (prompt, negative_prompt) in enumerate(zip(prompts, negative_prompts, strict=True)):
        single = generate(pipe, prompt, negative_prompt=negative_prompt, video=videos[i], generator=seed(i))
        torch.testing.assert_close(batch[i : i + 1], single, atol=1e-5, rtol=1e-4)


def test_one_serves_all(pipe):
    videos = torch.stack([film(value=i) for i in range(2)])
    generators = [seed(i) for i in range(2)]
    latents = generate(pipe, PROMPT, video=videos, generator=[seed(0), seed(1)])
    for i, video in enumerate(videos):
        single = generate(pipe, PROMPT, video=video, generator=generators[i])
        torch.testing.assert_close(latents[i : i + 1], single, atol=1e-5, rtol=1e-4)
    latents = generate(pipe, ["a bell", "rain"], video=film(), negative_prompt="music", audio=noise(30))
    assert latents.shape == (2, 6, 10)


def test_what_is_asked_for_matters(pipe):
    latents = generate(pipe)
    assert torch.equal(latents, generate(pipe))
    assert not torch.allclose(latents, generate(pipe, "rain"), atol=1e-4)
    assert not torch.allclose(latents, generate(pipe, generator=seed(1)), atol=1e-2)
    assert not torch.allclose(latents, generate(pipe, negative_prompt="music"), atol=1e-4)
    with_video = generate(pipe, video=film())
    assert not torch.allclose(latents, with_video, atol=1e-4)
    assert not torch.allclose(generate(pipe, video=film(value=1)), with_video, atol=1e-4)


def test_other_flow_scheduler(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    assert generate(pipe).isfinite().all()
    assert pipe.num_timesteps == 2


# 3. Text


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("rain", PREFIX + "rain"),
        ("Quality: 10. Music: yes. rain", "Quality: 10. Music: yes. rain"),
        ("Quality: ten. Music: yes. rain", PREFIX + "Quality: ten. Music: yes. rain"),
        (PREFIX, PREFIX),
        ("", ""),
        (" ", " "),
    ],
)
def test_control_prefix(prompt, expected):
    assert add_control_prefix(prompt, PREFIX) == expected
    assert add_control_prefix(prompt, None) == prompt


def test_prefix_is_added_to_prompts_only(pipe):
    embeds = pipe.encode_prompt(["rain", PREFIX + "rain", ""], ["rain", "rain", ""])
    assert embeds["prompt_embeds"].shape == (3, len(PREFIX + "rain") + 1, TEXT_WIDTH)
    assert torch.equal(embeds["prompt_embeds"][0], embeds["prompt_embeds"][1])
    torch.testing.assert_close(embeds["prompt_embeds"][:1], text_features(pipe, PREFIX + "rain"))
    assert embeds["negative_prompt_embeds"].shape == (3, 5, TEXT_WIDTH)
    # No text is nothing to attend to, not even an end token.
    for name in ("prompt_attention_mask", "negative_prompt_attention_mask"):
        assert embeds[name].tolist()[:2] == [[True] * embeds[name].shape[1]] * 2
        assert not embeds[name][2].any()
    without = tiny_audio_pipeline(default_control_prefix=None)
    assert without.encode_prompt("rain")["prompt_embeds"].shape[1] == 5


def test_a_video_without_a_prompt_gets_the_prefix_alone(pipe):
    latents = generate(pipe, None, video=film())
    assert torch.equal(latents, generate(pipe, PREFIX, video=film()))
    without_text = generate(pipe, "", video=film())
    assert not torch.allclose(latents, without_text, atol=1e-4)
    pipe.register_to_config(default_control_prefix=None)
    assert torch.equal(generate(pipe, None, video=film()), without_text)


def test_embeddings_can_be_passed_back_and_encoders_freed(pipe):
    prompts = [PROMPT, "rain"]
    expected = generate(pipe, prompts, video=film(), negative_prompt="music")
    embeds = pipe.encode_prompt(prompts, "music")
    video_embeds = pipe.encode_video(film())
    pipe.tokenizer = pipe.text_encoder = pipe.image_processor = pipe.image_encoder = None
    for given in (video_embeds, video_embeds[0]):
        latents = generate(pipe, None, video_embeds=given, **embeds)
        torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-4)
    doubled = {name: tensor if tensor.dtype == torch.bool else tensor.double() for name, tensor in embeds.items()}
    assert torch.equal(generate(pipe, None, video_embeds=video_embeds.double(), **doubled), latents)
    # No text needs no encoder.
    assert generate(pipe, "", video_embeds=video_embeds).isfinite().all()
    with pytest.raises(ValueError, match="`tokenizer` is None, so text cannot be encoded"):
        generate(pipe)
    with pytest.raises(ValueError, match="`image_processor` is None, so a video cannot be seen"):
        generate(pipe, "", video=film())


# 4. Video


def test_video_formats(pipe):
    tensor = film()
    expected = pipe.encode_video(tensor)
    assert expected.shape == (1, 4, VIDEO_WIDTH)
    array = tensor.permute(0, 2, 3, 1).numpy()
    images = [PIL.Image.fromarray(frame) for frame in array]
    singles = [tensor / 255, (tensor / 255).double(), array, array / 255.0, images, list(array), list(tensor)]
    for video in singles:
        torch.testing.assert_close(pipe.encode_video(video), expected, atol=1e-6, rtol=0)
    rgba = [image.convert("RGBA") for image in images]
    torch.testing.assert_close(pipe.encode_video(rgba), expected, atol=1e-6, rtol=0)
    for batch in (tensor[None].repeat(2, 1, 1, 1, 1), np.stack([array, array]), [images, images], [tensor, array]):
        torch.testing.assert_close(pipe.encode_video(batch), expected.expand(2, -1, -1), atol=1e-6, rtol=0)


def test_long_films_are_seen_in_parts(pipe):
    video = film(150)
    sizes = []
    pipe.image_encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    features = pipe.encode_video(video)
    assert sizes == [64, 64, 22]
    parts = torch.cat([pipe.encode_video(video[:100]), pipe.encode_video(video[100:])], dim=1)
    torch.testing.assert_close(features, parts, atol=1e-6, rtol=0)
    with torch.no_grad():
        pixels = pipe.image_processor(list(video), return_tensors="pt").pixel_values
        torch.testing.assert_close(features[0], pipe.image_encoder(pixels).image_embeds, atol=1e-6, rtol=0)


# 5. Given sound


def encoded(pipe, waveform):
    config = pipe.vae.config
    mean, std = (torch.tensor(values)[:, None] for values in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        return (pipe.vae.encode(waveform).latent_dist.mean - mean) / std


def test_extension(pipe):
    given = noise(42)
    audios = generate(pipe, audio=given, output_type="pt")
    # 10 ms are two samples.
    assert torch.equal(audios[0, :, :40], given[:, :40])
    latents = generate(pipe, audio=given)
    silence = torch.zeros(1, 1, 80)
    silence[..., :42] = given
    # Five whole latents are given, two of them next to the cut.
    torch.testing.assert_close(latents[..., :3], encoded(pipe, silence)[..., :3], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(latents[..., 3:], encoded(pipe, silence)[..., 3:], atol=0.1)
    generated = generate(pipe, audio=given, output_type="pt")[..., 42:]
    decoded = pipe.decode_latents(latents, 80).detach()
    torch.testing.assert_close(generated, decoded[..., 42:])


def test_filling_a_gap(pipe):
    given = noise(110)
    arguments = {
        "audio": given,
        "audio_start_in_s": 0.05,
        "audio_gap_in_s": (0.15, 0.25),
        "audio_length_in_s": 0.72,
    }
    masks = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["audio_context_mask"].tolist()), with_kwargs=True
    )
    audios = generate(pipe, output_type="pt", **arguments)[0]
    # Samples 10 to 40 and 60 to 120 are given, thus the latents 2 to 4 and 8 to 14 as a whole.
    assert torch.equal(audios[:, 12:38], given[:, 2:28])
    assert torch.equal(audios[:, 62:118], given[:, 52:108])
    assert masks == [[[False] * 10 + [True] * 3 + [False] * 5]] * 8
    decoded = pipe.decode_latents(generate(pipe, **arguments), 144)[0].detach()
    for unknown in (slice(0, 10), slice(40, 60), slice(120, 144)):
        torch.testing.assert_close(audios[:, unknown], decoded[:, unknown])


def test_both_branches_hear_what_is_given(pipe):
    calls = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            (kwargs["audio_context"].clone(), kwargs["audio_context_mask"].tolist())
        ),
        with_kwargs=True,
    )
    given = noise(40)
    generate(pipe, audio=given, num_inference_steps=1, num_waveforms_per_prompt=2)
    silence = torch.zeros(1, 1, 80)
    silence[..., :40] = given
    expected = encoded(pipe, silence)[..., :3].expand(2, -1, -1)
    assert len(calls) == 4
    for context, mask in calls:
        assert mask == [[True] * 3 + [False] * 7] * 2
        torch.testing.assert_close(context[..., :3], expected, atol=1e-5, rtol=1e-4)


def test_latents_at_given_sound_follow_the_known_path(pipe):
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    latents = torch.randn(1, 6, 10, generator=seed(3))
    generate(pipe, audio=noise(40), latents=latents, guidance_scale=1)
    context = seen[0]["audio_context"][..., :3]
    for call in seen:
        sigma = call["timestep"] / 1000
        expected = (1 - sigma) * context + sigma * latents[..., :3]
        torch.testing.assert_close(call["hidden_states"][..., :3], expected, atol=1e-5, rtol=1e-4)


def test_given_sound_matters(pipe):
    first, second = generate(pipe, audio=noise(40)), generate(pipe, audio=noise(40, value=1))
    assert not torch.allclose(first[..., 3:], second[..., 3:], atol=1e-4)


def test_given_sound_with_a_video_and_in_a_batch(pipe):
    given = torch.stack([noise(40), noise(40, value=1)])
    audios = generate(pipe, None, video=film(), audio=given, output_type="pt")
    assert torch.equal(audios[..., :38], given[..., :38])


def test_other_rates_and_channels(pipe, caplog):
    stereo = torch.sin(torch.arange(60) / 5)[None] * torch.tensor([[0.2], [0.6]])
    with caplog.at_level(logging.WARNING):
        logging.getLogger("diffusers").propagate = True
        audios = generate(pipe, audio=stereo, audio_sampling_rate=300, output_type="pt")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "The 2 channels of `audio` are mixed down to one.",
        "`audio` is resampled from 300 to 200 Hz.",
    ]
    expected = 0.4 * torch.sin(torch.arange(40) * 1.5 / 5)
    torch.testing.assert_close(audios[0, 0, 4:36], expected[4:36], atol=0.02, rtol=0)


def test_formats_of_given_sound(pipe):
    given = noise(40)
    expected = generate(pipe, audio=given)
    for audio in (given[0], given[None], given.numpy(), given.numpy().astype(np.float64)):
        torch.testing.assert_close(generate(pipe, audio=audio), expected)
    loud = generate(pipe, audio=given * 10, output_type="pt")
    assert loud.abs().max() == 1


# 6. Long sounds


def test_multidiffusion_against_a_plain_loop(pipe):
    num_latents, starts = 47, [0, 10, 20, 27]
    seconds = num_latents * AUDIO_HOP / AUDIO_RATE
    video = film(20)
    latents = torch.randn(1, 6, num_latents, generator=seed(1))
    result = generate(
        pipe, video=video, video_frame_rate=20 / seconds, audio_length_in_s=seconds, latents=latents, guidance_scale=2
    )
    features = resample_frame_features(pipe.encode_video(video), 20 / seconds, num_latents)
    text = text_features(pipe, PREFIX + PROMPT)
    weights = 1 - (torch.linspace(-0.95, 0.95, AUDIO_SEGMENT)).abs()

    def velocity(sample, timestep):
        total, total_weights = torch.zeros_like(sample), torch.zeros(num_latents)
        for start in starts:
            window = slice(start, start + AUDIO_SEGMENT)
            cond = pipe.transformer(
                sample[..., window],
                timestep,
                encoder_hidden_states=text,
                video_hidden_states=features[:, window],
            ).sample
            uncond = pipe.transformer(sample[..., window], timestep).sample
            total[..., window] += weights * (uncond + 2 * (cond - uncond))
            total_weights[window] += weights
        return total / total_weights

    torch.testing.assert_close(result, midpoint(velocity, latents, 2), atol=1e-4, rtol=1e-4)


def test_sequential_segments_go_on_from_one_another(pipe):
    num_latents, starts = 34, [0, 10, 14]
    latents = torch.randn(1, 6, num_latents, generator=seed(1))
    arguments = {"audio_length_in_s": num_latents * AUDIO_HOP / AUDIO_RATE, "latents": latents}
    result = generate(pipe, long_form="sequential", guidance_scale=1, **arguments)
    text = text_features(pipe, PREFIX + PROMPT)
    made = torch.zeros(1, 6, 0)
    for start in starts:
        window = slice(start, start + AUDIO_SEGMENT)
        start_noise = latents[..., window]
        num_known = made.shape[2] - start
        known = torch.arange(AUDIO_SEGMENT) < num_known
        context = torch.nn.functional.pad(made[..., start:], (0, AUDIO_SEGMENT - num_known))

        def velocity(sample, timestep, context=context, known=known, start_noise=start_noise, num_known=num_known):
            given = {"audio_context": context, "audio_context_mask": known[None]} if num_known else {}
            prediction = pipe.transformer(sample, timestep, encoder_hidden_states=text, **given).sample
            return torch.where(known, start_noise - context, prediction)

        segment = midpoint(velocity, start_noise, 2)
        made = torch.cat([made, segment[..., num_known:]], dim=2)
    torch.testing.assert_close(result, made, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(result, generate(pipe, guidance_scale=1, **arguments), atol=1e-3)


@pytest.mark.parametrize("long_form", ["multidiffusion", "sequential"])
def test_model_sees_one_segment_at_a_time(pipe, long_form):
    lengths = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["hidden_states"].shape[2]), with_kwargs=True
    )
    audios = generate(
        pipe, audio_length_in_s=4, long_form=long_form, segment_overlap=0.2, num_inference_steps=1, output_type="np"
    )
    assert audios.shape == (1, 1, 800)
    # Segments start at 0, 16, 32, 48, 64 and 80.
    assert lengths == [AUDIO_SEGMENT] * (6 * 2 * 2)


@pytest.mark.parametrize("long_form", ["multidiffusion", "sequential"])
def test_both_ways_agree_within_one_segment(pipe, long_form):
    seconds = AUDIO_SEGMENT * AUDIO_HOP / AUDIO_RATE
    whole = tiny_audio_pipeline(segment_length_in_s=10)
    expected = generate(whole, audio_length_in_s=seconds)
    torch.testing.assert_close(generate(pipe, audio_length_in_s=seconds, long_form=long_form), expected)


@pytest.mark.parametrize("long_form", ["multidiffusion", "sequential"])
def test_long_given_sound_is_extended_by_few_model_calls(pipe, long_form):
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(1))
    given = noise(400)
    arguments = {"audio": given, "audio_length_in_s": 2.4, "guidance_scale": 1, "num_inference_steps": 1}
    audios = generate(pipe, long_form=long_form, output_type="pt", **arguments)
    # 60 latents, of which 48 are known; segments start at 0, 10, ..., 40, and those at 0, 10 and 20 need nothing.
    assert len(calls) == 2 * 2
    assert torch.equal(audios[0, :, :398], given[:, :398])
    latents = generate(pipe, long_form=long_form, **arguments)
    silence = torch.nn.functional.pad(given[None], (0, 80))
    torch.testing.assert_close(latents[..., :48], encoded(pipe, silence)[..., :48], atol=1e-5, rtol=1e-4)
    assert latents.isfinite().all()


def test_triangular_weights_add_up():
    window = triangular_window(AUDIO_SEGMENT)
    torch.testing.assert_close(window[10:] + window[:10], torch.ones(10))


# 7. Candidates


def test_candidates_are_ranked(pipe):
    prompts, videos = [PROMPT, "rain"], [film(value=0), film(value=1)]
    arguments = {"video": videos, "num_waveforms_per_prompt": 3}
    plain = generate(pipe, prompts, generator=[seed(i) for i in range(6)], output_type="np", **arguments)
    for i in range(6):
        single = generate(pipe, prompts[i // 3], video=videos[i // 3], generator=seed(i), output_type="np")
        np.testing.assert_allclose(plain[i], single[0], atol=1e-4)

    asked = []

    def ranker(candidates, prompt, video):
        assert [candidate.shape for candidate in candidates] == [(1, 80)] * 3
        asked.append((prompt, video))
        return [0.1, 0.9, 0.5] if prompt == PROMPT else np.array([3, 2, 1])

    ranked = generate(
        pipe, prompts, generator=[seed(i) for i in range(6)], ranker=ranker, output_type="np", **arguments
    )
    np.testing.assert_array_equal(ranked, plain[[1, 2, 0, 3, 4, 5]])
    assert [prompt for prompt, _ in asked] == prompts
    assert all(torch.equal(seen, video) for (_, seen), video in zip(asked, videos, strict=True))

    generate(pipe, num_waveforms_per_prompt=3, ranker=ranker, output_type="np")
    assert asked[-1] == (PROMPT, None)


@pytest.mark.parametrize("scores", [[1.0], [1.0, float("nan")], 3.0])
def test_bad_scores(pipe, scores):
    with pytest.raises(ValueError, match="`ranker` must return 2 finite scores, one for each candidate, got"):
        generate(pipe, num_waveforms_per_prompt=2, ranker=lambda *_: scores, output_type="np")


# 8. Callbacks, caches, offloading, loading


def test_callback_sees_and_changes_tensors(pipe):
    seen = []

    def callback(pipe, index, timestep, tensors):
        assert set(tensors) == {"latents", "prompt_embeds", "negative_prompt_attention_mask"}
        assert pipe.current_timestep == timestep
        seen.append((index, timestep.item(), tensors["latents"].clone()))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 3 else {}

    latents = generate(
        pipe,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "negative_prompt_attention_mask"],
    )
    assert [index for index, _, _ in seen] == [0, 1, 2, 3]
    assert [timestep for _, timestep, _ in seen] == pipe.scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    assert torch.equal(seen[-1][2], generate(pipe))
    assert not latents.any()
    assert pipe.current_timestep is None


def test_callback_can_replace_embeddings(pipe):
    other = pipe.encode_prompt("rain", do_classifier_free_guidance=False)
    replaced = generate(pipe, callback_on_step_end=lambda *_: other, guidance_scale=1)
    assert not torch.allclose(replaced, generate(pipe, guidance_scale=1), atol=1e-4)


@pytest.mark.parametrize("long_form", ["multidiffusion", "sequential"])
def test_interrupt(pipe, long_form):
    indices = []

    def callback(pipe, index, timestep, tensors):
        indices.append(index)
        pipe._interrupt = True
        return {}

    latents = generate(pipe, audio_length_in_s=1.6, callback_on_step_end=callback, long_form=long_form)
    assert indices == [0] and pipe.interrupt
    assert latents.shape == (1, 6, 40)
    indices.clear()
    generate(
        pipe,
        audio_length_in_s=1.6,
        callback_on_step_end=lambda *args: indices.append(args[1]) or {},
        long_form=long_form,
    )
    assert not pipe.interrupt
    assert indices == list(range(pipe.num_timesteps))
    assert pipe.num_timesteps == (4 if long_form == "multidiffusion" else 12)


def test_attention_kwargs_reach_the_transformer(pipe):
    received = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: received.append(kwargs["attention_kwargs"]), with_kwargs=True
    )
    generate(pipe, attention_kwargs={"scale": 0.5}, num_inference_steps=1)
    assert received == [{"scale": 0.5}] * 4


def test_first_block_cache_of_every_segment_and_branch(pipe):
    arguments = {"audio_length_in_s": 1.2}
    expected = generate(pipe, **arguments)
    calls = {0: 0, 1: 0}
    for index, block in enumerate(pipe.transformer.transformer_blocks):

        def count(module, args, kwargs, index=index):
            calls[index] += 1

        block.norm1.register_forward_pre_hook(count, with_kwargs=True)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    for _ in range(2):
        calls[0] = calls[1] = 0
        assert generate(pipe, **arguments).isfinite().all()
        # Two segments and two branches, which compute the second block at the first of four timesteps only.
        assert calls == {0: 16, 1: 4}
    pipe.transformer.disable_cache()
    assert torch.equal(generate(pipe, **arguments), expected)


def test_group_offload_changes_nothing(pipe):
    expected = generate(pipe, video=film())
    device = torch.device("cpu")
    pipe.enable_group_offload(
        onload_device=device, offload_device=device, offload_type="leaf_level", exclude_modules="vae"
    )
    assert torch.equal(generate(pipe, video=film()), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="model offloading needs an accelerator")
def test_model_cpu_offload(pipe):
    arguments = {"video": film(), "audio": noise(40), "output_type": "pt"}
    expected = generate(pipe, **arguments)
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(generate(pipe, **arguments).cpu(), expected, atol=1e-2, rtol=0)
    assert pipe.transformer.device.type == "cpu"


def test_offload_order_names_every_model(pipe):
    models = [name for name, component in pipe.components.items() if isinstance(component, torch.nn.Module)]
    assert sorted(pipe.model_cpu_offload_seq.split("->")) == sorted(models)


def test_inputs_and_components_are_left_as_they_were(pipe):
    before = copy.deepcopy(pipe.components)
    config = dict(pipe.config)
    inputs = {"video": film(30), "audio": noise(40), "latents": torch.randn(1, 6, 75, generator=seed())}
    copies = copy.deepcopy(inputs)
    generate(pipe, long_form="sequential", num_inference_steps=1, output_type="np", **inputs)
    assert all(torch.equal(inputs[name], copies[name]) for name in inputs)
    assert dict(pipe.config) == config
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            assert str(component.config) == str(before[name].config)
            assert [m.training for m in component.modules()] == [m.training for m in before[name].modules()]
            state_dict, old_state_dict = component.state_dict(), before[name].state_dict()
            assert all(torch.equal(state_dict[key], old_state_dict[key]) for key in old_state_dict)
    assert pipe.scheduler.config == before["scheduler"].config
    assert pipe.vae.use_tiling == before["vae"].use_tiling
    assert pipe.vae.tile_latents == before["vae"].tile_latents


@pytest.mark.parametrize("pipeline_class", [MovieGenAudioPipeline, diffusers.DiffusionPipeline])
def test_round_trip(pipe, pipeline_class, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = pipeline_class.from_pretrained(tmp_path)
    assert type(loaded) is MovieGenAudioPipeline
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.default_control_prefix == PREFIX
    assert loaded.config.segment_length_in_s == pipe.config.segment_length_in_s
    torch.testing.assert_close(generate(loaded, video=film()), generate(pipe, video=film()), atol=1e-5, rtol=1e-4)


def test_round_trip_without_encoders(tmp_path):
    arguments = dict.fromkeys(("tokenizer", "text_encoder", "image_processor", "image_encoder"))
    tiny_audio_pipeline(**arguments).save_pretrained(tmp_path)
    loaded = MovieGenAudioPipeline.from_pretrained(tmp_path)
    assert all(getattr(loaded, name) is None for name in arguments)


# 9. Bad input


def nan_film():
    video = film() / 255
    video[1, 0, 2, 3] = float("nan")
    return video


def nan_sound():
    sound = noise(40)
    sound[0, 7] = float("nan")
    return sound


VIDEO = {"video": film(), "video_frame_rate": FRAME_RATE, "audio_length_in_s": None}

BAD_INPUT = {
    "nothing": ({"prompt": None}, "Pass `prompt`, `video` or both"),
    "no length": ({"audio_length_in_s": None}, "Without a video the sound needs a length; pass `audio_length_in_s`."),
    "length 0": ({"audio_length_in_s": 0}, "`audio_length_in_s` must be a number of seconds above 0, got 0"),
    "length nan": ({"audio_length_in_s": float("nan")}, "`audio_length_in_s` must be a number of seconds above 0"),
    "too short": ({"audio_length_in_s": 0.001}, "The sound would be shorter than one sample at 200 Hz"),
    "not a string": ({"prompt": 3}, "`prompt` must be a string or a list of strings, got int"),
    "empty list": ({"prompt": []}, "`prompt` is an empty list"),
    "negative not a string": ({"negative_prompt": 1.5}, "`negative_prompt` must be a string or a list of strings"),
    "no frame rate": ({**VIDEO, "video_frame_rate": None}, "`video_frame_rate` must be a number of frames a second"),
    "frame rate 0": ({**VIDEO, "video_frame_rate": 0}, "`video_frame_rate` must be a number of frames a second above"),
    "frame rate nan": ({**VIDEO, "video_frame_rate": float("nan")}, "`video_frame_rate` must be a number of frames"),
    "frame rate below 0": ({**VIDEO, "video_frame_rate": -8}, "above 0, got -8"),
    "no frames": ({**VIDEO, "video": []}, "`video` has no frames; pass at least one."),
    "tensor without frames": ({**VIDEO, "video": film()[:0]}, "`video` has no frames; pass at least one."),
    "an image": ({**VIDEO, "video": film()[0]}, "or several of them, got Tensor (3, 18, 24)."),
    "a path": ({**VIDEO, "video": "film.mp4"}, "or several of them, got str."),
    "list of paths": ({**VIDEO, "video": ["a.png", "b.png"]}, "must hold videos, or frames, got a list with str"),
    "videos of two lengths": ({**VIDEO, "video": [film(4), film(5)]}, "`video` holds videos of 4 and 5 frames"),
    "channels last": (
        {**VIDEO, "video": film().permute(0, 2, 3, 1)},
        "The frames of `video` must have three colours, (3, height, width) in tensors",
    ),
    "integers": ({**VIDEO, "video": film().long()}, "must be uint8, or floating point in 0 to 1, found int64"),
    "out of range": (
        {**VIDEO, "video": film().float()},
        "must be uint8, or floating point in 0 to 1, found float32 0",
    ),
    "NaN in the video": (
        {**VIDEO, "video": nan_film()},
        "must be uint8, or floating point in 0 to 1, found float32 nan",
    ),
    "other length": (
        {**VIDEO, "audio_length_in_s": 1},
        "`audio_length_in_s` is 1, but the video lasts 0.4 s, from which it may differ by one frame; leave it out.",
    ),
    "both videos": ({**VIDEO, "video_embeds": torch.zeros(4, 12)}, "Pass `video` or `video_embeds`, not both."),
    "width of video embeddings": (
        {**VIDEO, "video": None, "video_embeds": torch.zeros(4, 7)},
        "`video_embeds` must be floating point of shape (frames, 12) or (batch, frames, 12), got torch.float32",
    ),
    "NaN in video embeddings": (
        {**VIDEO, "video": None, "video_embeds": torch.full((4, VIDEO_WIDTH), float("nan"))},
        "`video_embeds` has no frames, or values that are not finite",
    ),
    "context too long": (
        {"audio": noise(81)},
        "`audio` ends at 0.405 s, after the end of the result at 0.4 s; cut it, or ask for a longer result.",
    ),
    "context too late": ({"audio": noise(40), "audio_start_in_s": 0.3}, "`audio` ends at 0.5 s, after the end"),
    "context longer than the video": ({**VIDEO, "audio": noise(100)}, "`audio` ends at 0.5 s, after the end"),
    "context before the start": ({"audio": noise(40), "audio_start_in_s": -1}, "`audio_start_in_s` must be a number"),
    "nothing to make": ({"audio": noise(80)}, "`audio` covers the whole result, so there is nothing to make"),
    "context too short": (
        {"audio": noise(20), "audio_start_in_s": 0.1},
        "`audio` has no stretch long enough to go by; give at least 0.24 s without a gap.",
    ),
    "NaN in the context": ({"audio": nan_sound()}, "`audio` has samples that are not finite"),
    "no samples": ({"audio": noise(0)}, "`audio` has no samples; pass a sound, or leave it out."),
    "integer samples": ({"audio": np.zeros(40, np.int16)}, "`audio` must be floating point in [-1, 1] of shape"),
    "context as a path": ({"audio": "sound.wav"}, "or (batch, channels, samples), got str."),
    "samples first": ({"audio": noise(40).T}, "`audio` has 40 channels of 1 samples; transpose it"),
    "sampling rate": ({"audio": noise(40), "audio_sampling_rate": 0}, "`audio_sampling_rate` must be a whole number"),
    "gap without a sound": (
        {"audio_gap_in_s": (0.1, 0.2)},
        "`audio_gap_in_s` is a gap in `audio`, but `audio` is None",
    ),
    "gap outside": (
        {"audio": noise(70), "audio_gap_in_s": (0.2, 0.4)},
        "`audio_gap_in_s` must be the start and the end of a stretch within the 0.35 s of `audio`, got (0.2, 0.4).",
    ),
    "gap backwards": ({"audio": noise(70), "audio_gap_in_s": (0.2, 0.1)}, "`audio_gap_in_s` must be the start and"),
    "gap of one number": ({"audio": noise(70), "audio_gap_in_s": 0.1}, "`audio_gap_in_s` must be the start and"),
    "steps": ({"num_inference_steps": 0}, "`num_inference_steps` must be a whole number of at least 1, got 0"),
    "candidates": ({"num_waveforms_per_prompt": 1.5}, "`num_waveforms_per_prompt` must be a whole number"),
    "tokens": ({"max_sequence_length": 0}, "`max_sequence_length` must be a whole number of at least 1"),
    "guidance": ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number, got nan"),
    "long form": ({"long_form": "both"}, "`long_form` must be one of multidiffusion, sequential, got 'both'"),
    "overlap": ({"segment_overlap": 1}, "`segment_overlap` must be a number above 0 and below 1, got 1"),
    "output type": ({"output_type": "wav"}, "`output_type` must be one of np, pt, latent, got 'wav'"),
    "ranker of latents": ({"ranker": max, "output_type": "latent"}, "`ranker` compares sounds"),
    "callback tensors": (
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        "`callback_on_step_end_tensor_inputs` may name latents, prompt_embeds,",
    ),
    "counts": (
        {**VIDEO, "prompt": ["a", "b", "c"], "video": [film(), film()]},
        "`video` has 2 entries for 3 sounds; pass one, or one for each.",
    ),
    "generators": ({"generator": [seed(), seed()]}, "`generator` is a list of 2 for 1 sounds"),
    "latents": (
        {"latents": torch.zeros(1, 6, 9)},
        "`latents` must have shape (1, 6, 10) for 1 sounds of 80 samples, got (1, 6, 9).",
    ),
    "both texts": (
        {"prompt_embeds": torch.zeros(1, 3, TEXT_WIDTH)},
        "Pass `prompt` or the prompt embeddings, not both.",
    ),
    "both negative": (
        {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 3, TEXT_WIDTH)},
        "Pass `negative_prompt` or the negative prompt embeddings, not both.",
    ),
    "missing mask": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 3, TEXT_WIDTH)},
        "`prompt_attention_mask` is missing",
    ),
    "width of embeddings": (
        {
            "prompt": None,
            "prompt_embeds": torch.zeros(1, 3, 7),
            "prompt_attention_mask": torch.ones(1, 3, dtype=torch.bool),
        },
        "`prompt_embeds` must be floating point of shape (batch, tokens, 32), got torch.float32 (1, 3, 7)",
    ),
    "mask of embeddings": (
        {
            "prompt": None,
            "prompt_embeds": torch.zeros(1, 3, TEXT_WIDTH),
            "prompt_attention_mask": torch.ones(1, 4, dtype=torch.bool),
        },
        "`prompt_attention_mask` must be boolean of shape (1, 3), like `prompt_embeds`, got torch.bool (1, 4)",
    ),
}


@pytest.fixture(scope="module")
def shared_pipe():
    return tiny_audio_pipeline()


@pytest.mark.parametrize("arguments, message", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input(shared_pipe, arguments, message):
    with pytest.raises(ValueError) as error:
        shared_pipe(**{"prompt": PROMPT, "audio_length_in_s": 0.4, "num_inference_steps": 1, **arguments})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_foreign_components():
    for name in ("transformer", "vae"):
        with pytest.raises(ValueError, match=f"`{name}` is None, so there is nothing to generate with"):
            generate(tiny_audio_pipeline(**{name: None}))
    foreign = tiny_audio_pipeline(text_encoder=tiny_t5_encoder(258, 16, seed=0))
    with pytest.raises(ValueError, match="`text_encoder` gives features of width 16, but the transformer takes 32"):
        generate(foreign)
    encoder = tiny_image_encoder()
    encoder.config.projection_dim = 8
    with pytest.raises(ValueError, match="`image_encoder` gives features of width 8, but the transformer takes 12"):
        generate(tiny_audio_pipeline(image_encoder=encoder), video=film())
    vae = type(tiny_audio_vae())(4, (2, 4), 16, latent_channels=5, sampling_rate=AUDIO_RATE)
    with pytest.raises(ValueError, match="`vae` has latents of 5 channels, but the transformer takes 6"):
        generate(tiny_audio_pipeline(vae=vae))


@pytest.mark.parametrize("prefix", ["", "Quality: 9. Music: no.", "loud: "])
def test_bad_control_prefix(prefix):
    with pytest.raises(ValueError, match="`default_control_prefix` must read like 'Quality: 9. Music: no. '"):
        tiny_audio_pipeline(default_control_prefix=prefix)
