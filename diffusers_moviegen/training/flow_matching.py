"""Flow matching (Movie Gen, section 3.1.2), the same for every backbone."""

import torch


def sample_timesteps(
    count: int, generator: torch.Generator, num_train_timesteps: int = 1000, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Timesteps `(count,)` in float32 whose flow time `t = 1 - timestep / num_train_timesteps` is logit-normal(0, 1).

    Drawn on the CPU, so that a seed means the same on every device.
    """
    flow_time = torch.sigmoid(torch.randn(count, generator=generator))
    return (num_train_timesteps * (1 - flow_time)).to(device)
