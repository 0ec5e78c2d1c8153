"""Which parameter of a model gets which treatment: weight decay, layer-wise learning rates, full-precision state."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise, zip_longest
from math import isfinite, sqrt
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from piste.checks import refuse_unknown

__all__ = [
    "CONTAINERS",
    "GROUP_OPTIONS",
    "TRANSPOSED",
    "ModelWeight",
    "check_types",
    "describe_groups",
    "groups_table",
    "is_norm",
    "model_scales",
    "model_weights",
    "owned_by",
    "param_groups",
    "split_groups",
]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ALWAYS_FP32_BELOW = 4096  # no storage format quantises the state of smaller tensors, so they need no mark


@dataclass(eq=False)
class ModelWeight:
    """A parameter, under the first of its names, with every module that owns it (tied weights have several)."""

    name: str
    tensor: Tensor
    owners: list[nn.Module] = field(default_factory=list)


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    decay_norm_and_bias: bool = False,
    layer_decay: float | None = None,
    fp32_state: Sequence[type[nn.Module]] = (nn.Embedding,),
    *,
    no_decay: Sequence[type[nn.Module]] = (),
    lr: float | None = None,
    depth: Callable[[str], int] | None = None,
    include_frozen: bool = False,
    table: Callable[[str], object] | None = None,
    **unknown: NoReturn,
) -> list[dict[str, Any]]:
    """Parameter groups of a model, for any torch optimizer: weights decay, biases and norms do not.

    What is decayed is decided by what a parameter *is*, never by its name. Not decayed are the parameters of norm
    layers (every norm of ``torch.nn``, and modules with "Norm" in the name of their class or of one it derives from),
    vectors and single numbers (biases, scales, free parameters of at most one axis), the ``bias_k`` and ``bias_v`` of
    ``nn.MultiheadAttention``, modules of the types in ``no_decay``, and the names that the model itself lists in a
    method ``no_weight_decay()``, as timm's models do.

    Tied weights are counted once, under their first name; one owner that is spared or in ``fp32_state`` is enough.
    Groups are as few as the settings allow, and keep the order of the model.

    Layer-wise decay multiplies the learning rate by ``layer_decay`` for every layer between a weight and the output.
    Depth is read off the order in which modules were registered: each child of an ``nn.Sequential``, ``nn.ModuleList``
    or ``nn.ModuleDict`` is a layer, and each run of weights between such containers (the embeddings before the blocks,
    the norm and head behind them) is one layer. A container directly in a container is opened, and so is, in an
    ``nn.Sequential``, the only child of its class if it has containers of its own (``Sequential(backbone, head)``).

    Args:
        model: the module to be trained.
        weight_decay: of the decayed parameters, at least 0.
        decay_norm_and_bias: True decays all parameters alike.
        layer_decay: factor of the learning rate per layer, in (0, 1]; None gives all layers the optimizer's own rate.
        fp32_state: types of modules whose optimizer state stays in 32 bits under ``state="8bit"`` and the like (their
            groups say ``"state": "fp32"``). Tensors of fewer than 4,096 numbers always stay, and are not marked.
        no_decay: further types of modules whose own parameters are not decayed.
        lr: learning rate of the layer next to the output; needed with ``layer_decay`` and refused without it.
        depth: your own depth of a parameter, from its name, 0 for those next to the input; only with ``layer_decay``.
        include_frozen: True keeps parameters with ``requires_grad=False``, so that they can be unfrozen later under the
            same optimizer; False leaves them out.
        table: a function that is handed the table of what went where: ``table=print``.
        **unknown: nothing else is taken; a misspelt option is refused with the nearest known ones.

    Returns:
        Groups with "params", "param_names", "weight_decay" and, where they differ, "lr" and "state".

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: an unknown option, an argument out of its range, nothing to train, or a lazy parameter without
            shape yet.

    Not enough for optimizers with a rule of their own for matrices: ``piste.Muon.groups`` sorts these groups further.

    >>> import piste
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> for group in piste.param_groups(model, weight_decay=0.1):
    ...     print(group["weight_decay"], group["param_names"])
    0.1 ['0.weight', '2.weight']
    0.0 ['0.bias', '1.weight', '1.bias', '2.bias']

    Sources: no decay on norms and biases: Goyal et al., 2017 (arXiv 1706.02677). Layer-wise decay: Clark et al.,
    ELECTRA, 2020 (arXiv 2003.10555). 32-bit state of embeddings: Dettmers et al., 2022 (arXiv 2110.02861).
    """
    refuse_unknown("param_groups", unknown, GROUP_OPTIONS)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; legal: an nn.Module, whose modules say what its weights are"
        )
    if not (_number(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay={weight_decay!r} is not legal; legal: a finite number >= 0")
    check_types("fp32_state", fp32_state)
    check_types("no_decay", no_decay)
    _check_layer_decay(layer_decay, lr, depth)
    everything = model_weights(model)
    weights = [w for w in everything if include_frozen or w.tensor.requires_grad]
    if not weights:
        raise ValueError("model has no parameter to train: it has none, or all are frozen (requires_grad=False)")
    spared = _spared(model, weights, tuple(no_decay))
    rates = {} if layer_decay is None or lr is None else _rates(model, weights, layer_decay, lr, depth)

    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for weight in weights:
        settings: dict[str, Any] = {"weight_decay": weight_decay}
        if weight.name in spared and not decay_norm_and_bias:
            settings["weight_decay"] = 0.0
        if rates:
            settings["lr"] = rates[weight.name]
        if owned_by(weight, tuple(fp32_state)) and weight.tensor.numel() >= _ALWAYS_FP32_BELOW:
            settings["state"] = "fp32"
        group = groups.setdefault(tuple(settings.items()), {"params": [], "param_names": [], **settings})
        group["params"].append(weight.tensor)
        group["param_names"].append(weight.name)
    if table is not None:
        left_out = [w.name for w in everything if w not in weights]
        table(groups_table(list(groups.values()), left_out))
    return list(groups.values())


#: the options of :func:`param_groups` by name: its arguments but the model
GROUP_OPTIONS = tuple(name for name in inspect.signature(param_groups).parameters if name not in ("model", "unknown"))


def describe_groups(groups: Iterable[dict[str, Any]]) -> str:
    """A table of what went where: the settings of each group and the names in it, numbered blocks folded into one line.

    Args:
        groups: from :func:`param_groups`, or the ``param_groups`` of any optimizer.

    Returns:
        Several lines of text, without a line end at the end.

    Raises:
        KeyError: an entry has no "params".

    Not a format to parse: read the groups themselves.

    >>> import piste
    >>> from torch import nn
    >>> groups = piste.param_groups(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))
    >>> print(piste.describe_groups(groups))
    group  weight_decay  lr  state  tensors  numbers  parameters
        0          0.01   -      -        2       48  *.weight x2
        1             0   -      -        2       10  *.bias x2
    """
    return groups_table(list(groups))


def model_scales(model: nn.Module, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same groups, split by the ``scale`` that trained entries of each weight should have, for Amos.

    From the type of the module that owns a weight: norm scales 1; biases and other vectors 0.5; embeddings
    sqrt(2 / width); dense layers and convolutions sqrt(1 / fan-in), or sqrt(2 / fan-in) right behind a ReLU, GELU or
    SiLU in an ``nn.Sequential``. A group that names its own ``scale`` keeps it.

    Args:
        model: that owns the weights.
        groups: as :func:`param_groups` makes them.

    Returns:
        New groups with "scale" and "transposed" (is the first axis that of the inputs?), in the order of their first
        weights. Nothing tells of raw parameters what they are for: those of two axes and more count as dense layers.

    >>> import piste
    >>> from torch import nn
    >>> [group["scale"] for group in piste.Amos.groups(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)))]
    [0.25, 0.5]

    Source: Tian & Parikh 2022 (arXiv 2210.11693), and the settings of its authors' experiments.
    """
    owners = {id(w.tensor): w.owners[0] for w in model_weights(model)}
    behind = _behind_rectifier(model)

    def settings(tensor: Tensor) -> dict[str, Any]:
        owner = owners.get(id(tensor))
        turned = tensor.ndim > 1 and isinstance(owner, TRANSPOSED)
        return {"scale": _scale(tensor, owner, owner in behind), "transposed": turned}

    return split_groups(groups, settings)


