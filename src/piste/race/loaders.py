"""Data that are on your disk already, as the three parts of a task: CIFAR-10, Hugging Face ``datasets``, torchvision.

Nothing here downloads.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, default_collate

from piste.race.data import Collated, Splits

__all__ = ["cifar10", "hugging_face", "three_parts"]

_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_CLASSES = 10
_CIFAR_ROW = 1 + 3 * 32 * 32  # of the binary form: the label, then the pixels


def cifar10(folder: str | Path, *, valid: int = 5_000) -> Splits:
    """CIFAR-10 from a folder of its batches, in the form for Python or the binary form.

    Args:
        folder: holds ``data_batch_1`` … ``data_batch_5`` and ``test_batch``, or the same with ``.bin``.
        valid: how many training images are held out to choose learning rates, drawn once and for all.

    Returns:
        Batches of (float32 images of shape (n, 3, 32, 32), int64 labels). Each channel has mean 0 and standard
        deviation 1 over the images to train with. The report split is the test set.

    Raises:
        FileNotFoundError: a batch is missing.
        ValueError: a file is none of CIFAR-10's, or ``valid`` leaves nothing to train with.

    Pickles are read by a reader that knows arrays and nothing else: a file made to run code is refused.
    Not with augmentation: a task's ``loss`` can flip and shift, with random numbers common to all contenders.

    Example:
        >>> from piste.race.loaders import cifar10
        >>> data = lambda: cifar10("~/data/cifar-10-batches-py")  # for Task(data=data, ...)

    Source: Krizhevsky 2009, Learning multiple layers of features from tiny images.
    """
    directory = Path(folder).expanduser()
    names = [f"data_batch_{number}" for number in range(1, 6)]
    images, labels = _joined([_cifar_batch(directory, name) for name in names])
    if not 0 < valid < len(images):
        raise ValueError(f"valid={valid} of {len(images)} images; legal: 1 to {len(images) - 1}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    kept, held_out = order[valid:], order[:valid]
    shift, scale = _moments(images[kept])
    parts = [(images[kept], labels[kept]), (images[held_out], labels[held_out]), _cifar_batch(directory, "test_batch")]
    return Splits(*(Collated(_Images(*part, shift, scale), _as_it_is) for part in parts))


class _Images(Dataset[Any]):
    """Bytes that become numbers batch by batch: a quarter of the memory."""

    def __init__(self, images: Tensor, labels: Tensor, shift: Tensor, scale: Tensor) -> None:
        self.images, self.labels, self.shift, self.scale = images, labels, shift, scale

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return (self.images[indices].float() - self.shift) / self.scale, self.labels[indices]


def _as_it_is(batch: Any) -> Any:
    return batch


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, shaped to broadcast; from counts of the 256 values, exactly."""
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ values
    deviation = (shares @ values.square() - mean.square()).sqrt().clamp_min(1e-3)
    return mean.float().view(3, 1, 1), deviation.float().view(3, 1, 1)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _cifar_batch(directory: Path, name: str) -> tuple[Tensor, Tensor]:
    """Images as bytes, and labels, of one file."""
    binary, pickled = directory / f"{name}.bin", directory / name
    if binary.is_file():
        images, labels = _from_binary(binary)
    elif pickled.is_file():
        images, labels = _from_pickle(pickled)
    else:
        raise FileNotFoundError(f"there is neither {pickled} nor {binary.name}; legal: a folder of CIFAR-10's batches")
    if len(images) == 0 or len(images) != len(labels) or labels.min() < 0 or labels.max() >= _CIFAR_CLASSES:
        raise ValueError(f"{directory / name} is no batch of CIFAR-10: its labels are not one of 0 to 9 for each image")
    return images.view(-1, *_CIFAR_SHAPE), labels


def _from_binary(path: Path) -> tuple[Tensor, Tensor]:
    content = np.fromfile(path, dtype=np.uint8)
    if len(content) % _CIFAR_ROW:
        raise ValueError(f"{path} is no batch of CIFAR-10: {len(content)} bytes are no multiple of {_CIFAR_ROW}")
    rows = torch.from_numpy(content).view(-1, _CIFAR_ROW)
    return rows[:, 1:].contiguous(), rows[:, 0].long()


