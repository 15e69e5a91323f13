"""Sentences on how the compared rows were made: student, teacher, starting weights, images seen and image size. Does not import torch.

A separate module because it reads the settings of runs, which neither the table nor the page needs otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssld.pipelines.config import RowConfig, TableConfig
from ssld.shared.config.settings import NOT_IDENTITY
from ssld.shared.config.yaml_files import read_yaml
from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.run_dir import read_metrics, read_result
from ssld.shared.wording import count
from ssld.stage2_detect.config import PREFIX
from ssld.stage2_detect.model_config import KIND_NAMES

_LAST_GOOD = "detector_last_good.safetensors"  # left by a training whose moving teacher collapsed


@dataclass(frozen=True)
class Start:
    """Weights that a detector starts from: a few words, and the full path if they are a file that no stage here has made."""

    text: str
    path: str | None = None


def compared(table: TableConfig, runs: Path) -> str | None:
    """Say what the rows compare: the detector, and the start of each row; None if no row's training is known.

    What all detectors share, such as images seen and image size, is said once.
    """
    trainings = {
        name: training for name, row in table.rows.items() if (training := _training(row.detector, runs)) is not None
    }
    shared = set.intersection(*(set(facts) for _, facts in trainings.values())) if trainings else set()
    clauses = []
    for name, row in table.rows.items():
        if name in trainings:
            start, facts = trainings[name]
            clauses.append(f"{name}: {_with_facts(start, [fact for fact in facts if fact not in shared])}")
        elif text := origin(row, runs):
            clauses.append(f"{name}: {text}")
    if not clauses:
        return None
    facts = [fact for fact in next(iter(trainings.values()))[1] if fact in shared] if trainings else []
    starts = len({start for start, _ in trainings.values()})
    detector = f"a detector from {count(starts, 'start')}" if trainings else ""
    if starts == 1 < len(trainings):
        detector = f"{count(len(trainings), 'detector')} from the same start"
    backbones = count(len(clauses), "backbone") if not trainings else ""
    return f"Compared: {', '.join([detector or backbones, *facts])}. {'. '.join(clauses)}."


def alone(table: TableConfig, runs: Path) -> tuple[str, str] | None:
    """Say what the AP of a table with one detector is of, and how to compare it; None for other tables, and while its AP is not measured.

    Returns:
        a sentence on the detector, its photos and that nothing was compared; the lines that compare it.
    """
    rows = [row for row in table.rows.values() if row.detector]
    if len(rows) != 1 or table.gain is not None:
        return None
    run, settings = _detector_settings(rows[0].detector, runs)
    training = _training(rows[0].detector, runs)
    if run is None or training is None or "AP" not in _metrics(runs / rows[0].detector[0]):
        return None
    start, facts = training
    of_training = images_read(run, "data.train") if _setting(settings, "data", "keep_empty") is not False else None
    seen = _metrics(run).get("images_seen")
    if of_training and isinstance(seen, int):
        facts = [fact for fact in facts if not fact.endswith(" seen")]
        facts.append(f"{seen / of_training:.3g} passes over {count(of_training, 'photo')}")
    stage = runs / rows[0].detector[0]
    evaluated = images_read(stage, "annotations") or images_read(stage, "data.val")
    facts += [f"evaluated on {count(evaluated, 'photo')}"] if evaluated else []
    like = f"with like: {run.name}, " if run.is_relative_to(runs) else ""
    return (
        f"One detector, from {start}: {', '.join(facts)}. Nothing was compared.",
        "To compare it with one whose backbone stage 1 has trained: ssld init --unlabeled DIR --distill yes. "
        f"With one of other settings: a second stage {like}its evaluation, and gain in the table.",
    )


def images_read(run: Path, place: str) -> int | None:
    """Return the number of images that a run has read from the sources whose setting begins with `place`; None if it is not recorded."""
    try:
        read = (read_result(run) or {})["read"]
        return sum(int(tally["image"]["kept"]) for key, tally in read.items() if key.startswith(place)) or None
    except (*MALFORMED, UserError):
        return None


def _metrics(run: Path) -> dict[str, Any]:
    """Return the metrics of a run; empty if they are missing or damaged."""
    try:
        metrics = (read_result(run) or {}).get("metrics")
    except (*MALFORMED, UserError):
        return {}
    return metrics if isinstance(metrics, dict) else {}


def origin(row: RowConfig, runs: Path) -> str | None:
    """Describe the training of a row's backbone and detector from their run directories; None if neither is known.

    A detector row may name a training or an evaluation; the training of an evaluated file is looked up beside the file.
    """
    training = _training(row.detector, runs)
    if training is not None:
        return _with_facts(*training)
    run = _first(row.classifier, runs)
    return _backbone(run, runs) if run else None


def start(row: RowConfig, runs: Path) -> Start | None:
    """Name the weights that a row's detector starts from, and its moving teacher, if it has one; None if unknown."""
    run, settings = _detector_settings(row.detector, runs)
    weights = _start(settings, runs)
    if weights is None or run is None or not settings.get("moving_teacher"):
        return weights
    return Start(f"{weights.text}, {_moving(run)}", weights.path)


