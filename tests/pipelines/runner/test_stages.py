"""YAML to checked command lines, and the plan: missing, done, refused and repeated stages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from ssld.pipelines.config import PipelineConfig
from ssld.pipelines.runner.launch import command_line
from ssld.pipelines.runner.plan import make_plan
from ssld.pipelines.runner.stages import (
    KINDS,
    ROOT,
    Stage,
    build_stages,
    find_pipeline,
    followers,
    located,
    own_file,
    read_pipeline,
)
from ssld.shared.config.flag_values import flags
from ssld.shared.config.settings import CommandConfig, Config, identity, parse_config
from ssld.shared.config.yaml_files import flatten
from ssld.shared.errors import UserError
from ssld.stage2_detect.config import TrainConfig


def build(file: Path, **options: Any) -> list[Stage]:
    pipeline = read_pipeline(file)
    return build_stages(pipeline, file, output=pipeline.output, **options)


def error_of(file: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        make_plan(build(file, **options), set())
    return str(error.value)


# ---- flags


class Inner(Config):
    numbers: list[float] = []
    paths: list[Path | dict[str, str]] = []
    note: str | None = "x"
    on: bool = True


class Outer(CommandConfig):
    """Every kind of value."""

    inner: Inner = Inner()
    count: int = 0
    name: str = ""
    lr: float = Field(0.0)


def test_flags_parse_back_to_the_settings() -> None:
    settings = {
        "inner": {"numbers": [1, 2.5], "paths": ["a b", "c"], "note": None, "on": False},
        "count": -3,
        "name": "--odd name",
        "lr": 1e-5,
    }
    config = parse_config(Outer, [*flags(Outer, settings), "--output", "x"], program="p")
    assert config == Outer(output=Path("x"), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("paths", [[], ["with,comma"], ["a", {"path": "b", "labels": "c"}], ["[odd]"]])
def test_lists_that_need_json(paths: list[Any]) -> None:
    config = parse_config(Outer, [*flags(Outer, {"inner.paths": paths}), "--output", "x"], program="p")
    assert json.loads(config.model_dump_json())["inner"]["paths"] == paths


# ---- the YAML file


def test_shipped_pipelines_are_valid() -> None:
    stages = build(ROOT / "pipelines/quickstart.yaml")
    assert [stage.name for stage in stages][:4] == ["data", "teacher", "ssld", "baseline"]
    by_name = {stage.name: stage for stage in stages}
    assert by_name["ap_ssld"].needs == {"data", "detector_ssld", "ap_baseline"}
    assert by_name["ap_baseline"].needs == {"data", "detector_baseline"}
    assert by_name["report"].needs == {stage.name for stage in stages} - {"report"}
    build(ROOT / "pipelines/quickstart.yaml", smoke=True)
    build(ROOT / "pipelines/real_small.yaml", variables={"data": "somewhere"})
    build(ROOT / "pipelines/real_small.yaml", variables={"data": "somewhere"}, smoke=True)


def test_seeds_repeat_a_stage_and_the_stages_that_read_from_it(
    write_pipeline: Callable[..., Path], fake_kinds: None
) -> None:
    stages = {
        "data": {"command": "toy_data"},
        "student": {"command": "distill", "seeds": 3, "set": {"source": "${data}/out.txt", "seed": 5}},
        "other": {"like": "student", "set": {"text": "other"}},
        "detector": {"command": "train", "set": {"source": "${student}/out.txt"}},
        "ap": {"command": "evaluate_detector", "set": {"source": "${detector}/out.txt", "text": "${other}/out.txt"}},
    }
    table = {"rows": {"a": {"classifier": "student", "detector": "ap"}, "b": {"classifier": ["other", "other_2"]}}}
    file = write_pipeline(stages, table=table)
    pipeline = read_pipeline(file)
    built = {stage.name: stage for stage in build_stages(pipeline, file, output=Path("runs"))}
    names = ["student", "other", "detector", "ap"]
    assert list(built) == ["data", *(f"{name}{number}" for name in names for number in ("", "_1", "_2"))]
    for number, copy in enumerate(("", "_1", "_2")):
        student, detector, ap = (vars(built[f"{name}{copy}"].config) for name in ("student", "detector", "ap"))
        assert (student["seed"], detector["seed"]) == (5 + number, 0)
        assert detector["source"] == Path(f"runs/student{copy}/out.txt")
        assert ap["text"] == f"runs/other{copy}/out.txt"
        assert built[f"ap{copy}"].needs == {f"detector{copy}", f"other{copy}"}
        assert built[f"student{copy}"].needs == {"data"}
    assert pipeline.table is not None
    assert pipeline.table.rows["a"].classifier == ("student", "student_1", "student_2")
    assert pipeline.table.rows["a"].detector == ("ap", "ap_1", "ap_2")
    assert pipeline.table.rows["b"].classifier == ("other", "other_2")
    assert PipelineConfig.model_validate(pipeline.model_dump(mode="json")) == pipeline  # as a report reads the record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_1": {"command": "distill"}}, "stages.student.seeds: student_1 is the name of another stage"),
        *(
            ({"student": {"command": "distill", "seeds": seeds}, "two": {"command": "distill", "seeds": 2}}, message)
            for seeds, message in (
                (given, f"stages.student.seeds: expected a whole number from 1 to 10 (given: {word})")
                for given, word in ((11, "11"), (0, "0"), (True, "true"), ("3", '"3"'), (None, "null"), (2.0, "2.0"))
            )
        ),
        ({"student": {"command": "distill", "seeds": 2, "set": None}}, "stages.student.set: "),
        ({"student": {"command": "distill", "seeds": 2, "set": ["x"]}}, "stages.student.set: "),
        ({"student": {"command": "distill", "seeds": 2, "set": {"seed": True}}}, "a stage with seeds needs a number"),
        ({"two": {"command": "distill", "like": ["x"]}}, "stages.two.like: ['x']: no earlier stage of this name"),
        (
            {"student": {"command": "distill", "seeds": 2, "config": "${x}/a.yaml"}},
            "stages.student.set.seed: missing; a stage with seeds and the config ${x}/a.yaml needs its first seed here",
        ),
        ({"student": {"command": "distill", "seeds": 2, "set": {"seed": "${x}"}}}, "a stage with seeds needs a number"),
        (
            {
                "two": {"command": "distill", "seeds": 2},
                "both": {"command": "train", "set": {"source": "${student}${two}"}},
            },
            "stages.both: reads from stages with different seeds (student 3, two 2, its own 1)",
        ),
    ],
)
def test_mistakes_in_seeds_are_named(
    change: dict[str, Any], message: str, write_pipeline: Callable[..., Path], fake_kinds: None
) -> None:
    stages = {"student": {"command": "distill", "seeds": 3}, **change}
    with pytest.raises(UserError) as caught:
        read_pipeline(write_pipeline(stages))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_seeds_count_from_the_seed_of_the_config_file(
    write_pipeline: Callable[..., Path], fake_kinds: None, tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text("seed: 42\n", encoding="utf-8")
    file = tmp_path / "settings.yaml"
    file.write_text("base: base.yaml\ntext: x\n", encoding="utf-8")
    stages = {
        "a": {"command": "distill", "seeds": 2, "config": str(file)},
        "b": {"like": "a", "set": {"seed": 7}},
        "c": {"command": "distill", "seeds": 2},
    }
    pipeline = read_pipeline(write_pipeline(stages))
    seeds = {name: stage.set["seed"] for name, stage in pipeline.stages.items()}
    assert seeds == {"a": 42, "a_1": 43, "b": 7, "b_1": 8, "c": 0, "c_1": 1}
    file.write_text("seed: x\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"stages.a.config: .*settings.yaml: seed: 'x': a stage with seeds needs"):
        read_pipeline(write_pipeline(stages))


def test_students_of_the_distillation_pipeline_differ_in_what_teaches_them() -> None:
    by_name = {stage.name: stage for stage in build(ROOT / "pipelines/detector_distillation.yaml")}
    students = ("alone", "distilled", "with_unlabeled")
    names = [f"{student}{seed}" for student in students for seed in ("", "_1", "_2")]
    settings = {name: dict(flatten(identity(by_name[name].config))) for name in names}

    def changed(one: str, other: str) -> set[str]:
        pair = settings[one], settings[other]
        return {key for key in pair[0] | pair[1] if pair[0].get(key) != pair[1].get(key)}

    assert {key.split(".")[0] for key in changed("alone", "distilled")} == {"distill"}
    assert changed("distilled", "with_unlabeled") == {"unlabeled", "batch_size", "optim.reference_batch"}
    for student in students:
        for seed in (1, 2):
            assert settings[f"{student}_{seed}"] == settings[student] | {"seed": seed}
    assert by_name["with_unlabeled"].needs == {"all_scenes", "few_scenes", "teacher"}


@pytest.mark.parametrize("smoke", [False, True])
def test_rungs_of_the_ladder_differ_in_what_they_are_named_after(smoke: bool) -> None:
    stages = build(ROOT / "pipelines/ssld_ablation.yaml", variables={"data": "somewhere"}, smoke=smoke)
    rungs = {stage.name: stage for stage in stages if stage.kind is KINDS["distill"]}
    settings = {name: dict(flatten(identity(stage.config))) for name, stage in rungs.items()}
    differences = {
        ("hard_and_soft", "kl"): {"hard_label_weight", "losses"},
        ("kl", "symmetric_kl"): {"losses"},
        ("supervised", "symmetric_kl"): {"objective"},
        ("symmetric_kl", "in_class"): {"data.train"},
        ("symmetric_kl", "all_unlabeled"): {"data.train"},
        ("all_unlabeled", "curated"): {"data.train"},
        ("all_unlabeled", "longer"): set() if smoke else {"steps"},
        ("all_unlabeled", "batch_teacher"): {"teacher.batchnorm"},
        ("all_unlabeled", "stored"): {"store"},
    }
    for (one, other), keys in differences.items():
        pair = settings[one], settings[other]
        assert {key for key in pair[0] | pair[1] if pair[0].get(key) != pair[1].get(key)} == keys, (one, other)
    # two more seeds of each
    for name in {rung for pair in differences for rung in pair}:
        for seed in (1, 2):
            assert settings[f"{name}_{seed}"] == settings[name] | {"seed": seed}
    assert len(rungs) == 3 * 10
    assert rungs["stored"].needs == {"teacher", "soft_labels"}
    assert rungs["curated"].needs == {"teacher", "curated_images"}


@pytest.mark.parametrize("name", ["quickstart", "real_small"])
def test_baseline_differs_from_ssld_in_objective_and_sources_only(name: str) -> None:
    variables = {"data": "somewhere"} if name == "real_small" else {}
    by_name = {stage.name: stage for stage in build(ROOT / f"pipelines/{name}.yaml", variables=variables)}
    ssld, baseline = (identity(by_name[stage].config) for stage in ("ssld", "baseline"))
    assert ssld.pop("objective") == "teacher"
    assert baseline.pop("objective") == "labels"
    assert ssld["data"].pop("train")[0] == baseline["data"].pop("train")[0]
    assert ssld == baseline
    # the detectors differ in nothing but the backbone, and every stage of it trains
    detectors = [identity(by_name[f"detector_{row}"].config) for row in ("ssld", "baseline", "random")]
    assert len({detector.pop("backbone") for detector in detectors}) == 3
    assert detectors[0] == detectors[1] == detectors[2]
    assert detectors[0]["model"]["freeze_stages"] == 0
    assert not detectors[0]["model"]["freeze_norm"]
    assert detectors[0]["optim"]["backbone_lr_factors"] == [1.0] * 5


def test_dotted_like_takes_over_settings(fake_kinds: None, write_pipeline: Any) -> None:
    file = write_pipeline(
        {
            "first": {"command": "toy_data", "set": {"text": "a", "steps": 3}},
            "second": {"like": "first", "set": {"text": "b"}},
        }
    )
    first, second = build(file)
    assert (first.config.text, second.config.text) == ("a", "b")  # type: ignore[attr-defined]
    assert second.config.steps == 3  # type: ignore[attr-defined]
    assert second.needs == frozenset()


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (
        {"a": {"comand": "teach"}},
        {},
        ["stages.a.comand: unknown key; did you mean 'command'?", "stages.a.command: missing"],
    ),
    ({"a": {"command": "teech"}}, {}, ["stages.a.command", "'teach'"]),
    ({"a": {"like": "b"}, "b": {"command": "teach"}}, {}, ["stages.a.like: b: no earlier stage"]),
    ({"a": {"command": "teach"}}, {"outptu": 1}, ["outptu: unknown key; did you mean 'output'?"]),
    (
        {"a": {"command": "teach"}},
        {"table": {"rows": {"x": {"classifier": "aa"}}}},
        ["table.rows.x.classifier: aa: no such stage; did you mean 'a'?"],
    ),
    ({"a": {"command": "teach"}}, {"table": {"rows": {"x": {}}, "gain": ["x", "y"]}}, ["table.gain: y: no such row"]),
    ({"a": {"command": "teach", "set": {"stps": 2}}}, {}, ["stage a: --stps: unknown flag; did you mean '--steps'?"]),
    ({"a": {"command": "teach", "set": {"steps": 0}}}, {}, ["stage a: ", "steps: ", "at least 1"]),
    ({"a": {"command": "teach", "set": {"output": "x"}}}, {}, ["stage a: set.output: not allowed"]),
    ({"a": {"command": "teach", "config": "no.yaml"}}, {}, ["stage a: no.yaml: No such file"]),
    ({"../a": {"command": "teach"}}, {}, ["stage ../a: not a valid name"]),
    ({"logs": {"command": "teach"}}, {}, ["stage logs: not a valid name"]),
    ({"a": {"command": "teach"}}, {"variables": {"a": 1}}, ["stage a: a variable has the same name"]),
    ({"a": {"command": "teach"}}, {"variables": {"output": 1}}, ["variables.output: this name is reserved"]),
    (
        {"a": {"command": "teach"}},
        {"variables": {"dir": None}},
        ["variable dir has no value; give it as --variables.dir"],
    ),
    (
        {"teacher": {"command": "teach"}, "b": {"command": "distill", "set": {"text": "${techer}"}}},
        {},
        ["stage b: ${techer}: no variable and no earlier stage of this name; did you mean 'teacher'?"],
    ),
    ({"a": {"command": "teach", "set": {"text": "${a}"}}}, {}, ["stage a: ${a}: no variable and no earlier stage"]),
]


@pytest.mark.parametrize(("stages", "other", "expected"), MISTAKES)
def test_mistakes_are_named(
    fake_kinds: None, write_pipeline: Any, stages: dict[str, Any], other: dict[str, Any], expected: list[str]
) -> None:
    message = error_of(write_pipeline(stages, **other))
    for part in expected:
        assert part in message


def test_all_mistakes_at_once(fake_kinds: None, write_pipeline: Any) -> None:
    message = error_of(
        write_pipeline({"a": {"command": "teach", "set": {"x": 1}}, "b": {"command": "teach", "set": {"y": 1}}})
    )
    assert [line.split(":")[0] for line in message.splitlines()] == ["stage a", "stage b"]


def test_duplicate_stage_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("output: x\nstages:\n  a: {command: teach}\n  a: {command: teach}\n")
    with pytest.raises(UserError, match=r"line 4: key 'a' is given twice"):
        read_pipeline(file)


def test_variables_reach_numbers_and_paths(fake_kinds: None, write_pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("x")
    file = write_pipeline(
        {"a": {"command": "teach", "set": {"source": "${dir}/in.txt", "steps": "${steps}"}}},
        variables={"dir": None, "steps": 5},
    )
    (stage,) = build(file, variables={"dir": str(tmp_path)})
    assert stage.config.steps == 5  # type: ignore[attr-defined]
    assert stage.config.source == tmp_path / "in.txt"  # type: ignore[attr-defined]


def test_a_setting_given_in_two_ways_is_refused(fake_kinds: None, write_pipeline: Any) -> None:
    file = write_pipeline(
        {"a": {"command": "teach", "set": {"metrics.top1": 1.0, "metrics": {"AP": 2.0, "top1": 3.0}}}}
    )
    with pytest.raises(UserError, match=r"stages\.a\.set: metrics\.top1 is given twice, with dots and in a group"):
        read_pipeline(file)


@pytest.mark.parametrize("text", ["1.10", "no", "yes", "2026-12-01", "1e3", '"010"', "'a # b'"])
def test_variables_are_as_they_are_written(fake_kinds: None, tmp_path: Path, text: str) -> None:
    (tmp_path / "in.txt").touch()
    file = tmp_path / "p.yaml"
    file.write_text(
        f"output: o\nvariables: {{v: {text}, steps: 5, w: ~}}\nstages: {{a: {{command: teach, set: {{text: '${{v}}/x', steps: '${{steps}}'}}}}}}\n"
    )
    (stage,) = build(file, variables={"w": "x"})
    assert stage.config.text == f"{text.strip(chr(34) + chr(39))}/x"  # type: ignore[attr-defined]
    assert stage.config.steps == 5  # type: ignore[attr-defined]


def test_smoke_settings_lie_on_top(fake_kinds: None, write_pipeline: Any) -> None:
    file = write_pipeline({"a": {"command": "teach", "set": {"steps": 5, "text": "t"}}}, smoke={"teach": {"steps": 1}})
    (stage,) = build(file, smoke=True)
    assert stage.config.steps == 1  # type: ignore[attr-defined]
    assert stage.config.text == "t"  # type: ignore[attr-defined]
    assert build(file)[0].config.steps == 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("smoke", "burn_in"),
    [({"train": {"steps": 2}}, 1), ({"train": {"steps": 4, "moving_teacher.burn_in": 3}}, 3), ({}, 500)],
)
def test_a_moving_teacher_begins_in_a_smoke_test(smoke: Any, burn_in: int, write_pipeline: Any) -> None:
    """After one step, where the smoke settings do not say when."""
    own: dict[str, Any] = {"backbone": "random:resnet18", "steps": 900, "batch_size": 4}
    own |= {"data": {"train_annotations": "a.json", "train_images": "a"}, "optim": {"lr": 0.1, "reference_batch": 4}}
    own |= {"moving_teacher": {"unlabeled": "b", "burn_in": 500}}
    file = write_pipeline({"moving": {"command": "train", "set": own}}, smoke=smoke)
    for flag, expected in ((True, burn_in), (False, 500)):
        (stage,) = build(file, smoke=flag)
        assert isinstance(stage.config, TrainConfig)
        assert stage.config.moving_teacher
        assert stage.config.moving_teacher.burn_in == expected


def test_located_falls_back_to_the_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert located("pipelines/quickstart.yaml") == str(ROOT / "pipelines/quickstart.yaml")
    assert located("nowhere.yaml") == "nowhere.yaml"


# ---- dependencies and missing inputs


def test_followers_are_transitive(fake_kinds: None, write_pipeline: Any, chain: dict[str, Any]) -> None:
    stages = build(write_pipeline(chain))
    assert followers(stages, {"teacher"}) == {"teacher", "student", "ap"}
    assert followers(stages, {"data"}) == set(chain)


def test_path_into_a_run_directory_is_a_dependency(fake_kinds: None, write_pipeline: Any, tmp_path: Path) -> None:
    file = write_pipeline(
        {"a": {"command": "teach"}, "b": {"command": "distill", "set": {"source": str(tmp_path / "runs/a/out.txt")}}}
    )
    assert build(file)[1].needs == {"a"}


def test_missing_inputs_are_told_before_anything_runs(fake_kinds: None, write_pipeline: Any) -> None:
    file = write_pipeline(
        {
            "a": {"command": "teach", "set": {"source": "nowhere.txt"}},
            "b": {"command": "distill", "set": {"sources": ["${a}/out.txt", "${a}/other.txt", "nowhere.txt"]}},
        }
    )
    assert error_of(file).splitlines() == [
        "stage a: source: nowhere.txt: no such file or folder",
        f"stage b: sources.1: {file.parent}/runs/a/other.txt: stage a does not write this; it writes out.txt",
    ]


# ---- one process


@pytest.mark.parametrize(
    "command",
    [
        "toy_data",
        "report",
        "convert_backbone",
        "convert_detector",
        "convert_paddle_detector",
        "export_backbone",
        "export_detector",
    ],
)
def test_commands_of_one_process_are_not_launched_as_several(command: str, write_pipeline: Any) -> None:
    message = error_of(write_pipeline({"a": {"command": command, "processes": 2}}))
    assert message == f"stage a: {command} runs as one process; remove processes: 2"


@pytest.mark.parametrize("name", ["detector_distillation", "moving_toy", "sad_toy"])
def test_milestones_of_shipped_pipelines_scale_with_their_steps(name: str, tmp_path: Path) -> None:
    file = find_pipeline(name)
    pipeline = read_pipeline(file)
    for steps in (200, 2000):
        lengths: dict[str, str] = {key: str(steps) for key in ("steps", "teacher_steps") if key in pipeline.variables}
        stages = build_stages(pipeline, file, output=tmp_path, variables=lengths)
        trainings = [stage.config for stage in stages if isinstance(stage.config, TrainConfig)]
        for config in trainings:
            first, second = config.optim.milestones(steps_per_epoch=1, steps=steps)
            assert 0.7 * steps < first < second < 0.95 * steps
        assert trainings


def test_names_of_conversions_are_those_of_the_command_line(write_pipeline: Any) -> None:
    """A pipeline of version 0.2, in which `convert_detector` was PaddlePaddle's, is told the new name."""
    old = {"command": "convert_detector", "config": "faster_rcnn_r50vd_ssld_1x", "set": {"weights": "w.pdparams"}}
    with pytest.raises(UserError, match=r"^stage a: weights: w.pdparams: .* convert_paddle_detector, .*; rename it$"):
        build(write_pipeline({"a": old}))
    (stage,) = build(write_pipeline({"a": old | {"command": "convert_paddle_detector"}}))
    assert command_line(stage)[:2] == ["ssld", "convert-paddle-detector"]
    (stage,) = build(write_pipeline({"a": {"command": "convert_detector", "set": {"weights": "w.pth"}}}))
    assert command_line(stage)[:2] == ["ssld", "convert-detector"]


