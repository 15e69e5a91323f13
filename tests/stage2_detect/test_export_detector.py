"""Export of detectors: the graph beside the detector, its operators in ONNX, the files and the folder, and what can go wrong."""

import json
import platform
import re
import sys
import time
import zipfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass
from torch.utils._pytree import tree_leaves

from ssld.shared.deploy.graph_files import read_program, session, write_onnx, write_program
from ssld.shared.errors import UserError
from ssld.shared.models.backbones import InputSettings
from ssld.shared.models.model_file import read_metadata
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.deploy import graph, precision, writing
from ssld.stage2_detect.deploy.card import detector_card
from ssld.stage2_detect.deploy.check import compare, graph_of
from ssld.stage2_detect.detector_file import LoadedDetector, load_detector
from ssld.stage2_detect.export import main
from ssld.stage2_detect.export_config import FILES
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models import deform, pooling
from ssld.stage2_detect.models.build import Detector, build_detector

ROOT = Path(__file__).resolve().parents[2]
RPN: dict[str, Any] = {"pre_nms_top_n_test": 60, "post_nms_top_n_test": 40}
DENSE: dict[str, Any] = {"convolutions": 1, "candidates": 50}
SMALL: dict[str, Any] = {
    "fpn_channels": 16,
    "rpn": RPN | {"anchor_sizes": [8, 16, 32, 64, 128]},
    "roi": {"hidden": 16},
    "mask": {"hidden": 8, "convolutions": 1},
    "dense": DENSE,
}
BATCH = ({0: torch.export.Dim("batch")},) * 2


def detector(kind: str, arch: str = "test_resnet", body: dict[str, Any] | None = None, **settings: Any) -> Detector:
    """Random weights whose scores and boxes are far from equal."""
    torch.manual_seed(0)
    config = DetectorConfig.model_validate(SMALL | {"kind": kind} | settings)
    inputs = InputSettings.of_detector((0.5,) * 3, (0.5,) * 3)
    net = timm.create_model(arch, features_only=True, **body or {})
    model = build_detector(config, classes=3, body=net, arch=arch, inputs=inputs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"(logits|deltas|boxes)\.weight", name):
                parameter.mul_(30 if "logits" in name else 5)
            if name.endswith("dense.head.logits.bias"):
                parameter.add_(3)
            if ".offset." in name:
                parameter.add_(torch.randn_like(parameter) / 20)
    return model


