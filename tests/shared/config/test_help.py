"""`--help`: what a run needs comes first, everything is somewhere, nothing twice."""

import re
import typing
from collections.abc import Iterator, Sequence

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ssld.pipelines.config import PipelineConfig
from ssld.pipelines.runner.stages import KINDS
from ssld.shared.config.annotations import models_in
from ssld.shared.config.help import choices_of, flags_of, settings_help
from ssld.shared.config.settings import CommandConfig, settings_parser
from ssld.shared.errors import UserError
from ssld.stage1_ssld.config import DistillConfig
from ssld.stage1_ssld.data_config import LossConfig, SourceConfig
from ssld.stage2_detect.config import EvaluateConfig, TrainConfig
from ssld.stage2_detect.train import main


def flags_in(text: str) -> list[str]:
    return re.findall(r"^  (?:-h \[GROUP\], )?--([\w.-]+)", text, re.M)


@pytest.mark.parametrize("config_type", [TrainConfig, DistillConfig, EvaluateConfig])
def test_help_all_has_every_key_once(config_type: type[CommandConfig]) -> None:
    listed = flags_in(settings_help(settings_parser(config_type, "x"), config_type, "all"))

    def leaves(model: object, prefix: str = "") -> set[str]:
        keys: set[str] = set()
        for name, value in model.items() if isinstance(model, dict) else ():
            inner = value.get("$ref") or next(
                (one.get("$ref") for one in value.get("anyOf", []) if "$ref" in one), None
            )
            nested = schema["$defs"][inner.rsplit("/", 1)[1]] if inner else {}
            keys |= leaves(nested["properties"], f"{prefix}{name}.") if "properties" in nested else {prefix + name}
        return keys

    schema = config_type.model_json_schema()
    assert set(listed) == leaves(schema["properties"]) | {"help", "config", "print-config"}
    assert len(listed) == len(set(listed))


def test_what_a_run_needs_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = settings_help(settings_parser(TrainConfig, "train.py"), TrainConfig)
    order = flags_in(text)
    needed = ["output", "batch_size", "optim.lr", "optim.reference_batch"]
    assert order[:4] == needed  # distill.teacher is required only where there is distill
    assert order.index("backbone") < order.index("steps") < order.index("seed")
    assert "model.roi.samples_per_image" not in order
    assert re.search(r"^  model +\d+ settings  The detector's architecture; stored in its file$", text, re.M)
    assert len(text.splitlines()) < 115
    assert "default: null" not in text


def settings_of(model: type[BaseModel], visited: set[type[BaseModel]]) -> Iterator[tuple[str, FieldInfo]]:
    """(name, field) of every setting of a class and of the classes in it, each class once."""
    if model in visited:
        return
    visited.add(model)
    for name, field in model.model_fields.items():
        yield f"{model.__module__}.{model.__name__}.{name}", field
        for group in models_in(field.annotation):
            yield from settings_of(group, visited)


def all_settings() -> dict[str, FieldInfo]:
    """Settings of all commands and of pipelines, without those that are only a group of others and have no text of their own."""
    visited: set[type[BaseModel]] = set()
    types = [kind.config_type for kind in KINDS.values()] + [PipelineConfig]
    fields = {name: field for config_type in types for name, field in settings_of(config_type, visited)}
    assert len(visited) > 35
    return {name: field for name, field in fields.items() if field.description or not models_in(field.annotation)}


# A description is read alone, in one line of `--help`: it begins with the noun that the setting is or the verb that it does.
_NO_BEGINNING = re.compile(
    r"(of|to|as|for|in|on|at|by|from|with|between|among|above|below|under|beside"  # prepositions
    r"|where|when|if|how|what|which|whether|who|that|because"  # subordinate clauses
    r"|the same|this|these|those|such|it|its|their|they|another|each|every|any|all|also|both"  # references to other text
    r"|kept|allowed|given|taken|used|found|shown|null|none)\b",  # participles and values without a noun
    re.IGNORECASE,
)
_A_FOR_PER = re.compile(
    r"\b(images?|pictures?|paths?|names?|passes|process(es)?|views?|lines?|boxes|classes|number) an? "
    r"(image|picture|line|step|rank|process|forward|batch|level|class|stage|optimizer|view|epoch)\b"
)


