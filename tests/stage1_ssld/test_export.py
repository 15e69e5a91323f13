"""Export: the ONNX file in ONNX Runtime, the folder in timm, the card, and what can go wrong."""

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml

from ssld.shared.deploy.graph_files import read_program
from ssld.shared.errors import UserError
from ssld.shared.models.backbones import create_classifier
from ssld.shared.models.model_file import read_metadata, save_model_file
from ssld.shared.models.references import parse_reference
from ssld.stage1_ssld.deploy.onnx_file import compare, onnx_runner, program_runner
from ssld.stage1_ssld.export import main

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("disc", "ring", "stripes")


@pytest.fixture(scope="module")
def exported(tiny: Any, teacher_file: Path, call: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one export, checked on images."""
    output: Path = tmp_path_factory.mktemp("export") / "run"
    argv = ["--model", str(teacher_file), "--data.path", str(tiny.val), "--output", str(output)]
    argv += ["--threads", "1", "--workers", "0", "--image_size", "32", "--check_images", "7", "--batch_size", "3"]
    assert call(main, argv) == 0
    return output


def test_the_onnx_file_answers_as_torch_does(exported: Path, teacher_file: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported / "backbone.onnx"), providers=["CPUExecutionProvider"])
    (pixels_in,) = session.get_inputs()
    assert (pixels_in.name, pixels_in.type, pixels_in.shape) == ("pixels", "tensor(uint8)", ["batch", 3, 32, 32])
    program = program_runner(exported / "backbone.pt2")
    net, inputs = create_classifier(parse_reference(str(teacher_file)))
    mean, std = (np.array(values)[:, None, None] for values in (inputs.mean, inputs.std))
    for count in (1, 2, 5):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3, 32, 32), np.uint8)
        with torch.no_grad():  # normalized by the test, not by the classifier
            expected = net.net.eval()(torch.from_numpy((pixels / 255 - mean) / std).float()).numpy()
        assert abs(expected).max() > 0.5
        (logits,) = session.run(["logits"], {"pixels": pixels})
        np.testing.assert_allclose(logits, expected, atol=1e-5 * abs(expected).max())
        np.testing.assert_allclose(program(torch.from_numpy(pixels)), expected, atol=1e-5 * abs(expected).max())


def test_what_the_onnx_file_says_about_itself(exported: Path, teacher_file: Path) -> None:
    import onnx

    model = onnx.load(exported / "backbone.onnx")
    onnx.checker.check_model(model)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    metadata = read_metadata(teacher_file)
    assert json.loads(facts["class_names"]) == ["disc", "ring", "stripes"]
    assert json.loads(facts["mean"]) == metadata["mean"]
    assert json.loads(facts["std"]) == metadata["std"]
    assert json.loads(facts["input_size"]) == [32, 32]
    assert facts["content_sha256"] == metadata["content_sha256"]
    assert (facts["arch"], facts["licence"]) == ("test_resnet", "apache-2.0")
    _, text = read_program(exported / "backbone.pt2")
    assert (text["class_names"], text["input_size"], text["mean"]) == (list(CLASSES), [32, 32], metadata["mean"])
    with zipfile.ZipFile(exported / "backbone.pt2") as archive:
        program = b"".join(archive.read(name) for name in archive.namelist())
    for content in ((exported / "backbone.onnx").read_bytes(), program):
        for folder in (str(ROOT), str(Path(torch.__file__).parent), str(teacher_file.parent), "site-packages"):
            assert folder.encode() not in content  # the exporters note the file and line of every node


def test_the_differences_are_reported(exported: Path) -> None:
    metrics = json.loads((exported / "result.json").read_text())["metrics"]
    assert metrics["images"] == 7
    assert 0 <= metrics["relative_difference"] < 1e-5
    assert metrics["largest_difference"] == pytest.approx(metrics["relative_difference"] * metrics["largest_logit"])
    assert metrics["top1_agreement"] == 1
    assert re.search(
        r"ONNX against torch on 7 images: logits differ by at most .*e-0\d", (exported / "log.txt").read_text()
    )
    card = (exported / "hub" / "README.md").read_text()
    assert "| image size | 32 x 32 |" in card
    assert "| at image size | 160 x 160 |" in card
    outputs = set(json.loads((exported / "result.json").read_text())["outputs"])
    assert outputs == {"backbone.onnx", "backbone.pt2", "hub/README.md", "hub/config.json", "hub/model.safetensors"}


def test_a_wrong_file_is_found_out(exported: Path, teacher_file: Path) -> None:
    net, _ = create_classifier(parse_reference(str(teacher_file)))
    net.eval()
    pixels = [torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))]
    run = onnx_runner(exported / "backbone.onnx", threads=1)
    assert compare(run, net, pixels)["relative_difference"] < 1e-5
    head: Any = net.net
    head = head.get_classifier()
    with torch.no_grad():
        head.bias[0] += 0.25
    result = compare(run, net, pixels)
    assert result["largest_difference"] == pytest.approx(0.25, rel=1e-3)
    with torch.no_grad():
        head.bias[1] = float("nan")
    assert compare(run, net, pixels)["relative_difference"] == float("inf")


def test_timm_loads_the_folder(exported: Path, teacher_file: Path) -> None:
    folder = exported / "hub"
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    net, inputs = create_classifier(parse_reference(str(teacher_file)))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.eval()(images), net.net.eval()(images), rtol=0, atol=0)
    data = timm.data.resolve_model_data_config(model)
    assert (*data["mean"], *data["std"], *data["input_size"]) == (*inputs.mean, *inputs.std, 3, 32, 32)
    assert (data["crop_pct"], data["interpolation"]) == (0.875, inputs.interpolation)
    assert model.pretrained_cfg["label_names"] == ["disc", "ring", "stripes"]
    text = json.loads((folder / "config.json").read_text())
    assert (text["architecture"], text["global_pool"], text["pretrained_cfg"]["license"]) == (
        "test_resnet",
        "avg",
        "apache-2.0",
    )
    assert text["pretrained_cfg"]["tag"] is None  # timm's own weights of this architecture have one
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5).num_classes == 5
    # and so does this project, as a folder and as a backbone file
    assert parse_reference(str(folder)).arch == "test_resnet"
    assert (
        read_metadata(folder / "model.safetensors")["content_sha256"] == read_metadata(teacher_file)["content_sha256"]
    )


def test_a_finished_export_is_left_alone(exported: Path, teacher_file: Path, tiny: Any, call: Any) -> None:
    argv = ["--model", str(teacher_file), "--data.path", str(tiny.val), "--output", str(exported), "--threads", "1"]
    argv += ["--workers", "0", "--image_size", "32", "--check_images", "7", "--batch_size", "3"]
    before = (exported / "backbone.onnx").stat().st_mtime_ns
    assert call(main, argv) == 0
    assert (exported / "backbone.onnx").stat().st_mtime_ns == before


def test_the_tolerance_and_unreadable_images(
    user_error: Any, teacher_file: Path, tmp_path: Path, jpeg: Any, call: Any
) -> None:
    (tmp_path / "images").mkdir()
    for seed in range(3):
        (tmp_path / "images" / f"{seed}.jpg").write_bytes(jpeg(seed=seed)[: 200 if seed == 1 else None])
    argv = ["--model", str(teacher_file), "--data.path", str(tmp_path / "images"), "--threads", "1", "--workers", "0"]
    argv += ["--image_size", "32", "--output", str(tmp_path / "run")]
    message = user_error(main, [*argv, "--tolerance", "1e-12"])
    assert re.search(r"backbone.onnx and torch differ by .* more than the tolerance 1e-12; raise tolerance", message)
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        ".lock",
        "config.yaml",
        "environment.json",
        "log.txt",
    }
    assert not (tmp_path / "run" / "result.json").exists()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "1.jpg: cannot be read, left out" in log
    assert "on 2 images" in log
    for file in (tmp_path / "images").iterdir():
        file.write_bytes(b"nothing")
    (tmp_path / "other").mkdir()
    message = user_error(main, [*argv[:-1], str(tmp_path / "other" / "run")])
    assert f"{tmp_path / 'images'}: none of the chosen images can be read" in message


def test_what_a_killed_export_leaves_goes(
    user_error: Any, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_below: Any
) -> None:
    begun: list[Path] = []

    def killed(path: Path, *_: Any) -> None:
        begun.append(path)
        raise UserError("stopped")

    monkeypatch.setattr("ssld.stage1_ssld.deploy.onnx_file.write_onnx", killed)
    argv = ["--model", str(teacher_file), "--output", str(tmp_path / "run"), "--threads", "1", "--image_size", "32"]
    user_error(main, argv)
    clean = files_below(tmp_path / "run")
    begun[0].write_bytes(b"a part")  # a kill leaves no time to delete it
    assert files_below(tmp_path / "run") != clean
    user_error(main, argv)
    assert files_below(tmp_path / "run") == clean


def test_mistakes(user_error: Any, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(model: Path, *flags: str) -> str:
        message: str = user_error(
            main, ["--model", str(model), "--output", str(tmp_path / "run"), "--threads", "1", *flags]
        )
        assert not (tmp_path / "run").exists()
        return message

    assert "gone.safetensors: no such file" in line(tmp_path / "gone.safetensors")
    save_model_file(tmp_path / "detector.safetensors", {"a": torch.zeros(1)}, {"kind": "detector"})
    assert "is a detector file, a backbone file is needed" in line(tmp_path / "detector.safetensors")
    save_model_file(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {})
    assert "was not written by this project" in line(tmp_path / "other.safetensors")
    assert "push_to_hub: one: is not of the form ORG/NAME" in line(teacher_file, "--push_to_hub", "one")
    message = line(teacher_file, "--push_to_hub", "me/what is this")
    assert message.startswith("push_to_hub: me/what is this: ")
    assert message.endswith("; give ORG/NAME")
    net: Any = timm.create_model("test_vit", num_classes=3)
    from ssld.shared.models.backbones import input_settings, save_backbone

    save_backbone(tmp_path / "vit.safetensors", net, arch="test_vit", inputs=input_settings(net, {}), classes=3)
    assert "image_size: test_vit takes 160 pixels only" in line(tmp_path / "vit.safetensors", "--image_size", "32")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert line(teacher_file) == (
        "export: needs onnx, onnxscript and onnxruntime (onnxruntime is missing); pip install -e '.[export]' in the clone"
    )


def test_a_network_that_cannot_be_traced_is_named(teacher_file: Path, tmp_path: Path) -> None:
    from ssld.stage1_ssld.deploy.onnx_file import write_onnx

    net, _ = create_classifier(parse_reference(str(teacher_file)))

    class Undecided(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels[:, 0] if pixels.sum() > 0 else pixels[:, 1]

    net.net = Undecided()
    net.eval()
    with pytest.raises(UserError, match="this network cannot be traced"):
        write_onnx(tmp_path / "a.onnx", net, (8, 8), {})
    big = torch.nn.Module()
    big.weight = torch.nn.Parameter(torch.empty(2**29, device="meta"))
    net.net = big
    with pytest.raises(UserError, match=r"2.1 GB of weights; ONNX files are limited to 2 GB; use --formats torch"):
        write_onnx(tmp_path / "a.onnx", net, (8, 8), {})


class Hub:
    """Stands for huggingface_hub.HfApi: records its calls."""

    calls: list[tuple[str, Any]] = []

    def create_repo(self, repository: str, **options: Any) -> None:
        self.calls.append(("create", (repository, options)))

    def upload_folder(self, **options: Any) -> Any:
        self.calls.append(("upload", options))
        return type("Done", (), {"commit_url": "https://example.org/commit"})()


def test_the_upload_fails_in_one_line_and_the_same_command_finishes_it(
    user_error: Any, call: Any, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--model", str(teacher_file), "--output", str(tmp_path / "run"), "--threads", "1", "--check_images", "3"]
    argv += ["--image_size", "32", "--push_to_hub", "me/tiny", "--private", "true", "--batch_size", "2"]
    message = user_error(main, argv)  # offline: tests set HF_HUB_OFFLINE
    assert message.startswith("push_to_hub: me/tiny: not uploaded (")
    assert f"{tmp_path / 'run' / 'hub'} is complete: log in with `hf auth login`" in message
    assert not (tmp_path / "run" / "result.json").exists()
    assert "on 3 images of noise" in (tmp_path / "run" / "log.txt").read_text()
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert call(main, argv) == 0
    (created, (repository, options)), (uploaded, what) = Hub.calls
    assert (created, repository, options) == ("create", "me/tiny", {"private": True, "exist_ok": True})
    assert (uploaded, what["repo_id"], what["folder_path"]) == ("upload", "me/tiny", str(tmp_path / "run" / "hub"))
    assert "uploaded to https://example.org/commit" in (tmp_path / "run" / "log.txt").read_text()
    card = (tmp_path / "run" / "hub" / "README.md").read_text()
    assert 'timm.create_model("hf-hub:me/tiny", pretrained=True)' in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
