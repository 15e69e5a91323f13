"""A loss of one's own: registered by name, used through settings and flags, held against the built-in loss of the same formula."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssld.shared.models.model_file import read_tensors
from ssld.stage1_ssld.config import DistillConfig
from ssld.stage1_ssld.data_config import LOSSES, LossConfig
from ssld.stage1_ssld.distill import distill, main, register_loss


@pytest.fixture(autouse=True)
def unregister() -> Iterator[None]:
    builtin = set(LOSSES)
    yield
    for name in set(LOSSES) - builtin:
        del LOSSES[name]


def own_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = (teacher / temperature).softmax(-1)
    return temperature**2 * (p * (p.log() - (student / temperature).log_softmax(-1))).sum()


def weights(run: Path) -> dict[str, Tensor]:
    return read_tensors(run / "student.safetensors")


def test_trains_as_the_built_in_loss_of_its_formula(
    arguments: Any, distill_settings: dict[str, Any], call: Any, tmp_path: Path, metrics_of: Any
) -> None:
    register_loss("own_kl", own_kl)
    for name in ("kl", "own_kl"):
        losses = [{"name": name, "temperature": 4.0, "weight": 0.5}, "symmetric_kl"]
        assert call(main, arguments(distill_settings | {"losses": losses}, name)) == 0
    for name, tensor in weights(tmp_path / "kl").items():
        torch.testing.assert_close(weights(tmp_path / "own_kl")[name], tensor, rtol=1e-4, atol=1e-5)
    line = metrics_of(tmp_path / "own_kl")[0]
    assert line["loss"] == pytest.approx(0.5 * line["own_kl"] + line["symmetric_kl"], rel=1e-5)


def test_by_a_flag_and_by_the_python_call(
    arguments: Any, distill_settings: dict[str, Any], call: Any, tmp_path: Path
) -> None:
    register_loss("own_mse", lambda student, teacher: (student - teacher).square().mean(-1).sum())
    assert call(main, arguments(distill_settings, "flag", "--losses", "own_mse")) == 0
    settings = distill_settings | {"losses": ["own_mse"], "output": tmp_path / "called"}

    def run(_: list[str]) -> int:
        distill(DistillConfig(**settings))
        return 0

    assert call(run, []) == 0
    for name, tensor in weights(tmp_path / "flag").items():
        assert torch.equal(weights(tmp_path / "called")[name], tensor)


def test_on_pooled_features(
    arguments: Any, distill_settings: dict[str, Any], call: Any, tmp_path: Path, metrics_of: Any
) -> None:
    """Its heads are those of `pooled`, so the same formula gives the same weights."""

    def own_cosine(student: Tensor, teacher: Tensor) -> Tensor:
        return (1 - torch.cosine_similarity(student, teacher, dim=-1)).sum()

    register_loss("own_cosine", own_cosine, compares="pooled")
    for name in ("pooled", "own_cosine"):
        assert call(main, arguments(distill_settings | {"losses": [name]}, name)) == 0
    for name, tensor in weights(tmp_path / "pooled").items():
        torch.testing.assert_close(weights(tmp_path / "own_cosine")[name], tensor, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="two terms compare pooled features; keep one of them"):
        DistillConfig(**distill_settings, losses=["pooled", "own_cosine"], output=tmp_path / "x")


def test_returns_anything_but_a_sum(arguments: Any, distill_settings: dict[str, Any], user_error: Any) -> None:
    register_loss("per_image", lambda student, teacher: (student - teacher).square().mean(-1))
    settings = distill_settings | {"losses": ["per_image"]}
    expected = "losses: per_image returned [8]; return a scalar tensor, the sum over the batch"
    assert user_error(main, arguments(settings)) == expected
    register_loss("number", lambda student, teacher: 1.0)
    settings = distill_settings | {"losses": ["number"]}
    expected = "losses: number returned float; return a scalar tensor, the sum over the batch"
    assert user_error(main, arguments(settings, "other")) == expected
    register_loss("detached", lambda student, teacher: (student - teacher).square().sum().detach())
    settings = distill_settings | {"losses": ["detached"]}
    expected = (
        "losses: detached returned a tensor without gradient; compute it from the student's output, without detach"
    )
    assert user_error(main, arguments(settings, "third")) == expected


def test_the_example_of_the_documentation(
    arguments: Any, distill_settings: dict[str, Any], call: Any, tmp_path: Path, metrics_of: Any
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "my_loss"}
    exec(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], names)
    s, t = np.random.default_rng(0).standard_normal((2, 5, 4))
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (s, t))
    value = names["reverse_kl"](torch.from_numpy(s), torch.from_numpy(t)).item()
    assert value == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    assert call(names["main"], arguments(distill_settings, "run", "--losses", "reverse_kl")) == 0
    first, *_, last = (line["loss"] for line in metrics_of(tmp_path / "run") if "loss" in line)
    assert 0 < last < first


def test_names(arguments: Any, distill_settings: dict[str, Any], user_error: Any) -> None:
    with pytest.raises(ValueError, match=r"register_loss: 'kl' is taken; give another name"):
        register_loss("kl", own_kl)
    with pytest.raises(ValueError, match=r"register_loss: 'own kl' is not an identifier; give another name"):
        register_loss("own kl", own_kl)
    unknown: Any = "feats"
    with pytest.raises(ValueError, match=r"own_kl: compares: expected logits, pooled, spatial \(given: 'feats'\)"):
        register_loss("own_kl", own_kl, compares=unknown)
    message = user_error(main, arguments(distill_settings | {"losses": ["own_kl"]}))
    assert message.endswith(
        "losses.0.name: unknown loss 'own_kl'; give one of symmetric_kl, kl, soft_cross_entropy, jensen_shannon, dist, decoupled_kd, "
        "bernoulli_kl, pooled, spatial"
    )
    register_loss("own_kl", own_kl)
    assert LossConfig(name="own_kl", temperature=2.0).temperature == 2
    with pytest.raises(ValueError, match="own_kl has no beta; leave it at 1, or use decoupled_kd"):
        LossConfig(name="own_kl", beta=2.0)
    store = {"store": "x", "losses": ["own_kl"]}
    assert "store: own_kl needs every logit" in user_error(main, arguments(distill_settings | store))
