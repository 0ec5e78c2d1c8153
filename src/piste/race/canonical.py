"""Plain data as JSON: one text for one content, and its digest.

Numbers that JSON cannot hold (nan, inf) travel as the strings ``"nan"``, ``"inf"`` and ``"-inf"``, so that any JSON
reader can read the files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

__all__ = ["canonical_json", "digest", "fields_of", "plain"]


def plain(value: Any) -> Any:
    """A record or a study as JSON data, where ``asdict`` would copy all it holds; non-finite numbers by name."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return value if _all_finite(value) else [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if is_dataclass(value):
        return {name: plain(item) for name, item in fields_of(value).items()}
    return value


def canonical_json(content: Any) -> str:
    """One text for one content: sorted keys, no spaces, non-finite numbers as strings."""
    try:
        return _compact(content)
    except ValueError:
        return _compact(plain(content))


def _compact(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fields_of(of: Any) -> dict[str, Any]:
    """The fields of a dataclass as they are, where ``asdict`` would copy all they hold."""
    return {name: vars(of)[name] for name in of.__dataclass_fields__}


def digest(text: str) -> str:
    """Its SHA-256 in hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def _all_finite(values: Sequence[Any]) -> bool:
    """Whether these are numbers, and small enough to be added up."""
    try:
        return math.isfinite(sum(values))
    except TypeError:
        return False
