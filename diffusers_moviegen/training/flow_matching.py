"""Flow matching (Movie Gen, section 3.1.2), the same for every backbone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import ModelMixin, SchedulerMixin
from torch.nn.utils.rnn import pad_sequence

from .latent_cache import LatentCache


def sample_timesteps(
    count: int,
    generator: torch.Generator,
    num_train_timesteps: int = 1000,
    device: str | torch.device = "cpu",
    logit_mean: float = 0.0,
) -> torch.Tensor:
    """Timesteps `(count,)` in float32, whose flow time `t = 1 - timestep / num_train_timesteps` is logit-normal.

    Drawn on the CPU, so that a seed means the same on every device. The deviation is 1. The mean is `logit_mean`, 0 in
    the paper; below it there is more noise.
    """
    flow_time = torch.sigmoid(torch.randn(count, generator=generator) + logit_mean)
    return (num_train_timesteps * (1 - flow_time)).to(device)


def step_generator(seed: int, step: int, rank: int = 0, stream: int = 0) -> torch.Generator:
    """A generator on the CPU that these numbers alone decide, so that a resumed run draws what the first one would.

    Args:
        seed: of the run.
        step: counts batches, from 0.
        rank: of the process.
        stream: tells apart what is drawn for different purposes.
    """
    # Mixed, because the generator looks at 32 bits of a seed only: sums and products of these numbers would collide.
    mixed = np.random.SeedSequence([seed, step, rank, stream]).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


def text_inputs(texts: list[dict[str, torch.Tensor]], device: str | torch.device) -> dict[str, torch.Tensor | None]:
    """The text arguments of the backbone's `forward`.

    All encoders are always there, so that every process of a group computes gradients for the same weights; one that
    has no token for any text of the batch gets a padding token that the mask hides.

    Args:
        texts: for each sample features `(tokens, channels)` by suffix of the encoder: "", "_2", "_3".
        device: where the inputs go.
    """
    inputs = {}
    for suffix in texts[0]:
        features = [text[suffix] for text in texts]
        lengths = torch.tensor([len(value) for value in features])
        padded = pad_sequence(features, batch_first=True)
        if padded.shape[1] == 0:
            padded = padded.new_zeros(len(texts), 1, padded.shape[2])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        inputs[f"encoder_hidden_states{suffix}"] = padded.to(device)
        inputs[f"encoder_attention_mask{suffix}"] = None if mask.all() else mask.to(device)
    return inputs


def draw_flow_latents(
    batch: dict[str, Any], generator: torch.Generator, device: str | torch.device, logit_mean: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents sampled from the posteriors of a batch, noise like them, and timesteps `(batch,)`, all in float32.

    The arguments are those of `draw_flow_batch`.
    """
    mean, std = batch["mean"], batch["std"]
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    timesteps = sample_timesteps(len(mean), generator, device=device, logit_mean=logit_mean)
    return latents.to(device), noise.to(device), timesteps


def draw_flow_batch(
    batch: dict[str, Any],
    unconditional: dict[str, torch.Tensor],
    prompt_dropout: float,
    generator: torch.Generator,
    device: str | torch.device,
    logit_mean: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor | None]]:
    """What a batch of a [`LatentCache`] becomes in one step.

    Args:
        batch: as `LatentCache.collate` returns it.
        unconditional: text features of the empty prompt.
        prompt_dropout: share of the samples that get those instead of their own, 0 to 1.
        generator: on the CPU; alone decides all that is drawn.
        device: where the results go.
        logit_mean: as `sample_timesteps` takes it.

    Returns:
        Latents sampled from the posteriors and noise, both `(batch, channels, frames, height, width)`, timesteps
        `(batch,)`, all in float32, and the text arguments of the backbone.
    """
    flow_latents = draw_flow_latents(batch, generator, device, logit_mean)
    dropped = torch.rand(len(batch["mean"]), generator=generator) < prompt_dropout
    texts = [unconditional if drop else text for drop, text in zip(dropped.tolist(), batch["text"], strict=True)]
    return *flow_latents, text_inputs(texts, device)


