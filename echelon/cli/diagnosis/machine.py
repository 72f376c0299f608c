"""The doctor's checks of the machine and of what is served: memory, disks, limits, the clock, the port, the cluster.

Pure functions of the facts. The bounds are what `echelon serve` itself takes, Ray's processes included.
"""

from __future__ import annotations

from collections.abc import Callable

from echelon.cli.diagnosis.facts import Facts, Folder
from echelon.cli.diagnosis.finding import Finding, fail, ok, size, warn

MIB, GIB = 2**20, 2**30
LITTLE_MEMORY_BYTES, TOO_LITTLE_MEMORY_BYTES = 4 * GIB, GIB
LITTLE_SHARED_BYTES = 256 * MIB  # Ray's smallest object store takes 76 MiB
LITTLE_DISK_BYTES, TOO_LITTLE_DISK_BYTES = 2 * GIB, 100 * MIB
FEW_DESCRIPTORS, TOO_FEW_DESCRIPTORS = 4096, 1024
CLOCK_TOLERANCE_S = 86_400.0
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "ceph")


def check_memory(facts: Facts) -> Finding:
    memory = facts.memory
    if memory is None:
        return warn("memory", "cannot be told")
    free = memory.available_bytes if memory.limit_bytes is None else min(memory.available_bytes, memory.limit_bytes)
    limited = "" if memory.limit_bytes is None else f", {size(memory.limit_bytes)} left to this container"
    message = f"{size(memory.available_bytes)} of {size(memory.total_bytes)} available{limited}"
    if free < TOO_LITTLE_MEMORY_BYTES:
        return fail("memory", message, "end what uses it: Ray and a coordinator alone take about 1 GiB")
    if free < LITTLE_MEMORY_BYTES:
        return warn("memory", message, "small models alone will fit")
    return ok("memory", message)


def check_shared_memory(facts: Facts) -> Finding:
    folder = facts.shared_memory
    if folder is None:
        return warn("shared memory", "/dev/shm is not there: Ray will use a disk", "mount a tmpfs there")
    if folder.free_bytes < LITTLE_SHARED_BYTES:
        remedy = "in Docker start the container with --shm-size=1g (or --ipc=host)"
        return warn("shared memory", f"/dev/shm has {size(folder.free_bytes)} free", remedy)
    return ok("shared memory", f"/dev/shm has {size(folder.free_bytes)} free")


def check_state(facts: Facts) -> Finding:
    return _disk("state directory", facts.state, "choose another --state-dir")


def check_temporary(facts: Facts) -> Finding:
    return _disk("temporary folder", facts.temporary, "set TMPDIR to a folder on a larger disk")


def check_left_behind(facts: Facts) -> Finding:
    if not facts.left_behind:
        return ok("left behind", "no folders of clusters that were killed")
    paths = " ".join(folder.path for folder in facts.left_behind)
    found = f"clusters that were killed left {len(facts.left_behind)} folders, which nothing uses"
    return warn("left behind", found, f"rm -rf {paths}")


def check_descriptors(facts: Facts) -> Finding:
    if facts.descriptors is None:
        return warn("file descriptors", "the limit cannot be told")
    soft, hard = facts.descriptors
    message = f"{soft} for a process, at most {hard}"
    remedy = f"ulimit -n {min(hard, 65536)} before echelon serve"
    if soft < TOO_FEW_DESCRIPTORS:
        return fail("file descriptors", message, remedy)
    if soft < FEW_DESCRIPTORS:
        return warn("file descriptors", message, remedy)
    return ok("file descriptors", message)


def check_clock(facts: Facts) -> Finding:
    clock = facts.clock
    if clock is None:
        return warn("clock", "cannot be told")
    if clock.unix_s < clock.newest_unix_s - CLOCK_TOLERANCE_S:
        return fail("clock", "it is earlier than when Echelon was installed", "set it, and run an NTP service")
    if clock.synchronized is False:
        remedy = "run chrony or systemd-timesyncd: the times of jobs and events will differ between machines"
        return warn("clock", "the kernel says that nothing keeps it right", remedy)
    return ok("clock", "kept right by NTP" if clock.synchronized else "plausible; whether NTP keeps it is not told")


def check_port(facts: Facts) -> Finding:
    served = facts.served
    if served is None:
        return (
            fail("port", facts.settings_error, "correct what it names")
            if facts.settings_error
            else warn("port", "not looked at")
        )
    if served.cluster is not None:
        return ok("port", f"a cluster answers at {served.address}")
    if served.open:
        port = served.address.rpartition(":")[2]
        remedy = f"`ss -ltnp 'sport = :{port}'` names it; serve at another --address"
        return fail("port", f"what listens at {served.address} does not answer as Echelon: {served.error}", remedy)
    if not served.local:
        remedy = "is `echelon serve` running there, with an --address that others reach, and the port not filtered?"
        return fail("port", f"{served.address} cannot be reached: {served.error}", remedy)
    if served.bind_error:
        return fail("port", f"nothing can listen at {served.address}: {served.bind_error}", "choose another --address")
    return ok("port", f"{served.address} is free, nothing serves there")


def check_cluster(facts: Facts) -> Finding:
    cluster = facts.served.cluster if facts.served else None
    if cluster is None:
        return ok("cluster", "none is running")
    models = ", ".join(model.name for model in cluster.models)
    ready = sum(replica.state == "ready" for replica in cluster.replicas)
    state = f"{models or 'no model'}: {ready} of {len(cluster.replicas)} replicas ready, {cluster.queued} queued"
    if cluster.version != facts.version:
        found = f"it is Echelon {cluster.version}, this is {facts.version}"
        return warn("cluster", found, "install the same version on both sides")
    if ready < len(cluster.replicas) or not cluster.replicas:
        return warn("cluster", state, "`echelon events` tells what happened, and what is waited for")
    return ok("cluster", state)


def _disk(name: str, folder: Folder | None, remedy: str) -> Finding:
    if folder is None:
        return warn(name, "cannot be told")
    if not folder.writable:
        return fail(name, f"{folder.path} cannot be written", remedy)
    message = f"{folder.path}: {size(folder.free_bytes)} of {size(folder.total_bytes)} free"
    if folder.free_bytes < TOO_LITTLE_DISK_BYTES:
        return fail(name, message, f"free some, or {remedy}")
    if folder.free_bytes < LITTLE_DISK_BYTES:
        return warn(name, message, f"free some, or {remedy}")
    if folder.kind.startswith(NETWORK_FILE_SYSTEMS):
        return warn(name, f"{message}, on {folder.kind}: its locks may not hold", f"better a local disk: {remedy}")
    return ok(name, message)


MACHINE: tuple[Callable[[Facts], Finding], ...] = (
    check_memory,
    check_shared_memory,
    check_state,
    check_temporary,
    check_left_behind,
    check_descriptors,
    check_clock,
    check_port,
    check_cluster,
)
