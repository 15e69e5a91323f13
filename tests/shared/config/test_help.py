"""`--help`: what a run needs comes first, everything is somewhere, nothing twice."""

import re
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from ssld.pipelines.runner.stages import KINDS
from ssld.shared.config.help import choices_of, flags_of, models_in, settings_help
from ssld.shared.config.settings import CommandConfig, settings_parser
from ssld.shared.errors import UserError
from ssld.stage1_ssld.config import DistillConfig
from ssld.stage2_detect.config import EvaluateConfig, TrainConfig
from ssld.stage2_detect.train import main


def flags_in(text: str) -> list[str]:
    return re.findall(r"^  (?:-h \[GROUP\], )?--([\w.-]+)", text, re.M)


@pytest.mark.parametrize("config_type", [TrainConfig, DistillConfig, EvaluateConfig])
def test_help_all_has_every_key_once(config_type: type[CommandConfig]) -> None:
    shown = flags_in(settings_help(settings_parser(config_type, "x"), config_type, "all"))

    def leaves(model: object, prefix: str = "") -> set[str]:
        found: set[str] = set()
        for name, value in model.items() if isinstance(model, dict) else ():
            inner = value.get("$ref") or next(
                (one.get("$ref") for one in value.get("anyOf", []) if "$ref" in one), None
            )
            nested = schema["$defs"][inner.rsplit("/", 1)[1]] if inner else {}
            found |= leaves(nested["properties"], f"{prefix}{name}.") if "properties" in nested else {prefix + name}
        return found

    schema = config_type.model_json_schema()
    assert set(shown) == leaves(schema["properties"]) | {"help", "config", "print-config"}
    assert len(shown) == len(set(shown))


def test_what_a_run_needs_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = settings_help(settings_parser(TrainConfig, "train.py"), TrainConfig)
    order = flags_in(text)
    needed = [
        "data.train_annotations",
        "data.train_images",
        "output",
        "batch_size",
        "optim.lr",
        "optim.reference_batch",
    ]
    assert order[:6] == needed  # distill.teacher is required only where there is distill
    assert order.index("backbone") < order.index("steps") < order.index("seed")
    assert "model.roi.samples_per_image" not in order
    assert re.search(r"^  model +\d+ settings  The detector's architecture; stored in its file$", text, re.M)
    assert len(text.splitlines()) < 90
    assert "default: null" not in text


def test_every_setting_says_what_it_is() -> None:
    def nameless(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
        if model in seen:
            return
        seen.add(model)
        for name, field in model.model_fields.items():
            groups = models_in(field.annotation)
            if not groups and not field.description:
                yield f"{model.__name__}.{name}"
            for group in groups:
                yield from nameless(group, seen)

    seen: set[type[BaseModel]] = set()
    assert [name for kind in KINDS.values() for name in nameless(kind.config_type, seen)] == []
    assert len(seen) > 30


def test_help_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help", "model.rpn"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(flag.startswith("model.rpn.") for flag in flags_in(out))
    assert len(flags_in(out)) == 12
    with pytest.raises(UserError, match="--help modle: no such group of settings; did you mean 'model'"):
        settings_help(settings_parser(TrainConfig, "x"), TrainConfig, "modle")
    with pytest.raises(UserError, match=r"--help rpn: no such group of settings; did you mean 'model\.rpn'"):
        settings_help(settings_parser(TrainConfig, "x"), TrainConfig, "rpn")
    with pytest.raises(UserError, match="--help zebra: no such group of settings; groups: data, distill"):
        settings_help(settings_parser(TrainConfig, "x"), TrainConfig, "zebra")


def test_choices() -> None:
    actions = dict(flags_of(settings_parser(TrainConfig, "x")))
    assert choices_of(actions["model.rpn.sampling"]) == ["random", "first"]
    assert choices_of(actions["precision"]) == ["auto", "fp32", "bf16", "fp16"]
    assert choices_of(actions["trackers"]) == ["tensorboard", "wandb", "mlflow"]
    assert choices_of(actions["steps"]) == []
