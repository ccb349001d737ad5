import math
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput


@dataclass
class FlowMatchLinearQuadraticSchedulerOutput(BaseOutput):
    """
    Output of [`FlowMatchLinearQuadraticScheduler.step`].

    Args:
        prev_sample (`torch.Tensor`): The sample at the next, lower sigma, in the shape and dtype of the given one.
    """

    prev_sample: torch.Tensor


class FlowMatchLinearQuadraticScheduler(SchedulerMixin, ConfigMixin):
    r"""
    First-order Euler sampling of a flow on the linear-quadratic schedule of Movie Gen: the first part of the steps are
    the first steps of a much longer linear schedule, the others cover the rest with quadratically growing steps.

    With `n` steps of which `l` are linear, of an emulated linear schedule of `N` steps, step `i` is at

        sigma_i = 1 - i / N - (1 - n / N) * (max(i - l, 0) / (n - l)) ** 2

    which decreases strictly from exactly 1 (noise) to exactly 0 (data) and has a continuous slope. At least one step
    is quadratic, and `N` counts as `n` where it is smaller, which makes the schedule linear.

    Sigmas and timesteps are always float32. Neighbouring sigmas differ by `1 / N` at first, which bfloat16 cannot
    resolve: keep samples in float32 between the steps, or the first steps change nothing.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            A timestep is `num_train_timesteps` times sigma.
        num_emulated_steps (`int`, defaults to 1000):
            Steps of the linear schedule that is emulated. Movie Gen uses 250 or 1000.
        linear_ratio (`float`, defaults to 0.5):
            Share of linear steps, at least 0 and below 1; their number is rounded up.
        sigma_min (`float`, defaults to 1e-5):
            Noise left at the data end of the training path.
    """

    _compatibles = []
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        num_emulated_steps: int = 1000,
        linear_ratio: float = 0.5,
        sigma_min: float = 1e-5,
    ):
        if num_train_timesteps < 1 or num_emulated_steps < 1:
            raise ValueError(
                f"`num_train_timesteps` {num_train_timesteps} and `num_emulated_steps` {num_emulated_steps} must be "
                "at least 1."
            )
        if not 0 <= linear_ratio < 1:
            raise ValueError(f"`linear_ratio` {linear_ratio} must be at least 0 and below 1.")
        if not 0 <= sigma_min < 1:
            raise ValueError(f"`sigma_min` {sigma_min} must be at least 0 and below 1.")
        self.num_inference_steps = None
        self.sigmas = None
        self.timesteps = None
        self._step_index = None
        self._begin_index = None

    @property
    def step_index(self) -> int | None:
        """Index of the next step, `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, if it was set with [`set_begin_index`]."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Set the index of the first step, which otherwise is looked up from the first timestep.

        Args:
            begin_index (`int`, defaults to 0): Index into `timesteps`.
        """
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """
        Set the schedule: `sigmas` with one value per step and a final 0, and `timesteps` without the final one.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps, at least 1. Not needed with `sigmas`.
            device (`str` or `torch.device`, *optional*): Where `sigmas` and `timesteps` go.
            sigmas (`list[float]`, *optional*): A schedule of one's own in place of the linear-quadratic one: values
                from 1 to above 0, strictly decreasing, without the final 0.

        Raises:
            `ValueError`: Neither argument or two that disagree, or values out of range.
        """
        if sigmas is None:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(f"`num_inference_steps` is {num_inference_steps}; pass at least 1, or `sigmas`.")
            sigmas = self._linear_quadratic_sigmas(num_inference_steps)
        else:
            sigmas = np.asarray(sigmas, dtype=np.float32)
            if num_inference_steps is not None and num_inference_steps != len(sigmas):
                raise ValueError(
                    f"`sigmas` has {len(sigmas)} values but `num_inference_steps` is {num_inference_steps}; pass only "
                    "`sigmas`."
                )
            # Written so that NaN fails too.
            if sigmas.ndim != 1 or len(sigmas) == 0 or not (sigmas[0] <= 1 and sigmas[-1] > 0):
                raise ValueError("`sigmas` must be a list of values up to 1 and above 0; the final 0 is appended.")
            if not (np.diff(sigmas) < 0).all():
                raise ValueError("`sigmas` must decrease strictly (as float32), from noise near 1 to data near 0.")
            sigmas = np.append(sigmas, np.float32(0))

        self.num_inference_steps = len(sigmas) - 1
        self.sigmas = torch.from_numpy(sigmas).to(device=device, dtype=torch.float32)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self._step_index = None
        self._begin_index = None

    def _linear_quadratic_sigmas(self, num_steps: int) -> np.ndarray:
        emulated_steps = max(self.config.num_emulated_steps, num_steps)
        # The tolerance keeps a share such as 0.28 of 25 steps, 7.000000000000001 in floating point, at 7.
        linear_steps = min(math.ceil(num_steps * self.config.linear_ratio - 1e-9), num_steps - 1)
        steps = np.arange(num_steps + 1)
        quadratic = (np.maximum(steps - linear_steps, 0) / (num_steps - linear_steps)) ** 2
        times = steps / emulated_steps + (1 - num_steps / emulated_steps) * quadratic
        return (1 - times).astype(np.float32)

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """
        Index of a timestep in the schedule.

        Raises:
            `ValueError`: The timestep is not one of `timesteps`.
        """
        indices = (self.timesteps == timestep).nonzero()
        if len(indices) == 0:
            raise ValueError(f"Timestep {float(timestep)} is not in the schedule; pass one of `scheduler.timesteps`.")
        return indices[0].item()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> FlowMatchLinearQuadraticSchedulerOutput | tuple[torch.Tensor]:
        """
        Take one Euler step to the next sigma. Computed in float32.

        Args:
            model_output (`torch.Tensor`): Velocity from data to noise, in the shape of `sample`.
            timestep (`float` or `torch.Tensor`): One of `timesteps`. Only the first call looks at it, and only if
                [`set_begin_index`] was not called; further calls count on.
            sample (`torch.Tensor`): The present sample, preferably float32.
            return_dict (`bool`, defaults to `True`): Whether to return an output class instead of a tuple.

        Returns:
            [`FlowMatchLinearQuadraticSchedulerOutput`] or `tuple`, with the next sample in the dtype of `sample`.

        Raises:
            `ValueError`: There is no schedule yet, it is finished, or the first timestep is not in it.
        """
        if self.num_inference_steps is None:
            raise ValueError("There is no schedule yet; call `set_timesteps` first.")
        if self._step_index is None:
            if self._begin_index is None:
                if isinstance(timestep, torch.Tensor):
                    timestep = timestep.to(self.timesteps.device)
                self._step_index = self.index_for_timestep(timestep)
            else:
                self._step_index = self._begin_index
        if self._step_index >= self.num_inference_steps:
            raise ValueError(
                f"All {self.num_inference_steps} steps are taken; call `set_timesteps` before sampling again."
            )

        sigma_difference = self.sigmas[self._step_index + 1] - self.sigmas[self._step_index]
        prev_sample = sample.float() + sigma_difference * model_output.float()
        self._step_index += 1

        prev_sample = prev_sample.to(sample.dtype)
        if not return_dict:
            return (prev_sample,)
        return FlowMatchLinearQuadraticSchedulerOutput(prev_sample=prev_sample)

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        Point on the training path from data to noise: `(1 - sigma) * sample + (1 - (1 - sigma_min) * (1 - sigma)) *
        noise` (Movie Gen, flow matching, with its time `t = 1 - sigma`). Computed in float32.

        Args:
            sample (`torch.Tensor` of shape `(batch, ...)`): Data.
            timestep (`torch.Tensor` of shape `(batch,)` or scalar, float32): Any times from 0 to
                `num_train_timesteps`, not only those of the schedule.
            noise (`torch.Tensor`): Standard normal noise in the shape of `sample`.

        Returns:
            `torch.Tensor` in the shape and dtype of `sample`.
        """
        sigma = timestep.to(sample.device, torch.float32) / self.config.num_train_timesteps
        sigma = sigma.reshape(-1, *[1] * (sample.ndim - 1))
        noise_scale = 1 - (1 - self.config.sigma_min) * (1 - sigma)
        return ((1 - sigma) * sample.float() + noise_scale * noise.float()).to(sample.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        Training target, the derivative of [`scale_noise`] by sigma: `(1 - sigma_min) * noise - sample`, the negative
        of Movie Gen's, which counts time from noise to data. Computed in float32.

        Args:
            sample (`torch.Tensor`): Data.
            noise (`torch.Tensor`): Noise in the shape of `sample`.

        Returns:
            `torch.Tensor` in the shape and dtype of `sample`.
        """
        return ((1 - self.config.sigma_min) * noise.float() - sample.float()).to(sample.dtype)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
