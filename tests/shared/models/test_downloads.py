"""Missing downloads are reported within seconds, in one line; cached files are used without the network."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ssld.shared.errors import UserError
from ssld.shared.models import downloads
from ssld.shared.models.downloads import Remote, find_downloads, find_downloads_apart, kind_of, require_downloads

HUB = Remote("org/name@v2", ("model.safetensors", "pytorch_model.bin"))


class Answer:
    def __init__(self, status: int, size: int | None = None) -> None:
        self.status_code = status
        self.headers = {"X-Linked-Size": str(size)} if size else {}


class Session:
    """Answers by the end of the URL."""

    def __init__(self, responses: dict[str, Any]) -> None:
        self.responses, self.requested = responses, list[str]()

    def head(self, url: str, *, headers: Any, timeout: float) -> Answer:
        self.requested.append(url)
        response = self.responses.get(url.rsplit("/", 1)[-1], Answer(404))
        if isinstance(response, BaseException):
            raise response
        assert isinstance(response, Answer)
        return response


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that sets the responses of the hub; its cache is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def respond(**by_name: Any) -> Session:
        session = Session({name.replace("_DOT_", "."): answer for name, answer in by_name.items()})
        monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
        return session

    return respond


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    kinds = {
        "random:x": "random", "hf-hub:a/b": "hub", "timm:x": "timm", "resnet18": "timm", str(tmp_path): "folder",
        str(tmp_path / "file"): "file", "a/b": "path", "x.safetensors": "path", "x.pth": "path", "a" * 5000: "path",
    }  # fmt: skip
    assert {text: kind_of(text) for text in kinds} == kinds


def test_what_the_hub_answers(network: Any) -> None:
    session = network(model_DOT_safetensors=Answer(302, 102_000_000))
    assert HUB.ask() == (102_000_000, None)
    assert session.requested == ["https://huggingface.co/org/name/resolve/v2/model.safetensors"]
    network(pytorch_model_DOT_bin=Answer(200))
    assert HUB.ask() == (None, None)
    network()
    assert HUB.ask() == (None, "the hub does not have it (status 404)")
    network(model_DOT_safetensors=Answer(401))
    assert "needs `hf auth login` (status 401)" in str(HUB.ask()[1])
    network(model_DOT_safetensors=Answer(503))
    assert HUB.ask() == (None, "the hub returned status 503")
    network(model_DOT_safetensors=OSError(-2, "Name or\nservice not known"))
    assert HUB.ask() == (None, "no network ([Errno -2] Name or service not known)")


def test_a_network_that_never_answers(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_SECONDS", -0.45)
    monkeypatch.setattr(Remote, "_ask_hub", lambda self: time.sleep(0.5))
    assert "no network (no response within" in str(HUB.ask()[1])


def test_offline_is_honoured(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = network(model_DOT_safetensors=Answer(200))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        require_downloads({"teacher.model": "hf-hub:org/name"})
    assert str(caught.value) == (
        "teacher.model: hf-hub:org/name: not on this machine, and its download (model.safetensors of org/name) is not possible: "
        "HF_HUB_OFFLINE is set; `hf download org/name` where there is a network, or give a file or a folder instead"
    )
    assert not session.requested


def test_all_that_some_settings_need(network: Any, tmp_path: Path) -> None:
    (tmp_path / "datasets" / "org___my_Data").mkdir(parents=True)
    snapshot = tmp_path / "cache" / "models--a--cached" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes(b"")
    network(model_DOT_safetensors=Answer(302, 44_000_000), other=Answer(401))
    downloads = find_downloads(
        {
            "student.model": "timm:test_resnet",
            "again": "timm:test_resnet",
            "teacher.model": "hf-hub:a/cached",
            "random": "random:test_resnet",
            "unknown": "timm:nothing_like_it",
            "wrong": "hf-hub:nothing",
            "local": "runs/x/hub",
            "data.train.0": "hub:org/my_data",
            "data.val": "hub:org/other",
            "here": f"hub:{tmp_path}",
        }
    )
    assert [(one.line, one.possible) for one in downloads] == [
        ("unknown: nothing_like_it: timm has no such model", False),
        (
            "student.model: timm:test_resnet: not on this machine; model.safetensors of timm/test_resnet.r160_in1k (44.0 MB) will be downloaded",
            True,
        ),
        (
            "data.val: hub:org/other: not on this machine, and its download (data set org/other) is not possible: the hub has no such repository, "
            "or it needs `hf auth login` (status 401); `hf download org/other --repo-type dataset` where there is a network, "
            "or give a folder of its images instead",
            False,
        ),
    ]


def test_a_timm_model_without_weights(network: Any) -> None:
    [download] = find_downloads({"student.model": "vit_base_patch16_18x2_224"})
    assert not download.possible
    assert "timm has no weights for it; random:vit_base_patch16_18x2_224 starts from random ones" in download.text
    assert not download.exists


def test_weights_behind_a_url(network: Any, tmp_path: Path) -> None:
    remote = Remote(url="http://127.0.0.1:9/w.pth", names=("w.pth",), folder=str(tmp_path))
    with pytest.raises(
        UserError, match=r"timm:x: not on this machine, .*http://127.0.0.1:9/w.pth\) is not possible: no network"
    ):
        remote.fetch("timm:x")
    (tmp_path / "w.pth").write_bytes(b"")
    assert remote.fetch("timm:x") == tmp_path / "w.pth"


@pytest.mark.process
def test_from_a_process_of_its_own(tmp_path: Path) -> None:
    """A program without torch asks for timm's names; without any it starts none."""
    script = (
        "import json, sys; from ssld.shared.models.downloads import find_downloads_apart as find; "
        "downloads = find({'student.model': 'timm:test_resnet', 'teacher.model': 'x/y.safetensors'}); "
        "print(json.dumps([[one.line, one.possible] for one in downloads])); assert 'torch' not in sys.modules"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [[text, possible]] = json.loads(done.stdout)
    assert text.startswith("student.model: timm:test_resnet: not on this machine, and its download")
    assert not possible
    assert find_downloads_apart({"a": "random:x", "b": "x/y.safetensors"}) == []
