"""Where kernels are tested: on a CUDA device, or on the CPU by Triton's interpreter, which tests/conftest.py asks for.

Tests that import this are skipped where Triton is not installed; it comes with torch for CUDA. The interpreter cannot
multiply in bfloat16, and does not say what a compiler makes of a kernel: benchmarks/kernels.py checks that on a device.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16, torch.float32]
