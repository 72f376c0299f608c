"""For every test: none judges how long something took, not even hypothesis, for nobody knows who else is at work.

Kernels are interpreted where there is no device for them; Triton settles that when it is first imported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

if importlib.util.find_spec("triton") is not None:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of small models gain nothing from threads, and several ranks on few cores lose much by them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
