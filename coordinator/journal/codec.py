"""Journal records as bytes: u32 length, u32 CRC-32C, then a JournalRecord; little-endian.

Pure translation between `coordinator.journal.state` and protobuf, used by the journal file and by the simulator.
Reading stops cleanly at a torn tail: a process that dies inside write() leaves the start of a frame, and no one has
heard of what it held.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import google_crc32c
from google.protobuf.message import DecodeError

from coordinator.clock import ClockOrigin
from coordinator.journal.damage import Damage
from coordinator.journal.state import Assigned, Finished, Forgotten, Opened, Prompted, Record, Tokens
from coordinator.requests.nouns import Received, Request
from echelon.internal import link, wire
from echelon.internal.v1 import journal_pb2, link_pb2

FRAME = struct.Struct("<II")


def frame(records: Iterable[Record], term: int) -> bytes:
    """The records as they stand in the file, one frame each."""
    parts: list[bytes] = []
    for record in records:
        payload = encode(record, term)
        parts.append(FRAME.pack(len(payload), google_crc32c.value(payload)))
        parts.append(payload)
    return b"".join(parts)


def unframe(content: bytes) -> tuple[list[Record], int]:
    """The records up to the first frame that is cut, damaged or not understood, and how many bytes they take."""
    records: list[Record] = []
    offset = 0
    while offset + FRAME.size <= len(content):
        length, checksum = FRAME.unpack_from(content, offset)
        payload = content[offset + FRAME.size : offset + FRAME.size + length]
        # A file system may leave zeros after a power cut: a frame of nothing has the right checksum, but no record.
        if not length or len(payload) < length or google_crc32c.value(payload) != checksum:
            break
        try:
            records.append(decode(payload))
        except (DecodeError, ValueError):
            break
        offset += FRAME.size + length
    return records, offset


def find_damage(segment: str, content: bytes, at_byte: int) -> Damage | None:
    """Why reading has stopped where it did; None at the end of the segment."""
    rest = content[at_byte:]
    if not rest:
        return None
    length, checksum = FRAME.unpack_from(rest) if len(rest) >= FRAME.size else (0, 0)
    if len(rest) < FRAME.size + length or not any(rest):
        reason = "its last record is incomplete"  # as a process leaves it that is killed inside write()
    elif length and google_crc32c.value(rest[FRAME.size : FRAME.size + length]) == checksum:
        reason = "a record of an unknown kind; was it written by a later version?"
    else:
        reason = "a record does not match its checksum"
    return Damage(segment, at_byte, len(rest), reason)


def encode(record: Record, term: int) -> bytes:
    """The JournalRecord of a record, written by the coordinator of this term."""
    match record:
        case Tokens(request_id, attempt, first_token, ids, logprobs, choice):
            message = journal_pb2.JournalRecord(term=term)
            tokens = message.tokens  # filled in place, for speed: one of these is written for every token
            tokens.request = request_id
            tokens.choice = choice
            tokens.attempt = attempt
            tokens.first_token = first_token
            tokens.ids.extend(ids)
            if logprobs:
                tokens.logprobs.extend(map(wire.logprob_to_proto, logprobs))
            return message.SerializeToString()
        case Opened(request, received):
            return journal_pb2.JournalRecord(term=term, opened=_opened(request, received)).SerializeToString()
        case Assigned(request_id, attempt, replica, epoch, recomputed_tokens):
            assigned = journal_pb2.Assigned(
                request=request_id,
                attempt=attempt,
                replica=replica,
                epoch=epoch,
                recomputed_tokens=recomputed_tokens,
            )
            return journal_pb2.JournalRecord(term=term, assigned=assigned).SerializeToString()
        case Finished(request_id, finished_unix_s, finishes, error_reason, error_message):
            finished = journal_pb2.Finished(
                request=request_id,
                finishes=[wire.finish_to_proto(finish) for finish in finishes],
                error_reason=error_reason,
                error_message=error_message,
                finished_unix_s=finished_unix_s,
            )
            return journal_pb2.JournalRecord(term=term, finished=finished).SerializeToString()
        case Prompted(request_id, attempt, cached_tokens, logprobs):
            prompted = wire.prompted_to_proto(link.Prompted(request_id, attempt, cached_tokens, logprobs))
            return journal_pb2.JournalRecord(term=term, prompted=prompted).SerializeToString()
        case Forgotten(request_id):
            forgotten = journal_pb2.Forgotten(request=request_id)
            return journal_pb2.JournalRecord(term=term, forgotten=forgotten).SerializeToString()
        case ClockOrigin(boot_id, unix_s):
            origin = journal_pb2.ClockOrigin(boot_id=boot_id, unix_s=unix_s)
            return journal_pb2.JournalRecord(term=term, clock_origin=origin).SerializeToString()


def decode(payload: bytes) -> Record:
    """The record of a JournalRecord. Raises ValueError for one that this version does not know, or DecodeError."""
    message = journal_pb2.JournalRecord.FromString(payload)
    match message.WhichOneof("body"):
        case "tokens":
            tokens = message.tokens
            logprobs = tuple(map(wire.logprob_from_proto, tokens.logprobs))
            return Tokens(
                tokens.request, tokens.attempt, tokens.first_token, tuple(tokens.ids), logprobs, tokens.choice
            )
        case "opened":
            return Opened(_request(message.opened), tuple(tuple(held.ids) for held in message.opened.received))
        case "assigned":
            assigned = message.assigned
            return Assigned(
                assigned.request, assigned.attempt, assigned.replica, assigned.epoch, assigned.recomputed_tokens
            )
        case "finished":
            finished = message.finished
            return Finished(
                finished.request,
                finished.finished_unix_s,
                tuple(link.Finish(value) for value in finished.finishes),
                finished.error_reason,
                finished.error_message,
            )
        case "prompted":
            told = wire.prompted_from_proto(message.prompted)
            return Prompted(told.request, told.attempt, told.cached_tokens, told.prompt_logprobs)
        case "forgotten":
            return Forgotten(message.forgotten.request)
        case "clock_origin":
            return ClockOrigin(message.clock_origin.boot_id, message.clock_origin.unix_s)
        case other:
            raise ValueError(f"a journal record of an unknown kind: {other}")


def _opened(request: Request, received: Received) -> journal_pb2.Opened:
    return journal_pb2.Opened(
        request=request.request_id,
        digest=request.digest,
        model=request.model,
        prompt=request.prompt,
        sampling=wire.sampling_to_proto(request.sampling),
        deadline_unix_s=request.deadline_unix_s,
        opened_unix_s=request.opened_unix_s,
        received=[link_pb2.Ids(ids=ids) for ids in received],
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def _request(opened: journal_pb2.Opened) -> Request:
    return Request(
        request_id=opened.request,
        digest=opened.digest,
        model=opened.model,
        prompt=tuple(opened.prompt),
        sampling=wire.sampling_from_proto(opened.sampling),
        deadline_unix_s=opened.deadline_unix_s,
        opened_unix_s=opened.opened_unix_s,
        priority=opened.priority,
        cache_salt=opened.cache_salt,
    )
