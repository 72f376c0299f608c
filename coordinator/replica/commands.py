"""What a replica's core has its ranks told.

Frozen values, in the coordinator; `coordinator/internal_server.py` puts them on the wire.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settled:
    """What ranks found by running their largest step: how many of the planned blocks it takes, with graphs if any."""

    reserved_blocks: int
    graphs: bool


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes a ready rank holds, and what all ranks have settled on."""

    parameter_bytes: int
    kv_bytes: int
    settled: Settled | None = None


@dataclass(frozen=True, slots=True)
class Accept:
    """The rank belongs to this coordinator."""


@dataclass(frozen=True, slots=True)
class OpenStore:
    """To rank 0: open the rendezvous."""


@dataclass(frozen=True, slots=True)
class Form:
    """Form the epoch of the fence. settled: what ranks need not find out again; they capture graphs as they serve."""

    store_address: str
    kv_blocks: int
    settled: Settled | None = None


@dataclass(frozen=True, slots=True)
class Retire:
    """End the epoch that you serve, and wait for the next."""


@dataclass(frozen=True, slots=True)
class Blame:
    """To rank 0: another rank has broken in one of these steps; say which requests are in them."""

    first_step: int
    last_step: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """End yourself."""

    reason: str


Command = Accept | OpenStore | Form | Retire | Blame | Refuse