def split_groups(
    groups: Iterable[dict[str, Any]], settings: Callable[[Tensor], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The same groups, split by what ``settings`` says of each weight; what a group says itself goes before.

    Returns:
        New groups in the order of their first weights.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for index, group in enumerate(groups):
        names = group.get("param_names")
        own = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        for position, tensor in enumerate(group["params"]):
            whole = settings(tensor) | own
            named: dict[str, Any] = {} if names is None else {"param_names": []}
            new = found.setdefault((index, *map(whole.get, sorted(whole))), {"params": [], **named, **whole})
            new["params"].append(tensor)
            if names is not None:
                new["param_names"].append(names[position])
    return list(found.values())


def _scale(tensor: Tensor, owner: nn.Module | None, rectified: bool) -> float:
    if tensor.ndim < 2:
        is_norm_scale = owner is not None and is_norm(owner) and tensor is getattr(owner, "weight", None)
        return 1.0 if is_norm_scale else 0.5
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return sqrt(2 / tensor.shape[-1])
    fan_in = tensor.shape[1:].numel()
    if isinstance(owner, TRANSPOSED):  # (in, out / groups, *kernel)
        fan_in = tensor.shape[0] // owner.groups * tensor.shape[2:].numel()
    return sqrt((2 if rectified else 1) / max(1, fan_in))


def _behind_rectifier(model: nn.Module) -> set[nn.Module]:
    """Modules that read what a rectifier has made: only ``nn.Sequential`` tells the order."""
    found: set[nn.Module] = set()
    for sequence in model.modules():
        if isinstance(sequence, nn.Sequential):
            layers = [m for m in sequence if not isinstance(m, (nn.Dropout, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d))]
            rectifiers = (nn.ReLU, nn.GELU, nn.SiLU)
            found |= {after for before, after in pairwise(layers) if isinstance(before, rectifiers)}
    return found


def check_types(name: str, types: Sequence[type[nn.Module]]) -> None:
    good = isinstance(types, (tuple, list)) and all(isinstance(t, type) and issubclass(t, nn.Module) for t in types)
    if not good:
        raise ValueError(f"{name}={types!r} is not legal; legal: a tuple of nn.Module classes")


def _check_layer_decay(layer_decay: float | None, lr: float | None, depth: object) -> None:
    if layer_decay is None:
        for name, value in (("lr", lr), ("depth", depth)):
            if value is not None:
                raise ValueError(f"{name}={value!r} is not legal without layer_decay; legal: None")
    elif not (_number(layer_decay) and 0 < layer_decay <= 1):
        raise ValueError(f"layer_decay={layer_decay!r} is not legal; legal: None or a number in (0, 1]")
    elif lr is None or not (_number(lr) and lr >= 0):
        raise ValueError(
            f"lr={lr!r} is not legal with layer_decay; legal: the last layer's learning rate, a number >= 0"
        )


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def model_weights(model: nn.Module) -> list[ModelWeight]:
    found: dict[int, ModelWeight] = {}
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(prefix=path, recurse=False):
            if is_lazy(tensor):
                raise ValueError(f"parameter {name!r} has no shape yet: run one batch through the model first")
            found.setdefault(id(tensor), ModelWeight(name, tensor)).owners.append(module)
    return list(found.values())


def _spared(model: nn.Module, weights: list[ModelWeight], no_decay: tuple[type[nn.Module], ...]) -> set[str]:
    """The names of parameters that are not decayed."""
    listed = getattr(model, "no_weight_decay", None)
    spared = {str(name) for name in listed()} if callable(listed) else set()
    for weight in weights:
        vector = weight.tensor.ndim <= 1
        if vector or owned_by(weight, no_decay) or any(map(is_norm, weight.owners)) or _is_attention_bias(weight):
            spared.add(weight.name)
    return spared


def is_norm(module: nn.Module) -> bool:
    return any("Norm" in base.__name__ for base in type(module).__mro__)


def _is_attention_bias(weight: ModelWeight) -> bool:
    """The only biases of ``torch.nn`` that are no vectors: their shape is (1, 1, width)."""
    attentions = [owner for owner in weight.owners if isinstance(owner, nn.MultiheadAttention)]
    return any(weight.tensor is bias for owner in attentions for bias in (owner.bias_k, owner.bias_v))


def owned_by(weight: ModelWeight, types: tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(owner, types) for owner in weight.owners)


def _rates(
    model: nn.Module, weights: list[ModelWeight], layer_decay: float, lr: float, depth: Callable[[str], int] | None
) -> dict[str, float]:
    layers = _layers(model)
    depths = {w.name: layers[id(w.tensor)] if depth is None else depth(w.name) for w in weights}
    last = max(depths.values())
    return {name: lr * layer_decay ** (last - number) for name, number in depths.items()}


def _layers(model: nn.Module) -> dict[int, int]:
    """The layer of each parameter (by id), counted from the input."""
    first: dict[int, str] = {}
    for tensor, block in _blocks(model, ""):
        first.setdefault(id(tensor), block)
    runs = groupby(first.items(), key=lambda item: item[1])
    return {tensor: number for number, (_, run) in enumerate(runs) for tensor, _ in run}


def _blocks(module: nn.Module, path: str) -> Iterator[tuple[Tensor, str]]:
    """Every parameter with the path of the block it is in; the path is empty between blocks."""
    for tensor in module.parameters(recurse=False):
        yield tensor, ""
    for name, child in module.named_children():
        inside = f"{path}.{name}"
        if isinstance(module, CONTAINERS) and not _is_opened(child, module):
            for tensor in child.parameters():
                yield tensor, inside
        else:
            yield from _blocks(child, inside)


def _is_opened(child: nn.Module, container: nn.Module) -> bool:
    if isinstance(child, CONTAINERS):
        return True
    alone = sum(type(other) is type(child) for other in container.children()) == 1
    has_containers = any(isinstance(inner, CONTAINERS) for inner in child.modules())
    return isinstance(container, nn.Sequential) and alone and has_containers


def groups_table(groups: list[dict[str, Any]], left_out: Iterable[str] = ()) -> str:
    """What :func:`describe_groups` returns, with the names of frozen parameters at the end."""
    shown = [*(["rule"] if any("rule" in group for group in groups) else []), "weight_decay", "lr", "state"]
    rows = [["group", *shown, "tensors", "numbers", "parameters"]]
    last = len(rows[0]) - 1
    for number, group in enumerate(groups):
        members = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        names = group.get("param_names") or [p[0] for p in group["params"] if isinstance(p, tuple)]
        settings = [_cell(group.get(key)) for key in shown]
        counts = [str(len(members)), f"{sum(p.numel() for p in members):,}"]
        patterns = _folded(names) or ["(no names)"]
        rows.append([str(number), *settings, *counts, patterns[0]])
        rows += [[""] * last + [pattern] for pattern in patterns[1:]]
    widths = [max(len(row[column]) for row in rows) for column in range(last)]
    lines = ["  ".join([*map(str.rjust, row[:last], widths), row[last]]) for row in rows]
    return "\n".join(lines + [f"left out, frozen: {pattern}" for pattern in _folded(left_out)])


def _cell(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{float(value):.4g}"


def _folded(names: Iterable[str]) -> list[str]:
    """Names that differ in their numbers alone become one, with a star where the numbers differ and a count."""
    number = re.compile(r"\b\d+\b")
    families: dict[tuple[str, ...], list[list[str]]] = {}
    for name in names:
        families.setdefault(tuple(number.split(name)), []).append(number.findall(name))
    folded = []
    for pieces, numbers in families.items():
        shown = [column[0] if len(set(column)) == 1 else "*" for column in zip(*numbers, strict=True)]
        text = "".join(map("".join, zip_longest(pieces, shown, fillvalue="")))
        folded.append(f"{text} x{len(numbers)}" if len(numbers) > 1 else text)
    return folded
