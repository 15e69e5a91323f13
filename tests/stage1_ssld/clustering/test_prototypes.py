"""prototypes.py: an encoder without classes becomes a teacher that every other command takes as it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from ssld.shared import run_dir
from ssld.shared.errors import UserError
from ssld.shared.images import decode_image
from ssld.shared.models.backbones import create_classifier
from ssld.shared.models.model_file import read_metadata
from ssld.shared.models.references import parse_reference
from ssld.shared.models.teacher import FrozenTeacher, TeacherEnsemble
from ssld.shared.training import progress
from ssld.stage1_ssld.clustering import steps
from ssld.stage1_ssld.clustering.embedding_files import Standard
from ssld.stage1_ssld.clustering.steps import prototypes_for
from ssld.stage1_ssld.curate import main as curate
from ssld.stage1_ssld.curation import shard_pass
from ssld.stage1_ssld.data.views import val_view
from ssld.stage1_ssld.deploy.card import write_folder
from ssld.stage1_ssld.distill import main as distill
from ssld.stage1_ssld.distillation.losses import symmetric_kl
from ssld.stage1_ssld.evaluate import main as evaluate
from ssld.stage1_ssld.prototypes import main as prototypes
from ssld.stage1_ssld.write_soft_labels import main as write_soft_labels

RECORDS = {"config.yaml", "environment.json", "log.txt", "pool.json", "result.json", ".lock"}


def views(folder: Path, size: int = 64) -> torch.Tensor:
    files = sorted(folder.rglob("*.png"))
    return torch.stack([val_view(decode_image(file), image_size=size, val_crop=0.875) for file in files])


def metrics(run: Path) -> dict[str, Any]:
    actual: dict[str, Any] = json.loads((run / "result.json").read_text())["metrics"]
    return actual


def contents(run: Path) -> dict[str, Any]:
    """Outputs of a run. (The bytes of a safetensors file vary, because its header has no order.)"""
    result = json.loads((run / "result.json").read_text())
    return {
        "metrics": result["metrics"],
        "picture": result["outputs"]["prototypes.png"],
        "teacher": read_metadata(run / "teacher.safetensors"),
    }


def test_a_headless_vit_becomes_a_teacher(
    drawn_figures: None, made: Any, monkeypatch: pytest.MonkeyPatch, tiny: Any, encoder_file: Path, files_below: Any
) -> None:
    """Its logits match float64 distances to the centers, from embeddings of plain timm; plain timm loads the file."""
    given: dict[str, Any] = {}

    def noting(standard: Standard, center_KD: Any, offset_K: Any, temperature: float) -> Any:
        given.update(standard=standard, centers=center_KD, temperature=temperature)
        return layer(standard, center_KD, offset_K, temperature)

    layer = steps.linear_layer
    monkeypatch.setattr(steps, "linear_layer", noting)
    run = made()
    assert files_below(run) == RECORDS | {"teacher.safetensors", "prototypes.png"}

    net: Any = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    own: Any = timm.create_model("test_vit", num_classes=0)
    own.load_state_dict(torch.load(encoder_file, weights_only=True))
    own.set_input_size(img_size=(64, 64))  # as timm fits a position embedding to another size
    net.load_state_dict(own.state_dict())
    pixels = views(tiny.val)
    with torch.no_grad():
        z_BD = net(pixels / 127.5 - 1).double().numpy()
    x_BD = (z_BD - given["standard"].mean_D) / given["standard"].scale_D
    squares_BK = ((x_BD[:, None] - given["centers"]) ** 2).sum(2)
    expected = torch.from_numpy(-squares_BK / 2 / given["temperature"]).softmax(-1).float()
    teacher = FrozenTeacher(str(run / "teacher.safetensors"))
    torch.testing.assert_close(teacher(pixels).softmax(-1), expected, rtol=0, atol=1e-5)
    assert expected.max(1).values.std() > 0.02

    metadata = read_metadata(run / "teacher.safetensors", kind="backbone")
    assert metadata["model_args"] == {"img_size": [64, 64], "fc_norm": False, "global_pool": "token"}
    plain = timm.create_model("test_vit", num_classes=6, **metadata["model_args"]).eval()
    plain.load_state_dict(load_file(run / "teacher.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels / 127.5 - 1), teacher(pixels), rtol=1e-4, atol=1e-4)

    actual = metrics(run)
    assert (actual["prototypes"], actual["images"]) == (6, 74)
    assert actual["perplexity"] == pytest.approx(3, abs=0.01)
    assert 0 < actual["smallest"] <= actual["median_size"] <= actual["largest"]
    assert metadata["class_names"] == [f"prototype {number}" for number in range(6)]
    assert metadata["licence"] == "unknown"
    assert metadata["encoder"]["reference"] == str(encoder_file)
    assert metadata["prototypes"] == {**actual, "balanced": False, "sources": [
        str(tiny.unlabeled), str(tiny.parquet), str(tiny.train),
    ]}  # fmt: skip
    log = (run / "log.txt").read_text()
    assert "6 prototypes of 74 images: sizes from " in log
    assert "soft labels: median perplexity 3.00 at temperature " in log
    with Image.open(run / "prototypes.png") as drawn:
        assert drawn.height > 6 * 100
        assert len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize(
    ("arch", "pool", "expected"),
    [
        ("test_vit2", None, "avg"),  # a register token, no class token
        ("test_vit3", None, "map"),  # attention pooling
        ("test_vit", "avg", "avg"),  # the norm stays before the pooling
        ("test_resnet", "max", "max"),
        ("test_efficientnet", "catavgmax", "catavgmax"),  # twice as many features
        ("test_mambaout", None, None),  # an MLP before the last layer
    ],
)
def test_poolings_and_tokens(made: Any, tiny: Any, arch: str, pool: str | None, expected: str | None) -> None:
    """The file is rebuilt with the pooling it was made with, and embeds as timm's network of that pooling does."""
    run = made(encoder={"model": f"random:{arch}", "global_pool": pool}, seed=5, pool=[str(tiny.train)])
    metadata = read_metadata(run / "teacher.safetensors")
    assert (metadata.get("model_args") or {}).get("global_pool") == expected
    pixels = views(tiny.val)
    teacher = FrozenTeacher(str(run / "teacher.safetensors"))
    torch.manual_seed(5)
    net: Any = timm.create_model(arch)
    if hasattr(net, "set_input_size"):
        net.set_input_size(img_size=teacher.size)
    net.reset_classifier(0, pool) if pool else net.reset_classifier(0)
    mean, std = (torch.tensor(net.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        embedding = net.eval()((pixels / 255 - mean) / std)
    torch.testing.assert_close(teacher.embed(pixels), embedding, rtol=1e-4, atol=1e-4)
    log = (run / "log.txt").read_text()
    assert f"random:{arch}: random weights" in log
    assert "its 1000 classes are left out" in log


def test_its_views_have_the_size_that_the_prototypes_were_made_at(
    made: Any, arguments: Any, distill_settings: Any, call: Any, tmp_path: Path
) -> None:
    """A CNN takes any size, but the centers hold for one: its soft labels of other sizes are those of resized views, unless a size is set."""
    file = str(made(encoder="random:test_resnet") / "teacher.safetensors")
    draw = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=draw)
    resized = torch.nn.functional.interpolate(pixels.float(), (64, 64), mode="bilinear", antialias=True)
    teacher, at_32 = FrozenTeacher(file), FrozenTeacher(file, size=32)
    torch.testing.assert_close(teacher(pixels), teacher(resized))
    assert not torch.allclose(teacher(pixels), at_32(pixels), atol=0.1)
    assert call(distill, arguments(distill_settings | {"teacher": file, "steps": 1}, "student")) == 0
    log = (tmp_path / "student" / "log.txt").read_text()
    assert "teacher sees views of 32 px, resized to 64 x 64 (the size of its prototypes)" in log
    data = {key: value for key, value in distill_settings["data"].items() if key != "val"}
    fixed = distill_settings | {"teacher": {"model": "random:test_vit", "check_images": 0}, "steps": 1, "data": data}
    assert call(distill, arguments(fixed, "fixed")) == 0
    assert "resized to 160 x 160 (its fixed size)" in (tmp_path / "fixed" / "log.txt").read_text()


def test_nothing_is_learnt_where_student_and_teacher_are_equal(made: Any, tiny: Any) -> None:
    file = str(made() / "teacher.safetensors")
    student, _ = create_classifier(parse_reference(file))
    pixels = views(tiny.val)
    student.eval()
    loss = symmetric_kl(student(pixels), FrozenTeacher(file)(pixels)).sum()
    loss.backward()
    assert abs(loss.item()) < 1e-6
    gradients = [parameter.grad.abs().max().item() for parameter in student.parameters() if parameter.grad is not None]
    assert len(gradients) > 10
    assert max(gradients) < 1e-5


def test_class_means_as_prototypes_agree_with_the_head(
    made: Any, tiny: Any, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nearest-mean classifier without its head gets its predictions back if the K centers are its means."""
    pixels = views(tiny.train, 32)
    teacher = FrozenTeacher(str(teacher_file))
    z_BD = teacher.embed(pixels).double().numpy()
    labels = np.repeat(np.arange(3), 10)
    mean_KD = np.stack([z_BD[labels == k].mean(0) for k in range(3)])
    nearest = ((z_BD[:, None] - mean_KD) ** 2).sum(2).argmin(1)
    assert (nearest == labels).mean() > 0.5  # chance is a third

    def means(embeddings: Any, standard: Standard, count: int, **_: Any) -> Any:
        size_K = np.bincount(labels)
        return steps.Clusters((mean_KD - standard.mean_D) / standard.scale_D, np.zeros(3), size_K, 0)

    monkeypatch.setattr(steps, "find_clusters", means)
    monkeypatch.setattr(
        steps, "standard_of", lambda embeddings: Standard(np.zeros(embeddings.width), np.ones(embeddings.width))
    )
    change = {"encoder": str(teacher_file), "pool": [str(tiny.train)], "prototypes": 3, "perplexity": 1.2}
    run = made(image_size=32, **change)
    predictions = FrozenTeacher(str(run / "teacher.safetensors"))(pixels).argmax(-1).numpy()
    np.testing.assert_array_equal(predictions, nearest)
    assert read_metadata(run / "teacher.safetensors")["licence"] == "apache-2.0"


def test_other_commands_take_the_teacher(
    made: Any,
    settings: Any,
    arguments: Any,
    distill_settings: Any,
    call: Any,
    tmp_path: Path,
    tiny: Any,
    user_error: Any,
) -> None:
    """Curation keeps the best of each prototype, the store holds its soft labels, a student learns them; labels of other classes are not used."""
    file = str(made() / "teacher.safetensors")
    common = {key: settings[key] for key in ("threads", "workers", "device")}
    chosen = {"pool": [str(tiny.unlabeled), str(tiny.parquet)], "teacher": file, "keep": 2, "image_size": 64}
    assert call(curate, arguments(common | chosen | {"examples": 2}, "curated")) == 0
    assert 0 < metrics(tmp_path / "curated")["kept"] <= 12
    assert "prototype 0" in (tmp_path / "curated" / "classes.csv").read_text()

    data = distill_settings["data"]
    views = {"teacher": file, "views": 2, "top": 3, "data": data | {"val": None}}
    assert call(write_soft_labels, arguments(common | views, "soft")) == 0
    for name, change in (
        ("live", {"teacher": file}),
        ("stored", {"teacher": None, "store": str(tmp_path / "soft" / "store")}),
    ):
        assert call(distill, arguments(distill_settings | {"steps": 2} | change, name)) == 0
        assert read_metadata(tmp_path / name / "student.safetensors")["num_classes"] == 6
    actual = metrics(tmp_path / "live")
    assert "agreement" in actual
    assert "top1" not in actual
    assert "teacher: not checked" in (tmp_path / "live" / "log.txt").read_text()
    hard = distill_settings | {"teacher": file, "hard_label_weight": 1.0}
    assert "the teacher's classes are prototypes, which no human label names" in user_error(
        distill, arguments(hard, "hard")
    )

    recorded = {
        "model": str(tmp_path / "live" / "student.safetensors"),
        "teacher": file,
        "data": {"path": str(tiny.val)},
    }
    assert call(evaluate, arguments(common | recorded, "evaluated")) == 0
    assert metrics(tmp_path / "evaluated")["agreement"] == pytest.approx(actual["agreement"])


def test_a_student_that_starts_from_a_teacher_keeps_its_arguments(
    made: Any, arguments: Any, distill_settings: Any, call: Any, tmp_path: Path
) -> None:
    """Without them the network of 64 pixels could not be built again."""
    file = str(made() / "teacher.safetensors")
    data = distill_settings["data"] | {"image_size": 64}
    change = {"steps": 1, "student": file, "teacher": file, "data": data}
    assert call(distill, arguments(distill_settings | change, "student")) == 0
    student = tmp_path / "student" / "student.safetensors"
    assert read_metadata(student)["model_args"] == read_metadata(Path(file))["model_args"]
    assert FrozenTeacher(str(student)).size == (64, 64)


def test_a_folder_for_the_hub_builds_the_same_network(made: Any, tmp_path: Path) -> None:
    """timm reads size and pooling from its configuration."""
    file = made(encoder={"model": "random:test_vit", "global_pool": "avg"}) / "teacher.safetensors"
    reference = parse_reference(str(file))
    net, inputs = create_classifier(reference)
    write_folder(tmp_path / "hub", file, net.net, inputs, reference.metadata, push_to_hub=None, checks={})
    folder = FrozenTeacher(str(tmp_path / "hub"))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(folder(pixels), FrozenTeacher(str(file))(pixels))


def test_ensembles_need_the_same_prototypes(made: Any) -> None:
    one, same, other = (
        FrozenTeacher(str(made(name, **change) / "teacher.safetensors"))
        for name, change in (("one", {}), ("same", {}), ("other", {"perplexity": 2.0}))
    )
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(TeacherEnsemble([one, same])(pixels).softmax(-1), one(pixels).softmax(-1))
    with pytest.raises(UserError, match="its prototypes are not those of"):
        TeacherEnsemble([one, other])


@pytest.mark.slow
def test_two_processes_make_the_same_file(
    drawn_figures: None, made: Any, settings: Any, arguments: Any, scripts: Any, tmp_path: Path
) -> None:
    one = made("one")
    change = {"workers": 1}
    process = scripts.run("stage1_ssld/prototypes.py", *arguments(settings | change, "two"), ranks=2)
    assert process.returncode == 0, process.stderr
    assert contents(one) == contents(tmp_path / "two")


@pytest.mark.parametrize(
    ("name", "call_number", "shards_left"),
    [("save_embeddings", 2, 1), ("find_clusters", 1, 3), ("temperature_for", 1, 3)],
)
def test_goes_on_where_it_was_killed(
    made: Any, settings: Any, arguments: Any, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, call_number: int, shards_left: int,
) -> None:  # fmt: skip
    """Between two shards, in the k-means, and after it: what was done is not done again, and the file is that of a run in one go."""
    whole = made("whole")
    calls = 0
    real = getattr(steps, name)

    def killed(*given: Any, **also: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call_number:
            raise SystemExit
        return real(*given, **also)

    with monkeypatch.context() as patch:
        patch.setattr(steps, name, killed)
        with pytest.raises(SystemExit):
            call(prototypes, arguments(settings))
    run = tmp_path / "run"
    done = {path: path.stat().st_mtime_ns for path in (run / "embeddings").glob("*.npy")}
    assert len(done) == shards_left
    assert (run / "centres.npz").exists() == (name == "temperature_for")
    with monkeypatch.context() as patch:
        if name == "temperature_for":
            patch.setattr(steps, "find_clusters", lambda *_, **__: pytest.fail("was done"))
        patch.setattr(run_dir.shutil, "rmtree", lambda *_, **__: None)
        assert call(prototypes, arguments(settings)) == 0
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    assert contents(whole) == contents(run)
    assert "this run is finished" not in (run / "log.txt").read_text()
    assert call(prototypes, arguments(settings)) == 0
    assert "this run is finished" in (run / "log.txt").read_text()


def test_a_stop_in_the_k_means_keeps_the_embeddings(
    settings: Any, arguments: Any, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import os
    import signal

    real = steps.standard_of

    def signals(embeddings: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(embeddings)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "standard_of", signals)
        assert call(prototypes, arguments(settings)) == 143
    assert "the prototypes are not finished; all embeddings are kept; the same command" in capsys.readouterr().err
    assert len(list((tmp_path / "run" / "embeddings").glob("*.npy"))) == 3
    assert call(prototypes, arguments(settings)) == 0


def test_balanced_prototypes_are_first_classes_of_equally_many_images(made: Any, tiny: Any) -> None:
    run = made(balanced=True, prototypes=5, perplexity=2.0, pool=[str(tiny.train)])
    actual = metrics(run)
    assert actual["largest"] - actual["smallest"] <= 2
    predictions = FrozenTeacher(str(run / "teacher.safetensors"))(views(tiny.train)).argmax(-1)
    sizes = torch.bincount(predictions, minlength=5)
    assert (int(sizes.min()), int(sizes.max())) == (actual["smallest"], actual["largest"])


def test_what_its_patches_leave_out_is_said(made: Any, tiny: Any) -> None:
    run = made(encoder="random:vit_tiny_patch16_224", image_size=72, pool=[str(tiny.train)])
    log = (run / "log.txt").read_text()
    assert (
        "warning: its patches of 16 pixels do not divide 72, so the last 8 rows and columns of an image are not seen"
        in log
    )


def test_a_small_folder_is_many_shards(made: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a killed run keeps most of its work, and a slow encoder shows its progress; the embeddings stay the same."""
    whole = made("whole", pool=[str(tiny.train)], batch_size=4)
    monkeypatch.setattr(shard_pass, "_FEWEST_ROWS", 4)
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    run = made(pool=[str(tiny.train)], batch_size=4)
    files = sorted((run / "pool.json").read_text().split('"'))
    names = [f"{tiny.train}[{first}:{min(first + 4, 30)}] ({min(4, 30 - first)})" for first in range(0, 30, 4)]
    assert set(names) <= set(files)
    log = (run / "log.txt").read_text()
    assert "embeddings: 8 of 8 shards to do\nembeddings: 4 images, 1 of 8 shards of this process, " in log
    assert " to go\n" in log
    assert "embeddings: 30 images, 8 of 8 shards of this process, " in log
    assert metrics(run) == metrics(whole)


def test_streams_and_unreadable_images(made: Any, tiny: Any, tmp_path: Path) -> None:
    """A tar without an index; an unreadable image is listed and otherwise ignored."""
    import tarfile

    shutil.copytree(tiny.train, tmp_path / "pool")
    (tmp_path / "pool" / "disc" / "broken.png").write_bytes(b"no image")
    with tarfile.open(tmp_path / "pool.tar", "w") as archive:
        archive.add(tmp_path / "pool", "pool")
    one = made("one", pool=[str(tmp_path / "pool.tar")], streaming=True)
    two = made("two", pool=[str(tiny.train)])
    assert metrics(one)["images"] == metrics(two)["images"] == 30
    assert (one / "quarantine.txt").read_text().endswith("broken.png\n")


def test_how_many_prototypes() -> None:
    """The power of two next to a fortieth of the images, within bounds."""
    actual = {images: prototypes_for(images) for images in (10, 640, 900, 1000, 3800, 10_240, 100_000, 10**7)}
    expected = {10: 16, 640: 16, 900: 16, 1000: 32, 3800: 128, 10_240: 256, 100_000: 2048, 10**7: 4096}
    assert actual == expected


def test_its_own_number_of_prototypes(made: Any, tiny: Any) -> None:
    assert metrics(made(prototypes=None, perplexity=4.0))["prototypes"] == 16
