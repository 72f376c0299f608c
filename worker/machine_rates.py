"""What one device of this machine reads and computes a second, measured: `python -m worker.machine_rates DEVICE DTYPE`.

A process of its own, which `echelon bench` runs before anything else holds the device. One JSON line on stdout. Floors
are made of these figures, so they are those of large plain operations: a sum, and a product of square matrices.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable

import torch

WARM_UPS, REPEATS = 3, 10
READ_BYTES = {"cuda": 8 << 30, "cpu": 64 << 20}
PRODUCT_ROWS = {"cuda": 8192, "cpu": 512}
MEMORY_SHARE = 4  # a part of the free memory that the larger of both may take


def measured(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Bytes and FLOP a second of the best of some runs, and what they were measured on."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        name, count = torch.cuda.get_device_name(device), torch.cuda.device_count()
        versions |= {"cuda": str(torch.version.cuda)}
    else:
        name, count = platform.processor() or platform.machine(), 1
    rates = {"read_bytes_s": read_bytes_s(device), "flops": flops(device, dtype)}
    return {"device": device.type, "hardware": name, "devices": count, "versions": versions, **rates}


def read_bytes_s(device: torch.device) -> float:
    """Of memory that no cache holds."""
    count = READ_BYTES[device.type]
    if device.type == "cuda":
        count = min(count, torch.cuda.mem_get_info(device)[0] // MEMORY_SHARE)
    numbers = torch.ones(count // 4, dtype=torch.float32, device=device)
    return numbers.nbytes / _best_s(numbers.sum, device)


def flops(device: torch.device, dtype: torch.dtype) -> float:
    """Of a product of two square matrices: two for each pair of numbers."""
    rows = PRODUCT_ROWS[device.type]
    one, other = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    return 2.0 * rows**3 / _best_s(lambda: one @ other, device)


def _best_s(work: Callable[[], object], device: torch.device) -> float:
    """Of one run; on CUDA of several behind each other, by the device's clock."""
    for _ in range(WARM_UPS):
        work()
    if device.type == "cuda":
        return min(_device_s(work) for _ in range(3))
    return min(_host_s(work) for _ in range(REPEATS))


def _device_s(work: Callable[[], object]) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(REPEATS):
        work()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3 / REPEATS


def _host_s(work: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    work()
    return time.perf_counter() - begun_s


def main(device: str, dtype: str) -> None:
    """device: cpu, cuda, or auto, which is cuda where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = measured(torch.device(device), getattr(torch, dtype))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
