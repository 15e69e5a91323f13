"""A folder in which the commands of the documentation can be executed: every file they name is there, tiny.

Files that an earlier command of a page wrote are read as they are; a model that only another page writes is put there when a command reads it.
"""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from ssld.pipelines.cli import _BY_KIND, COMMANDS

ROOT = Path(__file__).resolve().parents[1]
SIDE = 64
NAMES = ("wide", "tall")

# setting -> value that makes a command tiny, whatever the page has; by script.
_HERE = {"threads": "1", "workers": "0", "device": "cpu"}
_TRAINING = _HERE | {"steps": "2", "batch_size": "4", "precision": "fp32", "channels_last": "false"}
_STAGE1 = _TRAINING | {"data.image_size": "32"}
_SIDES = {
    "resize.train_short_sides": "[64]",
    "resize.train_long_side": "64",
    "resize.short_side": "64",
    "resize.long_side": "64",
}
_RCNN = {
    "model.rpn.anchor_sizes": "[8, 16, 32, 64, 128]",
    "model.rpn.post_nms_top_n_train": "40",
    "model.rpn.post_nms_top_n_test": "30",
    "model.roi.hidden": "32",
    "model.roi.samples_per_image": "24",
}
TINY: dict[str, dict[str, str]] = {
    "stage1_ssld/distill.py": _STAGE1,
    "stage1_ssld/teach.py": _STAGE1,
    "stage1_ssld/prototypes.py": _HERE | {"batch_size": "8", "prototypes": "6", "image_size": "32"},
    "stage1_ssld/curate.py": _HERE | {"batch_size": "8", "keep": "2"},
    "stage1_ssld/write_soft_labels.py": _HERE | {"batch_size": "8", "data.image_size": "32", "top": "2"},
    "stage1_ssld/evaluate.py": _HERE | {"batch_size": "8"},
    "stage1_ssld/export.py": {
        "threads": "1",
        "workers": "0",
        "batch_size": "4",
        "check_images": "4",
        "formats": "torch",
    },
    "stage2_detect/train.py": _TRAINING
    | _SIDES
    | _RCNN
    | {
        "model.fpn_channels": "16",
        "model.dense.convolutions": "1",
        "distill.check_ap": "0",
    },
    "stage2_detect/evaluate.py": _HERE | {"batch_size": "4"},
    "stage2_detect/predict.py": _HERE | {"score_threshold": "0.005"},
    "stage2_detect/audit.py": _HERE | {"score_threshold": "0.005"},
    "stage2_detect/export.py": {"threads": "1", "batch_size": "2", "formats": "torch", "canvas": "[64, 64]"},
}
ONLY_WHERE_GIVEN = {"tta.short_sides": "[48, 64]", "tile": "48"}  # replace a page's value, and are added nowhere
ONE_OF = ({"steps", "train_epochs", "train_images"},)


def commands(page: Path) -> list[str]:
    """The indented command lines of a page and those of its bash blocks, in its order, continuation lines joined."""
    text = page.read_text(encoding="utf-8")
    pattern = r"```(?P<language>\w*)\n(?P<block>(?s:.*?))```|(?P<indented>(?:^ {4}\S.*\n?)(?:^ {4,}\S.*\n?)*)"
    matches = re.finditer(pattern, text, flags=re.MULTILINE)
    texts = [match["indented"] or (match["block"] if match["language"] == "bash" else "") for match in matches]
    lines = [line.strip() for text in texts for line in re.sub(r"\\\n\s+", "", text).splitlines()]
    if page.parent.name == "benchmarks":  # the output of scripts is indented too
        lines = [line for line in lines if line.startswith("python ")]
    return [line for line in lines if line and not line.startswith("#")]


def script_of(words: list[str]) -> str:
    """The script of a command line of `ssld`, without this word; of evaluations and exports by the name of the model's file, as of its kind."""
    module = COMMANDS[words[0]][0]
    if words[0] in _BY_KIND and "--model" in words:
        name = Path(words[words.index("--model") + 1]).name
        module = _BY_KIND[words[0]][1]["detector" if name.startswith("detector") else "backbone"]
    return f"{(module or 'ssld.pipelines.cli').removeprefix('ssld.').replace('.', '/')}.py"


def shrunk(script: str, words: list[str]) -> list[str]:
    """A command's flags with the sizes of `TINY` in place of its own."""
    tiny = TINY.get(script, {})
    given = flags_of(words)
    if "distill.teacher" not in given:
        tiny = {key: value for key, value in tiny.items() if not key.startswith("distill.")}
    tiny = tiny | {key: value for key, value in ONLY_WHERE_GIVEN.items() if key in given}
    replaced = set(tiny).union(*(group for group in ONE_OF if group & set(tiny)))
    kept = {key: value for key, value in given.items() if key not in replaced}
    return [word for key, value in (kept | tiny).items() for word in (f"--{key}", value)]


