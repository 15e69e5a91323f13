"""Sums on a device without float64, as Apple GPUs are: a distillation on the CPU in which every float64 tensor is an error, as it is there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssld.shared.distributed import ranks
from ssld.stage1_ssld.distill import main as distill
from ssld.stage1_ssld.distillation import features
from ssld.stage1_ssld.evaluation import metrics


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(out)):
            raise TypeError(f"{func}: the device does not support float64")
        return out


def test_a_distillation_needs_no_float64(
    arguments: Callable[..., list[str]],
    distill_settings: dict[str, Any],
    call: Callable[..., int],
    metrics_of: Callable[..., list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    """With features, their statistics and an evaluation; all numbers are those of a device that has it, to float32's digits."""
    settings = distill_settings | {"losses": [{"name": "kl"}, {"name": "pooled"}], "evaluate_every": 3}
    assert call(distill, arguments(settings, "with")) == 0
    for module in (ranks, features, metrics):
        monkeypatch.setattr(module, "sum_dtype", lambda device: torch.float32)
    with NoFloat64():
        assert call(distill, arguments(settings, "without")) == 0
    lines = [metrics_of(tmp_path / name) for name in ("with", "without")]
    for one, other in zip(*lines, strict=True):
        assert other == pytest.approx(one, rel=1e-3)


def test_float64_is_refused_by_the_mode() -> None:
    with NoFloat64(), pytest.raises(TypeError, match="float64"):
        ranks.for_sums(torch.ones(2))
