"""Schedules of the learning rate that diffusers does not have."""

import math


class HalveOnPlateau:
    """The factor of a learning rate that warms up, then halves when the validation loss stops falling (Movie
    Gen, training at 768 px).

    A callable for `torch.optim.lr_scheduler.LambdaLR`, which saves and restores its state with its own:

        schedule = HalveOnPlateau(num_warmup_steps=1000, patience=3, min_factor=0.1)
        lr_scheduler = LambdaLR(optimizer, schedule)
        ...
        schedule.update(validation_loss)

    Args:
        num_warmup_steps: steps in which the factor rises linearly from 0.
        patience: validations in a row without a new lowest loss after which the factor is halved; the count then
            starts again.
        min_factor: the factor is not halved below this, 0 to 1.

    Attributes:
        factor (`float`): the factor after the warm-up.
        best (`float`): the lowest validation loss so far.
        validations_since (`int`): validations since then, or since the factor was halved.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, num_warmup_steps: int, patience: int, min_factor: float = 0.0):
        if num_warmup_steps < 0 or patience < 1 or not 0 <= min_factor <= 1:
            raise ValueError(
                "`num_warmup_steps` must be at least 0, `patience` at least 1 and `min_factor` from 0 to 1, not "
                f"{num_warmup_steps}, {patience} and {min_factor}."
            )
        self.num_warmup_steps, self.patience, self.min_factor = num_warmup_steps, patience, min_factor
        self.factor, self.best, self.validations_since = 1.0, math.inf, 0

    def __call__(self, step: int) -> float:
        if step < self.num_warmup_steps:
            return self.factor * step / self.num_warmup_steps
        return self.factor

    def update(self, validation_loss: float) -> bool:
        """Notes the loss of a validation and returns whether it halved the factor, which shows from the next step on.

        A loss that is not a number counts as one that has not fallen.
        """
        if validation_loss < self.best:
            self.best, self.validations_since = validation_loss, 0
            return False
        self.validations_since += 1
        if self.validations_since < self.patience:
            return False
        self.validations_since = 0
        before, self.factor = self.factor, max(self.factor / 2, self.min_factor)
        return self.factor < before
