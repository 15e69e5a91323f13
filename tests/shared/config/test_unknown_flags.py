"""Flags that a command does not have, and words that are none: the line names the flag that was meant."""

import re

import pytest

from ssld.shared.config.help import flags_of
from ssld.shared.config.settings import Parser, parse_config, settings_parser
from ssld.shared.errors import UserError
from ssld.shared.wording import did_you_mean
from ssld.stage1_ssld.config import DistillConfig
from ssld.stage2_detect.config import TrainConfig
from ssld.stage2_detect.predict_config import AuditConfig, PredictConfig


def test_known_names_are_not_cut_short() -> None:
    names = [f"name{number:02d}" for number in range(40)]
    assert did_you_mean("zebra", names) == f"; known: {', '.join(names)}"
    hint = did_you_mean("--zebra", [*(f"--{name}" for name in names), "--group.zigzag_break"])
    assert hint.startswith("; the most similar of 41: --group.zigzag_break, --name")
    assert hint.count(",") < 10
    assert did_you_mean("--lr", ["--help", "--optim.lr"]) == "; did you mean '--optim.lr'?"
    assert did_you_mean("--steps", ["-h", "--help", "--redo"]) == "; known: --help, --redo, -h"  # alike in their dashes
    assert did_you_mean("--outptu", ["-h", "--help", "--output"]) == "; did you mean '--output'?"


def test_a_part_of_a_flag_names_it() -> None:
    flags = ["--optim.warmup_epochs", "--train_epochs", "--output", "--outer_width", "--augment.hue"]
    assert did_you_mean("--epochs", flags) == "; did you mean '--train_epochs'?"
    assert did_you_mean("--out", flags) == "; did you mean '--output'?"
    assert did_you_mean("--warmup", flags) == "; did you mean '--optim.warmup_epochs'?"
    assert "did you mean" not in did_you_mean("--ou", flags)  # too short to tell


def test_names_of_other_programs_lead_to_the_flag() -> None:
    for config_type in (TrainConfig, DistillConfig, PredictConfig, AuditConfig):
        keys = {key for key, _ in flags_of(settings_parser(config_type, "test.py"))}
        for name, key in config_type.other_names.items():
            assert key in keys
            assert name not in keys
            with pytest.raises(UserError, match=rf"--{name}: unknown flag; did you mean '--{re.escape(key)}'\?"):
                parse_config(config_type, [f"--{name}", "1"], program="test.py")
    with pytest.raises(UserError, match=r"--anotations: unknown flag; did you mean '--data.train_annotations'\?"):
        parse_config(TrainConfig, ["--anotations", "boxes.json"], program="test.py")


def test_a_setting_of_a_group_in_a_list_names_the_form_of_the_list() -> None:
    with pytest.raises(UserError) as error:
        parse_config(DistillConfig, ["--data.train", "a", "--data.train.labels", "none"], program="test.py")
    form = """data.train is a list, whose groups are given whole: --data.train '[{"path": ..., "labels": ...}]'"""
    assert str(error.value) == f"--data.train.labels: unknown flag; {form}"


def test_words_without_a_flag_and_numbers_that_are_none() -> None:
    parser = Parser(prog="test.py")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--count", type=int)
    for words, line in (
        (["photos"], "photos: no flag before it; give it as --NAME photos"),
        (
            ["1.jpg", "2.jpg", "3.jpg"],
            "1.jpg and 2 more: no flag before them; a flag takes one value: put a pattern such as '*.jpg' in quotes",
        ),
        (["--minutes", "20m"], "--minutes 20m: has to be a number"),
        (["--count", "2.5"], "--count 2.5: has to be a whole number"),
    ):
        with pytest.raises(UserError) as error:
            parser.parse_args(words)
        assert str(error.value).startswith(line)


def test_a_longer_name_that_begins_alike_is_nearest() -> None:
    assert did_you_mean("samples", ["sampling", "samples_per_image"]) == "; did you mean 'samples_per_image'?"
    assert did_you_mean("sampels", ["sampling", "samples"]) == "; did you mean 'samples'?"
