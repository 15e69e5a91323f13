"""Values of settings arrive as they are, whatever signs are in them: written as flags and read back, or typed."""

import json
import random
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import model_validator

from ssld.shared.config.flag_values import flags, read_value
from ssld.shared.config.settings import CommandConfig, Config, dump, parse_config
from ssld.shared.errors import UserError
from ssld.stage1_ssld.config import DistillConfig
from ssld.stage2_detect.config import EvaluateConfig, TrainConfig

NAMES = [
    *(
        'photos "new"',
        "back\\slash",
        "[old]",
        "[old",
        "{x}",
        "{x",
        "~",
        "~me",
        "a,b",
        "x,",
        "a#b",
        "a: b",
        "a b",
        "a=b",
    ),
    *(
        " lead",
        "trail ",
        '"q"',
        '"q',
        "\\",
        '\\"',
        "\\n",
        "a\tb",
        "Größe (2)",
        "写真",
        "-x",
        "--x",
        "it's",
        "$HOME",
        "*",
        ".",
    ),
    *("2024", "1.10", "1e3", "NaN", "null", "true", "[1]", '["x"]', '{"a": 1}'),
]


class Source(Config):
    """Images in a folder."""

    path: str
    root: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class Group(Config):
    """A group with every kind of value."""

    folder: Path | None = None
    either: Path | list[Path] | None = None
    name: str | None = None
    words: list[str] = []
    paths: list[Path] = []
    sources: list[Source] = []
    source: Source | None = None
    shares: dict[str, float] = {}
    sides: list[int] = []
    levels: list[Literal[4, 8]] = []
    pairs: list[tuple[float, float]] = []
    area: tuple[float, float] = (0.0, 1.0)
    rate: float = 1.0
    on: bool | None = False


class Settings(CommandConfig):
    """Settings of a test."""

    output: Path = Path("o")
    group: Group = Group()


def parsed(*words: str) -> Group:
    return parse_config(Settings, words, program="test.py").group


def there_and_back(values: dict[str, Any]) -> dict[str, Any]:
    return dump(parsed(*flags(Settings, {"group": values})))


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_read_back(name: str) -> None:
    """In every kind of setting, alone and beside others, where no file of this name exists yet."""
    sources = [{"path": name, "root": name}, {"path": "y", "root": None}]
    values: dict[str, Any] = {
        "folder": name,
        "name": name,
        "words": [name, "y"],
        "paths": ["y", name],
        "sources": sources,
    }
    values |= {"source": {"path": "z", "root": name}, "shares": {name: 0.5, f"{name}.y": 0.25}}
    assert there_and_back(values) == dump(Group()) | values
    alone = {"words": [name], "paths": [name], "source": {"path": name, "root": None}}
    assert there_and_back(alone | {"sources": name, "source": name}) == dump(Group()) | alone | {
        "sources": [alone["source"]]
    }
    for either in (name, [name], [name, "y"]):
        read = there_and_back({"either": either})["either"]
        assert read == ([either] if isinstance(either, str) else either)


def test_random_names_are_read_back() -> None:
    signs = random.Random(0)
    for _ in range(60):
        names = ["".join(signs.choices('ab\\"[]{},:# =~.', k=signs.randint(1, 6))) for _ in range(3)]
        values = {"words": names, "shares": dict.fromkeys(names, 0.5), "name": names[0]}
        assert there_and_back(values) == dump(Group()) | values


