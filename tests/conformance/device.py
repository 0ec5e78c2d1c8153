"""Promises on another device: their tensors are made there, and come back when NumPy asks for them."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

__all__ = ["On"]


class On(TorchFunctionMode):
    """``with On(device):`` like a default device, under which generators of the CPU and ``numpy()`` go on working."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.makers = _device_constructors()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.Tensor.numpy, torch.Tensor.__array__):
            return func(args[0].cpu(), *args[1:], **given)
        if func in self.makers and given.get("device") is None and "out" not in given:
            if given.get("generator") is not None:
                return func(*args, **given).to(self.device)
            given["device"] = self.device
        return func(*args, **given)
