"""Strict settings: YAML first, flags on top, nothing else; mistakes are one line with the nearest known name."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field, model_validator

from ssld.shared.config.settings import (
    CommandConfig,
    Config,
    differences,
    dump,
    dump_yaml,
    identity,
    parse_config,
    settings_parser,
)
from ssld.shared.config.yaml_files import merge, read_yaml
from ssld.shared.errors import UserError


class Group(Config):
    """A group."""

    rate: float = Field(0.1, gt=0)
    names: list[str] = []


class Inner(Config):
    """An item of a list."""

    path: Path


class Settings(CommandConfig):
    """Settings of a test."""

    steps: int = 5
    kind: Literal["plain", "fancy"] = "plain"
    group: Group = Group()
    maybe: Group | None = None
    items: list[Inner] = []
    workers: int = 2


def parse(tmp_path: Path, text: str | None, *flags: str) -> Settings:
    config: list[str] = []
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
        config = ["--config", str(tmp_path / "c.yaml")]
    return parse_config(Settings, [*config, *flags], program="test.py")


def refused(tmp_path: Path, text: str | None, *flags: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(tmp_path, text, *flags)
    return str(caught.value).replace(str(tmp_path / "c.yaml"), "FILE")


def test_flags_lie_on_top_of_yaml(tmp_path: Path) -> None:
    text = "output: out\nsteps: 7\ngroup: {rate: 1e-4, names: [a, b]}\nmaybe: {rate: 2}\n"
    config = parse(tmp_path, text, "--group.rate", "0.5", "--maybe.names", "x,y")
    assert config.steps == 7
    assert config.group == Group(rate=0.5, names=["a", "b"])
    assert config.maybe == Group(rate=2, names=["x", "y"])
    assert parse(tmp_path, text).group.rate == 1e-4  # which PyYAML reads as text
    assert parse(tmp_path, text, "--maybe", "null").maybe is None
    assert parse(tmp_path, None, "--output", "o", "--steps=3").steps == 3


def test_environment_is_not_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STEPS", "steps", "GROUP__RATE", "SSLD_STEPS"):
        monkeypatch.setenv(name, "99")
    (tmp_path / ".env").write_text("steps=99\n")
    monkeypatch.chdir(tmp_path)
    assert parse(tmp_path, "output: o\n").steps == 5


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("output: o\nstep: 3\n", (), "FILE: step: unknown key; did you mean 'steps'?"),
        ("output: o\ngroup: {rte: 3}\n", (), "FILE: group.rte: unknown key; did you mean 'rate'?"),
        ("output: o\nmaybe: {rte: 3}\n", (), "FILE: maybe.rte: unknown key; did you mean 'rate'?"),
        ("output: o\nitems: [{path: a, pth: b}]\n", (), "FILE: items.0.pth: unknown key; did you mean 'path'?"),
        (
            "output: o\ngroup.rate: 3\n",
            (),
            "FILE: group.rate: unknown key; in a YAML file groups are nested: group: {rate: 3}",
        ),
        ("output: o\nzebra.rate: 3\n", (), "FILE: zebra.rate: unknown key; known: group, items, kind, maybe"),
        ("output: o\nzebra: 3\n", (), "FILE: zebra: unknown key; known: group, items, kind, maybe, output, steps,"),
        ("steps: 3\n", (), "FILE: output: missing; give it in the YAML file or as --output"),
        ("output: o\ngroup: {rate: 0}\n", (), "FILE: group.rate: has to be above 0 (given: 0)"),
        ("output: o\nsteps: many\n", (), "FILE: steps: has to be a whole number"),
        ("output: o\nkind: fany\n", (), "FILE: kind: has to be 'plain' or 'fancy' (given: \"fany\")"),
        ("output: o\nsteps: 1\nsteps: 2\n", (), "FILE, line 3: key 'steps' is given twice"),
        ("output: o\ngroup: {rate: 1, rate: 2}\n", (), "FILE, line 2: key 'rate' is given twice"),
        ("output: [\n", (), "FILE: not valid YAML:"),
        ("output: o\n? [a]\n: 1\n", (), "FILE, line 2: a key has to be one word, not a list or a map of them"),
        ("output: o\n? {a: 1}\n: 1\n", (), "FILE, line 2: a key has to be one word"),
        ("output: o\n1: 2\n", (), "FILE: 1: a key has to be text; put it in quotes"),
        ("output: o\nnull: 2\n", (), "FILE: null: a key has to be text; put it in quotes"),
        ("output: o\ngroup: {yes: 2}\n", (), "FILE: group.true: a key has to be text; put it in quotes"),
        ("output: o\nitems: [{1.5: 2}]\n", (), "FILE: items.0.1.5: a key has to be text; put it in quotes"),
        (f"output: {'[' * 20000}\n", (), "FILE, line 1: nested more than 50 levels deep"),
        ("output: &a [*a]\n", (), "FILE: holds more than 200,000 values, through its aliases (*NAME)"),
        ("output: 2020-13-45\n", (), "FILE, line 1: '2020-13-45' is no timestamp; put it in quotes where it is text"),
        ("output: o\nsteps: !!int x\n", (), "FILE, line 2: 'x' is no int; put it in quotes where it is text"),
        ("output: !!map [1]\n", (), "FILE, line 1: a list or map is no map"),
        ("output: 010\n", (), "FILE, line 1: 010 is 8 to YAML; write 8, or put it in quotes where it is text"),
        ("output: o\nsteps: 1_000\n", (), "FILE, line 2: 1_000 is 1000 to YAML; write 1000,"),
        ("output: o\nsteps: 1:30\n", (), "FILE, line 2: 1:30 is 90 to YAML; write 90,"),
        ("output: o\nsteps: 0x10\n", (), "FILE, line 2: 0x10 is 16 to YAML; write 16,"),
        ("output: o\nsteps: !!python/object:os.system x\n", (), "FILE: not valid YAML: could not determine"),
        ("output: o\ngroup: {rate: .inf}\n", (), "FILE: group.rate: has to be a finite number (given: Infinity)"),
        ("output: o\ngroup: {rate: .nan}\n", (), "FILE: group.rate: has to be"),
        ("output: o\n", ("--group.rate", "inf"), "command line: group.rate: has to be a finite number"),
        ("output: o\n", ("--steps", "9" * 5000), "command line: steps: is too large a number"),
        ("output: o\n", ("--rate", "1"), "--rate: unknown flag; did you mean '--group.rate'?"),
        ("- output\n", (), "FILE: expected a mapping at the top level, found list"),
        ("output: o\n", ("--stepz", "3"), "--stepz: unknown flag; did you mean '--steps'?"),
        ("output: o\n", ("--group.rat=3",), "--group.rat: unknown flag; did you mean '--group.rate'?"),
        ("output: o\n", ("--steps",), "expected one argument"),
        ("output: o\n", ("--steps", "x"), "steps: has to be a whole number"),
        ("output: o\n", ("--group.names", "null"), "group.names: has to be a list; [] is an empty one (given: null)"),
        (None, ("--config", "gone.yaml"), "gone.yaml: No such file or directory"),
    ],
)
def test_mistakes(text: str | None, flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    line = refused(tmp_path, text, *flags)
    assert message in line
    assert "\n" not in line


def test_misspelt_flags_are_reported_together(tmp_path: Path) -> None:
    assert refused(tmp_path, "output: o\n", "--stepz", "3", "--group.rat=--x", "--steps", "1").splitlines() == [
        "--stepz: unknown flag; did you mean '--steps'?",
        "--group.rat: unknown flag; did you mean '--group.rate'?",
    ]


def test_a_file_of_aliases_does_not_grow_out_of_proportion(tmp_path: Path) -> None:
    """Nine aliases of nine aliases ..., a billion values in a few lines."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for one, before in zip("bcdefghi", "abcdefgh", strict=True):
        lines.append(f"{one}: &{one} [{', '.join([f'*{before}'] * 9)}]")
    message = refused(tmp_path, "\n".join([*lines, "items: *i", ""]))
    assert message == "FILE: holds more than 200,000 values, through its aliases (*NAME)"