def brought(better: RowConfig, base: RowConfig, runs: Path) -> str | None:
    """Name what a row's detector had and the other one had not: stage 1, unlabeled photos, or both.

    None if neither, or if other settings differ too, so that nothing could be said about these alone.
    """
    (run, settings), (_, base_settings) = (_detector_settings(row.detector, runs) for row in (better, base))
    moving, base_moving = (one.get("moving_teacher") for one in (settings, base_settings))
    alike = moving == base_moving
    if run is None or _compared_settings(settings, alike) != _compared_settings(base_settings, alike):
        return None
    if not alike and base_moving:
        return None
    parts = []
    distilled, base_distilled = (_distilled(one.get("backbone"), runs) for one in (settings, base_settings))
    if _first_weights(settings, runs) != _first_weights(base_settings, runs):
        return None
    if distilled and base_distilled is False:
        parts.append("the teacher's soft labels in stage 1, in place of labels,")
    elif distilled and not base_distilled:
        parts.append(_stage_1(Path(settings["backbone"]).parent))
    elif settings.get("backbone") != base_settings.get("backbone"):
        return None
    if not alike:
        unlabeled = images_read(run, "moving_teacher.unlabeled")
        photos = count(unlabeled, "unlabeled photo") if unlabeled else "the unlabeled photos"
        blind = " that found no object in them" if _found_nothing(run) else ""
        parts.append(f"{photos} under a moving teacher{blind}")
    return " and ".join(parts) or None


def _stage_1(run: Path) -> str:
    """Name a distillation by its photos: a run shorter than a pass has seen a part of them."""
    photos, seen = images_read(run, "data.train"), _metrics(run).get("images_seen")
    if photos is None:
        return "stage 1"
    part = f"{seen:,} of " if isinstance(seen, int) and seen < photos else ""
    return f"stage 1 on {part}{count(photos, 'photo')}"


def _start(settings: dict[str, Any], runs: Path) -> Start | None:
    backbone, init = settings.get("backbone"), settings.get("init")
    published = _published(init)
    if isinstance(init, str) and not published:
        return Start("detector file", init)
    if not isinstance(backbone, str):
        return Start(f"COCO weights ({published})") if published else None
    kind, _, name = backbone.partition(":")
    if (distilled := _distilled(backbone, runs)) is not None:
        own = Start("stage 1" if distilled else "stage 1, trained on labels")
    elif kind in ("random", "timm") and name:
        own = Start(backbone if published else "random weights" if kind == "random" else "pretrained weights")
    else:
        own = Start(_short(backbone, runs), backbone)
    return Start(f"body of {own.text} under COCO weights", own.path) if published else own


def _published(init: Any) -> str | None:
    """Return the name of the published detector that `init` is; None for a file, and for none."""
    return init.removeprefix(PREFIX) if isinstance(init, str) and init.startswith(PREFIX) else None


