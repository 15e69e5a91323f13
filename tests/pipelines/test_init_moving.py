"""`ssld init --moving_teacher yes`: a detector that learns from the unlabeled photos too, beside the same one without them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ssld.pipelines import init, run
from ssld.pipelines.runner.estimate import read_rates
from ssld.pipelines.scaffold import fit, pool
from ssld.shared.config.settings import identity
from ssld.shared.config.yaml_files import flatten
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.data.unlabeled_images import LabeledImages, unlabeled_images
from tests.pipelines import test_init as base

LINE = ["--images", "photos", "--annotations", "all.json", "--output", "deep/mine.yaml", "--unlabeled", "more photos"]
YES = [*LINE, "--moving_teacher", "yes"]
photos = base.photos
Output = pytest.CaptureFixture[str]


def configs() -> dict[str, Any]:
    return base.stages_of("deep/mine.yaml")


def differences(first: TrainConfig, second: TrainConfig) -> dict[str, tuple[Any, Any]]:
    one, other = (dict(flatten(identity(config))) for config in (first, second))
    return {key: (one.get(key), other.get(key)) for key in one | other if one.get(key) != other.get(key)}


def test_both_detectors_differ_in_the_teacher_alone(photos: Path, capfd: Output) -> None:
    """The run reads the list that is written, from any folder: without the copies of annotated photos."""
    (photos / "more photos" / "copy.png").write_bytes((photos / "photos" / "5.png").read_bytes())
    assert init.main(YES) == 0
    out = capfd.readouterr().out
    assert "1 photo dropped: 1 copies of training photos (first: copy.png)" in out
    assert "--moving_teacher yes" not in out
    assert (
        f"under a moving teacher takes about {fit.MOVING:g} times as long as the same one without it; a trial tells whether"
        in out
    )
    content = yaml.safe_load(Path("deep/mine.yaml").read_text())
    assert list(content["stages"]) == [
        *("detector_imagenet", "detector_moving", "ap_imagenet", "ap_moving", "predictions", "report")
    ]
    rows = {"moving teacher": {"detector": "ap_moving"}, "ImageNet": {"detector": "ap_imagenet"}}
    assert content["table"] == {"rows": rows, "gain": ["moving teacher", "ImageNet"]}
    built = configs()
    plain, moving = built["detector_imagenet"], built["detector_moving"]
    changed = differences(plain, moving)
    given = {key: value for key, value in changed.items() if not key.startswith("moving_teacher")}
    assert given == {"batch_size": (2, 4), "optim.reference_batch": (8, 16)}
    ratios = [one.batch_size / one.optim.reference_batch for one in (plain, moving)]  # scale the learning rate
    assert ratios[0] == ratios[1]
    assert moving.batch_size * moving.labeled_share == plain.batch_size
    assert str(built["ap_moving"].compare) == "runs/ap_imagenet/detections.json"
    (source,) = moving.moving_teacher.sources
    listed = moving.moving_teacher.model_copy(update={"unlabeled": Path("deep") / source})
    found = unlabeled_images("moving_teacher.unlabeled", listed.sources, LabeledImages([], []))
    assert [Path(one.path) for one in found.records] == [photos / "more photos" / f"{n}.png" for n in range(3)]
    assert {path.name for path in Path("deep").iterdir() if path.suffix == ".txt"} == {
        "mine_moving.txt",
        "mine_shown.txt",
    }
    for flags in ([], ["--smoke"]):
        assert run.main(["deep/mine.yaml", "--dry-run", *flags]) == 0, capfd.readouterr().err
    assert "--moving_teacher.burn_in 1" in capfd.readouterr().out


def test_the_time_has_the_steps_of_the_teacher(photos: Path, capfd: Output) -> None:
    """2.2 times those of the other detector, kept for dry runs."""
    assert init.main(YES) == 0
    steps = sorted(rate.step for rate in read_rates(Path("deep/runs/mine")).values() if rate.step)
    assert steps == [pytest.approx(0.001), pytest.approx(0.0022)]
    capfd.readouterr()
    assert run.main(["deep/mine.yaml", "--dry-run"]) == 0
    assert "unknown" not in capfd.readouterr().out.partition("runs/mine: ")[2]


def test_beside_stage_1_without_its_held_out_photos(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: Output
) -> None:
    monkeypatch.setattr(pool, "SMALLEST_POOL", 20)
    monkeypatch.setattr(pool, "LEAST_HELD_OUT", 4)
    draw = np.random.default_rng(1)
    for number in range(3, 30):
        pixels = draw.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / "more photos" / f"{number}.png")
    assert init.main([*YES, "--distill", "yes"]) == 0
    stages = yaml.safe_load(Path("deep/mine.yaml").read_text())["stages"]
    assert [name for name in stages if name.startswith(("ssld", "detector"))] == [
        *("ssld", "detector_imagenet", "detector_ssld", "detector_moving")
    ]
    assert stages["detector_moving"]["like"] == "detector_ssld"  # the gains of stage 1 and of the moving teacher add up
    assert "backbone" not in stages["detector_moving"]["set"]
    assert stages["ap_moving"]["set"]["compare"] == "${ap_ssld}/detections.json"
    lists = {
        part: {Path(line).name for line in Path(f"deep/mine_{part}.txt").read_text().splitlines()}
        for part in ("unlabeled", "held_out", "moving")
    }
    assert len(lists["held_out"]) == 4
    assert lists["moving"] == lists["unlabeled"]
    assert run.main(["deep/mine.yaml", "--dry-run"]) == 0, capfd.readouterr().err
    assert init.main([*YES, "--output", "deep/other.yaml"]) == 0
    assert len(Path("deep/other_moving.txt").read_text().splitlines()) == 30  # without stage 1 nothing is held out
    # Nor from a student without weights, which learns features.
    assert init.main([*YES, "--backbone", "random:resnet18", "--output", "deep/new.yaml"]) == 0
    new = {part: Path(f"deep/new_{part}.txt").read_text().splitlines() for part in ("unlabeled", "moving")}
    assert len(new["moving"]) == len(new["unlabeled"]) == 30


def test_without_the_flag_a_line_says_how(photos: Path, capfd: Output) -> None:
    assert init.main(LINE) == 0
    assert "detector_moving" not in Path("deep/mine.yaml").read_text()
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "--moving_teacher yes" in line]
    assert (
        "on blood cells it gained 3 AP with 10 labeled photos, nothing with 41 (docs/benchmarks/few_labels_cpu_2026-12-01.md)"
        in line
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([*YES[:6], *YES[8:]], "--moving_teacher yes: give --unlabeled too, a folder of photos without boxes"),
        (YES[4:], "--moving_teacher: is about detectors; give --data, or --images and --annotations, too"),
        (
            [*YES, "--backbone", "random:resnet18", "--distill", "no"],
            "--moving_teacher yes: 3 unlabeled photos, and a step uses 4; give more photos",
        ),
    ],
)
def test_mistakes_are_one_line(line: list[str], message: str, photos: Path, capfd: Output) -> None:
    assert init.main(line) == 2
    assert capfd.readouterr().err == f"error: {message}\n"
    assert not Path("deep").exists()
