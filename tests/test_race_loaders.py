"""Data on the disk become the three parts of a task; what is not theirs to read is refused."""

from __future__ import annotations

import io
import itertools
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from piste.race import Splits, Task
from piste.race.contenders import make_contenders
from piste.race.data import evaluation_batches, fetch, fingerprint, length, to_device, training_batches
from piste.race.inspection import inspect_task, load_data
from piste.race.loaders import cifar10, hugging_face, three_parts
from piste.race.record import CONFIRM, FINISHED, RunKey
from piste.race.training import run

ROWS = 4  # of each batch of a small CIFAR-10
NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def cifar_rows(number: int) -> tuple[np.ndarray[Any, Any], list[int]]:
    draw = np.random.default_rng(number)
    return draw.integers(0, 256, size=(ROWS, 3072), dtype=np.uint8), draw.integers(0, 10, size=ROWS).tolist()


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes text as Python 2 did, which has no other kind: that is how CIFAR-10 was released."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, text: str | bytes) -> None:
        content = text.encode() if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string


def cifar_content(number: int) -> dict[str, Any]:
    pixels, labels = cifar_rows(number)
    return {"data": pixels, "labels": labels, "batch_label": "training batch", "filenames": ["a.png"] * ROWS}


def write_pickles(folder: Path) -> None:
    """By Python 2 and numpy 1, which has another name for a module."""
    for number, name in enumerate(NAMES):
        text = io.BytesIO()
        Python2Pickler(text, protocol=2).dump(cifar_content(number))
        (folder / name).write_bytes(text.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


def write_pickles_again(folder: Path) -> None:
    """What Python 3 makes of the same when it is loaded as bytes and saved."""
    for number, name in enumerate(NAMES):
        content = {key.encode(): value for key, value in cifar_content(number).items()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def write_binaries(folder: Path) -> None:
    for number, name in enumerate(NAMES):
        pixels, labels = cifar_rows(number)
        rows = np.concatenate([np.array(labels, dtype=np.uint8)[:, None], pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())


@pytest.mark.parametrize("write", [write_pickles, write_pickles_again, write_binaries])
def test_cifar10_is_read_in_both_forms(tmp_path: Path, write: Any) -> None:
    write(tmp_path)
    splits = cifar10(tmp_path, valid=6)
    assert [length(part) for part in (splits.train, splits.valid, splits.report)] == [14, 6, ROWS]
    images, labels = fetch(splits.train, torch.arange(14))
    assert (images.shape, images.dtype, labels.dtype) == ((14, 3, 32, 32), torch.float32, torch.int64)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.square().mean((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    pixels, test_labels = cifar_rows(5)
    images, labels = fetch(splits.report, torch.arange(ROWS))
    assert labels.tolist() == test_labels
    shown = torch.tensor(pixels).view(ROWS, 3, 32, 32)[2, 1].double()
    correlation = torch.corrcoef(torch.stack([shown.flatten(), images[2, 1].double().flatten()]))[0, 1]
    assert correlation > 0.99999


def test_both_forms_give_the_same(tmp_path: Path) -> None:
    for name, write in (("pickles", write_pickles), ("binaries", write_binaries)):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    first, second = (fingerprint(cifar10(tmp_path / name, valid=6)) for name in ("pickles", "binaries"))
    assert first == second


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_pickles(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Bomb(tmp_path / "went off"), b"labels": []}))
    with pytest.raises(ValueError, match=r"data_batch_3 is no batch of CIFAR-10: .*it asks for"):
        cifar10(tmp_path, valid=6)
    assert not (tmp_path / "went off").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_2", b"", "no batch of CIFAR-10"),
        ("data_batch_2", pickle.dumps([1, 2]), "no batch of CIFAR-10"),
        ("data_batch_2", pickle.dumps({b"labels": [1]}), "KeyError"),
        ("data_batch_2", pickle.dumps({b"data": [[1, 2]], b"labels": [1]}), "no batch of CIFAR-10: its data"),
        ("data_batch_2.bin", b"12345", "no multiple of 3073"),
        ("data_batch_2.bin", bytes([11]) + bytes(3072), "not one of 0 to 9"),
    ],
)
def test_files_that_are_not_cifar10_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_pickles(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_2.*{message}"):
        cifar10(tmp_path, valid=6)


def test_a_missing_batch_and_too_many_held_out(tmp_path: Path) -> None:
    write_pickles(tmp_path)
    with pytest.raises(ValueError, match="valid=20 of 20 images; legal: 1 to 19"):
        cifar10(tmp_path, valid=20)
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither .*data_batch_4 nor data_batch_4.bin"):
        cifar10(tmp_path, valid=6)


def squares() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.tensor([float(i)]), torch.tensor([float(i * i)])) for i in range(20)]


