"""Layers of an exported detector that are written in another form: padding and ReLU6, with the same values."""

import gc
from pathlib import Path

import numpy as np
import torch
from timm.layers import Conv2dSame, create_conv2d
from torch import Tensor, nn
from torch.nn import functional as F

from ssld.shared.deploy.graph_files import session, write_onnx
from ssld.stage2_detect.deploy import graph, writing


def test_tensorflow_padding_becomes_a_constant() -> None:
    """For sides that are multiples of the stride, the values are timm's, and the trace has no arithmetic on sides."""
    torch.manual_seed(0)
    for kernel, stride, dilation in ((3, 2, 1), (5, 2, 1), (3, 1, 2), (4, 4, 1), (1, 2, 1)):
        same = create_conv2d(3, 4, kernel, stride=stride, dilation=dilation, padding="same")
        if not isinstance(same, Conv2dSame):  # timm pads by a constant itself where it can
            continue
        net = graph.easily_traced(nn.Sequential(same, nn.ReLU())).eval()
        assert not any(type(module) is Conv2dSame for module in net.children())
        maps = torch.randn(2, 3, 24, 40)
        torch.testing.assert_close(net(maps), same(maps).relu())
        sides = {2: 8 * torch.export.Dim("rows", min=2), 3: 8 * torch.export.Dim("columns", min=2)}
        nodes = torch.export.export(net, (maps,), dynamic_shapes=(sides,)).graph.nodes
        assert {str(node.target) for node in nodes if node.op == "call_function"} == {
            "aten.pad.default",
            "aten.conv2d.default",
            "aten.relu.default",
        }
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert graph.easily_traced(plain) is plain


def test_relu6_is_one_operator_of_onnx(tmp_path: Path) -> None:
    """In a file and in torch the values are those of `nn.Hardtanh`, NaN included; the module given stays as it is."""
    import onnx

    torch.manual_seed(0)
    given = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU6(inplace=True), nn.Conv2d(4, 2, 1), nn.Hardtanh(-0.5, 0.25)
    ).eval()
    net = graph.easily_traced(given)
    assert [type(module) for module in net.children()] == [nn.Conv2d, graph.Clip, nn.Conv2d, graph.Clip]
    assert [type(module) for module in given] == [nn.Conv2d, nn.ReLU6, nn.Conv2d, nn.Hardtanh]
    maps = 9 * torch.randn(2, 3, 5, 7)
    unknown = maps.clone()
    unknown[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        expected = given(maps)
        torch.testing.assert_close(net(maps), expected, rtol=0, atol=0)
        torch.testing.assert_close(net(unknown), given(unknown), rtol=0, atol=0, equal_nan=True)
    file = tmp_path / "clip.onnx"
    write_onnx(
        file, net, (maps,), ({0: torch.export.Dim("batch")},), {}, inputs=["maps"], outputs=["clipped"],
        translations=writing.onnx_translations(),
    )  # fmt: skip
    assert [node.op_type for node in onnx.load(file).graph.node] == ["Conv", "Clip", "Conv", "Clip"]
    (by_file,) = session(file, threads=1).run(None, {"maps": maps.numpy()})
    np.testing.assert_allclose(by_file, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_convolutions_pad_themselves_in_onnx(tmp_path: Path) -> None:
    """Zeros alone, and only where nothing else reads the padded map."""
    import onnx

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=side) for side in (0, 1, 0))

        def forward(self, maps_BCHW: Tensor) -> Tensor:
            first = self.first(F.pad(maps_BCHW, (0, 1, 1, 2)))
            second = F.pad(self.second(F.pad(first, (1, 1, 1, 1), value=0.5)), (0, 2, 2, 0))
            return self.third(second) + second[:, :, 1:-1, 1:-1]

    torch.manual_seed(0)
    net, maps = Padded().eval(), torch.randn(2, 3, 12, 16)
    write_onnx(
        tmp_path / "a.onnx", net, (maps,), ({0: torch.export.Dim("batch")},), {}, inputs=["maps"], outputs=["sum"]
    )
    assert gc.isenabled()
    nodes = onnx.load(tmp_path / "a.onnx").graph.node
    assert sum(node.op_type == "Pad" for node in nodes) == 2
    pads = [list(one.ints) for node in nodes if node.op_type == "Conv" for one in node.attribute if one.name == "pads"]
    assert pads[:2] == [[1, 0, 2, 1], [1, 1, 1, 1]]
    (total,) = session(tmp_path / "a.onnx", threads=1).run(None, {"maps": maps.numpy()})
    np.testing.assert_allclose(total, net(maps).detach(), atol=1e-5)
