"""The mesh: forms the process groups of one epoch, and takes them down.

The only place that makes process groups, in rank processes. The mesh is an arange reshaped. Groups are built on their
own prefix of the epoch's store and never on torch.distributed's global default group, so epochs cannot mix and
nothing is left behind in the process.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from parallel.comm import Backend, Channel, Group
from parallel.context import ParallelContext, solo_context
from parallel.degrees import Place
from parallel.side_stream import SideStream

PUBLISH_TIMEOUT_S = 30.0
REACH_S, COME_S = 10.0, 15.0  # who cannot reach the store says so before the others say that it has not come


def open_store(host: str) -> tuple[TCPStore, str]:
    """A store served from this process on a free port, and its "host:port". It lives as long as the object."""
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    return store, f"{host}:{store.port}"


def form_context(
    store_address: str,
    prefix: str,
    epoch: int,
    place: Place,
    device: torch.device,
    dtype: torch.dtype,
    timeout_s: float,
    depth: int = 1,
    come_s: float = COME_S,
) -> ParallelContext:
    """Meets the other ranks at the store under prefix and epoch; returns when all have come.

    timeout_s bounds each group's meeting and every later gloo collective; a peer that dies makes those raise at once.
    Raises ConnectionError when the store cannot be reached, TimeoutError naming who has not come within come_s.
    depth: how many micro-batches are in the pipeline at once at most.
    """
    if place.degrees.replica_ranks == 1:
        return solo_context(device, dtype, epoch)
    own_address = _address_facing(store_address)
    store = PrefixStore(f"{prefix}/epoch-{epoch}", _client(store_address, timeout_s))
    _await_all(store, place, come_s)
    maker = _Maker(store, own_address, device, timedelta(seconds=timeout_s))
    ranks = torch.arange(place.degrees.replica_ranks).view(place.degrees.pipeline, place.degrees.data, -1)
    stage, data_rank, tensor_rank = place.pipeline_rank, place.data_rank, place.tensor_rank
    replica = maker.on_host("replica", ranks.flatten().tolist(), place.rank)
    present = replica.all_reduce(torch.ones(1)).item()  # connects now, while a late peer is still expected
    assert present == replica.size, f"{present} ranks of {replica.size} met at {prefix}"
    tensor = maker.group("tensor", ranks[stage, data_rank].tolist(), place.rank)
    data = maker.group("data", ranks[stage, :, tensor_rank].tolist(), place.rank)
    received, sent, returned = maker.channels(place, depth)
    return ParallelContext(
        epoch=epoch,
        device=device,
        dtype=dtype,
        place=place,
        tensor=tensor,
        data=data,
        stage=maker.group("stage", ranks[stage].flatten().tolist(), place.rank),
        replica=replica,
        received=received,
        sent=sent,
        returned=returned,
        beside=SideStream.of(device),
    )


def publish(store_address: str, key: str, value: str) -> None:
    """Leaves a word for the other ranks at the store."""
    _client(store_address, PUBLISH_TIMEOUT_S).set(key, value)


def lookup(store_address: str, key: str, timeout_s: float) -> str:
    """The word left under a key; waits for it. Raises torch.distributed.DistStoreError after timeout_s."""
    return str(_client(store_address, timeout_s).get(key).decode())


def close(context: ParallelContext) -> None:
    """Ends the context's groups; collectives that wait in them fail. The context is useless afterwards."""
    groups = (context.tensor, context.data, context.stage, context.replica)
    channels = (context.received, context.sent, context.returned)
    backends = [group.backend for group in groups] + [channel.backend for channel in channels if channel]
    for backend in {id(backend): backend for backend in backends if backend is not None}.values():
        backend.abort()


def _await_all(store: Store, place: Place, come_s: float) -> None:
    """Returns when all ranks have come to the store: no group is begun that cannot be completed."""
    keys = [f"rank-{rank}" for rank in range(place.degrees.replica_ranks)]
    store.set(keys[place.rank], "")
    try:
        store.wait(keys, timedelta(seconds=come_s))
    except dist.DistStoreError:
        absent = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
        raise TimeoutError(f"after {come_s:g} s these ranks have not come to the store: {absent}") from None


class _Maker:
    """Makes groups that meet at one store; every rank of a group asks for it under the same name.

    The same ranks on the same device are one group, whatever it is asked for.
    """

    def __init__(self, store: Store, address: str, device: torch.device, timeout: timedelta) -> None:
        self._store = store
        self._address = address
        self._device = device
        self._timeout = timeout
        self._made: dict[tuple[torch.device, tuple[int, ...]], Group] = {}

    def on_host(self, name: str, members: list[int], rank: int) -> Group:
        """Over gloo, for tensors in host memory."""
        return self._met(name, members, rank, torch.device("cpu"))

    def group(self, name: str, members: list[int], rank: int) -> Group:
        """For tensors on the device; connected when this returns."""
        return self._met(name, members, rank, self._device)

    def channels(self, place: Place, depth: int) -> tuple[Channel | None, Channel | None, Channel | None]:
        """From the stage before, to the stage behind, and from the last to the first; in this order everywhere.

        Two hidden states may be on their way to a stage, so that one travels while another is computed. What returns
        never has to wait, or two stages could wait for each other: ids and scores of each micro-batch have room.
        """
        stages, stage = place.degrees.pipeline, place.pipeline_rank
        received = self._channel(place.on_stage(stage - 1), place, place, 2) if not place.first_stage else None
        sent = self._channel(place, place.on_stage(stage + 1), place, 2) if not place.last_stage else None
        returned = None
        if stages > 1 and (place.first_stage or place.last_stage):
            returned = self._channel(place.on_stage(stages - 1), place.on_stage(0), place, 2 * depth)
        return received, sent, returned

    def _channel(self, sender: Place, receiver: Place, own: Place, room: int) -> Channel:
        """With one number sent through it: a communicator connects at its first use."""
        backend = self._backend(f"from-{sender.rank}-to-{receiver.rank}", int(own == receiver), 2, self._device)
        channel = Channel(backend, self._device, room)
        if own == sender:
            channel.send(torch.ones(1, device=self._device))
        else:
            assert channel.receive((1,), torch.float32).item() == 1
        return channel

    def _met(self, name: str, members: list[int], rank: int, device: torch.device) -> Group:
        if len(members) == 1:
            return Group()
        if (known := self._made.get((device, tuple(members)))) is not None:
            return known
        backend = self._backend(f"{name}-{members[0]}", members.index(rank), len(members), device)
        group = self._made[device, tuple(members)] = Group(members.index(rank), len(members), backend)
        group.all_reduce(torch.ones(1, device=device))  # connects now
        return group

    def _backend(self, name: str, rank: int, size: int, device: torch.device) -> Backend:
        store = PrefixStore(name, self._store)
        if device.type == "cuda":
            return _nccl(store, rank, size, device, self._timeout)
        return _gloo(store, rank, size, self._address, self._timeout)


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
    try:
        with socket.create_connection((host, int(port)), timeout=REACH_S) as connection:
            address: str = connection.getsockname()[0]
    except OSError as error:
        raise ConnectionError(f"the store of rank 0 at {store_address} cannot be reached: {error}") from error
    return address
