"""One thread, one seed, one cache for compiled code: what every test of this folder starts from."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torchvision_stub import declare_operators

declare_operators()  # before any test imports what imports torchvision
# Triton's kernels run in its interpreter; it asks for that when it is imported
os.environ.setdefault("TRITON_INTERPRET", "1")
# compiled kernels are kept beside the checkout, not in the home of whoever runs the tests
os.environ.setdefault("PISTE_CACHE", str(Path(__file__).parent.parent / ".piste-cache"))
# the same examples in every run, however long a busy machine takes to draw them
settings.register_profile("piste", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("piste")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """A fixed seed before each test, and one thread: the tensors here are tiny and the sums must not be reordered.

    PISTE_TEST_THREADS asks for another number.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("PISTE_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(threads)
