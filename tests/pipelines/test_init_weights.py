"""`ssld init`: weights files of one's own, and weights that are out of reach."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import save_file

from ssld.pipelines import init
from ssld.pipelines.scaffold import weights
from ssld.shared.errors import UserError
from ssld.shared.models.downloads import Download
from ssld.stage1_ssld.config import DistillConfig
from ssld.stage2_detect.config import TrainConfig
from tests.pipelines import test_init as base

photos = base.photos


def test_weights_files_of_ones_own(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Their architectures reach every stage; without one, a line says what is missing before anything is read."""
    tensors = {"w": np.zeros(2, np.float32)}
    for name in ("small", "large"):
        save_file(tensors, f"{name}.safetensors")
    line = ["--images", "photos", "--annotations", "all.json", "--unlabeled", "more photos", "--distill", "yes"]
    line += ["--backbone", "small.safetensors", "--teacher", "large.safetensors", "--output", "mine.yaml"]
    assert init.main([*line, "--teacher_arch", "resnet50"]) == 2
    message = "error: --backbone small.safetensors: does not name its architecture; add --arch with its timm name\n"
    assert capfd.readouterr().err == message
    assert init.main([*line, "--arch", "resnet18", "--teacher_arch", "resnet50"]) == 0
    stages = base.stages_of("mine.yaml")
    distill, first, plain = stages["ssld"], stages["detector_ssld"], stages["detector_imagenet"]
    assert isinstance(distill, DistillConfig)
    assert isinstance(first, TrainConfig)
    assert isinstance(plain, TrainConfig)
    assert distill.teacher
    assert (distill.student.arch, distill.teacher.arch) == ("resnet18", "resnet50")
    assert (first.backbone, first.arch) == ("runs/ssld/student.safetensors", None)
    assert (plain.backbone, plain.arch) == ("small.safetensors", "resnet18")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n", "is a Git LFS pointer (64 bytes)"),
        (b"\x40\0\0\0\0\0\0\0{", "the file is damaged or not complete (9 bytes)"),
    ],
)
def test_a_broken_file_of_weights_is_named_as_it_was_given(
    content: bytes, message: str, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before the photos are looked at and before any trial."""
    (photos / "sub").mkdir()
    Path("sub/net.safetensors").write_bytes(content)
    line = ["--images", "photos", "--annotations", "all.json", "--output", "mine.yaml"]
    assert init.main([*line, "--backbone", "sub/net.safetensors", "--arch", "resnet18"]) == 2
    out, error = capfd.readouterr()
    assert error.startswith(f"error: --backbone sub/net.safetensors: {message}")
    assert out == ""


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3.lvd1689m", "timm:vit_base_patch16_siglip_256.v2_webli"])
def test_an_encoder_of_timms_is_no_teacher_of_classes(
    name: str, photos: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name says so: nothing is downloaded, and nothing announced."""
    monkeypatch.setattr(weights, "find_downloads_apart", None)
    monkeypatch.setattr(weights, "faults_apart", weights.faults_of)
    line = ["--images", "photos", "--annotations", "all.json", "--unlabeled", "more photos", "--distill", "yes"]
    assert init.main([*line, "--teacher", name, "--output", "mine.yaml"]) == 2
    out, error = capfd.readouterr()
    assert error.startswith(
        f"error: --teacher {name}: has 0 classes, a teacher needs several; run `ssld prototypes` first"
    )
    assert out == ""
    assert not Path("mine.yaml").exists()


def test_files_and_names_that_give_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a line with the flag; sound ones give none."""
    monkeypatch.chdir(tmp_path)
    net = timm.create_model("test_resnet")
    save_file({name: tensor.numpy() for name, tensor in net.state_dict().items()}, "net.safetensors")
    assert (
        weights.faults_of({"backbone": ("net.safetensors", "test_resnet"), "teacher": ("random:test_vit", None)}) == []
    )
    torch.save(net.state_dict(), "net.pth")  # of a teacher alone, as in stage 1
    assert weights.faults_of({"teacher": ("net.pth", "test_resnet")}) == []
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), "encoder.pth")
    (found,) = weights.faults_of({"teacher": ("encoder.pth", "test_vit")})
    assert found.startswith(
        "--teacher encoder.pth: has 0 classes, a teacher needs several; run `ssld prototypes` first"
    )
    assert weights.faults_of({"teacher": ("encoder.pth", "test_vit")}, classes=False) == []
    assert weights.faults_of({"teacher": ("timm:vit_small_patch16_dinov3.lvd1689m", None)}, classes=False) == []
    assert weights.faults_of({"backbone": ("net.pth", "test_resnet")})
    for given, line in (
        (("net.safetensors", "test_resnett"), "net.safetensors: test_resnett: timm has no such model; did you mean"),
        (("net.safetensors", "test_efficientnet"), "net.safetensors: does not hold a test_efficientnet"),
        (("random:test_resnett", None), "random:test_resnett: test_resnett: timm has no such model"),
    ):
        (found,) = weights.faults_of({"backbone": given})
        assert found.startswith(f"--backbone {line}")


def test_a_network_without_maps_of_features_is_enough_for_stage_1_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **options: object) -> None:
        raise UserError("gives no maps of features")

    monkeypatch.setattr("ssld.shared.models.backbones.create_body", refuse)
    given = {"backbone": ("random:test_vit", None)}
    assert weights.faults_of(given, maps=True) == ["--backbone gives no maps of features"]
    assert weights.faults_of(given, maps=False) == []


def test_a_name_that_timm_does_not_have_needs_no_file(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "resnet18: timm has no such model; did you mean 'resnet18'?"
    absent = Download("timm:resnet18", text, possible=False, exists=False)
    monkeypatch.setattr(weights, "find_downloads_apart", lambda references: [absent])
    line = ["--images", "photos", "--annotations", "all.json", "--output", "mine.yaml", "--backbone", "timm:resnet18"]
    assert init.main(line) == 2
    assert capfd.readouterr().err.endswith("--backbone resnet18: timm has no such model; did you mean 'resnet18'?\n")


def test_without_weights_and_network_nothing_is_written(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def offline(references: dict[str, str]) -> list[Download]:
        return [Download(key, f"{text}: not on this machine", possible=False) for key, text in references.items()]

    monkeypatch.setattr(weights, "find_downloads_apart", offline)
    assert init.main(["--images", "photos", "--annotations", "all.json", "--output", "mine.yaml"]) == 2
    error = capfd.readouterr().err
    assert error == "error: timm:resnet18d.ra2_in1k: not on this machine: --backbone FILE --arch NAME\n"
    assert not list(photos.glob("mine*"))