def flags_of(words: list[str]) -> dict[str, str]:
    """`--key value` pairs by key."""
    assert len(words) % 2 == 0, f"flags and values do not come in pairs: {words}"
    assert all(word.startswith("--") for word in words[::2]), f"not a flag where one should be: {words}"
    return {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}


@dataclass
class Sandbox:
    """The folder, and the run directories in it.

    Attributes:
        teacher: a backbone file that replaces every pretrained timm model.
        written: run directories that commands have written so far.
    """

    folder: Path
    teacher: Path
    written: set[Path] = field(default_factory=set)

    def tiny_names(self, text: str) -> str:
        """`text` with tiny networks in place of those it names."""
        text = re.sub(r"\btimm:[\w.]+", str(self.teacher), text)
        return re.sub(r"\brandom:[\w.]+", "random:test_resnet", text)

    def give(self, word: str) -> None:
        """Put a model file where `word` asks for one that no command of this sandbox should have written."""
        path = self.folder / word
        if not word.startswith("runs/") or path.exists() or any(path.is_relative_to(run) for run in self.written):
            return
        if path.name in ("student.safetensors", "teacher.safetensors", "backbone.safetensors"):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.teacher, path)
        elif path.name == "detector.safetensors":
            kind = next((kind for kind in ("gfl", "retinanet") if kind in word), "faster_rcnn")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_random_detector(path, kind, self.folder / "train.json")


def build(folder: Path, *, train: Path, val: Path, unlabeled: Path, teacher: Path) -> Sandbox:
    """Fill an empty folder.

    Args:
        train: folder of class folders; `val` another one.
        unlabeled: folder of images.
        teacher: backbone file with the classes of `train`.
    """
    for images in ("images", "data/imagenet"):
        shutil.copytree(train, folder / images / "train")
        shutil.copytree(val, folder / images / "val")
    for images in ("pool", "data/unlabeled"):
        shutil.copytree(unlabeled, folder / images)
    sandbox = Sandbox(folder, teacher)
    for file in (*ROOT.glob("*/configs/*.yaml"), *(ROOT / "pipelines").rglob("*.yaml")):
        text = sandbox.tiny_names(file.read_text(encoding="utf-8"))
        target = folder / file.relative_to(ROOT)
        _made(target.parent)
        target.write_text(tiny_pipeline(text) if file.is_relative_to(ROOT / "pipelines") else text, encoding="utf-8")
    coco = {
        "train.json": "photos",
        "annotations.json": "photos",
        "val.json": "photos",
        "mine/train.json": "mine/photos",
    }
    coco |= {f"data/coco/annotations/instances_{part}2017.json": f"data/coco/{part}2017" for part in ("train", "val")}
    for seed, (annotations, images) in enumerate(coco.items()):
        write_coco(folder / annotations, folder / images, seed, 8 if annotations == "annotations.json" else 4)
    for number in range(4):
        scene(90 + number)[0].save(_made(folder / "more_photos") / f"{number}.png")
    Image.fromarray(np.tile(np.asarray(scene(99)[0]), (1, 2, 1))).save(_made(folder / "aerial") / "large.png")
    write_clip(folder / "clip.mp4")
    write_yolo(folder / "datasets/pets")
    write_voc(folder / "VOCdevkit/VOC2012")
    write_parquet(folder / "datasets/cppe-5/data")
    return sandbox


def tiny_pipeline(text: str) -> str:
    """A pipeline whose every stage has the sizes of `TINY`, and of the file's own `smoke:` where `TINY` has none."""
    from ssld.pipelines.config import CommandName
    from ssld.pipelines.runner.stages import KINDS
    from ssld.shared.config.yaml_files import flatten

    content = yaml.safe_load(text)
    commands: dict[str, CommandName] = {}
    for name, stage in content["stages"].items():
        command = commands[name] = stage.get("command") or commands[stage["like"]]
        sizes = {k: v for k, v in TINY.get(KINDS[command].script, {}).items() if not k.startswith("distill.")}
        tiny: dict[str, Any] = dict(flatten(content.get("smoke", {}).get(command, {})))
        tiny |= {key: yaml.safe_load(value) for key, value in sizes.items()}
        replaced = set(tiny).union(*(group for group in ONE_OF if group & set(tiny)))
        own = {key: value for key, value in flatten(stage.get("set", {})) if key not in replaced}
        stage["set"] = own | tiny
    return yaml.safe_dump(content, sort_keys=False)