def test_numbers_switches_and_nothing_are_read_back() -> None:
    values = {"sides": [3, -4], "levels": [8, 4], "pairs": [[1.0, 2.5]], "area": [0.5, 1e-9], "rate": 1e-5, "on": True}
    assert there_and_back(values) == dump(Group()) | values
    nothing: dict[str, Any] = {
        "folder": None,
        "either": None,
        "name": None,
        "source": None,
        "on": None,
        "words": [],
        "shares": {},
    }
    assert there_and_back(nothing) == dump(Group()) | nothing
    assert there_and_back({"paths": [2024, "y"]})["paths"] == ["2024", "y"]  # as YAML reads the name of a folder


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["words", "a,b"], "words", ["a", "b"]),
        (["words", "[a, b]"], "words", ["a", "b"]),
        (["words", '"a,b", c'], "words", ["a,b", "c"]),
        (["words", '["a,b", "c\\"d"]'], "words", ["a,b", 'c"d']),
        (["words", "1,1.10,true"], "words", ["1", "1.10", "true"]),
        (["words", "[]"], "words", []),
        (["words", "a", "words", "b,c"], "words", ["a", "b", "c"]),
        (["either", "a", "either", "b"], "either", ["b"]),
        (["either", "a\\b,c"], "either", ["a\\b", "c"]),
        (["either", "a", "either", "null"], "either", None),
        (["sides", "8,16"], "sides", [8, 16]),
        (["pairs", "[1, 2], [3, 4]"], "pairs", [[1.0, 2.0], [3.0, 4.0]]),
        (["levels", "[4]"], "levels", [4]),
        (["sources", 'a,{"path": "b", "root": "c,d"}'], "sources", [("a", None), ("b", "c,d")]),
        (["shares", "a=0.5, b=0.25"], "shares", {"a": 0.5, "b": 0.25}),
        (["shares", '{"a=b": 0.5}', "shares", "c=1"], "shares", {"a=b": 0.5, "c": 1.0}),
        (["source", "p"], "source", ("p", None)),
        (["source", '{"path": "p"}', "source.root", "r"], "source", ("p", "r")),
        (["name", '"null"'], "name", "null"),
        (["name", "null"], "name", None),
        (["name", '"q'], "name", '"q'),
    ],
)
def test_what_is_typed(words: list[str], key: str, value: Any) -> None:
    pairs = zip(words[::2], words[1::2], strict=True)
    read = dump(parsed(*(word for name, text in pairs for word in (f"--group.{name}", text))))[key]
    as_pair = read and key == "source"
    assert (
        tuple(read.values()) if as_pair else [tuple(s.values()) for s in read] if key == "sources" else read
    ) == value


@pytest.mark.parametrize("name", [name for name in NAMES if name != "."])
def test_a_name_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    group = parsed(f"--group.either={name}", f"--group.sources={name}", f"--group.source.path={name}")
    assert [source.path for source in group.sources] == [name]
    assert group.source is not None
    assert group.source.path == ("./null" if name == "null" else name)
    if name != "null":  # None, where a setting may be that
        assert group.either == [Path(name)]
        words = ["--model", "x", "--output", "o", "--annotations", "y.json", f"--images={name}"]
        assert parse_config(EvaluateConfig, words, program="x").images == Path(name)


