"""Prototypes as a linear layer, against distances in float64."""

import numpy as np
import pytest

from ssld.stage1_ssld.clustering.embedding_files import Standard
from ssld.stage1_ssld.clustering.prototype_layer import linear_layer, perplexities, scores, softmax, temperature_for

D, K, B = 24, 7, 200


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(3)


def by_distance(x_BD: np.ndarray, center_KD: np.ndarray, offset_K: np.ndarray, temperature: float) -> np.ndarray:
    """softmax((-|x - c|^2 / 2 + offset) / T), written out."""
    squares_BK = ((x_BD[:, None] - center_KD) ** 2).sum(2)
    shares_BK = np.exp((-squares_BK / 2 + offset_K) / temperature)
    return np.asarray(shares_BK / shares_BK.sum(1, keepdims=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_the_layer_answers_as_the_distances_do(draw: np.random.Generator, dtype: type, offset: float) -> None:
    """Standardization folded in: the layer sees raw embeddings, of features that differ in mean and scale a thousandfold."""
    standard = Standard(draw.normal(size=D) * 20, 10 ** draw.uniform(-2, 1, D))
    center_KD, offset_K = draw.normal(size=(K, D)), offset * draw.normal(size=K)
    z_BD = (draw.normal(size=(B, D)) * standard.scale_D + standard.mean_D).astype(np.float32)
    x_BD = (z_BD.astype(np.float64) - standard.mean_D) / standard.scale_D
    weight_KD, bias_K = linear_layer(standard, center_KD, offset_K, temperature=4.0)
    logits_BK = z_BD.astype(dtype) @ weight_KD.astype(dtype).T + bias_K.astype(dtype)
    expected = by_distance(x_BD, center_KD, offset_K, 4.0)
    exact = 1e-12 if dtype is np.float64 else 2e-4  # float32: a feature of mean 20 and deviation 0.01 takes 11 bits
    np.testing.assert_allclose(softmax(logits_BK.astype(np.float64)), expected, atol=exact)
    assert expected.max(1).std() > 0.05


def test_float32_is_enough_for_features_as_encoders_have_them(draw: np.random.Generator) -> None:
    """Equal to 1e-6: after a LayerNorm, means and deviations are of one size."""
    standard = Standard(draw.normal(size=D), draw.uniform(0.5, 2, D))
    center_KD, offset_K = draw.normal(size=(K, D)), np.zeros(K)
    z_BD = (draw.normal(size=(B, D)) * standard.scale_D + standard.mean_D).astype(np.float32)
    weight_KD, bias_K = linear_layer(standard, center_KD, offset_K, temperature=4.0)
    logits_BK = z_BD @ weight_KD.astype(np.float32).T + bias_K.astype(np.float32)
    x_BD = (z_BD.astype(np.float64) - standard.mean_D) / standard.scale_D
    expected = by_distance(x_BD, center_KD, offset_K, 4.0)
    np.testing.assert_allclose(softmax(logits_BK.astype(np.float64)), expected, atol=1e-6)


def test_class_means_as_centers_are_a_nearest_mean_classifier(draw: np.random.Generator) -> None:
    labels = draw.integers(0, K, B)
    z_BD = draw.normal(size=(K, D))[labels] + 0.8 * draw.normal(size=(B, D))
    mean_KD = np.stack([z_BD[labels == k].mean(0) for k in range(K)])
    weight_KD, bias_K = linear_layer(Standard(np.zeros(D), np.ones(D)), mean_KD, np.zeros(K), 1.0)
    nearest = ((z_BD[:, None] - mean_KD) ** 2).sum(2).argmin(1)
    prediction = (z_BD @ weight_KD.T + bias_K).argmax(1)
    np.testing.assert_array_equal(prediction, nearest)
    assert (prediction == labels).mean() > 0.8


def test_scores_rank_centers_by_distance(draw: np.random.Generator) -> None:
    x_BD, center_KD = draw.normal(size=(B, D)), draw.normal(size=(K, D))
    squares_BK = ((x_BD[:, None] - center_KD) ** 2).sum(2)
    result = scores(x_BD, center_KD, np.zeros(K))
    np.testing.assert_allclose((x_BD**2).sum(1)[:, None] - 2 * result, squares_BK)
    assert scores(x_BD.astype(np.float32), center_KD, np.zeros(K)).dtype == np.float64


@pytest.mark.parametrize("perplexity", [1.5, 4.0, 6.5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_temperature_gives_the_perplexity(draw: np.random.Generator, perplexity: float, scale: float) -> None:
    score_BK = scale * draw.normal(size=(B, K))
    temperature = temperature_for(score_BK, perplexity)
    assert np.median(perplexities(score_BK / temperature)) == pytest.approx(perplexity, rel=1e-6)


def test_perplexity_of_one_and_of_all() -> None:
    np.testing.assert_allclose(perplexities(np.array([[0.0, -1e9, -1e9], [5.0, 5.0, 5.0]])), [1, 3])