def save_random_detector(path: Path, kind: str, annotations: Path) -> None:
    """A detector file with random weights and the classes of a COCO JSON; it has detections in every image."""
    import timm
    import torch

    from ssld.shared.models.backbones import InputSettings
    from ssld.stage2_detect.config import ResizeConfig
    from ssld.stage2_detect.data.coco import read_coco
    from ssld.stage2_detect.detector_file import save_detector
    from ssld.stage2_detect.model_config import DetectorConfig
    from ssld.stage2_detect.models.build import build_detector

    torch.manual_seed(0)
    parts: dict[str, Any] = {"dense": {"convolutions": 1, "score_threshold": 0.001}}
    if kind == "faster_rcnn":
        rpn = {"anchor_sizes": [8, 16, 32, 64, 128], "post_nms_top_n_train": 40, "post_nms_top_n_test": 30}
        parts = {"roi": {"hidden": 32, "samples_per_image": 24}, "rpn": rpn}
    config = DetectorConfig(kind=kind, fpn_channels=16, **parts)
    body = timm.create_model("test_resnet", features_only=True)
    inputs = InputSettings.of_detector((0.5,) * 3, (0.5,) * 3)
    model = build_detector(config, classes=len(NAMES), body=body, arch="test_resnet", inputs=inputs)
    resize = ResizeConfig(train_short_sides=[SIDE], train_long_side=SIDE, short_side=SIDE, long_side=SIDE)
    data = read_coco(annotations, None, training=False)
    save_detector(path, model, config=config, resize=resize, arch="test_resnet", inputs=inputs, data=data)


# ---- tiny data sets in every format that the pages read


def scene(seed: int) -> tuple[Image.Image, list[tuple[int, list[int]]]]:
    """Draw an image of two rectangles; returns it and their (class, [x, y, w, h]); the class is whether it is wide or tall."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
    objects = []
    for label, left in enumerate((2, 34)):
        width, height = (26, 16) if label == 0 else (16, 26)
        top = int(draw.integers(2, 34))
        pixels[top : top + height, left : left + width] = (250, 90, 40) if label == 0 else (40, 120, 250)
        objects.append((label, [left, top, width, height]))
    return Image.fromarray(pixels), objects


def write_coco(file: Path, folder: Path, seed: int, count: int = 4) -> None:
    """Write scenes into a folder and their COCO JSON; images of several files may lie in one folder."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    _made(folder)
    _made(file.parent)
    for number in range(count):
        image, objects = scene(10 * seed + number)
        name = f"{file.stem}_{number}.png"
        image.save(folder / name)
        images.append({"id": number + 1, "file_name": name, "width": SIDE, "height": SIDE})
        for label, box in objects:
            one = {"id": len(annotations) + 1, "image_id": number + 1, "category_id": label + 1, "bbox": box}
            annotations.append(one | {"area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(NAMES)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def write_clip(file: Path) -> None:
    """Write a video of three scenes."""
    from ssld.stage2_detect.prediction.video_file import VideoFile

    with VideoFile(file, SIDE, SIDE, 10) as video:
        for number in range(3):
            video.add(np.asarray(scene(70 + number)[0]), number / 10)


def write_yolo(root: Path) -> None:
    """Write two images for training and one for validation."""
    for part, numbers in (("train", (1, 2)), ("val", (3,))):
        for number in numbers:
            image, objects = scene(60 + number)
            image.save(_made(root / "images" / part) / f"{number}.png")
            lines = [
                f"{label} {(x + w / 2) / SIDE} {(y + h / 2) / SIDE} {w / SIDE} {h / SIDE}"
                for label, (x, y, w, h) in objects
            ]
            (_made(root / "labels" / part) / f"{number}.txt").write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [wide, tall]\n")


def write_voc(root: Path) -> None:
    """Write one image for training and one for validation."""
    for number, part in ((1, "train"), (2, "val")):
        image, objects = scene(50 + number)
        image.save(_made(root / "JPEGImages") / f"{number}.jpg")
        xml = "".join(
            f"<object><name>{NAMES[label]}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
            f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for label, (x, y, w, h) in objects
        )
        size = f"<size><width>{SIDE}</width><height>{SIDE}</height><depth>3</depth></size>"
        (_made(root / "Annotations") / f"{number}.xml").write_text(
            f"<annotation><filename>{number}.jpg</filename>{size}{xml}</annotation>"
        )
        (_made(root / "ImageSets/Main") / f"{part}.txt").write_text(f"{number}\n")


def write_parquet(folder: Path) -> None:
    """Write four images per split with boxes as x, y, width, height, as data sets of the hub have them."""
    import io

    for split, seed in (("train", 40), ("test", 45)):
        rows = []
        for number in range(4):
            image, objects = scene(seed + number)
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            boxes = {"bbox": [[float(v) for v in box] for _, box in objects], "category": [k for k, _ in objects]}
            rows.append({"image": {"bytes": buffer.getvalue(), "path": f"{number}.png"}, "objects": boxes})
        labels = {"feature": {"names": list(NAMES), "_type": "ClassLabel"}, "_type": "Sequence"}
        facts = {"info": {"features": {"image": {"_type": "Image"}, "objects": {"category": labels}}}}
        table = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(facts)})
        pq.write_table(table, _made(folder) / f"{split}-00000-of-00001.parquet")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