def flow_loss(
    transformer: torch.nn.Module,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    conditions: dict[str, torch.Tensor | None],
) -> torch.Tensor:
    """Mean squared error of the predicted velocity, in diffusers' direction from data to noise; a scalar.

    Args:
        transformer: the backbone, wrapped or not.
        scheduler: a flow-matching scheduler with `scale_noise` and `get_velocity`.
        latents, noise, timesteps, conditions: as `draw_flow_batch` returns them; the conditions are further arguments
            of the backbone.
    """
    noisy = scheduler.scale_noise(latents, timesteps, noise)
    prediction = transformer(hidden_states=noisy, timestep=timesteps, **conditions, return_dict=False)[0]
    return F.mse_loss(prediction.float(), scheduler.get_velocity(latents, noise))


def text_conditions(batch: dict[str, Any], device: str | torch.device) -> dict[str, torch.Tensor | None]:
    """The conditions of a batch of a [`LatentCache`] for a backbone that reads text alone."""
    return text_inputs(batch["text"], device)


@torch.no_grad()
def validation_flow_loss(
    transformer: ModelMixin,
    scheduler: SchedulerMixin,
    cache: LatentCache,
    accelerator: Accelerator,
    batch_size: int,
    num_times: int = 4,
    conditions: Callable[[dict[str, Any], torch.device], dict[str, torch.Tensor | None]] = text_conditions,
) -> float:
    """The flow-matching loss on fixed samples at fixed times and noise, which tracks human judgement (section 3.3).

    Every sample is seen at `num_times` flow times, midpoints of equally likely intervals of the training
    distribution, with noise and a draw of its posterior that its place in the cache decides. So the figure is the
    same, up to rounding, for every batch size and number of processes. To be called by all processes.

    Args:
        transformer: the backbone, wrapped or not; it is left in training mode.
        scheduler: as in `flow_loss`.
        cache: the samples.
        accelerator: shares them out among the processes and decides the precision.
        batch_size: samples a forward pass.
        num_times: flow times a sample.
        conditions: makes the further arguments of the backbone of a batch.
    """
    by_bucket = {}
    for index, sample in enumerate(cache.samples):
        by_bucket.setdefault(sample.bucket, []).append(index)
    batches = [
        indices[start : start + batch_size]
        for indices in by_bucket.values()
        for start in range(0, len(indices), batch_size)
    ]
    quantiles = (torch.arange(num_times) + 0.5) / num_times
    times = 1000 * (1 - torch.sigmoid(torch.special.ndtri(quantiles)))
    transformer.eval()
    total = torch.zeros(2, device=accelerator.device)
    # Sharded weights are gathered by all processes together: each does as many passes as the others, the last ones
    # perhaps for nothing.
    for start in range(0, len(batches), accelerator.num_processes):
        place = start + accelerator.process_index
        indices = batches[min(place, len(batches) - 1)]
        batch = cache.collate([cache.read(index) for index in indices])
        inputs = conditions(batch, accelerator.device)
        latents, noise = [], []
        for index, mean, std in zip(indices, batch["mean"], batch["std"], strict=True):
            generator = step_generator(0, index)
            latents.append(mean + std * torch.randn(mean.shape, generator=generator))
            noise.append(torch.randn(mean.shape, generator=generator))
        latents, noise = (torch.stack(values).to(accelerator.device) for values in (latents, noise))
        for time in times:
            timesteps = time.expand(len(indices)).to(accelerator.device)
            with accelerator.autocast():
                loss = flow_loss(transformer, scheduler, latents, noise, timesteps, inputs)
            if place < len(batches):
                total += torch.stack(
                    [loss.float() * len(indices), torch.ones_like(loss, dtype=torch.float) * len(indices)]
                )
    transformer.train()
    total = accelerator.reduce(total, "sum")
    return (total[0] / total[1]).item()
