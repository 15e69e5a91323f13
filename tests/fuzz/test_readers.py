"""Every reader on thousands of damaged files: an answer or a UserError, never another exception, a hang, gigabytes, or a file elsewhere."""

import contextlib
import io
import json
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ssld.pipelines.config import PipelineConfig
from ssld.pipelines.inspecting import inspect_text
from ssld.shared.config.validation import validate
from ssld.shared.config.yaml_files import read_recipe, read_settings
from ssld.shared.images import UnreadableImage
from ssld.shared.models.model_file import read_metadata, read_shapes, read_tensors, save_model_file
from ssld.shared.models.paddle_weights import read_paddle_weights
from ssld.stage1_ssld.data.sources import open_sources
from ssld.stage1_ssld.data_config import SourceConfig
from ssld.stage2_detect.config import ResizeConfig, TrainConfig
from ssld.stage2_detect.foreign.files import read_foreign
from ssld.stage2_detect.model_config import DetectorConfig
from tests.fuzz.conftest import Fuzz, encoded_png
from tests.fuzz.mutations import as_json, mutated_bytes, mutated_parquet, mutated_text

RECIPE = """output: run
backbone: random:test_resnet
steps: 10
batch_size: 2
data: {train_annotations: a.json, train_images: images}
optim: {lr: 0.1, reference_batch: 8, milestones_steps: [3, 5]}
model:
  kind: faster_rcnn
  rpn: {anchor_sizes: [8, 16, 32, 64, 128]}
resize: &r {short_side: 64}
"""
PIPELINE = """output: runs
variables: {x: 3}
stages:
  a: {command: distill, set: {steps: 3, data.train: [x]}}
  b: {like: a, processes: 2}
table: {rows: {one: {classifier: a}}, gain: [one, one]}
"""


def test_recipes(fuzz: Fuzz, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    fuzz(
        lambda draw: mutated_text(RECIPE, draw),
        file,
        lambda: validate(TrainConfig, read_recipe(file, TrainConfig.alternatives), source=str(file)),
    )


def test_pipelines(fuzz: Fuzz, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE)
    fuzz(
        lambda draw: mutated_text(PIPELINE, draw),
        file,
        lambda: validate(PipelineConfig, read_settings(file), source=str(file)),
    )


def read_source(file: Path) -> None:
    """Open a source and look at its first images; that one cannot be decoded is an answer."""
    (source,) = open_sources([SourceConfig(path=str(file))], "data.train")
    for row in range(min(2, len(source.rows))):
        source.rows.name(row)
        with contextlib.suppress(UnreadableImage):
            source.read(row)


def test_tars(fuzz: Fuzz, tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(2):
            for name, data in ((f"{number}.png", encoded_png(number)), (f"{number}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    sound = content.getvalue().rstrip(b"\0") + b"\0" * 1024
    file = tmp_path / "x.tar"
    file.write_bytes(sound)
    heads = [place for place in range(0, len(sound), 512) if sound[place + 257 : place + 262] == b"ustar"]

    def mutate(draw: random.Random) -> bytes:
        changed = bytearray(mutated_bytes(sound, draw) if draw.random() < 0.4 else sound)
        head = draw.choice(heads)  # most bytes are pixels: damage what is read as names, sizes and kinds too
        if len(changed) < head + 512:
            return bytes(changed)
        for _ in range(draw.randrange(3)):
            place = draw.choice((0, 1, 100, 124, 128, 135, 148, 156, 257, 345))
            changed[head + place : head + place + 4] = draw.choice(
                (b"../a", b"/etc", b"7777", b"\x80\xff\xff\xff", b"LKxg", b"\0\0\0\0", b"-111")
            )
        if draw.random() < 0.8:  # with a checksum that fits
            block = changed[head : head + 512]
            block[148:156] = b" " * 8
            changed[head + 148 : head + 156] = f"{sum(block):06o}\0 ".encode()
        return bytes(changed)

    fuzz(mutate, file, lambda: read_source(file))


def test_parquet_images(fuzz: Fuzz, tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    table = pa.table({"image": [encoded_png(0), encoded_png(1)], "label": [0, 1], "id": [4, 5]})
    pq.write_table(table, file, compression="none")
    sound = file.read_bytes()
    fuzz(lambda draw: mutated_parquet(sound, draw), file, lambda: read_source(file))


def test_paddle_weights(fuzz: Fuzz, tmp_path: Path) -> None:
    content = {
        "stem.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "stem.bias": np.zeros(2, np.float64),
        "StructuredToParameterName@@": {"stem.weight": "w_0"},
        "part@@.0": np.arange(3, dtype=np.float32),
        "part@@.1": np.arange(3, dtype=np.float32),
        "UnpackBigParamInfor@@": {"part": {"OriginShape": (2, 3), "slices": ["part@@.0", "part@@.1"]}},
    }
    file = tmp_path / "w.pdparams"
    sound = [pickle.dumps(content, protocol=protocol) for protocol in (2, 4)]
    file.write_bytes(sound[0])
    fuzz(lambda draw: mutated_bytes(draw.choice(sound), draw), file, lambda: read_paddle_weights(file))


def test_detectors_of_other_projects(fuzz: Fuzz, tmp_path: Path) -> None:
    """A file of detectron2's model zoo, and a checkpoint of mmdetection with its records."""
    arrays = {
        "proposal_generator.x.weight": np.ones((2, 3), np.float32),
        "n": np.array(3),
        "backbone.bottom_up.y": np.zeros(2),
    }
    zoo, checkpoint = tmp_path / "w.pkl", tmp_path / "w.pth"
    sound = [pickle.dumps({"model": arrays, "__author__": "zoo"}, protocol=protocol) for protocol in (2, 4)]
    zoo.write_bytes(sound[0])
    fuzz(lambda draw: mutated_bytes(draw.choice(sound), draw), zoo, lambda: read_foreign(zoo))
    torch.save({"meta": {"config": "x", "CLASSES": ("a",)}, "state_dict": {"neck.x.weight": torch.ones(2)}}, checkpoint)
    whole = checkpoint.read_bytes()
    fuzz(lambda draw: mutated_bytes(whole, draw), checkpoint, lambda: read_foreign(checkpoint))


def test_model_files(fuzz: Fuzz, tmp_path: Path) -> None:
    """The header of a safetensors file, and the metadata in it."""
    file = tmp_path / "d.safetensors"
    facts = {
        "kind": "detector",
        "arch": "test_resnet",
        "class_names": ["cat", "dog"],
        "category_ids": [1, 2],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "model": DetectorConfig().model_dump(mode="json"),
        "resize": ResizeConfig().model_dump(mode="json"),
    }
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2, 2)}
    save_model_file(file, tensors, facts)
    sound = file.read_bytes()
    length = int.from_bytes(sound[:8], "little")
    header, data = json.loads(sound[8 : 8 + length]), sound[8 + length :]
    metadata = json.loads(header["__metadata__"]["ssld"])
    changed_metadata, changed_header = as_json(metadata), as_json(header)

    def mutate(draw: random.Random) -> bytes:
        if draw.random() < 0.2:
            return mutated_bytes(sound, draw)
        if draw.random() < 0.25:
            text = changed_header(draw)
        else:
            inner = {"format": "pt", "ssld": changed_metadata(draw).decode("utf-8", "replace")}
            text = json.dumps(header | {"__metadata__": inner}).encode()
        return len(text).to_bytes(8, "little") + text + data

    def read() -> None:
        read_shapes(file)
        read_tensors(file)
        read_metadata(file)
        inspect_text(file)

    fuzz(mutate, file, read)
