"""What is said where a framework is not installed."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize("name", ["fastai", "timm"])
def test_a_missing_framework_says_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == name or m == f"piste.integrations.{name}"]:
        monkeypatch.delitem(sys.modules, module)

    class Missing:
        """Finds nothing of it."""

        @staticmethod
        def find_spec(module: str, path: object = None, target: object = None) -> None:
            if module.partition(".")[0] == name:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=rf"needs {name}: pip install 'piste\[{name}\]'"):
        importlib.import_module(f"piste.integrations.{name}")
