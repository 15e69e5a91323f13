"""benchmarks/dense.py: both sides are one network with one set of settings, and every row is printed. Nothing here is timed."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import dense, gpu
from benchmarks.detect import make_inputs


def test_torchvisions_losses_are_ours() -> None:
    """For one image, since torchvision divides image by image."""
    inputs = make_inputs(96, 128, 1, torch.device("cpu"))
    ours = dense.our_detector("retinanet", "test_resnet", inputs).train()
    reference = dense.torchvisions_detector(ours).train()
    losses, expected = dense.call(dense.OURS, ours, inputs), dense.call(dense.TORCHVISION, reference, inputs)
    assert losses["loss_cls"].item() == pytest.approx(expected["classification"].item(), rel=1e-4)
    assert losses["loss_box"].item() == pytest.approx(expected["bbox_regression"].item(), rel=1e-4)
    for one in (losses, expected):
        torch.stack(list(one.values())).sum().backward()
    mine = ours.dense.head.class_tower[0].weight.grad
    torch.testing.assert_close(reference.head.classification_head.conv[0][0].weight.grad, mine, rtol=1e-3, atol=1e-5)


def test_every_ratio_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {row.name: row for row in gpu.rows(tmp_path, tmp_path, tiny=True, gpu=False)}
    line = both["retinanet"].line[1:]
    assert both["ld"].line[1:] == [*line[: line.index("--modes")], "--modes", "ld"]
    dense.main([*line, "ld"])
    output = capsys.readouterr().out
    share = re.search(r"(\d+)% of our detections are torchvision's", output)
    assert share
    assert int(share[1]) > 95
    rows = ["96x160 training", "96x160 inference", "96x160 LD step / (student step + teacher forward)"]
    for row in rows:
        (text,) = re.findall(rf"^{re.escape(row)}.*", output, re.MULTILINE)
        assert re.fullmatch(both["retinanet"].cell, text)


def test_the_measured_assignment_finds_something(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dense, "_ATSS_IMAGES", 1)  # of 64: that is a minute where others use the processor too
    dense.print_peak_of_assignment()
    before, peak = map(int, capsys.readouterr().out.split())
    assert 100 < before <= peak
