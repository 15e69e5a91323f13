"""Folded BatchNorm: equal outputs from fewer modules, and an unchanged network where folding is impossible."""

import contextlib
import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from ssld.shared.models import folding
from ssld.shared.models.folding import fold_batchnorm
from tests.tf32 import to_tf32


def lived_in(net: Any) -> Any:
    """The network with statistics and scales that a mistake in folding would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                for tensor, low in ((module.running_mean, -1), (module.bias, -1), (module.running_var, 0.5), (module.weight, 0.5)):  # fmt: skip
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return net.eval()


def noise(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize(
    ("arch", "all_of_them"),
    [
        ("test_resnet", True),
        ("test_efficientnet", True),  # BatchNorm and activation in one module
        ("tf_mobilenetv3_small_minimal_100", True),  # padding by size before the convolution
        ("hgnetv2_b0", True),
        ("repvgg_a0", False),  # BatchNorm of the input itself
    ],
)
@torch.no_grad()
def test_same_answers_from_fewer_modules(arch: str, all_of_them: bool) -> None:
    torch.manual_seed(0)
    net = lived_in(timm.create_model(arch, num_classes=5))
    before, pixels = copy.deepcopy(net.state_dict()), noise(64)
    folded, count, reason = fold_batchnorm(net, noise())
    assert not reason
    assert count > 0
    assert norms(folded) == norms(net) - count
    assert (norms(folded) == 0) == all_of_them
    expected = net(pixels)
    torch.testing.assert_close(folded(pixels), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())  # a copy was folded
    # its parts can still be called one by one
    part: Any = folded
    torch.testing.assert_close(part.forward_head(part.forward_features(pixels)), part(pixels))


class Shared(nn.Module):
    """One convolution, read by its BatchNorm and by the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        result: torch.Tensor = self.norm(y) + y
        return result


class Twice(Shared):
    """One BatchNorm after the same convolution, twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.conv(x)) + self.norm(self.conv(2 * x))
        return result


class Undecided(Shared):
    """The called layers depend on the input's values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.conv(x if x.sum() > 0 else -x))
        return result


class Whimsical(Shared):
    """Answers otherwise where it was folded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.conv(x)) * len(list(self.norm.parameters()))
        return result


class Partly(nn.Module):
    """One pair that can be folded, before one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), Shared()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(x))
        return result


@torch.no_grad()
def test_what_can_be_folded_is() -> None:
    net = lived_in(Partly())
    folded, count, reason = fold_batchnorm(net, noise())
    assert not reason
    assert (count, norms(folded)) == (1, 1)
    torch.testing.assert_close(folded(noise()), net(noise()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Shared, "no BatchNorm directly follows a convolution whose output nothing else reads"),
        (Twice, "no BatchNorm directly follows a convolution whose output nothing else reads"),
        (Undecided, "the network cannot be traced or run folded (TraceError: symbolically traced variables cannot be"),
        (Whimsical, "outputs would differ by 1.0e+00 of the largest; 0.001 is allowed"),
        (lambda: timm.create_model("test_vit"), ""),
    ],
)
def test_a_network_that_cannot_be_folded_is_itself(kind: Any, reason: str) -> None:
    net = lived_in(kind())
    same, count, why = fold_batchnorm(net, noise(160))
    assert same is net
    assert count == 0
    assert why.startswith(reason)
    assert bool(why) == bool(reason)


BACKENDS: Any = torch.backends
PRECISIONS = (BACKENDS.cudnn.conv, BACKENDS.cuda.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.matmul)


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions as on a GPU of Ampere or later: operands rounded, unless it is switched off.

    To bf16: what TF32 changes is at the limit of what folding may, and on some CPUs below it.
    """
    forward = nn.Conv2d._conv_forward

    def rounded(self: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if BACKENDS.cudnn.conv.fp32_precision != "ieee":
            x, weight = x.bfloat16().float(), weight.bfloat16().float()
        return forward(self, x, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", rounded)


def test_rounding_of_tf32() -> None:
    """A step is 2^-10 between 1 and 2."""
    given = torch.tensor([1.0, 1 + 2**-10, 1 + 0.4 * 2**-10, -1 - 0.6 * 2**-10, 3.0])
    assert to_tf32(given).tolist() == [1.0, 1 + 2**-10, 1.0, -1 - 2**-10, 3.0]


def test_tf32_does_not_decide(tf32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rounding is larger than what folding may change; so the comparison runs without it, and switches it back afterwards."""
    torch.manual_seed(0)
    net = lived_in(timm.create_model("resnet50d", num_classes=5))
    before = [group.fp32_precision for group in PRECISIONS]
    assert before[0] == "tf32"
    _, count, reason = fold_batchnorm(net, noise(64))
    assert count > 50
    assert not reason
    assert [group.fp32_precision for group in PRECISIONS] == before
    monkeypatch.setattr(folding, "full_float32", contextlib.nullcontext)
    same, count, reason = fold_batchnorm(net, noise(64))
    assert same is net
    assert count == 0
    assert reason.startswith("outputs would differ by ")


def test_precision_comes_back_after_an_error() -> None:
    before = [group.fp32_precision for group in PRECISIONS]

    def fail() -> None:
        with folding.full_float32():
            assert {group.fp32_precision for group in PRECISIONS} == {"ieee"}
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert [group.fp32_precision for group in PRECISIONS] == before


def test_no_warning_from_tracing(recwarn: pytest.WarningsRecorder) -> None:
    fold_batchnorm(lived_in(timm.create_model("test_efficientnet")), noise())
    assert not recwarn.list