def _from_pickle(path: Path) -> tuple[Tensor, Tensor]:
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images, labels = torch.as_tensor(np.array(content[b"data"])), torch.tensor(content[b"labels"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no batch of CIFAR-10: {type(error).__name__}: {error}") from error
    if images.dtype != torch.uint8 or images.ndim != 2 or images.shape[1] != _CIFAR_ROW - 1:
        raise ValueError(f"{path} is no batch of CIFAR-10: its data are {images.dtype} of shape {tuple(images.shape)}")
    return images, labels.long()


class _ArraysOnly(pickle.Unpickler):
    """Reads numbers, text, lists, dicts and numpy arrays. Everything else that a pickle could call is refused."""

    _reconstruct = np.zeros(1).__reduce__()[0]
    _known: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # How Python 3 writes bytes in the form of Python 2.
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin-1"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self._known[module, name]


def three_parts(
    dataset: Any,
    *,
    valid: Any = 0.1,
    report: Any = 0.1,
    seed: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Splits:
    """Any data set that is read by index (torchvision's, Hugging Face's, a list) as the three parts of a task.

    Args:
        dataset: has ``__len__`` and ``__getitem__``.
        valid: a data set of its own, or which share of ``dataset`` is held out to choose learning rates.
        report: likewise, for the scores; torchvision's ``train=False`` is for here.
        seed: of the draw that decides which examples are held out.
        collate: makes a batch of a list of examples; None: torch's ``default_collate``, with pictures (of PIL) turned
            into float tensors of shape (channels, height, width) between 0 and 1.

    Raises:
        TypeError: a data set cannot be read by index.
        ValueError: a share is not between 0 and 1, or a part would be empty.

    Example:
        >>> from piste.race.loaders import three_parts
        >>> splits = three_parts([(float(i), i % 2) for i in range(100)], valid=0.2, report=0.1)
        >>> len(splits.train), len(splits.valid), len(splits.report)
        (70, 20, 10)
    """
    given = {"valid": valid, "report": report}
    _check_indexed("dataset", dataset)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = {}
    for name, value in given.items():
        if isinstance(value, (int, float)):
            parts[name], order = _share_of(dataset, order, name, float(value))
        else:
            _check_indexed(name, value)
            parts[name] = value
    train = dataset if len(order) == len(dataset) else Subset(dataset, order)
    make = collate or _collated_pictures
    return Splits(*(Collated(part, make) for part in (train, parts["valid"], parts["report"])))


def _share_of(dataset: Any, order: list[int], name: str, share: float) -> tuple[Subset[Any], list[int]]:
    """The share as a subset, and the order without it."""
    count = round(share * len(dataset))
    if not 0 < share < 1 or not 0 < count < len(order):
        raise ValueError(f"{name}={share:g} of {len(dataset)} examples; legal: a share that leaves every part some")
    return Subset(dataset, order[:count]), order[count:]


def _check_indexed(name: str, dataset: Any) -> None:
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(f"{name} is a {type(dataset).__name__}; legal: a data set with a length that is read by index")


def _collated_pictures(examples: list[Any]) -> Any:
    return default_collate([_without_pictures(example) for example in examples])


def _without_pictures(example: Any) -> Any:
    if isinstance(example, Mapping):
        return {name: _without_pictures(value) for name, value in example.items()}
    if isinstance(example, (tuple, list)):
        return tuple(_without_pictures(value) for value in example)
    if not hasattr(example, "getbands"):  # what only PIL's images have
        return example
    pixels = torch.from_numpy(np.array(example))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)
    return pixels.float() / (255 if pixels.dtype == torch.uint8 else 1)


def hugging_face(
    source: Any, *, columns: Sequence[str] | None = None, valid: float = 0.1, report: float = 0.1, seed: int = 0
) -> Splits:
    """A data set of Hugging Face's ``datasets`` that was kept with ``save_to_disk``, or is in memory.

    Args:
        source: the folder, a ``Dataset``, or a ``DatasetDict`` with ``"train"`` and perhaps ``"validation"`` and
            ``"test"``, which become the other two parts.
        columns: those of a batch; None: all.
        valid: the share of ``"train"`` that is held out where there is no ``"validation"``.
        report: likewise for ``"test"``.
        seed: of that draw.

    Returns:
        Batches are dicts of tensors, one for each column, as ``with_format("torch")`` gives them.

    Raises:
        ModuleNotFoundError: ``datasets`` is not installed.
        ValueError: there is no ``"train"``, a column is unknown, or a part would be empty.

    Example:
        >>> from piste.race.loaders import hugging_face
        >>> data = lambda: hugging_face("~/data/emotion", columns=["input_ids", "label"])  # for Task(data=data, ...)
    """
    import datasets  # type: ignore[import-untyped, import-not-found, unused-ignore]

    found = datasets.load_from_disk(str(Path(source).expanduser())) if isinstance(source, (str, Path)) else source
    parts = dict(found) if isinstance(found, Mapping) else {"train": found}
    if "train" not in parts:
        raise ValueError(f"the splits are {', '.join(parts)}; legal: a 'train' among them")
    have = parts["train"].column_names
    unknown = [name for name in columns or () if name not in have]
    if unknown:
        raise ValueError(f"columns has {unknown[0]!r}; legal: {', '.join(have)}")
    wanted = None if columns is None else list(columns)
    made = {name: part.with_format("torch", columns=wanted) for name, part in parts.items()}
    held_out = {"valid": made.get("validation", valid), "report": made.get("test", report)}
    return three_parts(made["train"], **cast(Any, held_out), seed=seed, collate=default_collate)
