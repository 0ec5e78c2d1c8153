"""Frameworks that may be missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["framework"]


@contextmanager
def framework(name: str) -> Iterator[None]:
    """Round the imports of a framework: where it is missing, say how to get it.

    Args:
        name: of the package, which is also that of the extra of piste.

    Raises:
        ModuleNotFoundError: the package is not installed. Errors inside of a package that is there pass through.

    Example:
        >>> from piste.integrations.framework import framework
        >>> with framework("no_such_framework"):
        ...     import no_such_framework
        Traceback (most recent call last):
        ModuleNotFoundError: this part of piste needs no_such_framework: pip install 'piste[no_such_framework]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name:
            raise
        raise ModuleNotFoundError(
            f"this part of piste needs {name}: pip install 'piste[{name}]'", name=error.name
        ) from error
