from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler

from diffusers_moviegen.training import HalveOnPlateau, Muon, make_lr_scheduler, make_optimizer, optimization


def options(**changes):
    defaults = {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "lr_scheduler": "cosine"}
    defaults |= {"lr_warmup_steps": 2, "max_train_steps": 10, "lr_patience": 1, "min_learning_rate": 0.004}
    return SimpleNamespace(**defaults | changes)


def test_adamw_is_pytorchs_for_the_weights_that_learn():
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[0].bias.requires_grad_(False)
    ours = make_optimizer(Accelerator(cpu=True), options(), models[0], betas=(0.8, 0.9))
    reference = torch.optim.AdamW([models[1].weight], lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(3):
        for model, optimizer in zip(models, (ours, reference), strict=True):
            model(torch.full((1, 3), step + 1.0)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(models[0].weight, models[1].weight)
    assert [group["params"] for group in ours.param_groups] == [[models[0].weight]]


def test_muon_is_for_whole_weights(monkeypatch):
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(3, 2)
    assert isinstance(make_optimizer(accelerator, options(optimizer="muon"), model), Muon)
    # As if this process were one of FSDP's.
    monkeypatch.setattr(optimization, "DistributedType", SimpleNamespace(FSDP=DistributedType.NO))
    with pytest.raises(ValueError, match="--optimizer muon needs whole weights.*use adamw"):
        make_optimizer(accelerator, options(optimizer="muon"), model)
    make_optimizer(accelerator, options(), model)


def test_schedules():
    def rates(lr_scheduler, optimizer, update=None):
        found = []
        for _ in range(10):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            lr_scheduler.step()
            if update is not None:
                update(1.0)
        return found

    ours, reference = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01) for _ in range(2))
    lr_scheduler, plateau = make_lr_scheduler(options(), ours)
    assert plateau is None
    wanted = get_scheduler("cosine", reference, num_warmup_steps=2, num_training_steps=10)
    assert rates(lr_scheduler, ours) == rates(wanted, reference)

    ours = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    lr_scheduler, plateau = make_lr_scheduler(options(lr_scheduler="halve_on_plateau"), ours)
    assert isinstance(plateau, HalveOnPlateau)
    # After the warm-up, the first loss is the lowest. Each of the others halves the rate of the next step but one.
    assert rates(lr_scheduler, ours, plateau.update) == pytest.approx([0, 0.005, 0.01, 0.005, *[0.004] * 6])