class Mine(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x)


def collate_halved(examples: list[Any]) -> Any:
    return tuple(torch.stack(column) / 2 for column in zip(*examples, strict=True))


def test_a_module_and_loaders_are_a_task_in_under_ten_lines() -> None:
    """The loader's data and collate function are used, its order and size are not."""
    train = DataLoader(squares(), batch_size=5, shuffle=True, collate_fn=collate_halved)  # type: ignore[arg-type]
    valid, test = (DataLoader(squares(), batch_size=7) for _ in range(2))  # type: ignore[arg-type]
    criterion = torch.nn.MSELoss()
    task = Task(
        name="mine",
        model=Mine,
        data=lambda: Splits(train, valid, test),
        loss=lambda model, batch: criterion(model(batch[0]), batch[1]),
        batch_size=5,
        steps=8,
    )
    splits = load_data(task)
    x, y = next(training_batches(splits.train, 5, seed=0))
    torch.testing.assert_close((2 * x) ** 2, 2 * y)
    assert [count for _, count in evaluation_batches(splits.valid, 16)] == [16, 4]
    assert inspect_task("mine", task, "f00d", splits, torch.device("cpu")).parameters == 2
    contender = make_contenders(("sgd",), ())[0]
    key = RunKey("mine", "f00d", contender.name, "sgd", "one_cycle", {"lr": 1e-4}, 8, 1, CONFIRM, "cpu", {})
    assert run(task, splits, contender, key, lambda step: None).status == FINISHED


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(squares())


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(Stream()), "valid is a DataLoader of an IterableDataset"),
        (
            lambda: DataLoader(squares(), sampler=WeightedRandomSampler([1.0] * 20, 20)),  # type: ignore[arg-type]
            "valid is a DataLoader with a WeightedRandomSampler; legal: shuffled or in order",
        ),
        (lambda: DataLoader(squares(), batch_size=None), "valid is a DataLoader without batches"),  # type: ignore[arg-type]
        (lambda: DataLoader([]), "valid is empty"),  # type: ignore[arg-type]
    ],
)
def test_loaders_that_the_race_cannot_use(loader: Any, message: str) -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=message):
        Splits(train=(x,), valid=loader(), report=(x,))


def test_batches_that_are_mappings_move() -> None:
    from collections import UserDict  # what a tokenizer gives

    moved = to_device(UserDict(x=torch.zeros(2), y=[torch.ones(1)]), torch.device("meta"))
    assert moved["x"].device.type == moved["y"][0].device.type == "meta"


def test_three_parts_share_nothing() -> None:
    splits = three_parts(squares(), valid=0.2, report=0.1)
    parts = [fetch(part, torch.arange(length(part)))[0].flatten().tolist() for part in vars(splits).values()]
    assert [len(part) for part in parts] == [14, 4, 2]
    assert sorted(itertools.chain(*parts)) == [float(i) for i in range(20)]
    again = three_parts(squares(), valid=0.2, report=0.1)
    assert fingerprint(again) == fingerprint(splits) != fingerprint(three_parts(squares(), valid=0.2, seed=1))