def test_merge_keys_are_yaml(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\nc: [*a, *a]\n")
    assert read_yaml(tmp_path / "m.yaml")["b"] == {"x": 1, "y": 3}
    (tmp_path / "m.yaml").write_text("b:\n  <<: 3\n")
    with pytest.raises(UserError, match="expected a mapping or list of mappings for merging"):
        read_yaml(tmp_path / "m.yaml")


def test_a_group_given_as_one_flag_names_the_flag_of_its_key(tmp_path: Path) -> None:
    from ssld.stage1_ssld.config import DistillConfig

    message = "--data: is a group or list of settings: give --data.train VALUE, or the whole as JSON"
    with pytest.raises(UserError) as raised:
        parse_config(DistillConfig, ["--data", "photos"], program="distill.py")
    assert str(raised.value) == message


def test_what_a_group_needs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bare command prints its usage, and a missing group is reported by the settings that it needs."""
    from ssld.stage2_detect.config import TrainConfig

    with pytest.raises(UserError) as caught:
        parse_config(TrainConfig, [], program="ssld train")
    lines = str(caught.value).splitlines()
    assert "command line: data: missing; give it in the YAML file or as --data" in lines
    assert "command line: optim: missing; give it in the YAML file or as --optim.lr, --optim.reference_batch" in lines
    assert "command line: output: missing; give it in the YAML file or as --output" in lines
    usage = capsys.readouterr().err
    assert usage.startswith("usage: ssld train [--config FILE] [--KEY VALUE ...]\n")
    assert "--optim.lr float" in usage
    assert "--workers" not in usage


def test_every_mistake_has_its_line(tmp_path: Path) -> None:
    lines = refused(tmp_path, "output: o\nstep: 3\ngroup: {rate: -1}\n").splitlines()
    assert len(lines) == 2


def test_print_config_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(tmp_path, "output: o\nitems: [{path: a}]\n", "--steps", "9", "--print-config")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert parse(tmp_path, printed) == parse(tmp_path, "output: o\nitems: [{path: a}]\nsteps: 9\n")


def test_settings_are_frozen_and_dump_back(tmp_path: Path) -> None:
    config = parse(tmp_path, "output: o\n")
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3  # type: ignore[misc]
    assert dump(Settings(**yaml.safe_load(dump_yaml(config)))) == dump(config)
    assert config.recipe == tmp_path / "c.yaml"


def test_identity_leaves_out_where_and_how_fast(tmp_path: Path) -> None:
    a = identity(parse(tmp_path, "output: o\n"))
    b = identity(parse(tmp_path, "output: p\nworkers: 7\nthreads: 3\n"))
    assert a == b
    assert "steps" in a
    c = identity(parse(tmp_path, "output: o\nmaybe: {rate: 3}\ngroup: {rate: 2}\n"))
    assert list(differences(a, c)) == [("group.rate", 0.1, 2.0), ("maybe", None, {"rate": 3.0, "names": []})]


def test_groups_in_a_list_differ_one_by_one() -> None:
    old = {"pool": [{"path": "a", "weight": None}, {"path": "b"}], "sizes": [1, 2], "train": [{"path": "c"}]}
    new = {
        "pool": [{"weight": None, "path": "a"}, {"path": "d"}],
        "sizes": [1, 3],
        "train": [{"path": "c"}, {"path": "e"}],
    }
    expected = [("pool.1.path", "b", "d"), ("sizes", [1, 2], [1, 3]), ("train", old["train"], new["train"])]
    assert list(differences(old, new)) == expected


def test_merge_goes_group_by_group() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merge(base, {"a": {"y": [3]}, "c": 2}) == {"a": {"x": 1, "y": [3]}, "b": 1, "c": 2}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merge({"a": None}, {"a": {"x": 1}}) == {"a": {"x": 1}}


def test_empty_yaml_is_no_settings(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "e.yaml") == {}


@pytest.mark.process
def test_config_modules_do_not_import_torch() -> None:
    code = "import sys; import ssld.stage1_ssld.config, ssld.shared.run_dir, ssld.shared.config.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        (2, "model.rpn.anchor_sizes", "8,16,32,64"),
        (2, "model.rpn.anchor_sizes.0", "0,16,32,64,128"),
        (2, "model.rpn.anchor_ratios", "[]"),
        (2, "model.rpn.anchor_ratios.1", "1,-2"),
        (2, "model.rpn.positive_iou", "1.1"),
        (2, "model.rpn.negative_iou", "0"),
        (2, "model.rpn.positive_fraction", "1.5"),
        (2, "model.rpn.nms_iou", "0"),
        (2, "model.rpn.pre_nms_top_n_train", "0"),
        (2, "model.rpn.post_nms_top_n_train", "0"),
        (2, "model.rpn.pre_nms_top_n_test", "-1"),
        (2, "model.rpn.post_nms_top_n_test", "0"),
        (2, "model.roi.positive_iou", "0"),
        (2, "model.roi.positive_fraction", "-0.1"),
        (2, "model.roi.hidden", "0"),
        (2, "model.roi.score_threshold", "1"),
        (2, "model.roi.nms.iou", "2"),
        (2, "model.roi.detections_per_image", "0"),
        (2, "resize.train_short_sides.1", "48,31"),
        (2, "optim.backbone_lr_factors.0", "-1,1,1,1,1"),
        (1, "data.crop_area", "0.5,0.2"),
        (1, "data.crop_area.0", "0,1"),
        (1, "data.crop_area.1", "0.5,1.5"),
        (1, "data.crop_ratio", "2,1"),
        (1, "data.crop_ratio.0", "-1,1"),
    ],
)
def test_nonsense_is_refused_by_its_key(stage: int, key: str, value: str) -> None:
    from ssld.stage1_ssld.config import TeachConfig
    from ssld.stage2_detect.config import TrainConfig

    common = "--output o --steps 1 --batch_size 1 --optim.lr 1 --optim.reference_batch 1"
    stages: dict[int, tuple[type[CommandConfig], str]] = {
        1: (TeachConfig, "--model.model random:x --data.train x"),
        2: (TrainConfig, "--backbone random:x --data.train_annotations a --data.train_images i"),
    }
    config_type, needed = stages[stage]
    argv = [*common.split(), *needed.split()]
    parse_config(config_type, argv, program="test.py")
    flag = key.rstrip("0123456789").rstrip(".")
    with pytest.raises(UserError, match=rf"command line: {re.escape(key)}: ") as caught:
        parse_config(config_type, [*argv, f"--{flag}={value}"], program="test.py")
    assert "\n" not in str(caught.value)


class _Recipe(CommandConfig):
    alternatives = (("steps", "epochs"), ("group.names", "group.rate"))
    maybe: list[int] | None = None
    steps: int | None = None
    epochs: int | None = None
    group: Group = Group()
    model: dict[str, int] = {}
    sides: list[int] = []


def test_a_recipe_lies_on_its_bases(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text("output: o\nepochs: 12\nmodel: {depth: 1, width: 2}\nsides: [1, 2]\n")
    (tmp_path / "sub" / "b.yaml").write_text("base: ../a.yaml\nmodel: {width: 3}\n")
    (tmp_path / "sub" / "c.yaml").write_text("base: b.yaml\nsteps: 5\nsides: [3]\n")
    config = parse_config(_Recipe, ["--config", str(tmp_path / "sub" / "c.yaml")], program="test.py")
    assert dump(config) == dump(_Recipe(output=Path("o"), steps=5, model={"depth": 1, "width": 3}, sides=[3]))
    flags = ["--config", str(tmp_path / "sub" / "b.yaml"), "--steps", "7"]
    assert parse_config(_Recipe, flags, program="test.py").epochs is None
    assert parse_config(_Recipe, [*flags[:-1], "null"], program="test.py").epochs == 12  # nothing in its place

    (tmp_path / "h.yaml").write_text("output: o\ngroup: {rate: 0.7}\nmaybe: [1]\n")
    (tmp_path / "i.yaml").write_text("base: h.yaml\ngroup: {names: [a]}\n")
    config = parse_config(_Recipe, ["--config", str(tmp_path / "i.yaml")], program="test.py")
    assert config.group == Group(rate=0.1, names=["a"])
    flags = ["--config", str(tmp_path / "h.yaml"), "--steps", "7"]
    assert parse_config(_Recipe, flags, program="test.py").group.rate == 0.7
    assert parse_config(_Recipe, flags, program="test.py").maybe == [1]
    assert parse_config(_Recipe, [*flags, "--maybe", "2,3"], program="test.py").maybe == [2, 3]
    assert parse_config(_Recipe, [*flags, "--maybe", "null"], program="test.py").maybe is None
    assert parse_config(_Recipe, [*flags, "--group.names", "b"], program="test.py").group == Group(names=["b"])

    (tmp_path / "sub" / "d.yaml").write_text("base: c.yaml\n")
    with pytest.raises(UserError, match=r"b.yaml: base: ../a.yaml: a chain of more than two bases"):
        parse_config(_Recipe, ["--config", str(tmp_path / "sub" / "d.yaml")], program="test.py")
    (tmp_path / "e.yaml").write_text("base: f.yaml\n")
    with pytest.raises(UserError, match=r"f.yaml: No such file"):
        parse_config(_Recipe, ["--config", str(tmp_path / "e.yaml")], program="test.py")
    (tmp_path / "g.yaml").write_text("base: [a.yaml]\n")
    with pytest.raises(UserError, match=r"g.yaml: base: expected the name of a YAML file"):
        parse_config(_Recipe, ["--config", str(tmp_path / "g.yaml")], program="test.py")


class Both(Config):
    """A group of two settings that go together, and one that it needs."""

    needed: str
    one: int | None = None
    two: int | None = None

    @model_validator(mode="after")
    def _both(self) -> "Both":
        if (self.one is None) != (self.two is None):
            raise ValueError("give one and two, or neither")
        return self


class Paired(CommandConfig):
    """Settings that have to go together."""

    pair: Both | None = None

    steps: int | None = None
    epochs: float | None = None
    group: Group = Group()

    @model_validator(mode="after")
    def _one_length(self) -> "Paired":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give one of steps and epochs")
        return self


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("output: o\nsteps: 3\n", ("--steps", "x"), "command line: steps: has to be a whole number"),
        ("output: o\nsteps: 3\n", ("--epochs", "2"), "command line: give one of steps and epochs"),
        ("output: o\nsteps: 3\nepochs: 2\n", (), "FILE: give one of steps and epochs"),
        ("output: o\nsteps: 3\nepochs: 2\n", ("--group.rate", "2"), "FILE: give one of steps and epochs"),
        ("steps: 3\nepochs: 2\n", ("--output", "o"), "FILE: give one of steps and epochs"),
        ("output: o\nsteps: 3\n", ("--group.rate", "-1"), "command line: group.rate: has to be above 0"),
        ("output: o\nsteps: 3\ngroup: {rate: -1}\n", ("--group.names", "a"), "FILE: group.rate: has to be above"),
        (
            "output: o\nsteps: 3\ngroup: {rate: -1}\n",
            ("--group.rate", "-1"),
            "command line: group.rate: has to be above",
        ),
        ("steps: 3\n", ("--group.rate", "2"), "FILE: output: missing"),
        # what flags bring into a group that the file lacks altogether, or has in part
        ("output: o\nsteps: 3\n", ("--pair.needed", "n", "--pair.one", "1"), "command line: pair: give one and two"),
        ("output: o\nsteps: 3\npair: {one: 1}\n", ("--pair.needed", "n"), "FILE: pair: give one and two"),
        ("output: o\nsteps: 3\npair: {needed: n}\n", ("--pair.one", "1"), "command line: pair: give one and two"),
    ],
)
def test_who_is_to_blame(text: str, flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """A fault is the command line's where the file alone is sound, and the file's where flags do not touch it."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        parse_config(Paired, ["--config", str(tmp_path / "c.yaml"), *flags], program="test.py")
    line = str(caught.value).replace(str(tmp_path / "c.yaml"), "FILE")
    assert line.startswith(message)
    assert "\n" not in line


class _Inner(Config):
    on: bool = False


class _Switches(CommandConfig):
    loud: bool = False
    maybe: bool | None = None
    name: str = ""
    inner: _Inner = _Inner()


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        (["--loud"], {"loud": True}),
        (["--loud", "--name", "x"], {"loud": True, "name": "x"}),
        (["--loud", "false", "--maybe"], {"loud": False, "maybe": True}),
        (["--loud=false", "--inner.on"], {"loud": False, "inner": {"on": True}}),
    ],
)
def test_a_switch_may_stand_alone(flags: list[str], values: dict[str, Any]) -> None:
    config = parse_config(_Switches, ["--output", "o", *flags], program="test.py")
    assert {key: dump(config)[key] for key in values} == values