def test_nothing_stays_nothing_beside_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline writes `null` for a setting that it switches off, and a mistyped `2>null` leaves such a file."""
    monkeypatch.chdir(tmp_path)
    Path("null").touch()
    nothing = {"folder": None, "either": None, "name": None, "source": None, "on": None}
    assert there_and_back(nothing) == dump(Group()) | nothing
    for either in ("null", ["null"], ["null", "y"]):
        assert there_and_back({"either": either})["either"] == ([either] if isinstance(either, str) else either)
    data = {"train_annotations": "a.json", "train_images": "photos", "val_images": None}
    assert read_value(TrainConfig, "data.val_images", flags(TrainConfig, {"data": data})[-1]) is None


def test_the_caller_says_what_exists() -> None:
    assert read_value(Settings, "group.either", "a,b") == ["a", "b"]
    assert read_value(Settings, "group.either", "a,b", lambda text: text == "a,b") == ["a,b"]


def test_names_of_classes_reach_their_setting() -> None:
    data = {"train_annotations": "a.json", "train_images": "photos"}
    settings = {"output": "o", "steps": 1, "batch_size": 1, "optim": {"lr": 1, "reference_batch": 1}, "data": data}
    teacher = {"unlabeled": "u", "class_thresholds": {"traffic light": 0.5, "No. 5": 0.25}}
    config = parse_config(
        TrainConfig, flags(TrainConfig, settings | {"backbone": "random:x", "moving_teacher": teacher}), program="x"
    )
    assert config.moving_teacher is not None
    assert config.moving_teacher.class_thresholds == {"traffic light": 0.5, "No. 5": 0.25}


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("group", "x", "--group: is a group or list of settings: give --group.KEY VALUE, or the whole as JSON"),
        ("group.words", "[" * 100_000, "command line: a value is nested too deeply"),
        ("group.paths", "[1.5]", "group.paths: has to be a path; put a name like that in quotes (given: [1.5])"),
        ("group.either", "[true]", "group.either: has to be a path; put a name like that in quotes (given: [true])"),
        ("group.shares", "a", "group.shares: "),
        ("group.sides", "8,x", "group.sides.1: has to be a whole number"),
    ],
)
def test_what_is_refused(flag: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(f"--{flag}", text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_text_beside_entries_of_the_same_mapping_is_refused() -> None:
    values = {"moving_teacher": {"class_thresholds": "cat=0.5"}, "moving_teacher.class_thresholds.dog": 0.4}
    with pytest.raises(UserError, match=r"class_thresholds: is the text 'cat=0.5' and has .*\.dog too"):
        flags(TrainConfig, values)


@pytest.mark.parametrize("key", ["folder", "either", "name", "words", "paths", "sources", "source"])
@pytest.mark.parametrize("value", [1.1, False])
def test_a_number_is_no_name(key: str, value: float | bool) -> None:
    """What YAML reads as 1.1 was 1.10 in the file, and false was `no`: as the text of a flag it would be another name."""
    for one in (value, [value], [value, "y"]):
        with pytest.raises(
            UserError, match=rf"^group\.{key}: is {json.dumps(value)} to YAML; put a text like that in quotes"
        ):
            flags(Settings, {"group": {key: one}})


class _Evaluated(CommandConfig):
    val: Source | None = None


def test_a_text_for_a_group_goes_with_settings_of_the_group() -> None:
    """The text was dropped, and `val.path` reported as missing."""
    words = ["--output", "o", "--val", "photos", "--val.root", "below"]
    for line in (words, [*words[:2], *words[4:], *words[2:4]]):
        config = parse_config(_Evaluated, line, program="evaluate")
        assert dump(config)["val"] == {"path": "photos", "root": "below"}
    config = parse_config(_Evaluated, [*words, "--val.path", "others"], program="evaluate")
    assert dump(config)["val"] == {"path": "others", "root": "below"}


def test_a_group_as_yaml_has_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    text = "{path: photos, root: below}"
    with pytest.raises(UserError, match=r"^val: \{path: photos, root: below\} is not JSON: .* give --val.NAME VALUE$"):
        parse_config(_Evaluated, ["--output", "o", "--val", text], program="evaluate")
    Path(text).mkdir()
    config = parse_config(_Evaluated, ["--output", "o", "--val", text], program="evaluate")
    assert dump(config)["val"] == {"path": text, "root": None}


def test_a_list_of_groups_as_yaml_has_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    text = "[{name: kl, weight: 1}]"
    with pytest.raises(
        UserError, match=r"^losses: \[\{name: kl, weight: 1\}\] is not JSON: put names and texts in double quotes$"
    ):
        read_value(DistillConfig, "losses", text)
    assert read_value(DistillConfig, "losses", '[{"name": "kl", "weight": 1}]') == [{"name": "kl", "weight": 1}]
    assert read_value(DistillConfig, "losses", "kl,dist") == ["kl", "dist"]
    Path("{a: b}").touch()
    assert read_value(DistillConfig, "data.train", "{a: b}") == ["{a: b}"]
