"""Flow matching: training times, batches, losses."""

import math
from statistics import NormalDist

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from diffusers_moviegen import MovieGenPipeline
from diffusers_moviegen.training import (
    LatentCache,
    draw_flow_batch,
    flow_loss,
    sample_timesteps,
    step_generator,
    text_inputs,
    validation_flow_loss,
)
from tests.tiny import tiny_pipeline
from tests.training_examples.caches import make_cache


COUNT = 40_000


def flow_times(seed: int = 0, **options) -> torch.Tensor:
    return 1 - sample_timesteps(COUNT, torch.Generator().manual_seed(seed), **options).double() / 1000


@pytest.mark.parametrize("mean", [0.0, -0.75])
def test_flow_time_is_logit_normal(mean):
    times = flow_times(logit_mean=mean) if mean else flow_times()
    assert 0 < times.min() and times.max() < 1
    normal = NormalDist()
    for share in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        quantile = 1 / (1 + math.exp(-normal.inv_cdf(share) - mean))
        below = (times < quantile).double().mean().item()
        assert below == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / COUNT))
    logits = torch.logit(times)
    assert logits.mean().item() == pytest.approx(mean, abs=4 / math.sqrt(COUNT))
    assert logits.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * COUNT))


def test_timestep_counts_noise():
    """Timestep 0 is data, flow time 1: the smallest draw of the normal is the largest timestep."""
    timesteps = sample_timesteps(1000, torch.Generator().manual_seed(3))
    normals = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    assert timesteps.argmax() == normals.argmin() and timesteps.argmin() == normals.argmax()
    unit = sample_timesteps(1000, torch.Generator().manual_seed(3), num_train_timesteps=1)
    torch.testing.assert_close(timesteps, 1000 * unit)


def test_seed_decides_on_every_device():
    generator = torch.Generator().manual_seed(5)
    first, second = sample_timesteps(7, generator), sample_timesteps(7, generator)
    assert first.shape == (7,) and first.dtype == torch.float32
    assert not torch.equal(first, second)
    assert torch.equal(first, sample_timesteps(7, torch.Generator().manual_seed(5)))

    # The meta device computes nothing: what follows can only come from the CPU generator.
    generator = torch.Generator().manual_seed(5)
    assert sample_timesteps(7, generator, device="meta").device.type == "meta"
    assert torch.equal(second, sample_timesteps(7, generator))
    if torch.cuda.is_available():
        assert torch.equal(first, sample_timesteps(7, torch.Generator().manual_seed(5), device="cuda").cpu())


# Batches


def test_step_generators_differ_in_every_number():
    draws = {
        torch.randint(2**62, (), generator=step_generator(seed, step, rank, stream)).item()
        for seed in range(3)
        for step in range(50)
        for rank in range(3)
        for stream in range(2)
    }
    assert len(draws) == 3 * 50 * 3 * 2
    first, second = (torch.rand(5, generator=step_generator(1, 2, 3, 4)) for _ in range(2))
    assert torch.equal(first, second)