def _with_facts(start: str, facts: Sequence[str]) -> str:
    """Join a detector's initial weights and its own facts; a start that stage 1 has made has commas and numbers of its own."""
    return ("; the detector: " if "," in start and facts else ", " * bool(facts)).join([start, ", ".join(facts)])


def _first(stages: Sequence[str], runs: Path) -> Path | None:
    """Return the run directory of the first of several seeds."""
    return runs / stages[0] if stages else None


def _backbone(run: Path, runs: Path) -> str | None:
    """Describe the training of a backbone."""
    settings = _settings(run)
    student = _text(settings, "student", "model")
    model = student or _text(settings, "model", "model")
    if model is None:
        return None
    teacher = _text(settings, "teacher", "model")
    labels = settings.get("objective") == "labels" or teacher is None
    how = "trained on labels" if labels else f"distilled from {_short(teacher, runs)}"
    facts = [
        f"{'student' if student else 'network'} {_short(model, runs)} {how}",
        *_extent(run, settings, "data", "image_size"),
    ]
    return ", ".join(facts)


def _training(stages: Sequence[str], runs: Path) -> tuple[str, list[str]] | None:
    """Return (initial weights, [kind of detector, images seen, image size]) of a row's detector, in words; None if unknown."""
    run, settings = _detector_settings(stages, runs)
    backbone, init = settings.get("backbone"), settings.get("init")
    if run is None or not (isinstance(backbone, str) or isinstance(init, str)):
        return None
    kind = _text(settings, "model", "kind")
    teacher = _text(settings, "distill", "teacher")
    facts = [KIND_NAMES.get(kind, kind)] if kind else []
    facts += [f"distilled from {_short(teacher, runs)}"] if teacher else []
    facts += [_moving(run)] if settings.get("moving_teacher") else []
    facts += _extent(run, settings, "resize", "short_side")
    published = _published(init)
    if isinstance(init, str) and not published:
        return f"the detector file {_short(init, runs)}", facts
    if not published:
        return (_described(backbone, runs), facts) if isinstance(backbone, str) else None
    if not isinstance(backbone, str):
        return f"COCO weights ({published})", facts
    made_by = _made_by(backbone, runs)
    training = _backbone(made_by, runs) if made_by else None
    body = _short(backbone, runs) + (f" ({training})" if training else "")
    return f"body of {body} under COCO weights ({published})", facts


def _moving(run: Path) -> str:
    """Describe the moving teacher of a training."""
    unlabeled = images_read(run, "moving_teacher.unlabeled")
    words = "moving teacher" + (f", {count(unlabeled, 'unlabeled photo')}" if unlabeled else "")
    return words + (", no object found in them" if unlabeled and _found_nothing(run) else "")


def failed_teachers(table: TableConfig, runs: Path) -> list[str]:
    """Return a line for each row whose moving teacher found no object or collapsed: its score does not tell what unlabeled photos bring."""
    lines = []
    for name, row in table.rows.items():
        run, settings = _detector_settings(row.detector, runs)
        if run is None or not settings.get("moving_teacher"):
            continue
        if _found_nothing(run):
            lines.append(
                f"{name}: its moving teacher found no object in the unlabeled photos, so this row does not show what they bring; "
                "train longer, or with a lower moving_teacher.score_threshold"
            )
        elif (run / _LAST_GOOD).exists() and read_result(run):  # a run that ends without a collapse removes it
            lines.append(
                f"{name}: its moving teacher collapsed in training, so this row does not show what the unlabeled photos bring; {run / _LAST_GOOD} is "
                "from before, and the log of the training says what to set"
            )
    return lines


def _found_nothing(run: Path) -> bool:
    """Return whether no line of a training under a moving teacher has a pseudo-box; False if none tells."""
    try:
        found = [boxes for line in read_metrics(run) if isinstance(boxes := line.get("pseudo_boxes"), int | float)]
    except OSError:
        return False
    return bool(found) and not any(found)


