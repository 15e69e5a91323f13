"""Parameter groups, learning-rate scaling, and schedules step by step."""

from typing import Any

import pytest
import torch
from torch import nn

from ssld.shared.training.optim import (
    cosine_factor,
    decay_factor,
    describe_lr,
    make_optimizer,
    multistep_factor,
    parameter_groups,
    scale_lr,
    set_lr,
)


def small_net() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    net[0].weight.requires_grad_(False)
    return net


def test_groups_by_decay_and_factor() -> None:
    groups = parameter_groups(
        small_net(), weight_decay=0.1, decay_norm_and_bias=False, lr_factor=lambda name: 0.5 if name[0] == "1" else 1.0
    )
    described = {(group["lr_factor"], group["weight_decay"]): group["names"] for group in groups}
    assert described == {(1.0, 0.0): ["0.bias", "2.bias"], (0.5, 0.0): ["1.weight", "1.bias"], (1.0, 0.1): ["2.weight"]}
    (group,) = parameter_groups(small_net(), weight_decay=0.1, decay_norm_and_bias=True)
    assert group["names"] == ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert len(group["params"]) == 5


def test_optimizers_are_what_their_names_say() -> None:
    def trained(name: str) -> float:
        weight = nn.Parameter(torch.ones(1))
        group = {"params": [weight], "lr_factor": 0.5, "weight_decay": 0.1}
        optimizer = make_optimizer(name, [group], momentum=0.9)  # type: ignore[arg-type]
        for _ in range(2):
            set_lr(optimizer, 0.2)
            weight.grad = torch.full((1,), 2.0)
            optimizer.step()
        return weight.item()

    # by hand, learning rate 0.1: g = 2 + 0.1 w; v = 0.9 v + g; w -= 0.1 v (plain) or 0.1 (g + 0.9 v) (Nesterov)
    w1 = 1 - 0.1 * 2.1
    g2 = 2 + 0.1 * w1
    assert trained("sgd") == pytest.approx(w1 - 0.1 * (0.9 * 2.1 + g2))
    n1 = 1 - 0.1 * (2.1 + 0.9 * 2.1)
    h2 = 2 + 0.1 * n1
    assert trained("nesterov") == pytest.approx(n1 - 0.1 * (h2 + 0.9 * (0.9 * 2.1 + h2)))
    # AdamW with a constant gradient: decoupled decay, then a step of the learning rate
    a1 = 1 * (1 - 0.01) - 0.1
    assert trained("adamw") == pytest.approx(a1 * (1 - 0.01) - 0.1, rel=1e-5)


def test_scaling() -> None:
    assert scale_lr(0.4, 256, 64, "sgd") == pytest.approx(0.1)
    assert scale_lr(0.4, 256, 64, "nesterov") == pytest.approx(0.1)
    assert scale_lr(0.4, 256, 64, "adamw") == pytest.approx(0.2)
    assert (
        describe_lr(0.4, 256, 64, "adamw")
        == "lr 0.2 = 0.4 scaled from batch 256 to 64 (with the square root of the batch)"
    )
    assert describe_lr(0.4, 256, 256, "adamw") == "lr 0.4 for batch 256"


def test_cosine_step_by_step() -> None:
    curve = [cosine_factor(step, steps=6, warmup_steps=2) for step in range(7)]
    assert curve == pytest.approx([0.5, 1.0, 1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5, 0.0])
    assert cosine_factor(0, steps=1, warmup_steps=0) == 1
    assert [cosine_factor(step, steps=2, warmup_steps=4) for step in range(2)] == [0.25, 0.5]


def test_multistep_step_by_step() -> None:
    curve = [multistep_factor(s, milestones=[4, 6], gamma=0.1, warmup_steps=2, warmup_start=0.1) for s in range(8)]
    assert curve == pytest.approx([0.1, 0.55, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert multistep_factor(0, milestones=[], gamma=0.1, warmup_steps=0, warmup_start=0.1) == 1


def test_decay_step_by_step() -> None:
    warmup: dict[str, Any] = {"warmup_steps": 2, "warmup_start": 0.5}
    linear = [decay_factor(step, steps=10, decay_steps=4, **warmup) for step in range(11)]
    assert linear == pytest.approx([0.5, 0.75, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    cosine = [decay_factor(step, steps=6, decay_steps=None, **warmup) for step in range(7)]
    assert cosine == pytest.approx([0.5, 0.75, 1, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5, 0])
    whole = [decay_factor(step, steps=4, decay_steps=9, warmup_steps=2, warmup_start=0.5) for step in range(4)]
    assert whole == pytest.approx([0.5, 0.75, 1, 0.5])  # the decay begins after the warm-up at the earliest