def text(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Features of one text: tokens of 16, 12 and 8 channels."""
    generator = torch.Generator().manual_seed(seed)
    channels = {"": 16, "_2": 12, "_3": 8}
    return {
        suffix: torch.randn(length, count, generator=generator)
        for (suffix, count), length in zip(channels.items(), lengths, strict=True)
    }


def test_text_inputs_pad_and_mask():
    texts = [text(3, 2, 0), text(5, 2, 0)]
    inputs = text_inputs(texts, "cpu")
    assert inputs["encoder_hidden_states"].shape == (2, 5, 16)
    assert inputs["encoder_attention_mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert torch.equal(inputs["encoder_hidden_states"][0, :3], texts[0][""])
    # Nothing to hide needs no mask, and an encoder without a token is there all the same.
    assert inputs["encoder_attention_mask_2"] is None
    assert inputs["encoder_hidden_states_3"].shape == (2, 1, 8)
    assert inputs["encoder_attention_mask_3"].tolist() == [[False], [False]]


def make_batch(count: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "mean": torch.randn(count, 4, 2, 4, 6, generator=generator),
        "std": torch.rand(count, 4, 2, 4, 6, generator=generator),
        "text": [text(3, 4, 2, seed=index) for index in range(count)],
    }


def test_batches_are_draws_of_the_posterior_with_dropped_prompts():
    batch, unconditional = make_batch(4000), text(1, 2, 0, seed=99)
    latents, noise, timesteps, inputs = draw_flow_batch(batch, unconditional, 0.25, step_generator(0, 0), "cpu")
    assert latents.shape == noise.shape == batch["mean"].shape and timesteps.shape == (4000,)
    standard = (latents - batch["mean"]) / batch["std"]
    for values in (standard, noise):
        assert values.mean().item() == pytest.approx(0, abs=5e-3)
        assert values.std().item() == pytest.approx(1, abs=5e-3)
    assert (standard * noise).mean().item() == pytest.approx(0, abs=5e-3)

    dropped = inputs["encoder_attention_mask_3"].sum(1) == 0
    assert dropped.double().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    first, kept = dropped.nonzero()[0].item(), (~dropped).nonzero()[0].item()
    assert torch.equal(inputs["encoder_hidden_states"][first, :1], unconditional[""])
    assert torch.equal(inputs["encoder_hidden_states_2"][kept], batch["text"][kept]["_2"])

    again = draw_flow_batch(batch, unconditional, 0.25, step_generator(0, 0), "cpu")
    other = draw_flow_batch(batch, unconditional, 0.25, step_generator(0, 1), "cpu")
    assert torch.equal(latents, again[0]) and torch.equal(noise, again[1]) and torch.equal(timesteps, again[2])
    assert not torch.equal(noise, other[1])
    never = draw_flow_batch(batch, unconditional, 0.0, step_generator(0, 0), "cpu")[3]
    assert never["encoder_attention_mask_3"] is None


def test_flow_loss_is_the_squared_error_of_the_velocity():
    pipeline = tiny_pipeline()
    transformer, scheduler = pipeline.transformer.eval(), pipeline.scheduler
    config = transformer.config
    generator = torch.Generator().manual_seed(2)
    latents, noise = (torch.randn(3, config.in_channels, 2, 4, 6, generator=generator) for _ in range(2))
    timesteps = torch.tensor([10.0, 500.0, 990.0])
    with torch.no_grad():
        loss = flow_loss(transformer, scheduler, latents, noise, timesteps, {})
        # The paper's formulas, with its flow time and the sign of its velocity.
        sigma_min, t = 1e-5, (1 - timesteps.double() / 1000).view(-1, 1, 1, 1, 1)
        noisy = t * latents + (1 - (1 - sigma_min) * t) * noise
        velocity = latents.double() - (1 - sigma_min) * noise.double()
        prediction = -transformer(noisy.float(), timesteps, return_dict=False)[0]
    assert loss.item() == pytest.approx((prediction.double() - velocity).square().mean().item())


# Validation


def test_validation_loss_is_the_mean_over_samples_and_times(pipeline_folder, tmp_path):
    cache = LatentCache([make_cache(tmp_path / "cache", pipeline_folder, num_images=3, num_videos=2)])
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    pipeline = MovieGenPipeline.from_pretrained(pipeline_folder)
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    torch.manual_seed(0)
    loss = validation_flow_loss(transformer, scheduler, cache, accelerator, batch_size=2, num_times=3)
    assert transformer.training and not any(p.grad is not None for p in transformer.parameters())
    torch.manual_seed(1)
    for batch_size in (1, 5):
        same = validation_flow_loss(transformer, scheduler, cache, accelerator, batch_size, num_times=3)
        assert same == pytest.approx(loss, rel=1e-5)

    losses = []
    for index in range(len(cache)):
        batch = cache.collate([cache.read(index)])
        generator = step_generator(0, index)
        latents = batch["mean"] + batch["std"] * torch.randn(batch["mean"].shape[1:], generator=generator)
        noise = torch.randn(batch["mean"].shape[1:], generator=generator)[None]
        for share in (1 / 6, 1 / 2, 5 / 6):
            timestep = torch.tensor([1000 - 1000 / (1 + math.exp(-NormalDist().inv_cdf(share)))])
            with torch.no_grad():
                losses.append(
                    flow_loss(
                        transformer.eval(), scheduler, latents, noise, timestep, text_inputs(batch["text"], "cpu")
                    ).item()
                )
    assert len(losses) == 15
    assert loss == pytest.approx(sum(losses) / 15, rel=1e-5)