# ---- files of the project


def test_a_pipeline_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_pipeline("quickstart") == ROOT / "pipelines/quickstart.yaml"
    assert find_pipeline("ssld_lcnet_100") == ROOT / "pipelines/recipes/ssld_lcnet_100.yaml"
    assert find_pipeline("pipelines/quickstart.yaml") == ROOT / "pipelines/quickstart.yaml"
    assert find_pipeline("quickstart.yaml") == Path("quickstart.yaml")  # not there, which reading it tells
    with pytest.raises(
        UserError, match=r"^quickstat: no such file, and no shipped pipeline of this name; did you mean 'quickstart'\?$"
    ):
        find_pipeline("quickstat")
    (tmp_path / "quickstart").mkdir()
    assert find_pipeline("quickstart") == ROOT / "pipelines/quickstart.yaml"
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").write_text("output: x")
    assert find_pipeline("quickstart") == Path("quickstart")
    monkeypatch.chdir(ROOT)
    assert find_pipeline("quickstart") == Path("pipelines/quickstart.yaml")


def test_what_only_has_the_name_of_a_file_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/run.py").write_text("another copy")
    monkeypatch.chdir(tmp_path)
    assert own_file("pipelines/run.py") == str(ROOT / "pipelines/run.py")
    monkeypatch.chdir(ROOT)
    assert own_file("pipelines/run.py") == "pipelines/run.py"
