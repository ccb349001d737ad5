from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput


@dataclass
class FlowMatchMidpointSchedulerOutput(BaseOutput):
    """
    Output of [`FlowMatchMidpointScheduler.step`].

    Args:
        prev_sample (`torch.Tensor`): The sample at the next, lower sigma, in the shape and dtype of the given one.
    """

    prev_sample: torch.Tensor


class FlowMatchMidpointScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Second-order sampling of a flow by the midpoint method (Movie Gen Audio): every step evaluates the model twice, at
    its beginning and halfway, and goes the whole way with the velocity found halfway. The error falls with the square
    of the step size.

    `timesteps` lists all evaluations, two a step, so a pipeline loops over them as over those of any scheduler, and
    calls [`step`] for each. Samples after an odd number of calls are at midpoints and only serve the next evaluation.

    Sigmas and timesteps are always float32.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            A timestep is `num_train_timesteps` times sigma.
        sigma_min (`float`, defaults to 1e-5):
            Noise left at the data end of the training path.
    """

    _compatibles = []
    order = 2

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, sigma_min: float = 1e-5):
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` {num_train_timesteps} must be at least 1.")
        if not 0 <= sigma_min < 1:
            raise ValueError(f"`sigma_min` {sigma_min} must be at least 0 and below 1.")
        self.num_inference_steps = None
        self.sigmas = None
        self.timesteps = None
        self._step_index = None
        self._begin_index = None
        self._sample = None

    @property
    def step_index(self) -> int | None:
        """Index of the next evaluation, even at the beginning of a step; `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first evaluation, if it was set with [`set_begin_index`]."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Set the index of the first evaluation, which otherwise is looked up from the first timestep.

        Args:
            begin_index (`int`, defaults to 0): Index into `timesteps`, an even one: odd ones are midpoints.
        """
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """
        Set the schedule: `sigmas` with the beginning and the midpoint of every step and a final 0, and `timesteps`
        without the final one. Steps are equally long by default.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps, at least 1, each of two evaluations. Not needed
                with `sigmas`.
            device (`str` or `torch.device`, *optional*): Where `sigmas` and `timesteps` go.
            sigmas (`list[float]`, *optional*): Where the steps begin, in place of the linear schedule: values from 1
                to above 0, strictly decreasing, without midpoints and without the final 0.

        Raises:
            `ValueError`: Neither argument or two that disagree, or values out of range.
        """
        if sigmas is None:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(f"`num_inference_steps` is {num_inference_steps}; pass at least 1, or `sigmas`.")
            # Linear in the steps, and so in their halves.
            sigmas = np.linspace(1, 0, 2 * num_inference_steps + 1).astype(np.float32)
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
            nodes = np.append(sigmas, np.float32(0))
            sigmas = np.zeros(2 * len(nodes) - 1, dtype=np.float32)
            sigmas[::2] = nodes
            sigmas[1::2] = (nodes[:-1] + nodes[1:]) / 2
            if not (np.diff(sigmas) < 0).all():
                raise ValueError(
                    "`sigmas` must decrease strictly (as float32, with room for midpoints), from noise near 1 to data "
                    "near 0."
                )

        self.num_inference_steps = len(sigmas) // 2
        self.sigmas = torch.from_numpy(sigmas).to(device=device, dtype=torch.float32)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self._step_index = None
        self._begin_index = None
        self._sample = None

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
    ) -> FlowMatchMidpointSchedulerOutput | tuple[torch.Tensor]:
        """
        At the beginning of a step, keep the sample and go halfway; at the midpoint, go the whole way from the kept
        sample. Computed in float32.

        Args:
            model_output (`torch.Tensor`): Velocity from data to noise, in the shape of `sample`.
            timestep (`float` or `torch.Tensor`): One of `timesteps`. Only the first call looks at it, and only if
                [`set_begin_index`] was not called; further calls count on.
            sample (`torch.Tensor`): The present sample, preferably float32.
            return_dict (`bool`, defaults to `True`): Whether to return an output class instead of a tuple.

        Returns:
            [`FlowMatchMidpointSchedulerOutput`] or `tuple`, with the next sample in the dtype of `sample`.

        Raises:
            `ValueError`: There is no schedule yet, it is finished, or the first timestep is a midpoint or not in it.
        """
        if self.num_inference_steps is None:
            raise ValueError("There is no schedule yet; call `set_timesteps` first.")
        if self._step_index is None:
            begin_index = self._begin_index
            if begin_index is None:
                if isinstance(timestep, torch.Tensor):
                    timestep = timestep.to(self.timesteps.device)
                begin_index = self.index_for_timestep(timestep)
            if begin_index % 2:
                raise ValueError(
                    f"Index {begin_index} of the schedule is a midpoint; begin with a step, at an even index."
                )
            self._step_index = begin_index
        if self._step_index >= 2 * self.num_inference_steps:
            raise ValueError(
                f"All {self.num_inference_steps} steps are taken; call `set_timesteps` before sampling again."
            )

        sigma_next = self.sigmas[self._step_index + 1]
        if self._step_index % 2 == 0:
            self._sample = sample
            sigma = self.sigmas[self._step_index]
        else:
            sigma = self.sigmas[self._step_index - 1]
        prev_sample = self._sample.float() + (sigma_next - sigma) * model_output.float()
        self._step_index += 1
        if self._step_index % 2 == 0:
            self._sample = None

        prev_sample = prev_sample.to(sample.dtype)
        if not return_dict:
            return (prev_sample,)
        return FlowMatchMidpointSchedulerOutput(prev_sample=prev_sample)

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
