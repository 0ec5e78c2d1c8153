"""What there is: the optimizer classes of piste, and presets and wrappers by the names that people write."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from piste.pedigree import OPTIMIZERS, OptimizerInfo
from piste.preset import Preset
from piste.presets import presets
from piste.wrappings import WRAPPINGS

__all__ = ["OPTIMIZERS", "OptimizerInfo", "list_optimizers", "list_wrappers", "optimizer_info", "preset_of"]

_ARXIV = re.compile(r"\d{4}\.\d{4,5}")


def optimizer_info(name: str) -> OptimizerInfo:
    """The registry's row of a class, found whatever the case and hyphens of its name.

    Args:
        name: "RangerAdaBelief", "ranger-adabelief", …

    Raises:
        ValueError: there is none; the message names the nearest.

    Not for presets: ``piste.presets[name]`` has those.

    >>> import piste
    >>> piste.optimizer_info("ranger-adabelief").state
    ('m', 's', 'slow')
    """
    by_key = {_key(info.name): info for info in OPTIMIZERS}
    if _key(name) not in by_key:
        known = [info.name for info in OPTIMIZERS]
        raise ValueError(f"no optimizer class {name!r}{_near(name, known)}; there are {', '.join(known)}")
    return by_key[_key(name)]


def list_optimizers(pattern: str = "*") -> list[str]:
    """The names that :func:`piste.create` takes, in order.

    Args:
        pattern: with ``*`` and ``?``; case, hyphens and underscores make no difference. ``"*sam+sgd*"`` is every such
            wrapper round every such preset; without a ``+`` presets alone are meant. An arXiv number is what the
            sources of presets are searched for.

    Returns:
        Names of presets. Every class has one, named like it.

    Raises:
        Nothing: where no name fits, the list is empty.

    Not a list of classes: that is ``piste.registry.OPTIMIZERS``.

    >>> import piste
    >>> piste.list_optimizers("sgd*")
    ['sgd', 'sgd_momentum', 'sgd_nesterov']
    """
    *outer, inner = pattern.split("+")
    found = sorted(name for name in presets if _fits(name, inner, presets[name].source))
    for part in reversed(outer):
        found = [f"{name}+{rest}" for name in list_wrappers(part) for rest in found]
    return found


def list_wrappers(pattern: str = "*") -> list[str]:
    """What may stand before the ``+`` of a name, as in ``"sam+adamw"``.

    Args:
        pattern: with ``*`` and ``?``; or an arXiv number; or what some list calls the paper, as "efficient sam".

    Returns:
        Names of wrappers, a wrapper's own name before the labels of others.

    Raises:
        Nothing: where no name fits, the list is empty.

    >>> import piste
    >>> piste.list_wrappers("efficient sam"), piste.list_wrappers("2205.14083")
    (['looksam'], ['saf', 'mesa'])
    """
    found = [w.name for w in WRAPPINGS.values() if _fits(w.name, pattern, w.source)]
    return found or [w.name for w in WRAPPINGS.values() if any(_fits(label, pattern, "") for label in w.labels)]


def _fits(name: str, pattern: str, source: str) -> bool:
    return fnmatchcase(_key(name), _key(pattern)) or (_ARXIV.fullmatch(pattern) is not None and pattern in source)


def preset_of(name: str | Preset) -> Preset:
    """The preset that :func:`piste.create` makes of a name.

    Args:
        name: as for :func:`piste.create`; a :class:`Preset` is returned as it is.

    Raises:
        TypeError, ValueError: as :func:`piste.create`.

    >>> from piste.registry import preset_of
    >>> preset_of("Efficient SAM+AdamW").name
    'looksam+adamw'
    """
    if isinstance(name, Preset):
        return name
    if not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}; legal: the name of an optimizer, or a Preset")
    *outer, inner = name.split("+")
    by_key = {_key(known): preset for known, preset in presets.items()}
    if _key(inner) not in by_key:
        raise ValueError(f"no optimizer {inner!r}{_near(inner, presets)}; piste.list_optimizers() has all names")
    return presets["+".join([*map(_wrapping, outer), by_key[_key(inner)].name])]


def _wrapping(name: str) -> str:
    """A wrapper's name as it is spelt here; a label of some list's, if it means one wrapper alone."""
    found = [known for known in WRAPPINGS if _key(known) == _key(name)]
    found = found or [w.name for w in WRAPPINGS.values() if _key(name) in map(_key, w.labels)]
    if len(found) != 1:
        raise ValueError(f"no wrapper {name!r}{_near(name, WRAPPINGS)}; legal: {', '.join(WRAPPINGS)}")
    return found[0]


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def _near(name: str, known: Iterable[str]) -> str:
    """A hint at the known names that are spelt nearly so, whatever their case and hyphens."""
    by_key = {_key(each): each for each in known}
    found = [by_key[key] for key in get_close_matches(_key(name), by_key, n=3, cutoff=0.5)]
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""
