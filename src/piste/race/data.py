"""Splits of a task's data: how many examples, one batch, the order of batches, a fingerprint.

A split is a tuple of tensors of equal length (the fast way: a batch is the same tuple, indexed) or a map-style
``torch.utils.data.Dataset`` (a batch is made with torch's own ``default_collate``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

Split = Sequence[Tensor] | Dataset[Any]

_FINGERPRINT_EXAMPLES = 64


@dataclass(frozen=True)
class Splits:
    """The three parts of a task's data. No example should stand in two of them.

    Args:
        train: what the gradient sees.
        valid: chooses the learning rate of each contender; its curve is drawn in the report.
        report: used once, at the end of each confirmation run, and for nothing else: the scores.

    Each is a tuple of tensors of equal length, or a map-style ``torch.utils.data.Dataset``.

    Raises:
        ValueError: a part is neither, has tensors of different lengths, or is empty.

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


def length(split: Split) -> int:
    """Number of examples."""
    return len(cast(Sized, split)) if isinstance(split, Dataset) else len(split[0])


def fetch(split: Split, indices: Tensor) -> Any:
    """The examples at ``indices`` as one batch."""
    if isinstance(split, Dataset):
        return default_collate([split[index] for index in indices.tolist()])
    return tuple(tensor[indices] for tensor in split)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch (tuples, lists and mappings of tensors)."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(item, device) for name, item in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(to_device(item, device) for item in batch)
    return batch


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
    elif isinstance(batch, dict):
        for name in sorted(batch):
            digest.update(str(name).encode())
            _update(digest, batch[name])
    elif isinstance(batch, (tuple, list)):
        for item in batch:
            _update(digest, item)
    else:
        digest.update(repr(batch).encode())


def _checked_split(name: str, split: object) -> Split:
    if isinstance(split, TensorDataset):
        split = split.tensors
    if isinstance(split, Dataset):
        _check_sized(name, split)
        return split
    if not isinstance(split, (tuple, list)) or not split or not all(isinstance(part, Tensor) for part in split):
        raise ValueError(
            f"{name} must be a tuple of tensors or a map-style torch.utils.data.Dataset, not {_described(split)}"
        )
    if any(part.ndim == 0 for part in split):
        raise ValueError(f"{name} holds a tensor without dimensions; the first dimension counts the examples")
    lengths = [len(part) for part in split]
    if len(set(lengths)) != 1:
        raise ValueError(f"the tensors of {name} must have equal lengths, not {lengths}")
    if lengths[0] == 0:
        raise ValueError(f"{name} is empty")
    return tuple(split)


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
