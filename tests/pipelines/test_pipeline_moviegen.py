import copy

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler

from diffusers_moviegen import AutoencoderKLMovieGen
from tests.tiny import MAX_FRAMES, MAX_SIZE, TEXT_WIDTH, tiny_pipeline


PROMPT = 'a red circle says "HI"'


def seed(value=0):
    return torch.Generator().manual_seed(value)


def generate(pipeline, prompt=PROMPT, output_type="pt", **kwargs):
    arguments = {"num_inference_steps": 3, "generator": seed(), "output_type": output_type, **kwargs}
    return pipeline(prompt, **arguments).frames


# 1. Output


def test_output_types(pipeline):
    arrays = generate(pipeline, output_type="np")
    assert arrays.shape == (1, 9, 32, 48, 3)
    assert arrays.dtype == np.float32
    assert 0 <= arrays.min() < arrays.max() <= 1

    tensors = generate(pipeline, output_type="pt")
    assert tensors.shape == (1, 9, 3, 32, 48)
    np.testing.assert_array_equal(tensors.permute(0, 1, 3, 4, 2).numpy(), arrays)

    images = generate(pipeline, output_type="pil")
    assert isinstance(images[0][0], PIL.Image.Image)
    assert (len(images), len(images[0]), images[0][0].size) == (1, 9, (48, 32))
    np.testing.assert_array_equal(np.asarray(images[0][4]), (arrays[0, 4] * 255).round().astype(np.uint8))

    latents = generate(pipeline, output_type="latent")
    assert latents.shape == (1, 16, 2, 4, 6)
    assert latents.dtype == torch.float32
    vae = pipeline.vae
    mean, std = (
        torch.tensor(values)[:, None, None, None] for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        decoded = vae.decode(latents * std + mean).sample[:, :, :9]
    expected = (decoded / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(tensors, expected, atol=1e-5, rtol=0)


def test_default_output_is_pil_in_an_output_object(pipeline):
    output = pipeline(PROMPT, num_inference_steps=1)
    assert isinstance(output.frames[0][0], PIL.Image.Image)
    frames = pipeline(PROMPT, num_inference_steps=1, return_dict=False)
    assert isinstance(frames, tuple) and isinstance(frames[0][0][0], PIL.Image.Image)


@pytest.mark.parametrize("num_frames", [1, 2, 8, 17, MAX_FRAMES])
def test_any_number_of_frames(pipeline, num_frames):
    frames = generate(pipeline, num_frames=num_frames, output_type="np")
    assert frames.shape == (1, num_frames, 32, 48, 3)


def test_defaults_come_from_the_checkpoint(pipeline):
    explicit = generate(pipeline, height=32, width=48, num_frames=9, frame_rate=8, guidance_scale=3.0)
    assert torch.equal(generate(pipeline), explicit)
    assert pipeline.guidance_scale == 3.0

    other = tiny_pipeline(
        default_height=48, default_width=16, default_num_frames=4, default_frame_rate=12, default_guidance_scale=1.0
    )
    frames = generate(other)
    assert frames.shape == (1, 4, 3, 48, 16)
    assert other.guidance_scale == 1.0
    explicit = generate(pipeline, height=48, width=16, num_frames=4, frame_rate=12, guidance_scale=1.0)
    assert torch.equal(frames, explicit)

    quick = tiny_pipeline(default_num_inference_steps=2)
    frames = generate(quick, num_inference_steps=None)
    assert quick.num_timesteps == 2 and torch.equal(frames, generate(pipeline, num_inference_steps=2))
    generate(pipeline, num_inference_steps=None)
    assert pipeline.num_timesteps == 50


def test_numbers_of_numpy(pipeline):
    numbers = {"height": np.int64(32), "width": np.int32(48), "num_frames": np.int64(9), "frame_rate": np.float32(8)}
    assert torch.equal(generate(pipeline, guidance_scale=np.float64(3), **numbers), generate(pipeline))


def test_frame_rate_matters_for_videos_only(pipeline):
    assert not torch.equal(generate(pipeline, frame_rate=8), generate(pipeline, frame_rate=16))
    image = {"num_frames": 1}
    assert torch.equal(generate(pipeline, frame_rate=8, **image), generate(pipeline, frame_rate=16, **image))


# 2. What is computed


def test_against_a_plain_loop(pipeline):
    guidance_scale, num_steps = 4.0, 4
    latents = torch.randn(1, 16, 2, 4, 6, generator=seed(5))
    result = generate(
        pipeline,
        negative_prompt="blurry",
        guidance_scale=guidance_scale,
        num_inference_steps=num_steps,
        latents=latents,
        output_type="latent",
    )

    conditions = []
    for text, drawn in (("FPS-8: " + PROMPT, "HI"), ("blurry", None)):
        condition = {}
        for suffix, part in (("", text), ("_2", text), ("_3", drawn)):
            if part is not None:
                token_ids = getattr(pipeline, f"tokenizer{suffix}")(part, return_tensors="pt").input_ids
                encoder = getattr(pipeline, f"text_encoder{suffix}")
                condition[f"encoder_hidden_states{suffix}"] = encoder(token_ids).last_hidden_state
        conditions.append(condition)
    # Two linear steps of 1/1000 each, then quadratic ones.
    sigmas = [1, 0.999, 0.998, 0.998 - 0.001 - 0.996 / 4, 0]
    with torch.no_grad():
        for sigma, next_sigma in zip(sigmas, sigmas[1:], strict=False):
            timestep = torch.tensor([1000.0 * sigma])
            cond, uncond = (pipeline.transformer(latents, timestep, **condition).sample for condition in conditions)
            velocity = uncond + guidance_scale * (cond - uncond)
            latents = latents + (next_sigma - sigma) * velocity
    torch.testing.assert_close(result, latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance_scale, calls", [(1.0, 3), (0.0, 3), (1.5, 6)])
def test_model_calls(pipeline, guidance_scale, calls):
    count = 0

    def count_call(module, args, kwargs):
        nonlocal count
        count += 1

    pipeline.transformer.register_forward_pre_hook(count_call, with_kwargs=True)
    generate(pipeline, guidance_scale=guidance_scale, output_type="latent")
    assert count == calls
    assert pipeline.num_timesteps == 3


def test_schedule_and_latents_stay_float32_in_bfloat16(pipeline):
    pipeline.to(torch.bfloat16)
    timesteps = []

    def record(module, args, kwargs):
        assert kwargs["hidden_states"].dtype == torch.bfloat16
        assert kwargs["encoder_hidden_states"].dtype == torch.bfloat16
        assert kwargs["timestep"].dtype == torch.float32
        timesteps.append(kwargs["timestep"].item())

    pipeline.transformer.register_forward_pre_hook(record, with_kwargs=True)
    latents = generate(pipeline, num_inference_steps=50, guidance_scale=1.0, output_type="latent")
    assert latents.dtype == torch.float32
    assert len(set(timesteps)) == 50


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(pipeline, dtype):
    expected = generate(pipeline)
    frames = generate(pipeline.to(dtype))
    assert frames.isfinite().all()
    torch.testing.assert_close(frames.float(), expected, atol=0.1, rtol=0)


def test_batch_of_prompts_gives_what_single_calls_give(pipeline):
    prompts = [PROMPT, "a much longer prompt about a blue square", ""]
    negative_prompts = ["blurry", "", 'a sign "NO"']
    batch = generate(pipeline, prompts, negative_prompt=negative_prompts, generator=[seed(i) for i in range(3)])
    for i, (prompt, negative_prompt) in enumerate(zip(prompts, negative_prompts, strict=True)):
        single = generate(pipeline, prompt, negative_prompt=negative_prompt, generator=seed(i))
        torch.testing.assert_close(batch[i : i + 1], single, atol=1e-4, rtol=0)


def test_several_videos_a_prompt(pipeline):
    prompts = [PROMPT, "a blue square"]
    generators = [seed(i) for i in range(4)]
    frames = generate(pipeline, prompts, num_videos_per_prompt=2, generator=generators)
    assert frames.shape[0] == 4
    for i, prompt in enumerate([prompts[0], prompts[0], prompts[1], prompts[1]]):
        torch.testing.assert_close(frames[i], generate(pipeline, prompt, generator=seed(i))[0], atol=1e-4, rtol=0)


def test_prompt_and_seed_matter(pipeline):
    frames = generate(pipeline)
    assert torch.equal(frames, generate(pipeline))
    assert not torch.allclose(frames, generate(pipeline, 'a red circle says "HO"'), atol=1e-4)
    assert not torch.allclose(frames, generate(pipeline, generator=seed(1)), atol=1e-2)
    assert not torch.allclose(frames, generate(pipeline, negative_prompt="blurry"), atol=1e-4)


def test_sigmas(pipeline):
    generate(pipeline, num_inference_steps=3)
    own_sigmas = pipeline.scheduler.sigmas.tolist()
    latents = generate(pipeline, output_type="latent")
    assert torch.equal(generate(pipeline, sigmas=own_sigmas[:-1], output_type="latent"), latents)
    other = generate(pipeline, sigmas=[1.0, 0.5], output_type="latent")
    assert pipeline.num_timesteps == 2
    assert not torch.allclose(other, latents, atol=1e-3)


def test_other_flow_scheduler(pipeline):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    assert generate(pipeline).isfinite().all()
    sigmas = np.linspace(1, 0.25, 4).tolist()
    default = generate(pipeline, sigmas=sigmas, output_type="latent")
    ours = generate(tiny_pipeline(), sigmas=sigmas, output_type="latent")
    torch.testing.assert_close(default, ours, atol=1e-4, rtol=1e-4)


def test_prompt_rewriter(pipeline):
    rewritten = generate(pipeline, "A CIRCLE", prompt_rewriter=str.lower, negative_prompt="BLURRY")
    assert torch.equal(rewritten, generate(pipeline, "a circle", negative_prompt="BLURRY"))
    with pytest.raises(ValueError, match="`prompt_rewriter` must return a string, got NoneType for 'a'"):
        generate(pipeline, "a", prompt_rewriter=lambda prompt: None)


# 3. Embeddings


def test_embeddings_can_be_passed_back_and_encoders_freed(pipeline):
    prompts = [PROMPT, "a blue square"]
    expected = generate(pipeline, prompts, negative_prompt="blurry")
    embeds = pipeline.encode_prompt(prompts, "blurry")
    assert torch.equal(generate(pipeline, None, **embeds), expected)

    pipeline.tokenizer = pipeline.text_encoder = None
    pipeline.tokenizer_2 = pipeline.text_encoder_2 = None
    pipeline.tokenizer_3 = pipeline.text_encoder_3 = None
    assert torch.equal(generate(pipeline, None, **embeds), expected)
    assert generate(pipeline, None, num_videos_per_prompt=2, **embeds).shape[0] == 4
    positive = {name: tensor for name, tensor in embeds.items() if not name.startswith("negative")}
    assert generate(pipeline, None, guidance_scale=1.0, **positive).shape[0] == 2
    with pytest.raises(ValueError, match="Guidance needs the negative prompt embeddings"):
        generate(pipeline, None, **positive)
    with pytest.raises(ValueError, match=r"`tokenizer` \(UL2\) is None"):
        generate(pipeline, PROMPT)


def test_embeddings_of_one_kind_and_text_of_the_other(pipeline):
    prompts = [PROMPT, "a blue square"]
    expected = generate(pipeline, prompts, negative_prompt="blurry")
    embeds = pipeline.encode_prompt(prompts, "blurry")
    positive = {name: tensor for name, tensor in embeds.items() if not name.startswith("negative")}
    negative = {name: tensor for name, tensor in embeds.items() if name.startswith("negative")}
    assert torch.equal(generate(pipeline, None, negative_prompt="blurry", **positive), expected)
    assert torch.equal(generate(pipeline, prompts, **negative), expected)
    assert torch.equal(generate(pipeline, None, **positive), generate(pipeline, prompts))


def test_embeddings_are_cast(pipeline):
    embeds = pipeline.encode_prompt(PROMPT)
    doubled = {name: tensor if tensor.dtype == torch.bool else tensor.double() for name, tensor in embeds.items()}
    assert torch.equal(generate(pipeline, None, **doubled), generate(pipeline))


# 4. Callbacks, caches, offloading


def test_callback_sees_and_changes_tensors(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        assert set(tensors) == {"latents", "prompt_embeds", "negative_prompt_attention_mask_3"}
        assert pipe.current_timestep == timestep
        seen.append((step, timestep.item(), tensors["latents"].clone()))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    latents = generate(
        pipeline,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "negative_prompt_attention_mask_3"],
    )
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [timestep for _, timestep, _ in seen] == pipeline.scheduler.timesteps.tolist()
    assert torch.equal(seen[-1][2], generate(pipeline, output_type="latent"))
    assert not latents.any()
    assert pipeline.current_timestep is None


def test_callback_can_replace_embeddings_and_guidance(pipeline):
    other = pipeline.encode_prompt("a blue square", do_classifier_free_guidance=False)

    def replace(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return other

    latents = []

    def keep(pipe, step, timestep, tensors):
        latents.append(tensors["latents"])
        return {}

    generate(pipeline, num_inference_steps=2, callback_on_step_end=keep)
    replaced = generate(pipeline, num_inference_steps=2, callback_on_step_end=replace, output_type="latent")
    timestep = pipeline.scheduler.timesteps[1]
    with torch.no_grad():
        velocity = pipeline.transformer(
            latents[0],
            timestep[None],
            encoder_hidden_states=other["prompt_embeds"],
            encoder_hidden_states_2=other["prompt_embeds_2"],
        ).sample
    torch.testing.assert_close(replaced, latents[0] - timestep / 1000 * velocity, atol=1e-4, rtol=1e-4)


def test_interrupt(pipeline):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = True
        return {}

    frames = generate(pipeline, callback_on_step_end=callback)
    assert steps == [0]
    assert pipeline.interrupt
    assert frames.shape == (1, 9, 3, 32, 48)
    generate(pipeline)
    assert not pipeline.interrupt


def test_attention_kwargs_reach_the_transformer(pipeline):
    received = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: received.append(kwargs["attention_kwargs"]), with_kwargs=True
    )
    generate(pipeline, attention_kwargs={"scale": 0.5}, num_inference_steps=1, output_type="latent")
    assert received == [{"scale": 0.5}] * 2
    assert pipeline.attention_kwargs == {"scale": 0.5}


def test_first_block_cache_skips_blocks_of_both_branches(pipeline):
    expected = generate(pipeline, num_inference_steps=4)
    calls = {0: 0, 1: 0}
    for index, block in enumerate(pipeline.transformer.transformer_blocks):

        def count(module, args, kwargs, index=index):
            calls[index] += 1

        block.norm1.register_forward_pre_hook(count, with_kwargs=True)

    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    for _ in range(2):
        calls[0] = calls[1] = 0
        cached = generate(pipeline, num_inference_steps=4)
        # Each branch computes the second block at the first step only.
        assert calls == {0: 8, 1: 2}
        assert cached.isfinite().all()
    pipeline.transformer.disable_cache()
    assert torch.equal(generate(pipeline, num_inference_steps=4), expected)

    # With a threshold that nothing stays below, the cache changes nothing.
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    torch.testing.assert_close(generate(pipeline, num_inference_steps=4), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload_changes_nothing(pipeline, offload_type):
    expected = generate(pipeline)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    pipeline.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=offload_type, **blocks
    )
    assert torch.equal(generate(pipeline), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="model offloading needs an accelerator")
def test_model_cpu_offload(pipeline):
    expected = generate(pipeline)
    pipeline.enable_model_cpu_offload()
    torch.testing.assert_close(generate(pipeline).cpu(), expected, atol=1e-2, rtol=0)
    assert pipeline.transformer.device.type == "cpu"


def test_offload_order_names_every_model(pipeline):
    models = [name for name, component in pipeline.components.items() if isinstance(component, torch.nn.Module)]
    assert sorted(pipeline.model_cpu_offload_seq.split("->")) == sorted(models)


def test_components_are_left_as_they_were(pipeline):
    before = copy.deepcopy(pipeline.components)
    config = dict(pipeline.config)
    generate(pipeline)
    assert dict(pipeline.config) == config
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            assert str(component.config) == str(before[name].config)
            assert [m.training for m in component.modules()] == [m.training for m in before[name].modules()]
            state_dict, old_state_dict = component.state_dict(), before[name].state_dict()
            assert all(torch.equal(state_dict[key], old_state_dict[key]) for key in old_state_dict)
    assert pipeline.scheduler.config == before["scheduler"].config
    assert pipeline.vae.use_tiling == before["vae"].use_tiling


# 5. Bad input


def embeds_with(**changes):
    embeds = tiny_pipeline().encode_prompt(PROMPT)
    return {"prompt": None, **embeds, **changes}


BAD_INPUT = {
    "height": ({"height": 100}, "`height` must be a multiple of 16, got 100; the nearest is 64."),
    "width": ({"width": 20}, "`width` must be a multiple of 16, got 20; the nearest is 16."),
    "small": ({"width": 3}, "`width` must be a multiple of 16, got 3; the nearest is 16."),
    "too wide": ({"width": MAX_SIZE + 16}, "`width` is 80, but the transformer has positions for at most 64 pixels"),
    "too high": ({"height": 160}, "`height` is 160, but the transformer has positions for at most 64 pixels"),
    "too long": ({"num_frames": 25}, "`num_frames` is 25, but the transformer has positions for at most 24 frames"),
    "no height": ({"height": 0}, "`height` must be a whole number of at least 1, got 0"),
    "no frames": ({"num_frames": 0}, "`num_frames` must be a whole number of at least 1, got 0"),
    "part of a frame": ({"num_frames": 8.5}, "`num_frames` must be a whole number of at least 1, got 8.5"),
    "negative steps": ({"num_inference_steps": -1}, "`num_inference_steps` must be a whole number of at least 1"),
    "no videos": ({"num_videos_per_prompt": 0}, "`num_videos_per_prompt` must be a whole number of at least 1"),
    "no tokens": ({"max_sequence_length": 0}, "`max_sequence_length` must be a whole number of at least 1"),
    "frame rate": ({"frame_rate": 0}, "`frame_rate` must be a number of frames a second above 0, got 0"),
    "frame rate nan": ({"frame_rate": float("nan")}, "`frame_rate` must be a number of frames a second above 0"),
    "guidance text": ({"guidance_scale": "7"}, "`guidance_scale` must be a finite number, got '7'"),
    "guidance nan": ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number, got nan"),
    "nothing": ({"prompt": None}, "Pass `prompt`, or the prompt embeddings"),
    "both": (lambda: embeds_with(prompt=PROMPT), "Pass `prompt` or the prompt embeddings, not both."),
    "empty list": ({"prompt": []}, "`prompt` is an empty list"),
    "not a string": ({"prompt": 3}, "`prompt` must be a string or a list of strings, got int"),
    "not strings": (
        {"prompt": ["a", None]},
        "`prompt` must be a string or a list of strings, got a list with NoneType",
    ),
    "negative not a string": ({"negative_prompt": 1.5}, "`negative_prompt` must be a string or a list of strings"),
    "negative list": (
        {"prompt": ["a", "b"], "negative_prompt": ["c"]},
        "`negative_prompt` has 1 entries for 2 prompts",
    ),
    "both negative": (
        lambda: embeds_with(negative_prompt="a"),
        "Pass `negative_prompt` or the negative prompt embeddings, not both.",
    ),
    "missing mask": (lambda: embeds_with(prompt_attention_mask_2=None), "`prompt_attention_mask_2` is missing"),
    "missing embeddings": (lambda: embeds_with(prompt_embeds=None), "`prompt_embeds` is missing"),
    "missing negative": (
        lambda: embeds_with(negative_prompt_embeds_3=None),
        "`negative_prompt_embeds_3` is missing",
    ),
    "width of embeddings": (
        lambda: embeds_with(prompt_embeds=torch.zeros(1, 4, TEXT_WIDTH + 1)),
        "`prompt_embeds` must be floating point of shape (batch, tokens, 32), got torch.float32 (1, 4, 33)",
    ),
    "integer embeddings": (
        lambda: embeds_with(prompt_embeds=torch.zeros(1, 4, TEXT_WIDTH, dtype=torch.int64)),
        "`prompt_embeds` must be floating point",
    ),
    "mask length": (
        lambda: embeds_with(prompt_attention_mask=torch.ones(1, 3, dtype=torch.bool)),
        "`prompt_attention_mask` must be boolean of shape (1, 30)",
    ),
    "mask dtype": (
        lambda: embeds_with(prompt_attention_mask=torch.ones(1, 30)),
        "`prompt_attention_mask` must be boolean of shape (1, 30), like `prompt_embeds`, got torch.float32",
    ),
    "batch of embeddings": (
        lambda: embeds_with(
            negative_prompt_embeds=torch.zeros(2, 1, TEXT_WIDTH),
            negative_prompt_attention_mask=torch.ones(2, 1, dtype=torch.bool),
        ),
        "`negative_prompt_embeds` has 2 entries for 1 prompts",
    ),
    "rewriter": (lambda: embeds_with(prompt_rewriter=str.lower), "`prompt_rewriter` needs `prompt`"),
    "latents": (
        {"latents": torch.zeros(1, 16, 2, 4, 4)},
        "`latents` must have shape (1, 16, 2, 4, 6) for 1 videos of 9 frames at 32x48, got (1, 16, 2, 4, 4)",
    ),
    "generators": ({"generator": [seed(), seed()]}, "`generator` is a list of 2 for 1 videos"),
    "output type": ({"output_type": "gif"}, "`output_type` must be one of pil, np, pt, latent, got 'gif'"),
    "callback tensors": (
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        "`callback_on_step_end_tensor_inputs` may name latents, prompt_embeds,",
    ),
    "sigmas": ({"sigmas": [0.5, 1.0]}, "`sigmas` must decrease strictly"),
}


@pytest.mark.parametrize("arguments, message", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input(pipeline, arguments, message):
    arguments = arguments() if callable(arguments) else arguments
    with pytest.raises(ValueError) as error:
        pipeline(**{"prompt": PROMPT, "num_inference_steps": 1, "output_type": "np", **arguments})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_models():
    with pytest.raises(ValueError, match="`transformer` is None"):
        generate(tiny_pipeline(transformer=None, vae=None))
    without_vae = tiny_pipeline(vae=None)
    with pytest.raises(ValueError, match="`vae` is None"):
        generate(without_vae)
    assert torch.equal(generate(without_vae, output_type="latent"), generate(tiny_pipeline(), output_type="latent"))


def test_autoencoder_of_another_checkpoint():
    vae = AutoencoderKLMovieGen(latent_channels=4, block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    with pytest.raises(ValueError, match="`vae` has latents of 4 channels, but the transformer takes 16; load the"):
        generate(tiny_pipeline(vae=vae))
