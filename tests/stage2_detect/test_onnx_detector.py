"""The file that runs an exported detector without torch: its pixels, boxes and masks are those of `detector.predict`."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ssld.shared.models.backbones import InputSettings
from ssld.stage2_detect.config import ResizeConfig
from ssld.stage2_detect.data.coco import read_coco
from ssld.stage2_detect.data.views import fit_view, view_image
from ssld.stage2_detect.deploy import onnx_detector
from ssld.stage2_detect.deploy.onnx_detector import OnnxDetector, decode, pasted, resized
from ssld.stage2_detect.detector_file import LoadedDetector, load_detector, save_detector
from ssld.stage2_detect.export import main
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.build import build_detector
from ssld.stage2_detect.models.mask_head import paste
from ssld.stage2_detect.models.mask_targets import decode_rle

SIZES = [(64, 90), (480, 640), (160, 160), (200, 201), (31, 400), (320, 480)]


@pytest.mark.parametrize("kernel", ["reference", "fast"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_is_that_of_torch(interpolation: str, kernel: str) -> None:
    draw = np.random.default_rng(0)
    different, total = 0, 0
    for height, width in SIZES:
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for short, long in ((160, 224), (95, 300)):
            view = fit_view(height, width, short_side=short, long_side=long)
            expected = view_image(torch.from_numpy(pixels).permute(2, 0, 1), view, interpolation, kernel).permute(
                1, 2, 0
            )
            ours = resized(pixels, (view.height, view.width), view.scale, interpolation, kernel)
            apart = np.abs(ours.astype(int) - expected.numpy())
            assert apart.max() <= (kernel == "reference")
            different += int(np.count_nonzero(apart))
            total += apart.size
    assert different < 1e-4 * total  # float32 sums in another order, which a tie at .5 shows


def test_masks_are_pasted_as_by_the_detector() -> None:
    draw = np.random.default_rng(1)
    maps = draw.uniform(0, 1, (6, 28, 28)).astype(np.float32)
    corners = draw.uniform(0, 60, (6, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + draw.uniform(0.2, 30, (6, 2)).astype(np.float32)], axis=1)
    boxes = boxes.clip(0, np.array([70, 80, 70, 80], np.float32))
    codes = paste(torch.from_numpy(maps), torch.from_numpy(boxes), 80, 70, 0.5)
    ours = pasted(maps, boxes, (80, 70), 0.5)
    assert 100 < ours.sum() < ours.size
    np.testing.assert_array_equal(ours, [decode_rle(code) for code in codes])


def test_files_of_every_kind_are_decoded_as_by_the_detector(tmp_path: Path) -> None:
    from ssld.shared.images import decode_image

    draw = np.random.default_rng(2)
    color = Image.fromarray(draw.integers(0, 256, (20, 30, 4), dtype=np.uint8), "RGBA")
    files = []
    for name, image in {
        "alpha.png": color, "grey.png": color.convert("L"), "both.png": color.convert("LA"), "one.png": color.convert("1"),
        "palette.gif": color.convert("P"), "cmyk.jpg": color.convert("CMYK"), "color.bmp": color.convert("RGB"),
    }.items():  # fmt: skip
        image.save(tmp_path / name)
        files.append(tmp_path / name)
    for orientation in range(1, 10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix in ("jpg", "tif", "png", "webp"):
            files.append(tmp_path / f"{orientation}.{suffix}")
            color.convert("RGB").save(files[-1], exif=exif)
    for file in files:
        np.testing.assert_array_equal(decode(file), decode_image(file).permute(1, 2, 0), err_msg=file.name)
    assert decode(tmp_path / "6.jpg").shape == (30, 20, 3)
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="I;16: more than 8 bits per channel"):
        decode(tmp_path / "deep.png")


@pytest.fixture(scope="module")
def pair(tiny_coco: Any, call: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedDetector, Path]:
    """A Mask R-CNN with random weights, whose scores are far from equal, and the run directory of its export."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"pre_nms_top_n_test": 60, "post_nms_top_n_test": 40}
    config = DetectorConfig.model_validate(
        {"kind": "mask_rcnn", "fpn_channels": 16, "rpn": small, "roi": {"hidden": 16}, "mask": {"hidden": 8, "convolutions": 1}}
    )  # fmt: skip
    inputs = InputSettings.of_detector((0.5,) * 3, (0.5,) * 3)
    body = timm.create_model("test_resnet", features_only=True)
    model = build_detector(config, classes=2, body=body, arch="test_resnet", inputs=inputs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("logits.weight", "deltas.weight")):
                parameter.mul_(30 if "logits" in name else 5)
    folder = tmp_path_factory.mktemp("runtime")
    data = read_coco(tiny_coco.val_annotations, None, training=False)
    sizes = ResizeConfig(train_short_sides=[160], train_long_side=224, short_side=160, long_side=224)
    save_detector(
        folder / "d.safetensors", model, config=config, resize=sizes, arch="test_resnet", inputs=inputs, data=data
    )
    argv = ["--model", str(folder / "d.safetensors"), "--output", str(folder / "run"), "--threads", "1"]
    assert call(main, [*argv, "--formats", "onnx", "--check_images", "1", "--batch_size", "2"]) == 0
    return load_detector(folder / "d.safetensors"), folder / "run"