def scene(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Coarse noise with padding of different sizes."""
    draw = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, height // 8, width // 8), dtype=torch.uint8, generator=draw)
    sizes = torch.tensor([(height - 4 * row, width - 8 * row) for row in range(count)])
    return pixels.repeat_interleave(8, 2).repeat_interleave(8, 3), sizes


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("faster_rcnn", {}),
        ("faster_rcnn", {"roi": {"hidden": 16, "class_agnostic": True, "detections_per_image": 7}}),
        ("mask_rcnn", {}),
        ("cascade_rcnn", {"cascade": {"score_rois": "last"}}),
        ("cascade_mask_rcnn", {"dcn_strides": [8, 16]}),
        ("gfl", {"dense": {"convolutions": 1, "candidates": None, "clip_boxes": False}}),
        ("retinanet", {}),
    ],
)
def test_the_graph_finds_what_the_detector_finds(kind: str, settings: dict[str, Any]) -> None:
    model = detector(kind, **settings)
    net = graph_of(model)
    many = [scene(3, 96, 128), scene(1, 64, 64)]
    with torch.no_grad():
        result = compare(lambda pixels, sizes: [part.numpy() for part in net(pixels, sizes)], model, many)
    assert result["detections"] == result["detections_by_file"] > 25
    assert result["missing"] == 0
    assert result["box_difference"] < 1e-3
    assert result["score_difference"] < 1e-5
    assert result["mask_difference"] < 1e-4


def test_rows_behind_the_detections_are_empty() -> None:
    net = graph_of(detector("mask_rcnn", roi={"hidden": 16, "score_threshold": 0.27}))
    with torch.no_grad():
        boxes, scores, labels, count, masks = net(*scene(2, 64, 96))
    assert boxes.shape == (2, 100, 4)
    assert masks.shape == (2, 100, 28, 28)
    for row in range(2):
        behind = slice(int(count[row]), None)
        assert 0 < count[row] < 100
        assert boxes[row, behind].abs().max() == scores[row, behind].max() == masks[row, behind].max() == 0
        assert (labels[row, behind] == -1).all()
        assert (scores[row, : count[row]].diff() <= 0).all()
        assert scores[row, : count[row]].min() > 0.27


def test_nms_against_a_double_loop_and_in_onnx(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    corners = draw.uniform(-20, 60, (2, 30, 2))
    boxes = np.concatenate([corners, corners + draw.uniform(1, 40, (2, 30, 2))], axis=2).astype(np.float32)
    scores = draw.uniform(0, 1, (2, 3, 30)).astype(np.float32)

    def iou(a: np.ndarray, b: np.ndarray) -> float:
        side = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
        return float(side / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - side))

    expected = np.zeros(scores.shape, bool)
    for p, q in np.ndindex(2, 3):
        kept: list[int] = []
        for n in np.argsort(-scores[p, q]):
            if scores[p, q, n] > 0.3 and all(iou(boxes[p, n], boxes[p, m]) <= 0.4 for m in kept):
                kept.append(n)
        expected[p, q, kept] = True
    assert 10 < expected.sum() < (scores > 0.3).sum()
    both = torch.from_numpy(boxes), torch.from_numpy(scores)
    np.testing.assert_array_equal(graph.keep_by_nms(*both, 0.4, 0.3, 30), expected)
    assert not graph.keep_by_nms(*both, 0.4, 2.0, 30).any()

    class Alone(nn.Module):
        def forward(self, boxes_PN4: Tensor, scores_PQN: Tensor) -> Tensor:
            return writing.onnx_nms(boxes_PN4, scores_PQN, 0.4, 0.3, 30)

    write_onnx(
        tmp_path / "a.onnx", Alone(), both, BATCH, {},
        inputs=["boxes", "scores"], outputs=["keep"], translations=writing.onnx_translations(),
    )  # fmt: skip
    (keep,) = session(tmp_path / "a.onnx", threads=1).run(None, {"boxes": boxes, "scores": scores})
    np.testing.assert_array_equal(keep, expected)
    (keep,) = session(tmp_path / "a.onnx", threads=1).run(None, {"boxes": boxes[:1], "scores": 0 * scores[:1]})
    assert not keep.any()


def test_deformable_convolution_and_pooling_in_onnx(tmp_path: Path) -> None:
    import onnx

    torch.manual_seed(2)
    convolution = deform.ModulatedDeformConv2d(nn.Conv2d(4, 6, 3, stride=2, padding=1)).eval()
    nn.init.normal_(convolution.offset.weight, std=0.2)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = convolution

        def forward(self, maps_BCHW: Tensor, rois_BR4: Tensor) -> tuple[Tensor, Tensor]:
            deformed = self.convolution(maps_BCHW)
            valid_BR = rois_BR4[..., 2] > 0
            return deformed, pooling.pool_rois([maps_BCHW, deformed[:, :4]], rois_BR4, valid_BR, strides=(4, 8), size=3)

    maps = torch.randn(2, 4, 24, 32)
    corners = torch.rand(2, 9, 2) * 60
    rois = torch.cat([corners, corners + torch.rand(2, 9, 2) * 190], dim=2)
    rois[:, -1] = 0
    with torch.no_grad():
        expected = Both()(maps, rois)  # on the CPU not by torchvision's pooling, which the file has
    assert expected[1][-1].abs().max() == 0 < expected[1][0].abs().max()
    write_onnx(
        tmp_path / "a.onnx", Both().eval(), (maps, rois), BATCH, {},
        inputs=["maps", "rois"], outputs=["a", "b"], translations=writing.onnx_translations(),
    )  # fmt: skip
    model = onnx.load(tmp_path / "a.onnx")
    assert {"DeformConv", "RoiAlign"} <= {node.op_type for node in model.graph.node}
    assert next(one.version for one in model.opset_import if not one.domain) >= 19
    for count in (1, 2):
        result = session(tmp_path / "a.onnx", threads=1).run(
            None, {"maps": maps[:count].numpy(), "rois": rois[:count].numpy()}
        )
        np.testing.assert_allclose(result[0], expected[0][:count], atol=2e-5)
        np.testing.assert_allclose(result[1], expected[1][: 9 * count], atol=2e-5)
    # Levels without any RoI, and no RoI at all.
    (nothing,) = session(tmp_path / "a.onnx", threads=1).run(["b"], {"maps": maps.numpy(), "rois": 0 * rois.numpy()})
    np.testing.assert_array_equal(nothing, np.zeros((18, 4, 3, 3)))


def test_pooling_in_openvino(tmp_path: Path) -> None:
    """Each RoI is pooled on its own level; a level may have none."""
    pytest.importorskip("openvino", reason="openvino is not installed")

    class Pooling(nn.Module):
        def forward(self, maps_BCHW: Tensor, rois_BR4: Tensor) -> Tensor:
            coarse = maps_BCHW[:, :, ::2, ::2]
            return pooling.pool_rois([maps_BCHW, coarse], rois_BR4, rois_BR4[..., 2] > 0, strides=(4, 8), size=3)

    torch.manual_seed(2)
    maps, corners = torch.randn(2, 4, 24, 32), torch.rand(2, 9, 2) * 60
    rois = torch.cat([corners, corners + torch.rand(2, 9, 2) * 190], dim=2)
    rois[:, -1] = 0
    write_onnx(
        tmp_path / "a.onnx", Pooling(), (maps, rois), BATCH, {},
        inputs=["pixels", "sizes"], outputs=["pooled"], translations=writing.onnx_translations(),
    )  # fmt: skip
    run = writing.openvino_runner(tmp_path / "a.onnx")
    np.testing.assert_allclose(run(maps, rois)[0], Pooling()(maps, rois), atol=2e-5)
    np.testing.assert_array_equal(run(maps, 0 * rois)[0], np.zeros((18, 4, 3, 3)))


@pytest.mark.parametrize(
    ("kind", "arch", "body", "settings"),
    [
        (
            "retinanet",
            "resnet26",
            {"channels": (8, 8, 16, 16)},
            {"stride_in_1x1": True, "dense": DENSE | {"candidates_of": "scores", "clip_after_nms": True}},
        ),
        (
            "faster_rcnn",
            "mobilenetv3_small_050",
            {},
            {"fpn_maps": "last_stage", "rpn": RPN | {"anchor_sizes": [16, 32, 64]}},
        ),
    ],
)
def test_bodies_of_other_projects_in_onnx(
    kind: str, arch: str, body: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    """Strides of Caffe's ResNets with detectron2's order of NMS and clipping, and the maps of MobileNetV3's last stage, as a user exports them."""
    model = detector(kind, arch, body, **settings)
    loaded = LoadedDetector(model, (), (), ResizeConfig(), {"model": {}})
    assert writing.write("onnx", tmp_path / "a.onnx", loaded, (160, 192), print) == (160, 192)
    with torch.no_grad():
        result = compare(writing.runner("onnx", tmp_path / "a.onnx"), model, [scene(2, 160, 192)])
    assert result["detections"] == result["detections_by_file"] > 25
    assert (result["missing"], result["images"]) == (0, 2)
    assert result["box_difference"] < 0.01
    assert result["score_difference"] < 1e-4


def test_a_two_stage_detector_as_a_program(tmp_path: Path) -> None:
    model = detector("mask_rcnn")
    pixels, sizes = scene(2, 96, 128)
    write_program(tmp_path / "a.pt2", graph_of(model), (pixels, sizes), BATCH, {"a": 1})
    program, facts = read_program(tmp_path / "a.pt2")
    assert facts == {"a": 1}

    @torch.no_grad()
    def run(*inputs: Tensor) -> list[np.ndarray]:
        return [part.numpy() for part in program(*inputs)]

    result = compare(run, model, [(pixels, sizes)])
    assert result["detections"] == result["detections_by_file"] > 25
    assert result["missing"] == 0
    assert max(result[f"{what}_difference"] for what in ("box", "score", "mask")) < 1e-3
    # Moved: to another device no node names the CPU any more, and to the CPU nothing changes.
    assert devices(program)["cpu"] > 10
    assert set(devices(read_program(tmp_path / "a.pt2", "meta")[0])) == {"meta"}
    moved = move_to_device_pass(torch.export.load(tmp_path / "a.pt2"), "cpu").module()
    with torch.no_grad():
        for part, expected in zip(moved(pixels, sizes), program(pixels, sizes), strict=True):
            assert torch.equal(part, expected)


def devices(program: nn.Module) -> Counter[str]:
    """How often a program's graph and its weights name each type of device."""
    graphs = [module.graph for module in program.modules() if isinstance(module, torch.fx.GraphModule)]
    arguments = [leaf for one in graphs for node in one.nodes for leaf in tree_leaves((node.args, node.kwargs))]
    named = [leaf.type for leaf in arguments if isinstance(leaf, torch.device)]
    named += [leaf for leaf in arguments if leaf in ("cpu", "meta")]
    return Counter([*named, *(tensor.device.type for tensor in program.state_dict().values())])


def test_differences_are_found() -> None:
    model = detector("retinanet")
    net = graph_of(model)
    many = [scene(2, 64, 96)]

    def changed(place: int, value: float) -> dict[str, float]:
        @torch.no_grad()
        def run(pixels: Tensor, sizes: Tensor) -> list[np.ndarray]:
            answer = [part.numpy().copy() for part in net(pixels, sizes)]
            answer[place][0, 0] += value
            return answer

        return compare(run, model, many)

    assert changed(0, 0.5)["box_difference"] == pytest.approx(0.5, abs=1e-3)
    assert changed(1, 0.25)["score_difference"] == pytest.approx(0.25, abs=1e-3)
    assert changed(1, float("nan"))["score_difference"] == float("inf")
    far = changed(0, 300.0)  # one detection here and one there, of the batch and of its first image alone
    assert far["missing"] == pytest.approx(4 / (far["detections"] + far["detections_by_file"]))


@pytest.fixture(scope="module")
def exported(detector_file: Path, tiny_coco: Any, call: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one export of a trained RetinaNet, checked on images."""
    output: Path = tmp_path_factory.mktemp("export") / "run"
    argv = ["--model", str(detector_file), "--images", str(tiny_coco.val_images), "--output", str(output)]
    argv += ["--threads", "1", "--check_images", "3", "--batch_size", "2", "--benchmark", "true"]
    assert call(main, argv) == 0
    return output


def test_what_an_export_leaves(exported: Path, detector_file: Path, files_below: Any) -> None:
    published = {f"hub/{name}" for name in ("README.md", "config.json", "detector.safetensors", *FILES.values())}
    kept = {".lock", "config.yaml", "environment.json", "log.txt", "result.json"}
    assert files_below(exported) - kept == published | {*FILES.values(), "onnx_detector.py", "hub/onnx_detector.py"}
    log = (exported / "log.txt").read_text()
    assert (
        "warning: this detector sees photos of 64 px, and the files pad shorter sides to 160 px: their detections differ "
        in log
    )
    for name in ("onnx", "pt2"):
        assert re.search(rf"detector.{name} against torch on 3 images: [1-9]\d* detections", log)
        assert re.search(rf"detector.{name} +[\d.]+ ms +[\d.]+ images/s", log)
    metrics = json.loads((exported / "result.json").read_text())["metrics"]
    for name in ("onnx", "torch"):
        assert metrics[name]["detections"] == metrics[name]["detections_by_file"] > 3
        assert metrics[name]["box_difference"] < 0.01
        assert metrics["seconds"]["latency"][FILES[name]] > 0
    metadata = load_detector(exported / "hub" / "detector.safetensors").metadata
    assert metadata["content_sha256"] == read_metadata(detector_file)["content_sha256"]
    assert not {"run", "trained_images"} & metadata.keys()


def test_the_files_by_themselves(exported: Path, detector_file: Path, tiny_coco: Any) -> None:
    import onnx
    from PIL import Image

    model = onnx.load(exported / "detector.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    metadata = read_metadata(detector_file)
    assert json.loads(facts["class_names"]) == ["wide", "tall"]
    assert json.loads(facts["category_ids"]) == [3, 7]
    assert json.loads(facts["mean"]) == metadata["mean"]
    assert json.loads(facts["resize"])["short_side"] == 64
    assert json.loads(facts["model"])["kind"] == "retinanet"
    assert facts["content_sha256"] == metadata["content_sha256"]
    assert not [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.BFLOAT16]
    assert read_program(exported / "detector.pt2")[1]["category_ids"] == [3, 7]
    with zipfile.ZipFile(exported / "detector.pt2") as archive:
        program = b"".join(archive.read(name) for name in archive.namelist())
    for content in ((exported / "detector.onnx").read_bytes(), program):
        for folder in (str(ROOT), str(Path(torch.__file__).parent), str(detector_file.parent), "site-packages"):
            assert folder.encode() not in content
    # A image as others would ask about it, on a canvas of another shape than that of the check.
    pixels = np.zeros((1, 3, 192, 256), np.uint8)
    with Image.open(tiny_coco.val_images / "0.png") as image:
        pixels[0, :, :64, :64] = np.array(image.convert("RGB")).transpose(2, 0, 1)
    onnx_session = session(exported / "detector.onnx", threads=1)
    boxes, scores, labels, count = onnx_session.run(None, {"pixels": pixels, "sizes": np.array([[64, 64]])})
    # Scores differ a little as well, so the threshold lies in the widest gap between the best ones.
    best = scores[0, :6]
    place = int((best[:-1] - best[1:]).argmax())
    threshold = float(best[place] + best[place + 1]) / 2
    (result,) = load_detector(detector_file).predict([tiny_coco.val_images / "0.png"], score_threshold=threshold)
    many = int((scores[0, : count[0]] >= threshold).sum())
    assert many == len(result) > 0
    # Padding is not the same in both, which shows near the border of the image.
    np.testing.assert_allclose(boxes[0, :many], result.boxes_N4, atol=1.5)
    np.testing.assert_array_equal(labels[0, :many], result.labels_N)


def test_the_card(exported: Path, detector_file: Path) -> None:
    card = (exported / "hub" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["pipeline_tag"], front["library_name"]) == ("object-detection", "ssld")
    metadata = read_metadata(detector_file)
    for line in (
        "RetinaNet on test_resnet, which detects 2 classes: wide, tall.",
        f"| AP50, % | {100 * metadata['metrics']['AP50']:.1f} |",
        "| read, data.val_annotations | ",
        f"| training finished | {time.strftime('%Y')}-",
        f"| versions | Python {platform.python_version()}, ",
        f", torch {version('torch')}",
        "| interval | none: one training, evaluated once;",
        "| size in evaluation | short side 64, long side at most 64 |",
        "- the backbone, random:test_resnet",
        f"- evaluation: {detector_file.parent.name}/val.json".replace(detector_file.parent.name, "coco0"),
    ):
        assert line in card
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert (settings["steps"], settings["model"]["kind"]) == (120, "retinanet")
    assert str(detector_file.parent) not in card
    public = detector_card(metadata, None, push_to_hub="me/tall", parameters=1_500_000, checks={})
    assert 'load_detector(hf_hub_download("me/tall", "detector.safetensors"))' in public
    assert "# tall\n" in public
    assert public.count("Not recorded.") == 2


def test_mistakes(
    user_error: Any, detector_file: Path, teacher_file: Path, tiny_coco: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def line(model: Path, *flags: str) -> str:
        argv = ["--model", str(model), "--output", str(tmp_path / "run"), "--threads", "1", "--formats", "onnx", *flags]
        message: str = user_error(main, argv)
        return message

    assert "is a backbone file, a detector file is needed" in line(teacher_file)
    assert "push_to_hub: one: is not of the form ORG/NAME" in line(detector_file, "--push_to_hub", "one")
    assert "canvas" in line(detector_file, "--canvas", "[100, 64]")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime is missing); pip install -e '.[export]' in the clone" in line(detector_file)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="soft NMS"):
        graph_of(detector("faster_rcnn", roi={"nms": {"kind": "soft_linear"}}))


def test_nothing_stays_of_an_export_that_fails(
    user_error: Any, call: Any, detector_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"nothing")
    argv = ["--model", str(detector_file), "--threads", "1", "--formats", "torch", "--canvas", "[64, 64]"]
    message = user_error(main, [*argv, "--images", str(tmp_path / "photos"), "--output", str(tmp_path / "a")])
    assert "photos: none of the 1 images tried can be read" in message
    assert not (tmp_path / "a").exists()
    argv += ["--output", str(tmp_path / "run"), "--check_images", "1", "--push_to_hub", "me/tiny"]
    message = user_error(main, [*argv, "--score_tolerance", "1e-30", "--box_tolerance", "1e-30"])
    assert re.search(r"detector.pt2 and torch differ: .*_tolerance is 1e-30; raise the tolerance", message)
    left = {file.name for file in (tmp_path / "run").iterdir()}
    assert left == {".lock", "config.yaml", "environment.json", "log.txt"}
    argv[argv.index("--output") + 1] = str(tmp_path / "other")
    requests: list[Any] = []

    class Hub:
        def create_repo(self, repository: str, **options: Any) -> None:
            requests.append((repository, options["private"]))

        def upload_folder(self, **options: Any) -> Any:
            requests.append(options["folder_path"])
            return type("Done", (), {"commit_url": "https://example.org/commit"})()

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert call(main, argv) == 0
    assert requests == [("me/tiny", False), str(tmp_path / "other" / "hub")]


def test_the_last_layers_are_known_by_name() -> None:
    """Those without a nonlinearity behind them, which stay in float32: a new head needs its names in `precision._LAST`."""
    expected = {
        "cascade_mask_rcnn": {f"roi_heads.heads.{n}.{name}" for n in range(3) for name in ("logits", "deltas")}
        | {"mask_head.logits", "rpn.head.objectness", "rpn.head.deltas"},
        "gfl": {"dense.head.logits", "dense.head.boxes"},
    }
    for kind, names in expected.items():
        weights = [name for name, _ in detector(kind).named_parameters() if precision._LAST.search(name)]
        assert {name.removesuffix(".weight") for name in weights} == names
