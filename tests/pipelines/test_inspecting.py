"""`ssld inspect` on files of this project: kind, licence of the teacher, numbers, and no unused settings."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from ssld.pipelines.config import PipelineConfig, StageConfig
from ssld.pipelines.inspecting import KNOWN, inspect_text
from ssld.pipelines.reports.table import Record, write_record
from ssld.shared.errors import UserError
from ssld.shared.models.model_file import read_metadata, save_model_file
from ssld.shared.training.checkpoint import add_evaluation, save_checkpoint
from ssld.stage1_ssld.data.manifest import SCHEMA, write_manifest
from ssld.stage2_detect.model_config import DetectorConfig

TENSORS = {"weight": torch.zeros(2, 3), "scalar": torch.tensor(1.0)}
# kind of detector -> the groups of its settings that it reads
GROUPS = {
    "faster_rcnn": {"rpn", "roi"},
    "mask_rcnn": {"rpn", "roi", "mask"},
    "cascade_rcnn": {"rpn", "roi", "cascade"},
    "cascade_mask_rcnn": {"rpn", "roi", "cascade", "mask"},
    "retinanet": {"dense", "retinanet"},
    "gfl": {"dense", "gfl"},
}
TEACHER = {"arch": "resnet101d", "licence": "cc-by-nc-4.0", "content_sha256": "f00d"}


def test_backbone(teacher_file: Path) -> None:
    text = inspect_text(teacher_file)
    metadata = read_metadata(teacher_file)
    for expected in (
        "backbone file",
        "test_resnet",
        "apache-2.0",
        "disc, ring, stripes",
        metadata["content_sha256"],
        "timm_version",
    ):
        assert expected in text
    assert "92 (0.38 M values)" in text  # parameters and running statistics


def test_teacher_and_long_lists(tmp_path: Path) -> None:
    facts = {"kind": "backbone", "class_names": [f"class{n}" for n in range(100)], "teacher": TEACHER, "best": None}
    per_class = {f"class{n}": 0.25 for n in range(80)}
    save_model_file(
        tmp_path / "m.safetensors", TENSORS, facts | {"metrics": {"top1": 0.123456, "per_class": per_class}}
    )
    text = inspect_text(tmp_path / "m.safetensors")
    for expected in (
        "resnet101d",
        "cc-by-nc-4.0",
        "f00d",
        "class9 ... (100)",
        "0.1235",
        "class9 0.25 ... (80)",
        "2 (0.00 M values)",
    ):
        assert expected in text
    assert "class11" not in text


@pytest.mark.parametrize("kind", GROUPS)
def test_a_detector_shows_the_groups_it_reads(kind: Any, tmp_path: Path) -> None:
    model = DetectorConfig(kind=kind).model_dump(mode="json")
    groups = {name for name, value in model.items() if isinstance(value, dict)}
    assert groups == set().union(*GROUPS.values())  # a new group has to be put somewhere
    save_model_file(tmp_path / "d.safetensors", TENSORS, {"kind": "detector", "arch": "resnet50d", "model": model})
    text = inspect_text(tmp_path / "d.safetensors")
    assert f": detector ({kind}) file" in text.splitlines()[0]
    printed = {name for name in groups if f"\n    {name}\n" in text}
    assert printed == GROUPS[kind]
    config = DetectorConfig(kind=kind)
    assert ("mask" in printed, "cascade" in printed, "dense" in printed) == (
        config.has_masks,
        config.is_cascade,
        config.is_dense,
    )


def test_of_another_program(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "x.safetensors")
    assert "not written by this project" in inspect_text(tmp_path / "x.safetensors")
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "x.parquet")
    assert "Parquet file of another program" in inspect_text(tmp_path / "x.parquet")


def test_manifest(tmp_path: Path) -> None:
    columns = {field.name: pa.array([], field.type) for field in SCHEMA}
    facts = {"teacher": TEACHER, "numbers": {"kept": 7}}
    write_manifest(tmp_path / "selected.parquet", columns, [{"path": "pool/here"}], facts)
    text = inspect_text(tmp_path / "selected.parquet")
    for expected in ("manifest of a curation", "pool/here", "cc-by-nc-4.0", "kept             7"):
        assert expected in text


def test_store(tmp_path: Path) -> None:
    header = {
        "teacher": TEACHER,
        "num_classes": 10,
        "sources": [{"path": "photos", "rows": 12}],
        "shards": [{"file": "a", "images": 8}, {"file": "b", "images": 4}],
        "replayed": [[0, 0, 0, "abc"]],
    }
    (tmp_path / "store.json").write_text(json.dumps(header))
    text = inspect_text(tmp_path)
    for expected in ("store of soft labels", "photos (12 rows)", "2 (12 images)", "cc-by-nc-4.0"):
        assert expected in text
    assert "abc" not in text


@pytest.mark.parametrize("in_header", [True, False])
def test_a_store_says_how_much_it_keeps(in_header: bool, tmp_path: Path) -> None:
    """By its header, or for one of an earlier version by the result of its run."""
    store = tmp_path / "store"
    store.mkdir()
    header = {"num_classes": 1000, "top": 10, "views": 8, "teacher_settings": {"size": None, "precision": "fp32"}}
    (store / "store.json").write_text(json.dumps(header | ({"kept_probability": 0.934} if in_header else {})))
    if not in_header:
        (tmp_path / "result.json").write_text(json.dumps({"metrics": {"kept_probability": 0.934}}))
    text = inspect_text(store)
    for expected in ("93.4 % of the probability", "10 of 1000 classes stored per view", "that of the views"):
        assert expected in text


def test_a_teacher_of_prototypes(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"kind": "backbone", "arch": "resnet18", "input_size": [160, 160]}
    facts |= {"prototypes": {"prototypes": 64, "temperature": 11.8}, "encoder": {"reference": "timm:dino"}}
    save_model_file(tmp_path / "t.safetensors", TENSORS, facts)
    title, *lines = inspect_text(tmp_path / "t.safetensors").splitlines()
    assert title.endswith("backbone file, a teacher of 64 prototypes at 160 x 160 px")
    assert "    temperature      11.8" in lines
    assert "    reference        timm:dino" in lines


def test_tensors_of_other_programs_and_folders_of_the_hub(tmp_path: Path) -> None:
    tensors = {"stem.weight": torch.zeros(4, 3, 3, 3), "fc.weight": torch.zeros(9, 4)}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "net.pth")
    text = inspect_text(tmp_path / "net.pth")
    for expected in (
        "pickle with the tensors",
        "state_dict",
        "stem.weight [4, 3, 3, 3], fc.weight [9, 4]",
        "timm name",
    ):
        assert expected in text
    torch.save({"rpn.head.weight": torch.zeros(2, 2)}, tmp_path / "detector.pth")
    assert "ssld convert-detector" in inspect_text(tmp_path / "detector.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")  # not opened: it could run code
    with pytest.raises(UserError, match=r"module\.pth: cannot be read as a plain state dict"):
        inspect_text(tmp_path / "module.pth")
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 9}))
    (hub / "model.safetensors").write_bytes(b"")
    text = inspect_text(hub)
    for expected in ("folder in the Hugging Face layout", "resnet18", "model.safetensors"):
        assert expected in text


def test_a_checkpoint_has_the_values_of_its_evaluation(tmp_path: Path) -> None:
    state = {"step": 9, "best": 0.1, "evaluated": False, "skipped": [3, 0]}
    path = save_checkpoint(tmp_path, 9, {"model": TENSORS}, state)
    add_evaluation(tmp_path, 9, {"best": 0.25, "evaluated": True})
    text = inspect_text(path)
    for expected in ("best               0.25", "evaluated          yes", "skipped steps      3"):
        assert expected in text


def test_run_directory_and_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"steps": 9, "model": {"kind": "gfl"}, "backbone": "random:x"})
    )
    assert "run directory, not finished: the same command resumes it" in inspect_text(tmp_path)
    record = {"command": "train", "seconds": 90, "metrics": {"AP": 0.5}, "outputs": {"detector.safetensors": "aa"}}
    (tmp_path / "result.json").write_text(json.dumps(record))
    save_checkpoint(tmp_path / "checkpoints", 9, {"model": TENSORS}, {"step": 9})
    text = inspect_text(tmp_path)
    for expected in (
        "run directory, finished",
        "AP               0.5",
        "minutes            1.5",
        "detector.safetensors",
        "gfl",
        "step_00000009",
    ):
        assert expected in text
    checkpoint = tmp_path / "checkpoints" / "step_00000009"
    assert "checkpoint (complete)" in inspect_text(checkpoint)
    (checkpoint / "COMPLETE").unlink()
    assert "checkpoint (NOT complete: it is ignored)" in inspect_text(checkpoint)


def test_exported_networks(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["pixels"], ["scores"])
    out = onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, [1])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [out]))
    onnx.helper.set_model_props(model, {"kind": "detector", "class_names": '["cat", "dog"]', "licence": "cc-by-nc-4.0"})
    onnx.save(model, tmp_path / "d.onnx")
    with zipfile.ZipFile(tmp_path / "d.pt2", "w") as archive:
        archive.writestr(
            "archive/extra/metadata.json", json.dumps({"class_names": '["cat", "dog"]', "licence": "cc-by-nc-4.0"})
        )
    for name in ("d.onnx", "d.pt2"):
        text = inspect_text(tmp_path / name)
        assert "exported network" in text
        assert "cat, dog" in text
        assert "cc-by-nc-4.0" in text


@pytest.mark.parametrize(
    "name", ["x.onnx", "x.pt2", "x.parquet", "x.safetensors", "x.json", "x.JPG", "folder", "gone.onnx"]
)
def test_refusals(name: str, tmp_path: Path) -> None:
    if name == "folder":
        (tmp_path / name).mkdir()
    elif name != "gone.onnx":
        (tmp_path / name).write_bytes(b"something else\xff\xff")
    with pytest.raises(UserError) as caught:
        inspect_text(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.yaml", "metrics.jsonl", "a.txt", "folder"])
def test_what_is_known_is_said(name: str, tmp_path: Path) -> None:
    """Text files need no command to be read."""
    path = tmp_path / name
    path.mkdir() if name == "folder" else path.write_text("{}")
    with pytest.raises(UserError) as caught:
        inspect_text(path)
    assert str(caught.value) == f"{path}: not a file or folder of this project; {KNOWN}"


@pytest.mark.parametrize("text", ["steps: [1", "a: 1\n\tb: 2", "- 1\n"])
def test_a_damaged_file_of_settings_is_a_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        inspect_text(tmp_path)
    assert str(tmp_path / "config.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_folder_of_a_pipeline(tmp_path: Path) -> None:
    """Lists the stages with their states; a folder of runs without a pipeline lists its runs."""
    stages = {name: StageConfig(command=name) for name in ("distill", "train", "predict")}
    pipeline = PipelineConfig(output=tmp_path, stages=stages)
    for name in ("distill", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("steps: 3\n")
    (tmp_path / "distill" / "result.json").write_text('{"metrics": {}}')
    text = inspect_text(tmp_path)
    assert text.splitlines()[0] == f"{tmp_path}: folder of run directories"
    assert "distill (finished), train (not finished)" in text
    write_record(tmp_path, Record("mine", True, pipeline))
    lines = inspect_text(tmp_path).splitlines()
    assert lines[0] == f"{tmp_path}: folder of a pipeline at its smallest sizes"
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "name mine",
        "stages",
        "distill distill, finished",
        "train train, not finished",
        "predict predict, not run",
    ]


ODD: list[Any] = [None, True, 3, 1.5, "text", [], [[]], {}, {"a": {"b": [None]}}, 10**400, float("nan")]


@pytest.mark.parametrize(
    "file", ["result.json", "environment.json", "state.json", "store.json", "pipeline.json", "config.yaml"]
)
def test_records_of_another_form_are_a_line_or_shown(file: str, tmp_path: Path) -> None:
    records: dict[str, dict[str, Any]] = {
        "result.json": {
            "command": "train",
            "seconds": 90,
            "metrics": {"AP": 0.5},
            "outputs": {"a": "b"},
            "finished": "x",
        },
        "environment.json": {"started": "x", "machine": "m", "versions": {"a": "b"}},
        "state.json": {"step": 3},
        "store.json": {"sources": [{"path": "p", "rows": 3}], "shards": [{"images": 3}], "replayed": []},
        "pipeline.json": {
            "name": "n",
            "smoke": False,
            "pipeline": {"output": "o", "stages": {"a": {"command": "train"}}},
        },
        "config.yaml": {"steps": 3, "model": {"kind": "gfl"}, "data": {"train": ["x"]}},
    }
    sound = records[file]
    if file in ("result.json", "environment.json"):
        (tmp_path / "config.yaml").write_text("steps: 3\n")
    changed = [*ODD, *({**sound, key: odd} for key in sound for odd in ODD)]
    refused: list[str] = []
    for content in changed:
        (tmp_path / file).write_text(json.dumps(content))
        try:
            inspect_text(tmp_path)
        except UserError as error:
            refused += str(error).splitlines()
    assert 0 < len(refused) < 2 * len(changed)
    assert all(line.startswith(str(tmp_path)) for line in refused)


def facts_of(path: Path) -> dict[str, str]:
    return {line[2:20].strip(): line[20:].strip() for line in inspect_text(path).splitlines()[1:]}


def test_annotations_and_detections_are_counted(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 640 + n, "height": 480} for n in range(4)]
    objects: list[dict[str, Any]] = [
        {"id": n, "image_id": n % 3, "category_id": 7 if n < 5 else 2, "bbox": [1, 2, 3, 4], "iscrowd": int(n == 0)}
        for n in range(6)
    ]
    objects[1]["segmentation"] = [[0, 0, 4, 0, 4, 4]]
    categories = [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 9, "name": "ox"}]
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    assert inspect_text(file).splitlines()[0] == f"{file}: COCO annotations"
    text = " ".join(inspect_text(file).split())
    for expected in (
        "images 4, 1 of them without objects",
        "sizes 4, from 640 x 480 to 643 x 480",
        "objects 6 with masks 1 crowds 1",
        "classes 3, 1 of them without objects",
        "cat 5 dog 1",
    ):
        assert expected in text
    found = [{"image_id": n, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.25 * (n + 1)} for n in range(3)]
    file.write_text(json.dumps(found))
    assert inspect_text(file).splitlines()[0] == f"{file}: COCO detections"
    assert facts_of(file)["scores"] == "0.25 to 0.75"
    for content in ("{}", "[]", "[1]", '{"images": 3}', '[{"image_id": 1, "score": null}]', "[" * 100_000):
        file.write_text(content)
        with pytest.raises(UserError, match=r"train\.json: "):
            inspect_text(file)


def test_an_image_says_how_it_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    facts = facts_of(tmp_path / "a.jpg")
    assert (facts["format"], facts["size"], facts["mode"]) == ("JPEG", "30 x 20 px, as stored", "RGB")
    assert facts["EXIF orientation"] == "6, turned or mirrored when shown"
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:40])
    with pytest.raises(UserError, match=r"a\.jpg: not a readable image"):
        inspect_text(tmp_path / "a.jpg")


def test_json_and_images_are_read_without_torch(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('{"images": [], "categories": []}')
    code = (
        "import sys; from ssld.pipelines.cli import main; codes = [main(['inspect', file]) for file in sys.argv[1:]]; "
        "sys.exit(10 * any(codes) + ('torch' in sys.modules))"
    )
    files = [str(tmp_path / "a.png"), str(tmp_path / "a.json")]
    ended = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
