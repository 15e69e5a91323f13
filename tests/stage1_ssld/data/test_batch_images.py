"""The images of `batches.jpg` are the views that the student gets, with their names and labels."""

import numpy as np
import torch

from ssld.stage1_ssld.data.batch import NO_LABEL, Batch
from ssld.stage1_ssld.data.batch_images import view_images


def test_views_become_images_with_their_names() -> None:
    """Small views are enlarged by an integer factor, so that every pixel keeps its color; mixtures in float are rounded."""
    pixels_BCHW = torch.randint(0, 256, (20, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    keys = [f"photos/cats/{number}.jpg" for number in range(20)]
    labels_B = torch.tensor([1, NO_LABEL] * 10)
    batch = Batch(pixels_BCHW, labels_B, keys, [])
    images = view_images(pixels_BCHW, batch, ["dog", "cat"])
    assert [name for _, name in images[:2]] == ["cat: 0.jpg", "1.jpg"]
    assert len(images) == 16
    for number, (image, _) in enumerate(images):
        assert image.size == (192, 192)
        assert (np.asarray(image)[::4, ::4] == pixels_BCHW[number].permute(1, 2, 0).numpy()).all()
    mixed = view_images(pixels_BCHW.float() * 0.5 + 0.2, batch, None)
    expected = (pixels_BCHW[3].double() * 0.5 + 0.2).round().permute(1, 2, 0).numpy()
    assert (np.asarray(mixed[3][0])[::4, ::4] == expected).all()
    assert mixed[0][1] == "0.jpg"
    two = view_images(pixels_BCHW[:2], Batch(pixels_BCHW[:2], labels_B[:2], ["0:a/1.jpg", "0:b/1.jpg"], []), None)
    assert [name for _, name in two] == ["0:a/1.jpg", "0:b/1.jpg"]
    large = view_images(torch.zeros(1, 3, 224, 200, dtype=torch.uint8), batch, None)
    assert large[0][0].size == (200, 224)