def _distilled(backbone: Any, runs: Path) -> bool | None:
    """Return whether a stage has distilled a backbone from a teacher, or trained it on labels (False); None for other weights."""
    made_by = _made_by(backbone, runs) if isinstance(backbone, str) else None
    if made_by is None:
        return None
    settings = _settings(made_by)
    return settings.get("objective") != "labels" and _text(settings, "teacher", "model") is not None


def _first_weights(settings: dict[str, Any], runs: Path) -> Any:
    """Return the reference that a detector's backbone began with: before the stages of `runs` that trained it, if there are any."""
    backbone, seen = settings.get("backbone"), set()
    while isinstance(backbone, str) and backbone not in seen and (made_by := _made_by(backbone, runs)) is not None:
        seen.add(backbone)
        backbone = _text(_settings(made_by), "student", "model")
    return backbone


def _compared_settings(settings: dict[str, Any], alike: bool) -> dict[str, Any]:
    """Return the settings that stage 1 leaves as they are, and unless both detectors are `alike` in their moving teacher, this one too: its batch
    holds unlabeled photos."""
    changed = {"backbone", "arch", "moving_teacher", *NOT_IDENTITY} | (set() if alike else {"batch_size"})
    kept = {key: value for key, value in settings.items() if key not in changed}
    optim = kept.get("optim")
    if isinstance(optim, dict) and not alike:
        kept["optim"] = {key: value for key, value in optim.items() if key != "reference_batch"}
    return kept


def _described(backbone: str, runs: Path) -> str:
    """Describe the weights of a backbone, and their training if a stage has made them."""
    scheme, _, name = backbone.partition(":")
    if scheme == "random" and name:
        return f"random weights of {name}"
    made_by = _made_by(backbone, runs)
    if made_by is not None and (text := _backbone(made_by, runs)):
        return text
    return (
        f"timm's pretrained weights of {name}" if scheme == "timm" and name else f"weights of {_short(backbone, runs)}"
    )


def _detector_settings(stages: Sequence[str], runs: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the run directory and settings of a training, also of the one whose file an evaluation names."""
    run = _first(stages, runs)
    if run is None:
        return None, {}
    settings = _settings(run)
    if isinstance(file := settings.get("model"), str):  # an evaluation
        run = Path(file).parent
        settings = _settings(run)
    return run, settings


def _made_by(backbone: str, runs: Path) -> Path | None:
    """Return the run directory that a backbone file is in, if it is one of `runs`."""
    folder = Path(backbone).parent
    return folder if folder.is_relative_to(runs) and (folder / "config.yaml").is_file() else None


def _extent(run: Path, settings: dict[str, Any], group: str, key: str) -> list[str]:
    """Return the number of images seen in training (repeats included) and their size, in words."""
    images_seen, side = _metrics(run).get("images_seen"), _setting(settings, group, key)
    words = [f"{count(images_seen, 'image')} seen"] if isinstance(images_seen, int) else []
    return words + ([f"{side} px"] if isinstance(side, int) else [])


def _settings(run: Path) -> dict[str, Any]:
    """Return the settings of a run; empty if they are missing or damaged, which the stage itself reports."""
    try:
        return read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    except (OSError, *MALFORMED, UserError):
        return {}


def _setting(settings: dict[str, Any], group: str, key: str) -> Any:
    return settings[group].get(key) if isinstance(settings.get(group), dict) else None


def _text(settings: dict[str, Any], group: str, key: str) -> str | None:
    value = _setting(settings, group, key)
    return value if isinstance(value, str) else None


def _short(reference: str | None, runs: Path) -> str:
    """Return a file below the folder of runs relative to it, the name of another file, a name with a scheme (`timm:NAME`) unchanged."""
    path = Path(str(reference))
    if path.is_relative_to(runs):
        return path.relative_to(runs).as_posix()
    return str(reference) if ":" in str(reference).partition("/")[0] else path.name