def test_a_value_is_missing_elsewhere() -> None:
    with pytest.raises(UserError, match="expected one argument"):
        parse_config(_Switches, ["--output", "o", "--name", "--loud"], program="test.py")


def test_a_recipe_is_found_by_its_name_in_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file of the current folder comes first; a name that is neither is refused with the nearest one."""
    recipes = tmp_path / "shipped"
    recipes.mkdir()
    (recipes / "small_net.yaml").write_text("workers: 3\n")
    (recipes / "large_net.yaml").write_text("base: small_net.yaml\nsteps: 7\n")
    monkeypatch.setattr(Settings, "recipes", recipes)
    monkeypatch.chdir(tmp_path)
    config = parse_config(Settings, ["--config", "large_net", "--output", "x"], program="run.py")
    assert (config.workers, config.steps, config.recipe) == (3, 7, recipes / "large_net.yaml")
    (tmp_path / "large_net").write_text("steps: 9\n")
    assert parse_config(Settings, ["--config", "large_net", "--output", "x"], program="run.py").steps == 9
    for name, message in (
        ("smal_net", "smal_net: no such file, and no recipe of this name; did you mean 'small_net'?"),
        ("zebra", "zebra: no such file, and no recipe of this name; known: large_net, small_net"),
        ("small_net.yaml", "small_net.yaml: no such file; did you mean 'small_net'?"),
        ("other/zebra.yaml", "other/zebra.yaml: No such file or directory"),
    ):
        with pytest.raises(UserError) as error:
            parse_config(Settings, ["--config", name, "--output", "x"], program="run.py")
        assert str(error.value) == message
    for kind, text in ((Settings, "name of a shipped recipe"), (CommandConfig, "YAML file with settings")):
        assert text in " ".join(settings_parser(kind, "run.py").format_help().split())