def faults_of_description(text: str, values: Sequence[str] = ()) -> list[str]:
    """Rules of descriptions that a text breaks; `values` are the words that the setting takes."""
    first = text.split()[0].rstrip(":,;") if text.split() else ""
    checks = {
        "begins with neither noun nor verb": not first or _NO_BEGINNING.match(text) is not None,
        "begins with one of its values": first in values,
        "'a' for 'per'": _A_FOR_PER.search(text) is not None,
        "ends with a full stop": text.endswith("."),
    }
    return [rule for rule, broken in checks.items() if broken]


def literals_in(annotation: object) -> list[str]:
    """The words of the Literals in an annotation."""
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    return [word for inner in typing.get_args(annotation) for word in literals_in(inner)]


def test_every_description_stands_alone() -> None:
    faults = [
        f"{name} {', '.join(broken)}: {field.description}"
        for name, field in all_settings().items()
        if (broken := faults_of_description(field.description or "", literals_in(field.annotation)))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("text", "values", "rule"),
    [
        ("", [], "neither"),
        ("of the forward pass; losses and boxes stay fp32", [], "neither"),
        ("the same in steps", [], "neither"),
        ("That softens the distances", [], "neither"),
        ("kept an image", [], "neither"),
        ("to the image", [], "neither"),
        ("at most; no more than a tenth of the run", [], "neither"),
        ("as in the paper", [], "neither"),
        ("for the evaluation", [], "neither"),
        ("in pixels", [], "neither"),
        ("where the images are", [], "neither"),
        ("how far the student is from the teacher", [], "neither"),
        ("What is weighted", [], "neither"),
        ("null: 0.5", [], "neither"),
        ("auto takes a CUDA GPU", ["auto", "cpu"], "one of its values"),
        ("onnx: detector.onnx", ["onnx", "torch"], "one of its values"),
        ("number of images a step and process", [], "'a' for 'per'"),
        ("text file with a class name a line", [], "'a' for 'per'"),
        ("learning rate.", [], "full stop"),
    ],
)
def test_bad_descriptions_are_refused(text: str, values: list[str], rule: str) -> None:
    assert [rule in broken for broken in faults_of_description(text, values)] == [True]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("format of the file: onnx or torch", ["onnx", "torch"]),
        ("images per step and rank", []),
        ("offset in pixels", []),  # begins like of
        ("total steps", []),  # begins like to
        ("assignment of anchors", []),  # begins like as
        ("interpolation of an image", []),  # begins like in
        ("side of a view in pixels", []),
        ("IoU from which an anchor is positive", []),
        (".pdparams file", []),
    ],
)
def test_good_descriptions_are_accepted(text: str, values: list[str]) -> None:
    assert faults_of_description(text, values) == []


def test_help_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help", "model.rpn"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(flag.startswith("model.rpn.") for flag in flags_in(out))
    assert len(flags_in(out)) == 19
    with pytest.raises(UserError, match="--help modle: no such group of settings; did you mean 'model'"):
        settings_help(settings_parser(TrainConfig, "x"), TrainConfig, "modle")
    with pytest.raises(UserError, match=r"--help rpn: no such group of settings; did you mean 'model\.rpn'"):
        settings_help(settings_parser(TrainConfig, "x"), TrainConfig, "rpn")
    with pytest.raises(UserError, match="--help zebra: no such group of settings; groups: data, distill"):
        settings_help(settings_parser(TrainConfig, "x"), TrainConfig, "zebra")


def test_help_of_a_list_of_groups_has_the_keys_of_an_element(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    parser = settings_parser(DistillConfig, "x")
    for group in ("losses", "all"):
        text = settings_help(parser, DistillConfig, group)
        section = text.partition("keys of one element of losses:\n")[2].partition("\n\n")[0]
        assert re.findall(r"^  (\w+) ", section, re.M) == list(LossConfig.model_fields)
        assert "symmetric_kl, kl, soft_cross_entropy" in section
        assert "(default: [symmetric_kl])" in " ".join(text.split())
    sources = settings_help(parser, DistillConfig, "data.train")
    assert re.findall(r"^  (\w+) ", sources, re.M) == list(SourceConfig.model_fields)
    usual = settings_help(parser, DistillConfig)
    assert "(default: [symmetric_kl])" in " ".join(usual.split())
    assert "keys of one element" not in usual
    assert "LossConfig(" not in usual


def test_choices() -> None:
    actions = dict(flags_of(settings_parser(TrainConfig, "x")))
    assert choices_of(actions["model.rpn.sampling"]) == ["random", "first"]
    assert choices_of(actions["precision"]) == ["auto", "fp32", "bf16", "fp16"]
    assert choices_of(actions["trackers"]) == ["tensorboard", "wandb", "mlflow"]
    assert choices_of(actions["steps"]) == []
