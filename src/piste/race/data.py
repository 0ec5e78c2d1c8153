"""Splits of a task's data: how many examples, one batch, the order of batches, a fingerprint.

A split is a tuple of tensors of equal length (the fast way: a batch is the same tuple, indexed), a map-style
``torch.utils.data.Dataset`` (a batch is made with torch's own ``default_collate``) or a ``DataLoader``, of which the
data set and the function that makes batches are taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

Split = Sequence[Tensor] | Dataset[Any]

_FINGERPRINT_EXAMPLES = 64


@dataclass(frozen=True)
class Splits:
    """The three parts of a task's data. No example should stand in two of them.

    Args:
        train: what the gradient sees.
        valid: chooses the learning rate of each contender; its curve is drawn in the report.
        report: used once, at the end of each confirmation run, and for nothing else: the scores.

    Each is a tuple of tensors of equal length, a map-style ``torch.utils.data.Dataset``, or a ``DataLoader``: of that
    the race takes the data set and the ``collate_fn``; the order is the race's own, the same for every contender, and
    the size of batches the task's.

    Raises:
        ValueError: a part is none of those, has tensors of different lengths, is empty, or is a loader that cannot be
            read by index or has a sampler of its own.

    Example:
        >>> import torch
        >>> from piste.race import Splits
        >>> x, y = torch.randn(100, 2), torch.zeros(100)
        >>> splits = Splits(train=(x[:60], y[:60]), valid=(x[60:80], y[60:80]), report=(x[80:], y[80:]))
    """

    train: Split
    valid: Split
    report: Split

    def __post_init__(self) -> None:
        for name in ("train", "valid", "report"):
            object.__setattr__(self, name, _checked_split(name, getattr(self, name)))


class Collated(Dataset[Any]):
    """Anything with a length that is read by index, and what makes a batch of its examples.

    Args:
        examples: has ``__len__`` and ``__getitem__``, or ``__getitems__`` for many at once.
        collate: makes a batch of a list of examples.
    """

    def __init__(self, examples: Any, collate: Callable[[list[Any]], Any]) -> None:
        self.examples = examples
        self.collate = collate

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]

    def batch(self, indices: list[int]) -> Any:
        """The examples at ``indices`` as one batch."""
        if hasattr(self.examples, "__getitems__"):
            return self.collate(self.examples.__getitems__(indices))
        return self.collate([self.examples[index] for index in indices])


def length(split: Split) -> int:
    """Number of examples."""
    return len(cast(Sized, split)) if isinstance(split, Dataset) else len(split[0])


def fetch(split: Split, indices: Tensor) -> Any:
    """The examples at ``indices`` as one batch."""
    if isinstance(split, Collated):
        return split.batch(indices.tolist())
    if isinstance(split, Dataset):
        return default_collate([split[index] for index in indices.tolist()])
    return tuple(tensor[indices] for tensor in split)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch (tuples, lists and mappings of tensors)."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(item, device) for name, item in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(to_device(item, device) for item in batch)
    return batch


def is_on(split: Split, device: torch.device) -> bool:
    """Whether batches are tuples of tensors on this device as they are read."""
    return not isinstance(split, Dataset) and all(tensor.device == device for tensor in split)


def training_batches(split: Split, batch_size: int, seed: int) -> Iterator[Any]:
    """Batches without end: every epoch a new order, decided by ``seed`` alone; a last short batch is left out."""
    order = torch.Generator().manual_seed(seed)
    count = length(split)
    while True:
        permutation = torch.randperm(count, generator=order)
        for start in range(0, count - batch_size + 1, batch_size):
            yield fetch(split, permutation[start : start + batch_size])


def evaluation_batches(split: Split, batch_size: int) -> Iterator[tuple[Any, int]]:
    """Every example once, in order, as (batch, number of examples)."""
    for indices in torch.split(torch.arange(length(split)), batch_size):
        yield fetch(split, indices), len(indices)


def fingerprint(splits: Splits) -> str:
    """A hash of the number of examples and of 64 evenly spaced examples of each part.

    Reading every byte of a large dataset at every start would cost more than the race; this catches other data,
    another order and another preprocessing, and does not catch a single altered example in between.
    """
    digest = hashlib.sha256()
    for split in (splits.train, splits.valid, splits.report):
        count = length(split)
        digest.update(str(count).encode())
        indices = torch.linspace(0, count - 1, min(count, _FINGERPRINT_EXAMPLES)).long()
        _update(digest, fetch(split, indices))
    return digest.hexdigest()


def _update(digest: hashlib._Hash, batch: Any) -> None:
    if isinstance(batch, Tensor):
        digest.update(f"{batch.dtype}{tuple(batch.shape)}".encode())
        digest.update(batch.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(batch, Mapping):
        for name in sorted(batch):
            digest.update(str(name).encode())
            _update(digest, batch[name])
    elif isinstance(batch, (tuple, list)):
        for item in batch:
            _update(digest, item)
    else:
        digest.update(repr(batch).encode())


def _checked_split(name: str, split: object) -> Split:
    if isinstance(split, DataLoader):
        split = _of_loader(name, split)
    if isinstance(split, TensorDataset):
        split = split.tensors
    if isinstance(split, Dataset):
        _check_sized(name, split)
        return split
    if not isinstance(split, (tuple, list)) or not split or not all(isinstance(part, Tensor) for part in split):
        raise ValueError(
            f"{name} must be a tuple of tensors, a map-style torch.utils.data.Dataset or a DataLoader, "
            f"not {_described(split)}"
        )
    if any(part.ndim == 0 for part in split):
        raise ValueError(f"{name} holds a tensor without dimensions; the first dimension counts the examples")
    lengths = [len(part) for part in split]
    if len(set(lengths)) != 1:
        raise ValueError(f"the tensors of {name} must have equal lengths, not {lengths}")
    if lengths[0] == 0:
        raise ValueError(f"{name} is empty")
    return tuple(split)


def _of_loader(name: str, loader: DataLoader[Any]) -> Dataset[Any]:
    """A loader's data set and collate function; what decides its order would be lost, so that must say nothing."""
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(f"{name} is a DataLoader of an IterableDataset; legal: of a data set that is read by index")
    if loader.batch_sampler is None:
        raise ValueError(f"{name} is a DataLoader without batches; legal: one with a batch_size")
    order = getattr(loader.batch_sampler, "sampler", None)
    if not isinstance(order, (RandomSampler, SequentialSampler)):
        raise ValueError(
            f"{name} is a DataLoader with a {type(order).__name__}; legal: shuffled or in order, for the race decides "
            "which examples make a batch"
        )
    return Collated(loader.dataset, loader.collate_fn)


def _check_sized(name: str, split: Dataset[Any]) -> None:
    try:
        count = len(cast(Sized, split))
    except TypeError:
        raise ValueError(f"{name} must have a length (a map-style dataset), {type(split).__name__} has none") from None
    if count == 0:
        raise ValueError(f"{name} is empty")


def _described(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(sorted({type(item).__name__ for item in value})) or 'nothing'}"
    return type(value).__name__
