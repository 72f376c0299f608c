"""Ranks that do not come to the store, or cannot reach it: named at once, before any group is begun."""

from __future__ import annotations

import socket

import pytest
import torch

from parallel.degrees import Degrees
from parallel.mesh import form_context, open_store

PLACE = Degrees(pipeline=2, tensor=2).place(1)
CPU = torch.device("cpu")


def test_who_has_not_come_is_named() -> None:
    store, address = open_store("127.0.0.1")
    with pytest.raises(TimeoutError, match=r"after 0.5 s these ranks have not come to the store: 0, 2, 3$"):
        form_context(address, "replica-0", 1, PLACE, CPU, torch.float32, timeout_s=60, come_s=0.5)
    del store


def test_a_store_that_cannot_be_reached_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=f"the store of rank 0 at {address} cannot be reached: .*refused"):
        form_context(address, "replica-0", 1, PLACE, CPU, torch.float32, timeout_s=60)
