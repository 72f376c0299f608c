"""The mesh: forms the process groups of one epoch, and takes them down.

The only place that makes process groups, in rank processes. Groups are built on their own prefix of the epoch's store
and never on torch.distributed's global default group, so epochs cannot mix and nothing is left behind in the process.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from parallel.comm import Backend, Group
from parallel.context import ParallelContext, solo_context

PUBLISH_TIMEOUT_S = 30.0


def open_store(host: str) -> tuple[TCPStore, str]:
    """A store served from this process on a free port, and its "host:port". It lives as long as the object."""
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    return store, f"{host}:{store.port}"


def form_context(
    store_address: str,
    prefix: str,
    epoch: int,
    rank: int,
    tensor: int,
    device: torch.device,
    dtype: torch.dtype,
    timeout_s: float,
) -> ParallelContext:
    """Meets the other ranks at the store under prefix and epoch; returns when all have come.

    timeout_s bounds the meeting and every later gloo collective; a peer that dies makes those raise at once.
    """
    if tensor == 1:
        return solo_context(device, dtype, epoch)
    timeout = timedelta(seconds=timeout_s)
    store = PrefixStore(f"{prefix}/epoch-{epoch}/tensor", _client(store_address, timeout_s))
    if device.type == "cuda":
        backend = _nccl(store, rank, tensor, device, timeout)
    else:
        backend = _gloo(store, rank, tensor, _address_facing(store_address), timeout)
    group = Group(rank, tensor, backend)
    present = group.all_reduce(torch.ones(1, device=device)).item()  # connects now, while a late peer is still expected
    assert present == tensor, f"{present} ranks of {tensor} met at {prefix}"
    return ParallelContext(epoch=epoch, tensor=group, device=device, dtype=dtype)


def publish(store_address: str, key: str, value: str) -> None:
    """Leaves a word for the other ranks at the store."""
    _client(store_address, PUBLISH_TIMEOUT_S).set(key, value)


def lookup(store_address: str, key: str, timeout_s: float) -> str:
    """The word left under a key; waits for it. Raises torch.distributed.DistStoreError after timeout_s."""
    return str(_client(store_address, timeout_s).get(key).decode())


def close(context: ParallelContext) -> None:
    """Ends the context's groups; collectives that wait in them fail. The context is useless afterwards."""
    backend = context.tensor.backend
    if backend is not None:
        backend.abort()


def _client(store_address: str, timeout_s: float) -> TCPStore:
    host, _, port = store_address.rpartition(":")
    return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))


def _gloo(store: Store, rank: int, size: int, address: str, timeout: timedelta) -> Backend:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    options._devices = [gloo.create_device(hostname=address)]
    backend: Backend = gloo(store, rank, size, options)
    return backend


def _nccl(store: Store, rank: int, size: int, device: torch.device, timeout: timedelta) -> Backend:
    torch.cuda.set_device(device)
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    backend: Backend = nccl(store, rank, size, options)
    return backend


def _address_facing(store_address: str) -> str:
    """Our own address on the store's network: gloo listens there, whatever the host's name resolves to."""
    host, _, port = store_address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        address: str = connection.getsockname()[0]
    return address
