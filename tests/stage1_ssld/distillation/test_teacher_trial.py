"""The trial of the teacher before training: which images, when it stops the run, and the cause it names."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.models.backbones import input_settings, save_backbone
from ssld.shared.models.teacher import FrozenTeacher, Teacher, TeacherEnsemble
from ssld.stage1_ssld.data.batch import NO_LABEL, Batch
from ssld.stage1_ssld.distillation import teacher as teacher_module
from ssld.stage1_ssld.distillation.teacher import check_teacher, rows_to_try

CPU = torch.device("cpu")


def batches(pixels: Tensor, labels: Tensor, size: int = 50) -> Iterator[Batch]:
    yield Batch(torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0).long(), [], ["unreadable.png"])
    for start in range(0, len(pixels), size):
        some = slice(start, start + size)
        yield Batch(pixels[some], labels[some], [str(row) for row in range(start, start + len(pixels[some]))], [])


def teacher_of(path: Path, classes: int, seed: int = 0, **options: Any) -> FrozenTeacher:
    """A random network in a file whose predictions differ from image to image."""
    torch.manual_seed(seed)
    net: Any = timm.create_model("test_resnet", num_classes=classes).eval()
    with torch.no_grad():
        net.get_classifier().weight.normal_(0, 10)
        predictions = net((images_of(64) / 127.5) - 1)
        net.get_classifier().bias.sub_(predictions.mean(0))
    save_backbone(path, net, arch="test_resnet", inputs=input_settings(net, {}), classes=classes)
    return FrozenTeacher(str(path), **options)


def images_of(count: int) -> Tensor:
    """Blocks of random colors: noise by the pixel looks the same to every network."""
    generator = torch.Generator().manual_seed(count)
    blocks = torch.randint(0, 256, (count, 3, 2, 2), dtype=torch.uint8, generator=generator)
    return blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)


def check(teacher: Teacher, pixels: Tensor, labels: Tensor) -> str:
    return check_teacher(teacher, batches(pixels, labels), device=CPU, where="images/val")


def refused(teacher: Teacher, pixels: Tensor, labels: Tensor) -> str:
    with pytest.raises(UserError) as caught:
        check(teacher, pixels, labels)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{teacher.reference.text}: ")
    assert message.endswith("; teacher.check_images: 0 skips this check")
    return message


def test_a_teacher_that_knows_the_images(tmp_path: Path) -> None:
    teacher, pixels = teacher_of(tmp_path / "t.safetensors", 5), images_of(200)
    labels = teacher(pixels).argmax(-1)
    assert len(labels.unique()) == 5
    assert check(teacher, pixels, labels) == "teacher: accuracy 100.0 % on 200 images of images/val (chance 20.0 %)"
    labels[::2] = NO_LABEL
    labels[1::8] = (labels[1::8] + 1) % 5
    assert check(teacher, pixels, labels) == "teacher: accuracy 75.0 % on 100 images of images/val (chance 20.0 %)"


def test_the_same_answer_to_everything(tmp_path: Path) -> None:
    net: Any = timm.create_model("test_resnet", num_classes=50).eval()
    with torch.no_grad():
        net.get_classifier().bias[3] = 100
    file = tmp_path / "t.safetensors"
    save_backbone(file, net, arch="test_resnet", inputs=input_settings(net, {}), classes=50)
    assert "no better than guessing" in refused(FrozenTeacher(str(file)), images_of(200), torch.tensor([3, 4] * 100))


def test_another_class_order(tmp_path: Path) -> None:
    teacher, pixels = teacher_of(tmp_path / "t.safetensors", 5), images_of(200)
    predictions = teacher(pixels).argmax(-1)
    order = torch.tensor([1, 2, 3, 4, 0])
    message = refused(teacher, pixels, order[predictions])
    most = Counter(predictions.tolist()).most_common(1)[0][0]
    assert "accuracy 0.0 % on 200 images of images/val (chance 20.0 %), no better than guessing" in message
    assert "its classes are in another order than the labels (its class" in message
    assert "renumbered like that, its accuracy is 100 %" in message
    output = [int(word) for word in message.split("its class ")[1].replace(" is class ", " ").split(" of ")[0].split()]
    assert output == [most, order[most]]
    # the order of the images does not matter, nor that the teacher errs now and then
    sort = order[predictions].argsort()
    wrong = order[predictions].clone()
    wrong[::5] = (wrong[::5] + 1) % 5
    assert "another order" in refused(teacher, pixels[sort], order[predictions][sort])
    assert "another order" in refused(teacher, pixels, wrong)


@pytest.mark.parametrize(("classes", "seed"), [(3, 0), (3, 1), (3, 2), (5, 1), (10, 0)])
def test_weights_that_do_not_know_the_images(tmp_path: Path, classes: int, seed: int) -> None:
    teacher, pixels = teacher_of(tmp_path / "t.safetensors", classes), images_of(600)
    predictions = teacher(pixels).argmax(-1)
    # as right as guessing, to the image
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (600,), generator=generator)
    right = (labels == predictions).nonzero().flatten()
    labels[right[600 // classes :]] = (labels[right[600 // classes :]] + 1) % classes
    message = refused(teacher, pixels, labels)
    assert "its weights do not suit these images: wrong file or arch, an untrained head" in message
    assert "another order" not in message


def test_few_images_a_class_leave_both_causes_open(tmp_path: Path) -> None:
    teacher, pixels = teacher_of(tmp_path / "t.safetensors", 60), images_of(120)
    labels = torch.arange(120) % 60
    labels[teacher(pixels).argmax(-1) == labels] += 1
    message = refused(teacher, pixels, labels.clamp(max=59))
    assert "its weights do not suit these images" in message
    assert "or its classes are in another order" in message


def test_few_images_prove_nothing(tmp_path: Path) -> None:
    teacher, pixels = teacher_of(tmp_path / "t.safetensors", 3), images_of(100)
    labels = (teacher(pixels).argmax(-1) + 1) % 3
    assert check(teacher, pixels[:99], labels[:99]).startswith("teacher: accuracy 0.0 % on 99 images")
    refused(teacher, pixels, labels)
    none = torch.full((100,), NO_LABEL)
    assert check(teacher, pixels, none) == "teacher: not checked, images/val has no labeled images"


def pairs_of(counts: list[int], right: list[int]) -> list[tuple[int, int]]:
    """(label, prediction) pairs with the given images and correct predictions per class; the others predict a class that no image has."""
    return [(label, label if n < right[label] else 999) for label, count in enumerate(counts) for n in range(count)]


@pytest.mark.parametrize(("classes", "each"), [(2, 150), (10, 100), (128, 8)])
def test_the_limit_is_three_deviations_above_one_answer_to_everything(classes: int, each: int) -> None:
    limit = classes * each * (1 / classes + 3 * (1 / classes * (1 - 1 / classes) / (classes * each)) ** 0.5)
    for number, expected in ((int(limit), True), (int(limit) + 1, False)):
        right = [number // classes + (label < number % classes) for label in range(classes)]
        assert teacher_module.guesses(pairs_of([each] * classes, right), 1000) == expected


def test_one_answer_to_everything_is_a_guess_whatever_is_frequent() -> None:
    """Of 1,000 classes 128 are checked: a constant prediction is right on 0.8 %, eight times chance."""
    assert teacher_module.guesses(pairs_of([8] * 128, [8] + [0] * 127), 1000)
    assert teacher_module.guesses(pairs_of([900, 50, 50], [900, 0, 0]), 3)
    assert not teacher_module.guesses(pairs_of([900, 50, 50], [800, 30, 30]), 3)
    assert not teacher_module.guesses(pairs_of([200], [60]), 10)  # images of one class alone: against chance
    assert teacher_module.guesses(pairs_of([200], [25]), 10)


def test_orders_that_agree_in_some_classes(tmp_path: Path) -> None:
    """A third of the classes at their place lifts the accuracy far above guessing; the order is still wrong."""
    teacher, pixels = teacher_of(tmp_path / "t.safetensors", 10), images_of(800)
    predictions = teacher(pixels).argmax(-1)
    counts = torch.bincount(predictions, minlength=10).tolist()
    moved = sorted(range(10), key=lambda label: counts[label])[3:]
    order = torch.arange(10)
    order[moved] = order[moved[1:] + moved[:1]]
    message = refused(teacher, pixels, order[predictions])
    assert "less than half of what it could be: its classes are in another order than the labels" in message
    assert "renumbered like that, its accuracy is 100 %" in message


def test_every_network_of_an_ensemble_is_tried(tmp_path: Path) -> None:
    good, pixels = teacher_of(tmp_path / "good.safetensors", 5), images_of(200)
    bad = teacher_of(tmp_path / "bad.safetensors", 5, seed=3)
    labels = good(pixels).argmax(-1)
    ensemble = TeacherEnsemble([good, good])
    place = f"({good.reference.text})"
    assert check(ensemble, pixels, labels) == (
        f"teacher: accuracy 100.0 % {place}, 100.0 % {place} on 200 images of images/val (chance 20.0 %)"
    )
    with pytest.raises(UserError, match=rf"^{bad.reference.text}: accuracy \d+\.\d % on 200 images of images/val"):
        check(TeacherEnsemble([good, bad]), pixels, labels)
    shifted = (torch.arange(5) + 1) % 5
    ensemble = TeacherEnsemble([good, good])
    with pytest.raises(UserError, match="classes are in another order"):
        check(ensemble, pixels, shifted[labels])


def test_random_weights_are_not_tried() -> None:
    teacher = FrozenTeacher("random:test_resnet")
    line = check_teacher(teacher, iter(()), device=CPU, where="images/val")
    assert line == "teacher: random weights, not checked"


def test_it_is_tried_with_running_statistics(tmp_path: Path) -> None:
    running = teacher_of(tmp_path / "t.safetensors", 5)
    teacher, pixels = FrozenTeacher(str(tmp_path / "t.safetensors"), batchnorm="batch"), images_of(200)
    labels = running(pixels).argmax(-1)
    assert (teacher(pixels).argmax(-1) == labels).float().mean() < 0.9
    assert "accuracy 100.0 % on 200" in check(teacher, pixels, labels)


def test_all_ranks_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 images of this rank prove nothing; with 60 of another one they do, on both."""
    teacher, pixels = teacher_of(tmp_path / "t.safetensors", 3), images_of(60)
    labels = (teacher(pixels).argmax(-1) + 1) % 3
    assert "on 60 images" in check(teacher, pixels, labels)
    monkeypatch.setattr(teacher_module, "gather_lists", lambda pairs: pairs + pairs)
    assert "on 120 images" in refused(teacher, pixels, labels)


@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_of_many_classes_and_several_of_each(shuffled: bool) -> None:
    labels = np.repeat(np.arange(1000), 50)
    if shuffled:
        np.random.default_rng(0).shuffle(labels)
    rows = rows_to_try(labels.tolist(), 1024)
    assert len(rows) == len(set(rows)) == 1024
    counts = Counter(labels[rows].tolist())
    assert set(counts.values()) == {8}
    assert len(counts) == 128
    assert max(np.diff(sorted(counts))) < 10  # from all over the class numbers
    assert rows == rows_to_try(labels.tolist(), 1024)


def test_rows_where_there_are_fewer() -> None:
    assert sorted(rows_to_try([0, 1, NO_LABEL, 1, 0], 100)) == [0, 1, 3, 4]
    assert rows_to_try([NO_LABEL] * 3, 10) == []
    assert rows_to_try([], 10) == []
    labels = [0] * 1000 + [1] * 5
    rows = rows_to_try(labels, 200)
    assert Counter(labels[row] for row in rows) == {0: 100, 1: 5}
    assert max(rows[:100]) > 900  # not the first hundred of a folder
    assert len(rows_to_try(labels, 3)) == 3
