"""Prototypes as one linear layer: soft labels of a teacher whose classes are K centers.

The probability of center k is softmax_k(-|x - c_k|^2 / 2T). |x|^2 is the same for all classes and cancels in the softmax; the rest,
(x.c_k - |c_k|^2 / 2) / T, is linear in x. So is the standardization x = (z - mean) / scale: together they are a weight and a bias on z.

B images, K centers, D features.
"""

import numpy as np

from ssld.stage1_ssld.clustering.embedding_files import Standard

_BISECTIONS = 50


def scores(x_BD: np.ndarray, center_KD: np.ndarray, offset_K: np.ndarray) -> np.ndarray:
    """x.c - |c|^2 / 2 + offset, float64 [B,K], multiplied in the precision of x; largest for the nearest center if all offsets are equal."""
    product_BK = (x_BD @ center_KD.astype(x_BD.dtype).T).astype(np.float64)
    product_BK += offset_K - 0.5 * (center_KD**2).sum(1)
    return product_BK


def softmax(logits_BK: np.ndarray) -> np.ndarray:
    """Softmax over classes [B,K]."""
    shares_BK = np.exp(logits_BK - logits_BK.max(1, keepdims=True))
    shares_BK /= shares_BK.sum(1, keepdims=True)
    return shares_BK


def perplexities(logits_BK: np.ndarray) -> np.ndarray:
    """Perplexity (e to the entropy) of each image's softmax: 1 for a one-hot distribution, K for a uniform one."""
    shares_BK = softmax(logits_BK)
    return np.exp(-(shares_BK * np.log(np.maximum(shares_BK, 1e-300))).sum(1))


def temperature_for(score_BK: np.ndarray, perplexity: float) -> float:
    """Find the temperature at which the images' softmax has this median perplexity, by bisection of its logarithm.

    A perplexity outside 1..K gives a very small or very large temperature.
    """
    spread = float(np.median(score_BK.max(1) - score_BK.mean(1))) or 1.0
    low, high = np.log(spread * 1e-6), np.log(spread * 1e6)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if np.median(perplexities(score_BK / np.exp(middle))) < perplexity:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def linear_layer(
    standard: Standard, center_KD: np.ndarray, offset_K: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return (weight_KD, bias_K) float64 on z.

    The mean over classes is subtracted from both, which changes no softmax and keeps the logits small enough for float32.
    """
    weight_KD = center_KD / (standard.scale_D * temperature)
    bias_K = (offset_K - 0.5 * (center_KD**2).sum(1)) / temperature - weight_KD @ standard.mean_D
    return weight_KD - weight_KD.mean(0), bias_K - bias_K.mean()
