"""Every published recipe: loads, resolves to the published settings, and trains two steps of each of its stages at tiny size."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

from ssld.pipelines.runner.stages import Stage, build_stages, read_pipeline
from ssld.shared.config.settings import dump
from ssld.shared.training.optim import scale_lr
from ssld.stage1_ssld.config import DistillConfig, TeachConfig
from ssld.stage1_ssld.distill import main as distill
from ssld.stage1_ssld.teach import main as teach

FOLDER = Path(__file__).resolve().parents[2] / "pipelines" / "recipes"
IMAGENET, UNION = 1_281_167, 5_000_000
# stage: (images of a pass, passes, batch, lr at that batch, weight decay, whether norm and bias decay, warm-up passes).
# Source: the table of SSLD's phases (PaddleClas@d178931f, docs on distillation), and the headers for what is ours.
PHASES: dict[str, dict[str, tuple[int, float, int, float, float, bool, float]]] = {
    "ssld_resnet50d": {
        "phase1": (UNION, 360, 1024, 0.4, 7e-5, True, 5),
        "phase2": (IMAGENET, 60, 1024, 0.004, 7e-5, True, 5),
        "fix": (IMAGENET, 10, 512, 0.001, 7e-5, True, 0),
    },
    "ssld_resnet101d": {
        "phase1": (UNION, 360, 1024, 0.4, 7e-5, True, 5),
        "phase2": (IMAGENET, 30, 1024, 0.004, 7e-5, True, 5),
    },
    "ssld_resnet34d": {
        "phase1": (UNION, 360, 1024, 0.4, 7e-5, True, 5),
        "phase2": (IMAGENET, 30, 1024, 0.004, 7e-5, True, 5),
    },
    "ssld_mobilenetv3_large": {
        "phase1": (UNION, 360, 5760, 3.65625, 1e-5, False, 5),
        "phase2": (IMAGENET, 30, 2048, 0.008, 1e-5, False, 5),
    },
    "ssld_mobilenetv3_small": {
        "phase1": (UNION, 360, 5760, 3.65625, 1e-5, False, 5),
        "phase2": (IMAGENET, 30, 6400, 0.025, 1e-5, False, 5),
    },
    "ssld_mobilenetv1": {
        "phase1": (UNION, 360, 4096, 1.6, 3e-5, True, 5),
        "phase2": (IMAGENET, 30, 4096, 0.016, 3e-5, True, 5),
    },
    "ssld_mobilenetv2": {
        "phase1": (UNION, 360, 3072, 0.54, 1e-5, True, 5),
        "phase2": (IMAGENET, 30, 3072, 0.0054, 1e-5, True, 5),
    },
    "ssld_hgnetv2_b4": {
        "phase1": (UNION, 360, 1024, 0.5, 2e-5, True, 5),
        "phase2": (IMAGENET, 60, 1024, 0.005, 2e-5, True, 5),
    },
    "ssld_lcnet_100": {"phase1": (IMAGENET, 200, 1024, 0.4, 1e-5, False, 5)},
    "ssld_convnext_atto": {
        "phase1": (UNION, 120, 4096, 4e-3, 0.05, False, 5),
        "phase2": (IMAGENET, 30, 4096, 4e-5, 0.05, False, 5),
    },
    "funmatch_resnet50": {"student": (IMAGENET, 1200, 4096, 3e-3, 0.03, True, 1500 * 4096 / IMAGENET)},
    "skl_ugi_lcnet": {
        "teacher": (IMAGENET, 20, 256, 0.01, 4e-5, True, 5),
        "student": (UNION, 60, 256, 0.01, 4e-5, False, 5),
    },
}
STUDENTS = {
    "ssld_resnet50d": "resnet50d",
    "ssld_resnet101d": "resnet101d",
    "ssld_resnet34d": "resnet34d",
    "ssld_mobilenetv3_large": "mobilenetv3_large_100",
    "ssld_mobilenetv3_small": "mobilenetv3_small_100",
    "ssld_mobilenetv1": "mobilenetv1_100",
    "ssld_mobilenetv2": "mobilenetv2_100",
    "ssld_hgnetv2_b4": "hgnetv2_b4",
    "ssld_lcnet_100": "lcnet_100",
    "ssld_convnext_atto": "convnext_atto",
    "funmatch_resnet50": "resnetv2_50x1_bit",
    "skl_ugi_lcnet": "lcnet_100",
}
# Students of the same classes with fewer layers, to train; the others are small themselves.
SMALLER = {
    "resnet50d": "resnet10t",
    "resnet101d": "resnet10t",
    "resnet34d": "resnet10t",
    "hgnetv2_b4": "hgnetv2_b0",
}


def stages_of(name: str, output: Path, **variables: str) -> list[Stage]:
    file = FOLDER / f"{name}.yaml"
    pipeline = read_pipeline(file)
    defaults = dict.fromkeys(("imagenet", "images", "selected", "unlabeled"), "somewhere")
    given = {key: value for key, value in (defaults | variables).items() if key in pipeline.variables}
    return build_stages(pipeline, file, output=output, variables=given)


def test_every_recipe_is_in_the_table() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(PHASES) == set(STUDENTS)


@pytest.mark.parametrize("name", PHASES)
def test_resolves_to_the_published_settings(name: str, tmp_path: Path) -> None:
    stages = {stage.name: stage.config for stage in stages_of(name, tmp_path)}
    assert set(stages) == set(PHASES[name])
    for stage, (images, passes, batch, lr, decay, decay_norm, warmup) in PHASES[name].items():
        config = stages[stage]
        assert isinstance(config, DistillConfig | TeachConfig)
        assert config.batch_size == batch
        assert scale_lr(config.optim.lr, config.optim.reference_batch, batch, config.optim.name) == pytest.approx(lr)
        assert config.total_steps(images) == round(passes * images / batch)
        assert config.optim.total_warmup_steps(images, batch, 10**9) == round(warmup * images / batch)
        assert (config.optim.weight_decay, config.optim.decay_norm_and_bias) == (decay, decay_norm)
        if isinstance(config, DistillConfig):
            assert config.hard_label_weight == 0
            assert config.data.val is not None
    # A phase starts from the one before it.
    names = list(PHASES[name])
    for before, after in itertools.pairwise(names):
        config = stages[after]
        if isinstance(config, DistillConfig) and before != "teacher":
            assert config.student.model == str(tmp_path / before / "student.safetensors")


@pytest.mark.parametrize("name", PHASES)
def test_headers_say_what_is_published_and_what_it_costs(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    header = text[: text.index("output:")]
    for word in ("# Published: ", "# Cost: ", "this project has not measured this recipe"):
        assert word in header


@pytest.mark.parametrize("name", PHASES)
def test_weights_to_start_from_exist_under_the_licence_that_is_named(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if re.match(r"  \w+: timm:", line)]
    assert lines
    for line in lines:
        reference, _, comment = line.partition("timm:")[2].partition(" #")
        settings = timm.get_pretrained_cfg(reference, allow_unregistered=False)
        assert settings is not None, reference
        assert settings.has_weights
        assert settings.license == "apache-2.0"
        if line.startswith("  teacher: "):
            assert comment.startswith(" Apache-2.0")
    if "CC-BY-NC-4.0" in text:
        published = timm.get_pretrained_cfg("resnext101_32x16d.fb_wsl_ig1b_ft_in1k")
        assert published
        assert published.license == "cc-by-nc-4.0"


@pytest.mark.slow
@pytest.mark.parametrize("name", PHASES)
def test_two_steps_of_every_stage(
    name: str, tmp_path: Path, tiny: Any, teacher_file: Path, call: Callable[..., int]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train").symlink_to(tiny.train)
    (tmp_path / "images" / "val").symlink_to(tiny.val)
    student = f"random:{STUDENTS[name]}"
    variables = {
        "imagenet": str(tmp_path / "images"),
        "images": str(tmp_path / "images"),
        "selected": str(tiny.unlabeled),
        "unlabeled": str(tiny.unlabeled),
        "teacher": str(teacher_file),
        "teacher_start": "random:test_resnet",
        "student_start": student,
    }
    for stage in stages_of(name, tmp_path / "runs", **variables):
        values = dump(stage.config)
        if stage.name in ("phase1", "student"):
            assert values["student"]["model"] == student
            values["student"]["model"] = f"random:{SMALLER.get(STUDENTS[name], STUDENTS[name])}"
        values |= {"steps": 2, "train_epochs": None, "batch_size": 4, "workers": 0, "threads": 1, "device": "cpu"}
        values |= {"precision": "fp32", "evaluate_every": None, "log_every": 1}
        values["data"] |= {"image_size": 48 if stage.name == "fix" else 32, "val": None}
        values["optim"] |= {"warmup_epochs": None, "warmup_steps": 1}
        if values.get("teacher"):
            values["teacher"] |= {"size": None, "check_images": 0}
        file = tmp_path / f"{stage.name}.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        main = teach if isinstance(stage.config, TeachConfig) else distill
        assert call(main, ["--config", str(file)]) == 0
        result = json.loads((stage.run / "result.json").read_text())
        assert result["metrics"] == {"steps": 2, "images_seen": 8}
