"""Products of rows with a matrix, x W^T + b, as the layers of parallel/tensor.py and gated MLPs ask for them.

In rank processes. Few rows are multiplied by a kernel where there is one for the device, which reads the matrix sooner
than torch's product does; this is the one place that decides, but among the ways of `parallel/float8.py`. It knows no
model.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from parallel import float8, kernels
from parallel.float8 import Float8, Matrix

FEW_ROWS = 16  # a tile of tensor cores; beyond, torch's product takes less time, as measured
LEAST_ROWS = (1, 2)  # from each of these on a product of few rows is cut otherwise, which compiles a kernel


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """x [r, inputs], weight [outputs, inputs] -> [r, outputs]."""
    if isinstance(weight, Float8):
        return float8.linear(x, weight, bias)
    if takes_few(x, weight):
        from parallel.kernels.linear import linear_of_few_rows

        return linear_of_few_rows(x, weight, bias)
    return F.linear(x, weight, bias)


def takes_few(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels for few rows take these."""
    fits = x.dim() == 2 and len(x) <= FEW_ROWS and x.dtype == weight.dtype and weight.is_contiguous()
    return fits and x.dtype in kernels.DTYPES and kernels.can_run(x.device)