def test_a_data_set_of_its_own_for_the_scores() -> None:
    splits = three_parts(squares(), valid=0.25, report=squares()[:3])
    assert [length(part) for part in (splits.train, splits.valid, splits.report)] == [15, 5, 3]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dataset": Stream()}, TypeError, "dataset is a Stream"),
        ({"dataset": squares(), "report": iter(())}, TypeError, "report is a tuple_iterator"),
        ({"dataset": squares(), "valid": 0.0}, ValueError, "valid=0 of 20 examples"),
        ({"dataset": squares(), "valid": 0.5, "report": 0.5}, ValueError, "report=0.5 of 20 examples"),
        ({"dataset": squares(), "valid": 0.01}, ValueError, "valid=0.01 of 20 examples"),
    ],
)
def test_three_parts_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        three_parts(**arguments)


def test_pictures_become_numbers() -> None:
    image = pytest.importorskip("PIL.Image")

    class Pictures(Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Any:
            return image.new("RGB", (4, 3), (255, 0, 51)), {"grey": image.new("L", (4, 3), 102), "label": index}

    x, rest = fetch(three_parts(Pictures()).valid, torch.tensor([0]))
    assert x.shape == (1, 3, 3, 4)
    assert x[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])
    assert rest["grey"].shape == (1, 1, 3, 4)
    assert float(rest["grey"].mean()) == pytest.approx(0.4)


@pytest.mark.slow
def test_data_sets_of_torchvision() -> None:
    from torchvision_stub import declare_operators

    declare_operators()
    datasets = pytest.importorskip("torchvision.datasets")
    transforms = pytest.importorskip("torchvision.transforms")
    for transform in (None, transforms.ToTensor()):
        made = datasets.FakeData(size=30, image_size=(3, 8, 8), num_classes=4, transform=transform)
        x, y = fetch(three_parts(made).train, torch.arange(5))
        assert (x.shape, x.dtype, y.dtype) == ((5, 3, 8, 8), torch.float32, torch.int64)
        assert 0 <= float(x.min()) < float(x.max()) <= 1


@pytest.mark.slow
class TestHuggingFace:
    """With the real package, through a folder."""

    @staticmethod
    def made(count: int = 40) -> Any:
        datasets = pytest.importorskip("datasets")
        return datasets.Dataset.from_dict({"x": [[float(i), 1.0] for i in range(count)], "label": list(range(count))})

    def test_a_folder_in_three_parts(self, tmp_path: Path) -> None:
        self.made().save_to_disk(str(tmp_path / "kept"))
        splits = hugging_face(tmp_path / "kept", columns=["x", "label"], valid=0.25, report=0.25)
        assert [length(part) for part in (splits.train, splits.valid, splits.report)] == [20, 10, 10]
        batch = fetch(splits.train, torch.arange(6))
        assert batch["x"].shape == (6, 2)
        assert torch.equal(batch["x"][:, 0].long(), batch["label"])
        assert len(fingerprint(splits)) == 64

    def test_splits_that_it_has_are_used(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        kept = {"train": self.made(20), "validation": self.made(6), "test": self.made(4)}
        datasets.DatasetDict(kept).save_to_disk(str(tmp_path / "kept"))
        splits = hugging_face(tmp_path / "kept", columns=["x"])
        assert [length(part) for part in (splits.train, splits.valid, splits.report)] == [20, 6, 4]
        assert set(fetch(splits.valid, torch.tensor([0]))) == {"x"}

    def test_what_is_not_there_is_named(self) -> None:
        datasets = pytest.importorskip("datasets")
        with pytest.raises(ValueError, match="columns has 'y'; legal: x, label"):
            hugging_face(self.made(), columns=["y"])
        with pytest.raises(ValueError, match="the splits are test; legal: a 'train'"):
            hugging_face(datasets.DatasetDict({"test": self.made()}))
