"""Closed forms in float64 NumPy, and the comparison of a loss with one: values, and the gradient with differences of the closed form."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def entropy(p: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -(y * np.log(p) + (1 - y) * np.log(1 - p))


def softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def check(actual: Callable[[Tensor], Tensor], closed: Callable[[np.ndarray], np.ndarray], x: Tensor) -> None:
    """Values in float32 and in bf16's input against the closed form, and the gradient of the sum against its differences."""
    expected = closed(x.double().numpy())
    torch.testing.assert_close(actual(x).double(), torch.from_numpy(expected), rtol=2e-5, atol=2e-6)
    assert actual(x.bfloat16()).dtype == torch.float32
    leaf = x.clone().requires_grad_()
    actual(leaf).sum().backward()
    assert leaf.grad is not None
    slope, step = np.zeros(x.shape), 1e-5
    for place in np.ndindex(*x.shape):
        there = x.double().numpy()
        there[place] += step
        back = there.copy()
        back[place] -= 2 * step
        slope[place] = (closed(there).sum() - closed(back).sum()) / (2 * step)
    torch.testing.assert_close(leaf.grad.double(), torch.from_numpy(slope), rtol=1e-3, atol=1e-5)
