"""BatchNorm of the teacher: by running statistics, folded away, or by the batch as SSLD's own teachers had it."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import create_classifier
from ssld.shared.models.model_file import content_hash
from ssld.shared.models.references import parse_reference
from ssld.shared.models.teacher import FrozenTeacher, TeacherEnsemble

PIXELS = torch.randint(0, 256, (6, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of `test_resnet` with random weights and statistics far from those of a batch."""
    torch.manual_seed(3)
    net: Any = timm.create_model("test_resnet", num_classes=4)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("teacher") / "net.pth"
    torch.save(net.state_dict(), path)
    return path


@torch.no_grad()
def in_training_mode(file: Path) -> torch.Tensor:
    """Outputs of the network with every BatchNorm in training mode."""
    classifier, _ = create_classifier(parse_reference(str(file), "test_resnet", allow_pickle=True))
    classifier.eval()
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    logits: torch.Tensor = classifier(PIXELS)
    return logits


def test_batch_statistics(net_file: Path) -> None:
    teacher = FrozenTeacher(str(net_file), arch="test_resnet", batchnorm="batch")
    running = FrozenTeacher(str(net_file), arch="test_resnet")
    torch.testing.assert_close(teacher(PIXELS), in_training_mode(net_file), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(teacher(PIXELS), running(PIXELS), rtol=0.1)
    # outputs depend on the batch, but not on earlier batches
    first = teacher(PIXELS)
    teacher(PIXELS[:3])
    assert torch.equal(teacher(PIXELS), first)
    assert not torch.allclose(teacher(PIXELS[:3]), first[:3], rtol=1e-2)


def test_running_statistics_stay_and_are_what_it_is_evaluated_with(net_file: Path) -> None:
    teacher = FrozenTeacher(str(net_file), arch="test_resnet", batchnorm="batch")
    running = FrozenTeacher(str(net_file), arch="test_resnet")
    by_batch = teacher(PIXELS)
    with teacher.running_statistics():
        assert torch.equal(teacher(PIXELS), running(PIXELS))
        assert content_hash(teacher._classifier.net.state_dict()) == running.content_sha256()
    assert torch.equal(teacher(PIXELS), by_batch)
    with pytest.raises(ZeroDivisionError), teacher.running_statistics():
        raise ZeroDivisionError
    assert torch.equal(teacher(PIXELS), by_batch)
    assert teacher.content_sha256() == running.content_sha256()
    assert teacher.facts() == running.facts()
    with running.running_statistics():
        inside = running(PIXELS)
    assert torch.equal(inside, running(PIXELS))


def test_dropout_and_drop_path_stay_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet", num_classes=4, drop_rate=0.9, drop_path_rate=0.9)
    torch.save(net.state_dict(), tmp_path / "t.pth")
    teacher = FrozenTeacher(str(tmp_path / "t.pth"), arch="test_efficientnet", batchnorm="batch")
    training = [name for name, module in teacher._classifier.named_modules() if module.training]
    assert training == []
    assert torch.equal(teacher(PIXELS), teacher(PIXELS))


def test_a_teacher_without_batchnorm() -> None:
    with pytest.raises(UserError, match=r"random:test_vit: has no BatchNorm; set teacher\.batchnorm: eval"):
        FrozenTeacher("random:test_vit", batchnorm="batch")


def test_folded(net_file: Path) -> None:
    plain = FrozenTeacher(str(net_file), arch="test_resnet")
    folded = FrozenTeacher(str(net_file), arch="test_resnet", fold_batchnorm=True)
    assert plain.folded == 0
    assert folded.folded == sum(isinstance(module, nn.BatchNorm2d) for module in plain._classifier.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded._classifier.modules())
    torch.testing.assert_close(folded(PIXELS), plain(PIXELS), rtol=1e-3, atol=1e-4)
    assert folded.content_sha256() == plain.content_sha256()  # of the weights as they were
    assert folded.facts() == plain.facts()
    assert not folded(PIXELS).requires_grad
    by_batch = FrozenTeacher(str(net_file), arch="test_resnet", fold_batchnorm=True, batchnorm="batch")
    assert by_batch.folded == 0  # it needs its BatchNorm
    torch.testing.assert_close(by_batch(PIXELS), in_training_mode(net_file), rtol=1e-5, atol=1e-6)


def test_folded_in_half_precision_and_channels_last(net_file: Path) -> None:
    plain = FrozenTeacher(str(net_file), arch="test_resnet")
    fast = FrozenTeacher(
        str(net_file), arch="test_resnet", fold_batchnorm=True, channels_last=True, dtype=torch.bfloat16
    )
    answer, expected = fast(PIXELS), plain(PIXELS)
    assert answer.dtype == torch.float32
    assert (answer - expected).abs().max() < 0.05 * expected.abs().max()
    assert not torch.equal(answer, expected)


def test_statistics_of_an_ensemble(net_file: Path) -> None:
    members = [FrozenTeacher(str(net_file), arch="test_resnet", batchnorm="batch") for _ in range(2)]
    running = FrozenTeacher(str(net_file), arch="test_resnet")
    ensemble = TeacherEnsemble(members)
    assert ensemble.batchnorm == "batch"
    with ensemble.running_statistics():
        torch.testing.assert_close(ensemble(PIXELS).softmax(-1), running(PIXELS).softmax(-1))
    torch.testing.assert_close(ensemble(PIXELS).softmax(-1), in_training_mode(net_file).softmax(-1))
