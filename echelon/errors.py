"""Every error that Echelon raises or sends, and the one table that says how each travels.

EchelonError                      code                reasons
├── InvalidRequestError           INVALID_ARGUMENT    INVALID_FIELD, CONTEXT_TOO_LONG, CONSTRAINT_FAILED, NON_FINITE
├── NotFoundError                 NOT_FOUND           MODEL_NOT_FOUND, JOB_NOT_FOUND
├── ConflictError                 ALREADY_EXISTS      REQUEST_ID_CONFLICT, JOB_ID_CONFLICT
├── StreamTakenOverError          ABORTED             STREAM_TAKEN_OVER
├── QuarantinedError              ABORTED             REQUEST_QUARANTINED
├── OverloadedError               RESOURCE_EXHAUSTED  QUEUE_FULL, JOURNAL_UNAVAILABLE          (retryable)
├── UnavailableError              UNAVAILABLE         FAILING_OVER, DRAINING                   (retryable)
├── DeadlineError                 DEADLINE_EXCEEDED   DEADLINE
├── CancelledError                CANCELLED           CANCELLED
├── InternalError                 INTERNAL            INTERNAL
├── ResponseInvalidError          (never on the wire: an answer that its response_model does not take)
└── ConfigError                   (never on the wire: bad flags or files, found before anything starts)

An error carries its reason, the field it names and the request it ended. This module knows no transport:
`echelon/status.py` packs errors into google.rpc.Status and unpacks them by the same table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from echelon.types import Completion

ERROR_DOMAIN = "echelon.dev"


class EchelonError(Exception):
    """Base of all. code is a google.rpc.Code number; default_reason is used when none is given."""

    code: ClassVar[int] = 2
    default_reason: ClassVar[str] = "UNKNOWN"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.field = field
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} (request_id={self.request_id})" if self.request_id else self.message


class InvalidRequestError(EchelonError):
    """A field of the request is wrong; the message says which, why, and what to do."""

    code, default_reason = 3, "INVALID_FIELD"


class NotFoundError(EchelonError):
    """No such model or job."""

    code, default_reason = 5, "MODEL_NOT_FOUND"


class ConflictError(EchelonError):
    """The id is taken by other content."""

    code, default_reason = 6, "REQUEST_ID_CONFLICT"


class StreamTakenOverError(EchelonError):
    """Another stream attached to the same request; that one goes on."""

    code, default_reason = 10, "STREAM_TAKEN_OVER"


class QuarantinedError(EchelonError):
    """Each time the request was computed, alone at last, the step broke; it is not tried again."""

    code, default_reason = 10, "REQUEST_QUARANTINED"


class OverloadedError(EchelonError):
    """The queue or the journal takes no more now; nothing was started."""

    code, default_reason, retryable = 8, "QUEUE_FULL", True


class UnavailableError(EchelonError):
    """The coordinator cannot be reached, is draining, or has no replica yet."""

    code, default_reason, retryable = 14, "FAILING_OVER", True


class DeadlineError(EchelonError, TimeoutError):
    """The request's deadline passed before it ended."""

    code, default_reason = 4, "DEADLINE"


class CancelledError(EchelonError):
    """The request was cancelled."""

    code, default_reason = 1, "CANCELLED"


class InternalError(EchelonError):
    """A defect of Echelon's; the message names the request, the server's log has the rest."""

    code, default_reason = 13, "INTERNAL"


class ResponseInvalidError(EchelonError):
    """The answer is not what response_model asks for; `completion` is the answer. Raised by the SDK alone."""

    code, default_reason = 9, "RESPONSE_INVALID"

    def __init__(self, message: str, *, completion: Completion) -> None:
        super().__init__(message, request_id=completion.request_id)
        self.completion = completion


class ConfigError(EchelonError):
    """A flag, YAML key or file is wrong. Raised before anything is started."""

    code, default_reason = 9, "CONFIG"


WIRE_ERRORS: tuple[type[EchelonError], ...] = (
    InvalidRequestError,
    NotFoundError,
    ConflictError,
    StreamTakenOverError,
    QuarantinedError,
    OverloadedError,
    UnavailableError,
    DeadlineError,
    CancelledError,
    InternalError,
)


def error_of(
    code: int,
    message: str,
    *,
    reason: str | None = None,
    field: str | None = None,
    request_id: str | None = None,
    retry_after_s: float | None = None,
) -> EchelonError:
    """The error a status code stands for, of two with one code the one of the reason; of no code InternalError."""
    kinds = [error for error in WIRE_ERRORS if error.code == code] or [InternalError]
    kind = next((error for error in kinds if error.default_reason == reason), kinds[0])
    return kind(message, reason=reason, field=field, request_id=request_id, retry_after_s=retry_after_s)