def photo(height: int, width: int) -> np.ndarray:
    draw = np.random.default_rng(height)
    pixels = np.full((height, width, 3), 90, np.uint8)
    for _ in range(25):
        y, x, high, wide = (draw.uniform(0, 0.8, 4) * (height, width, height, width)).astype(int)
        pixels[y : y + high // 2 + 4, x : x + wide // 2 + 4] = draw.integers(0, 240, 3)
    return pixels + draw.integers(
        0, 16, pixels.shape, np.uint8
    )  # without equal areas, whose equal scores have no order


def test_the_file_finds_what_the_detector_finds(pair: tuple[LoadedDetector, Path], tmp_path: Path) -> None:
    loaded, run = pair
    detector = OnnxDetector(str(run / "detector.onnx"), threads=1)
    sides = [(64, 88), (480, 640), (160, 160), (200, 201), (400, 300), (320, 440)]  # padded to 160 or more by both
    images: list[Any] = [photo(*size) for size in sides]
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, image in (
        ("turned.jpg", Image.fromarray(images[0])),
        ("grey.png", Image.fromarray(images[5]).convert("L")),
    ):
        image.save(tmp_path / name, exif=exif)
        images.append(tmp_path / name)
    images.append(Image.fromarray(images[1]).convert("RGBA"))
    count = 0
    for image, ours in zip(images, detector.predict(images, score_threshold=0.3), strict=True):
        (expected,) = loaded.predict([image], score_threshold=0.3, batch_size=1)
        count += len(expected)
        assert ours.names == expected.names
        np.testing.assert_array_equal(ours.labels, expected.labels_N)
        np.testing.assert_allclose(ours.boxes, expected.boxes_N4, atol=0.01)
        np.testing.assert_allclose(ours.scores, expected.scores_N, atol=1e-3)
        assert ours.masks is not None
        assert expected.masks is not None
        for mask, code in zip(ours.masks, expected.masks, strict=True):
            assert np.count_nonzero(mask != decode_rle(code)) <= 1e-3 * mask.size
    assert count > 30


def test_boxes_end_at_the_border_of_the_image(pair: tuple[LoadedDetector, Path]) -> None:
    """Rounded, the sides of these images are half a pixel or more too long in the network's input; the file and the detector agree."""
    loaded, run = pair
    detector = OnnxDetector(str(run / "detector.onnx"), threads=1)
    for height, width in ((300, 410), (699, 652)):
        image, limits = photo(height, width), [width, height]
        (ours,), (expected,) = (
            detector.predict([image], 0.01),
            loaded.predict([image], score_threshold=0.01, batch_size=1),
        )
        np.testing.assert_allclose(ours.boxes, expected.boxes_N4, atol=0.01)
        for boxes in (ours.boxes, np.asarray(expected.boxes_N4)):
            assert np.equal(boxes[:, 2:], limits).any()
            assert (boxes[:, 2:] <= limits).all()


def test_a_batch_and_an_image_without_detections(pair: tuple[LoadedDetector, Path]) -> None:
    detector = OnnxDetector(str(pair[1] / "detector.onnx"), threads=1)
    images = [photo(480, 640), photo(240, 320)]  # one shape after resizing
    together = detector.run([detector.prepare(image) for image in images], [image.shape for image in images], 0.3)
    for image, one in zip(images, together, strict=True):
        (alone,) = detector.predict([image], 0.3)
        assert alone.names == one.names
        np.testing.assert_allclose(one.boxes, alone.boxes, atol=1e-2)
    (nothing,) = detector.predict([photo(64, 64)], score_threshold=1.0)
    assert nothing.names == []
    assert nothing.boxes.shape == (0, 4)
    assert nothing.masks is not None
    assert nothing.masks.shape == (0, 64, 64)
    drawn = np.asarray(onnx_detector.draw(images[1], together[1]))
    assert drawn.shape == images[1].shape
    assert (drawn != images[1]).any()
    np.testing.assert_array_equal(onnx_detector.draw(images[1], nothing._replace(masks=None)), images[1])


def test_a_fixed_canvas_takes_images_of_every_shape(pair: tuple[LoadedDetector, Path]) -> None:
    detector = OnnxDetector(str(pair[1] / "detector.onnx"), threads=1)
    detector.canvas = [160, 192]
    for size in SIZES:
        pixels, (high, wide), scale = detector.prepare(photo(*size))
        assert pixels.shape == (3, 160, 192)
        assert high <= 160
        assert wide <= 192
        assert high == 160 or wide == 192 or scale == 224 / max(size)
        assert not pixels[:, high:].any()
        assert not pixels[:, :, wide:].any()


def test_the_written_file_alone(pair: tuple[LoadedDetector, Path], tmp_path: Path) -> None:
    """The file beside the ONNX file is the tested one, is short, imports three packages, and runs as a script in a process without torch."""
    file = pair[1] / "onnx_detector.py"
    assert file.read_text() == Path(onnx_detector.__file__).read_text()
    assert (pair[1] / "hub" / file.name).read_text() == file.read_text()
    assert len(file.read_text().splitlines()) <= 155
    photo_file = tmp_path / "photo.png"
    Image.fromarray(photo(64, 90)).save(photo_file)
    words = [str(pair[1] / "detector.onnx"), str(photo_file), str(tmp_path / "drawn.png")]
    hidden = "import sys, runpy; sys.modules.update(torch=None, ssld=None); del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", hidden, str(file), *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.size == (90, 64)


def test_the_script_does_not_draw_over_a_second_photo(tmp_path: Path) -> None:
    """Two photos, and one alone, get the usage; both were a traceback or the loss of the second photo."""
    (tmp_path / "b.jpg").write_bytes(b"another photo")
    for words in (["d.onnx", "a.jpg"], ["d.onnx", "a.jpg", str(tmp_path / "b.jpg")]):
        done = subprocess.run(
            [sys.executable, onnx_detector.__file__, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert done.stderr.startswith("usage: python onnx_detector.py detector.onnx photo.jpg drawn.png")
    assert (tmp_path / "b.jpg").read_bytes() == b"another photo"
