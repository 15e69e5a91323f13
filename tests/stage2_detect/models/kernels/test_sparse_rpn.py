"""The RPN's head at single anchors against the head everywhere: values, gradients, and places at the border."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssld.stage2_detect.models.batch import Targets
from ssld.stage2_detect.models.kernels import plain, sparse_rpn
from ssld.stage2_detect.models.rpn import RPN

GRIDS = [(8, 12), (4, 6), (2, 3)]
STRIDES, SIZES = (8, 16, 32), (16.0, 32.0, 64.0)
IMAGE_SIZES = torch.tensor([[64, 96], [50, 70]])


def features() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 6, *grid, generator=generator).requires_grad_() for grid in GRIDS]


def targets() -> Targets:
    expected = torch.tensor([[[10.0, 12.0, 30.0, 28.0], [40.0, 5.0, 80.0, 50.0]], [[3.0, 3.0, 20.0, 18.0], [0.0] * 4]])
    return Targets(expected, torch.tensor([[4, 0], [2, -1]]), torch.tensor([11, 12]))


def test_cells_of_all_anchors() -> None:
    total = sum(rows * columns * 3 for rows, columns in GRIDS)
    cells = sparse_rpn.cells_of(torch.arange(total)[None], GRIDS, 3)
    actual = torch.stack((cells.level, cells.row, cells.column, cells.ratio), dim=-1)[0].tolist()
    assert actual == [
        [level, row, column, ratio]
        for level, (rows, columns) in enumerate(GRIDS)
        for row in range(rows)
        for column in range(columns)
        for ratio in range(3)
    ]


def test_patches_are_those_of_unfold() -> None:
    maps = features()
    for level, (feature, (rows, columns)) in enumerate(zip(maps, GRIDS, strict=True)):
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        where = [place.flatten().expand(2, -1) for place in (torch.full_like(row, level), row, column)]
        actual = sparse_rpn.patches(maps, *where)
        unfolded = F.unfold(feature, 3, padding=1).view(2, 6, 9, -1)  # channel, place of the kernel, cell
        assert torch.equal(actual.view(2, -1, 9, 6), unfolded.permute(0, 3, 2, 1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_losses_and_gradients_are_those_of_the_whole_maps(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    rpn = RPN(channels=6, strides=STRIDES, anchor_sizes=SIZES, samples_per_image=12, positive_iou=0.4)
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    calls: list[bool] = []
    rpn.head.register_forward_hook(lambda _module, _args, out: calls.append(out[0].requires_grad))

    def step() -> tuple[dict[str, Tensor], list[Tensor]]:
        maps = [feature.detach().contiguous(memory_format=memory_format).requires_grad_() for feature in features()]
        _, losses = rpn(maps, IMAGE_SIZES, targets())
        slopes = torch.autograd.grad(losses["loss_rpn_cls"] + 3 * losses["loss_rpn_box"], [*maps, *rpn.parameters()])
        return losses, list(slopes)

    sparse = step()
    assert calls
    assert not any(calls), "the maps have to be free of gradients"
    with plain():
        whole = step()
    assert calls[-1]
    for name in sparse[0]:
        assert sparse[0][name].item() == pytest.approx(whole[0][name].item(), rel=1e-5)
        assert sparse[0][name].item() > 0
    for actual, expected in zip(sparse[1], whole[1], strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_many_samples_take_the_whole_maps() -> None:
    assert sparse_rpn.pays(12, GRIDS)
    assert not sparse_rpn.pays(14, GRIDS)  # 9 * 14 of 126 cells
    with plain():
        assert not sparse_rpn.pays(12, GRIDS)


def test_under_autocast_the_values_stay_close() -> None:
    torch.manual_seed(0)
    rpn = RPN(channels=6, strides=STRIDES, anchor_sizes=SIZES, samples_per_image=12)
    _, exact = rpn(features(), IMAGE_SIZES, targets())
    with torch.autocast("cpu", torch.bfloat16):
        _, losses = rpn([feature.bfloat16() for feature in features()], IMAGE_SIZES, targets())
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.02)
