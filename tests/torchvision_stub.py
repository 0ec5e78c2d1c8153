"""torchvision beside a CPU build of torch.

Its wheels of the usual registry are CUDA builds whose custom operators a CPU build of torch cannot load, and then
``import torchvision`` fails, with everything that imports it: timm, fastai, transformers' Trainer. Declaring the
operators by name is enough for an import; nothing in these tests calls them. Users are not affected: whoever trains
on images has a torchvision that fits.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

_declared: list[torch.library.Library] = []  # operators live as long as their library


def declare_operators() -> None:
    """Declare torchvision's operators, if it is installed and they are not there."""
    found = importlib.util.find_spec("torchvision")
    if _declared or found is None or found.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    text = (Path(found.origin).parent / "_meta_registrations.py").read_text(encoding="utf-8")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted(set(re.findall(r"torchvision::(\w+)|register_meta\(\"(\w+)\"\)", text))):
        library.define(f"{name[0] or name[1]}(Tensor a) -> Tensor")
    _declared.append(library)
