"""Muon for the weights of convolutions and linear layers, AdamW for everything else, as one optimiser."""

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd


def orthogonalize(matrix: torch.Tensor, num_steps: int = 5) -> torch.Tensor:
    """About the nearest matrix with singular values of 1, by Newton-Schulz iterations (Jordan et al., 2024).

    The coefficients rise steeply from zero and do not converge to 1 exactly; singular values end between 0.7 and 1.2,
    which does for an update.

    Args:
        matrix (`torch.Tensor` of shape `(rows, columns)`): Of any scale; computed in bfloat16.
        num_steps (`int`, defaults to 5): Iterations.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16().T if is_tall else matrix.bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    r"""
    Muon (Jordan et al., 2024) for weights of convolutions and linear layers, AdamW for biases, scales and tables.

    torch's own takes matrices alone. Here the weight of a convolution is a matrix with a row for each output channel.
    Updates are scaled to the size of AdamW's (Liu et al., 2025, "Muon is Scalable for LLM Training"), so that one
    learning rate serves both and means about what it means to AdamW.

    Args:
        model (`torch.nn.Module`): Whose parameters are trained, those that require gradients. They are not sharded.
        lr (`float`): Learning rate of both.
        betas (`tuple[float, float]`, defaults to `(0.9, 0.99)`): Of AdamW.
        momentum (`float`, defaults to 0.95): Of Muon, in Nesterov's manner.
        weight_decay (`float`, defaults to 0): Decoupled, of both.
        eps (`float`, defaults to 1e-8): Of AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ):
        layers = [module for module in model.modules() if isinstance(module, nn.Linear | _ConvNd)]
        # Under weight norm the matrix is the direction, with a length of its own for each row.
        names = ("weight", "parametrizations.weight.original1")
        weights = {weight for layer in layers for name, weight in layer.named_parameters() if name in names}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [parameter for parameter in trained if parameter in weights], "muon": True},
            {"params": [parameter for parameter in trained if parameter not in weights], "muon": False},
        ]
        defaults = {"lr": lr, "betas": betas, "momentum": momentum, "weight_decay": weight_decay, "eps": eps}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = self._matrix_update if group["muon"] else self._adam_update
                change = update(parameter.grad, self.state[parameter], group)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * change)
        return loss

    @staticmethod
    def _matrix_update(grad: torch.Tensor, state: dict, group: dict) -> torch.Tensor:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        average = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        matrix = grad.lerp(average, group["momentum"]).flatten(1)
        # The root mean square of an orthogonal matrix's entries is 1 / sqrt(longer side); that of AdamW about 0.2.
        return 0.2 * max(matrix.shape) ** 0.5 * orthogonalize(matrix).to(grad.dtype).view_as(grad)

    @staticmethod
    def _adam_update(grad: torch.Tensor, state: dict, group: dict) -> torch.Tensor:
        if not state:
            # A tensor, as the optimisers of torch have it, so that checkpoints need no other types.
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        (beta1, beta2), step = group["betas"], state["step"].add_(1).item()
        mean = state["exp_avg"].lerp_(grad, 1 - beta1) / (1 - beta1**step)
        square = state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2) / (1 - beta2**step)
        return mean / (square.sqrt() + group["eps"])
