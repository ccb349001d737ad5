"""Muon against torch's own on matrices, AdamW against torch's own on the rest."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from diffusers_moviegen.training import Muon
from diffusers_moviegen.training.muon import orthogonalize


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 16, 5))


def train(model: nn.Module, optimizers: list, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def as_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    weights = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    return weights, [nn.Parameter(weight.detach().view(weight.shape[0], -1)) for weight in weights]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_are_those_of_torch(weight_decay):
    ours, theirs = make_model(), make_model()
    options = {"lr": 0.02, "weight_decay": weight_decay}
    train(ours, [Muon(ours, betas=(0.9, 0.99), **options)], range(5))

    # torch's takes matrices only: views of the same memory, which are given the gradients as matrices.
    weights, matrices = as_matrices(theirs)
    others = [parameter for parameter in theirs.parameters() if parameter.ndim < 2]
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.99), **options)
    for step in range(5):
        inputs = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        theirs(inputs).square().mean().backward()
        for weight, matrix in zip(weights, matrices, strict=True):
            matrix.grad = weight.grad.view_as(matrix)
        for optimizer in (muon, adam):
            optimizer.step()
        theirs.zero_grad()
    for mine, expected, start in zip(ours.parameters(), theirs.parameters(), make_model().parameters(), strict=True):
        assert not torch.allclose(expected, start, atol=1e-3)
        torch.testing.assert_close(mine, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24), (1, 7)])
def test_singular_values_become_about_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    result = orthogonalize(matrix).float()
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3 and values.max() < 1.3
    # The singular vectors stay.
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(result.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_no_gradient_no_update():
    assert not orthogonalize(torch.zeros(4, 4)).any()
    model = make_model()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = Muon(model, lr=1.0)
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before)) and not optimizer.state


def test_only_layers_have_matrices_and_frozen_weights_stay():
    model = make_model()
    model.register_parameter("table", nn.Parameter(torch.randn(6, 8)))
    model[0].requires_grad_(False)
    muon, adam = Muon(model, lr=0.1).param_groups
    assert [tuple(weight.shape) for weight in muon["params"]] == [(5, 128)]
    assert [tuple(weight.shape) for weight in adam["params"]] == [(6, 8), (8,), (8,), (5,)]


def test_a_restored_optimizer_goes_on():
    straight, resumed = make_model(), make_model()
    train(straight, [Muon(straight, lr=0.02)], range(6))
    first = Muon(resumed, lr=0.02)
    train(resumed, [first], range(3))
    state = copy.deepcopy(first.state_dict())
    second = Muon(resumed, lr=0.5)
    second.load_state_dict(state)
    train(resumed, [second], range(3, 6))
    for expected, actual in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, actual)


def make_normed_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        weight_norm(nn.Conv2d(3, 8, 3)), weight_norm(nn.ConvTranspose2d(8, 4, 2)), weight_norm(nn.Linear(5, 2))
    )


def test_under_weight_norm_the_directions_are_the_matrices():
    model = make_normed_model()
    muon, adam = Muon(model, lr=0.1).param_groups
    assert [tuple(weight.shape) for weight in muon["params"]] == [(8, 3, 3, 3), (8, 4, 2, 2), (2, 5)]
    lengths = [(8,), (8, 1, 1, 1), (4,), (8, 1, 1, 1), (2,), (2, 1)]
    assert [tuple(weight.shape) for weight in adam["params"]] == lengths
    assert sum(len(group["params"]) for group in (muon, adam)) == len(list(model.parameters()))


def test_updates_under_weight_norm_are_those_of_torch():
    ours, theirs = make_normed_model(), make_normed_model()
    train(ours, [Muon(ours, lr=0.02)], range(4))
    directions = [weight for name, weight in theirs.named_parameters() if name.endswith("original1")]
    others = [weight for name, weight in theirs.named_parameters() if not name.endswith("original1")]
    matrices = [nn.Parameter(weight.detach().view(weight.shape[0], -1)) for weight in directions]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=0.02, betas=(0.9, 0.99), weight_decay=0)
    for step in range(4):
        inputs = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        theirs(inputs).square().mean().backward()
        for weight, matrix in zip(directions, matrices, strict=True):
            matrix.grad = weight.grad.flatten(1)
        for optimizer in (muon, adam):
            optimizer.step()
        theirs.zero_grad()
    start = dict(make_normed_model().named_parameters())
    expected = dict(theirs.named_parameters())
    for name, mine in ours.named_parameters():
        assert not torch.allclose(expected[name], start[name], atol=1e-3)
        torch.testing.assert_close(mine, expected[name], atol=2e-4, rtol=0)
