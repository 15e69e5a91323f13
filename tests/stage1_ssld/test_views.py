"""Views: sizes and types, what the seed decides, and the central crop by hand."""

import pytest
import torch

from shared.images import seeded_view
from stage1_ssld.views import train_view, val_view

IMAGE = torch.randint(0, 256, (3, 30, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def view(key: str, number: int, seed: int = 0, flip: float = 0.5) -> torch.Tensor:
    with seeded_view(key, number, seed):
        return train_view(IMAGE, size=16, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=flip)


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
    assert torch.equal(train_view(square, size=30, area=(1, 1), ratio=(1, 1), flip=0), square)


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (8, 9), (30, 50)])
def test_any_shape_gives_a_view(shape: tuple[int, int]) -> None:
    image = torch.full((3, *shape), 9, dtype=torch.uint8)
    for out in (
        train_view(image, size=16, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5),
        val_view(image, size=16, crop=0.875),
    ):
        assert out.shape == (3, 16, 16)
        assert (out == 9).all()


def test_central_crop() -> None:
    # already at the size that the short side is resized to: the crop is plain indexing
    image = torch.randint(0, 256, (3, 32, 44), dtype=torch.uint8)
    assert torch.equal(val_view(image, size=28, crop=0.875), image[:, 2:30, 8:36])
    assert torch.equal(val_view(image[:, :, :32], size=32, crop=1.0), image[:, :, :32])
