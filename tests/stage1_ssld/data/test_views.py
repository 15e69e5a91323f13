"""Views: sizes and types, what the seed decides, augmentation and erasing, and the central crop by hand."""

import inspect
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from ssld.shared.config.settings import Config
from ssld.shared.errors import UserError
from ssld.shared.images import seeded_view
from ssld.stage1_ssld.config import CurateConfig
from ssld.stage1_ssld.curation.shard_pass import Reading
from ssld.stage1_ssld.data.batch import View, collate
from ssld.stage1_ssld.data.loaders import ValViews
from ssld.stage1_ssld.data.views import augmentation, training_view, val_view
from ssld.stage1_ssld.data_config import DataConfig

IMAGE = torch.randint(0, 256, (3, 30, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
POLICIES = ["rand-m9-mstd0.5-inc1", "original", "v0r", "3a", "augmix-m3-w2", "trivial"]


def settings(**changes: Any) -> DataConfig:
    return DataConfig.model_validate({"train": ["unused"], "image_size": 16, **changes})


def view(key: str, number: int, seed: int = 0, image: torch.Tensor = IMAGE, **changes: Any) -> torch.Tensor:
    return training_view(image, key, number, settings(**changes), seed)


@pytest.mark.parametrize(
    ("group", "taker", "others"),
    [
        (DataConfig, val_view, {"image_CHW"}),
        (DataConfig, ValViews, {"source", "labels"}),
        (DataConfig, augmentation, set()),
        (CurateConfig, Reading, {"hashes"}),
    ],
)
def test_a_keyword_has_the_name_of_the_setting_that_it_comes_from(
    group: type[Config], taker: Callable[..., Any], others: set[str]
) -> None:
    assert set(inspect.signature(taker).parameters) - others <= set(group.model_fields)


def test_a_view_is_a_function_of_key_pass_and_seed() -> None:
    first = view("0:a.jpg", 3)
    assert first.shape == (3, 16, 16)
    assert first.dtype == torch.uint8
    torch.rand(5)
    assert torch.equal(view("0:a.jpg", 3), first)
    for other in (view("0:a.jpg", 4), view("0:b.jpg", 3), view("0:a.jpg", 3, seed=1)):
        assert not torch.equal(other, first)


def test_drawing_views_leaves_the_generators_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    view("0:a.jpg", 3)
    assert torch.equal(torch.rand(2), expected)


def test_flip() -> None:
    plain, flipped = view("k", 0, flip=0), view("k", 0, flip=1)
    assert torch.equal(plain.flip(-1), flipped)
    share = sum(torch.equal(view(f"{n}", 0), view(f"{n}", 0, flip=1)) for n in range(200)) / 200
    assert 0.38 < share < 0.62


def test_the_whole_image_is_the_whole_image() -> None:
    square = IMAGE[:, :, :30]
    assert torch.equal(view("k", 0, image=square, image_size=30, crop_area=(1, 1), crop_ratio=(1, 1), flip=0), square)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_view_is_torchvisions_crop_and_flip(interpolation: str) -> None:
    for number in range(5):
        with seeded_view("k", number, 3):
            box = RandomResizedCrop.get_params(IMAGE, [0.2, 0.9], [0.5, 1.5])
            expected = F.resized_crop(IMAGE, *box, [16, 16], InterpolationMode(interpolation), antialias=True)
            expected = expected.flip(-1) if torch.rand(()) < 0.5 else expected
        actual = view("k", number, 3, crop_area=(0.2, 0.9), crop_ratio=(0.5, 1.5), interpolation=interpolation)
        assert (
            actual.int() - expected.int()
        ).abs().max() <= 1  # without AVX2 torch rounds by the layout in memory; 0 with it


@pytest.mark.parametrize("changes", [{}, {"augment": "rand-m9-mstd0.5-inc1"}, {"erase": 1}, {"train_view": "center"}])
def test_a_view_of_a_picture_is_that_of_its_pixels(changes: dict[str, Any]) -> None:
    drawn = Image.fromarray(IMAGE.permute(1, 2, 0).contiguous().numpy())
    for number in range(6):
        actual = training_view(drawn, "k", number, settings(**changes), 0)
        assert torch.equal(actual, view("k", number, **changes))


def test_a_batch_is_planar_whatever_the_layout_of_its_views() -> None:
    views = [view(key, 0) for key in "abc"]
    batch = collate([View(one, 0, "", []) for one in views]).pixels_BCHW
    assert batch.is_contiguous()
    assert all(torch.equal(pixels, one) for pixels, one in zip(batch, views, strict=True))


def test_the_center_view_is_the_evaluation_view() -> None:
    for number in range(2):
        actual = view(
            "k", number, train_view="center", val_crop=0.8, interpolation="bicubic", augment="trivial", erase=1
        )
        assert torch.equal(actual, val_view(IMAGE, image_size=16, val_crop=0.8, interpolation="bicubic"))


@pytest.mark.parametrize("policy", POLICIES)
def test_augmentations_are_functions_of_key_and_view(policy: str) -> None:
    plain = [view("k", number) for number in range(12)]
    first = [view("k", number, augment=policy) for number in range(12)]
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    again = [view("k", number, augment=policy) for number in reversed(range(12))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(a.shape == (3, 16, 16) and a.dtype == torch.uint8 for a in first)
    assert sum(not torch.equal(a, b) for a, b in zip(first, plain, strict=True)) >= 4
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_an_augmented_view_is_timms_of_the_plain_view() -> None:
    """The crop and the flip come first and draw the same; the augmentation goes on from there."""
    config = settings(augment="rand-m9-mstd0.5-inc1")
    for number in range(5):
        with seeded_view("k", number, 0):
            RandomResizedCrop.get_params(IMAGE, [0.08, 1.0], [3 / 4, 4 / 3])
            torch.rand(2)  # the flip, and whether to augment
            pixels = view("k", number)
            drawn = augmentation("rand-m9-mstd0.5-inc1", 16)(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
        assert torch.equal(
            training_view(IMAGE, "k", number, config, 0), torch.from_numpy(np.array(drawn)).permute(2, 0, 1)
        )


def test_trivial_is_one_operation_at_even_magnitudes() -> None:
    transform: Any = augmentation("trivial", 16)
    assert transform.num_layers == 1
    assert {operation.prob for operation in transform.ops} == {1}
    assert {(operation.magnitude, operation.magnitude_std) for operation in transform.ops} == {(10, float("inf"))}


def test_a_part_of_the_views_is_augmented() -> None:
    plain = [view("k", number) for number in range(100)]
    some = [view("k", number, augment="trivial", augment_probability=0.3) for number in range(100)]
    changed = sum(not torch.equal(a, b) for a, b in zip(some, plain, strict=True))
    assert 15 <= changed <= 42
    none = [view("k", number, augment="trivial", augment_probability=0) for number in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(none, plain, strict=False))


@pytest.mark.parametrize("policy", ["rand-x9", "rand-m", "random", "nothing", "augmix-q3", "original-foo", ""])
def test_policies_that_timm_does_not_know(policy: str) -> None:
    with pytest.raises(UserError, match=r"^data\.augment: .*: not one of timm's policies \(.*\); use rand-m9"):
        augmentation(policy, 16)


def test_erasing() -> None:
    plain = [view("k", number, image_size=32) for number in range(60)]
    erased = [view("k", number, image_size=32, erase=1) for number in range(60)]
    for a, b in zip(plain, erased, strict=True):
        rows, columns = (a != b).any(0).nonzero(as_tuple=True)
        box = b[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        assert torch.equal(a[:, ~inside], b[:, ~inside])
        assert 0.01 < inside.float().mean() < 0.4  # a fiftieth to a third, rounded to pixels
        assert box.unique().numel() > box.numel() / 20  # noise, not one color
    some = [view("k", number, image_size=32, erase=0.25) for number in range(60)]
    assert 6 <= sum(not torch.equal(a, b) for a, b in zip(plain, some, strict=True)) <= 25
    assert torch.equal(some[0], view("k", 0, image_size=32, erase=0.25))


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (8, 9), (30, 50)])
def test_any_shape_gives_a_view(shape: tuple[int, int]) -> None:
    image = torch.full((3, *shape), 9, dtype=torch.uint8)
    for out in (view("k", 0, image=image), val_view(image, image_size=16, val_crop=0.875)):
        assert out.shape == (3, 16, 16)
        assert (out == 9).all()


def test_central_crop() -> None:
    # already at the size that the short side is resized to: the crop is plain indexing
    image = torch.randint(0, 256, (3, 32, 44), dtype=torch.uint8)
    assert torch.equal(val_view(image, image_size=28, val_crop=0.875), image[:, 2:30, 8:36])
    assert torch.equal(val_view(image[:, :, :32], image_size=32, val_crop=1.0), image[:, :, :32])
