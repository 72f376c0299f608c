"""The job store: STATE/jobs.db, one SQLite file behind one connection, written by one thread of the coordinator.

Everything that a job promises is here: an acknowledged job is a committed one, an item has at most one result (a
primary key), and results are read by a cursor that rises with their commits. It decides nothing; `jobs.py` does.
WAL with synchronous=FULL keeps commits through power loss; locking_mode=EXCLUSIVE shuts out a second coordinator and
the WAL-reset defect of SQLite before 3.51.3, which needs two connections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import DBAPIError

from coordinator.jobs import codec as job_codec
from coordinator.jobs.events import ItemInterrupted, ItemRecorded, Outcome, StateChanged, StoredJob, Write
from echelon.errors import ConfigError, ConflictError, OverloadedError
from echelon.types import Completion, ItemCounts, ItemResult, JobState, JobStatus, Usage

SCHEMA_VERSION = 2
MAX_INTEGER = 2**63 - 1  # of SQLite
# Where a test may end the process, in the order in which a job meets them.
CRASH_POINTS = (
    *("create.begun", "create.job", "create.items", "create.committed"),
    *("write.begun", "write.result", "write.state", "write.finish", "write.committed"),
)
_USAGE = ("prompt_tokens", "completion_tokens", "recomputed_tokens", "cached_tokens")  # as Usage has them

_metadata = sql.MetaData()
_jobs = sql.Table(
    "jobs",
    _metadata,
    sql.Column("sequence", sql.Integer, primary_key=True),  # rises with creation
    sql.Column("job_id", sql.Text, nullable=False, unique=True),
    sql.Column("digest", sql.LargeBinary, nullable=False),
    sql.Column("model", sql.Text, nullable=False),
    sql.Column("state", sql.Text, nullable=False),
    sql.Column("total", sql.Integer, nullable=False),
    sql.Column("create_unix_s", sql.Float, nullable=False),
    sql.Column("start_unix_s", sql.Float),
    sql.Column("end_unix_s", sql.Float),
)
_items = sql.Table(
    "items",
    _metadata,
    sql.Column("job_id", sql.Text, primary_key=True),
    sql.Column("item_index", sql.Integer, primary_key=True),
    sql.Column("custom_id", sql.Text, nullable=False),
    sql.Column("line", sql.Text, nullable=False),
    sqlite_with_rowid=False,
)
_interruptions = sql.Table(
    "interruptions",
    _metadata,
    sql.Column("job_id", sql.Text, primary_key=True),
    sql.Column("item_index", sql.Integer, primary_key=True),
    sqlite_with_rowid=False,
)
_results = sql.Table(
    "results",
    _metadata,
    sql.Column("job_id", sql.Text, primary_key=True),
    sql.Column("item_index", sql.Integer, primary_key=True),
    sql.Column("cursor", sql.Integer, nullable=False),
    sql.Column("succeeded", sql.Boolean, nullable=False),
    *(sql.Column(name, sql.Integer, nullable=False) for name in _USAGE),
    sql.Column("body", sql.Text, nullable=False),  # last, so that summing the others never reads it
    sql.UniqueConstraint("job_id", "cursor"),
)


@dataclass(frozen=True, slots=True)
class NewItem:
    """One line of a batch file."""

    custom_id: str
    line: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NewJob:
    """What a user submitted. digest covers the model and every line."""

    job_id: str
    digest: bytes
    model: str
    items: tuple[NewItem, ...]
    create_unix_s: float


class JobStore:
    """Blocking; used by one thread at a time. crash_point is called at each of CRASH_POINTS."""

    def __init__(self, path: Path, crash_point: Callable[[str], None] = lambda point: None) -> None:
        self._crash_point = crash_point
        self._engine = sql.create_engine(f"sqlite+pysqlite:///{path}", poolclass=sql.NullPool)
        sql.event.listen(self._engine, "connect", _configure)
        sql.event.listen(self._engine, "begin", _begin)
        try:
            self._connection = self._engine.connect()
            with self._transaction():
                _migrate(self._connection)
        except DBAPIError as error:
            raise ConfigError(f"the job store {path} cannot be opened: {error.orig}", field="state_dir") from error

    def close(self) -> None:
        self._connection.close()
        self._engine.dispose()

    def create(self, new: NewJob) -> StoredJob:
        """Stores the job, or finds the one that has its id. Raises ConflictError when that one has other content."""
        with self._transaction():
            self._crash_point("create.begun")
            found = self._connection.execute(sql.select(_jobs.c.digest).where(_jobs.c.job_id == new.job_id)).first()
            if found is None:
                self._insert(new)
            elif found.digest != new.digest:
                raise ConflictError(
                    f"job {new.job_id!r} exists with other content; take a new id",
                    reason="JOB_ID_CONFLICT",
                    field="batch_job_id",
                )
        self._crash_point("create.committed")
        return self.load(new.job_id)[0]

    def load(self, job_id: str | None = None) -> tuple[StoredJob, ...]:
        """All jobs, or one, in the order of their creation."""
        where = sql.true() if job_id is None else _jobs.c.job_id == job_id
        with self._transaction():
            rows = self._connection.execute(sql.select(_jobs).where(where).order_by(_jobs.c.sequence)).all()
            return tuple(self._stored(row) for row in rows)

    def commit(self, writes: Sequence[Write]) -> None:
        """All of these writes in one transaction."""
        with self._transaction():
            self._crash_point("write.begun")
            for write in writes:
                self._write(write)
        self._crash_point("write.committed")

    def item_line(self, job_id: str, index: int) -> str:
        """The line of the batch file that the item was read from."""
        where = (_items.c.job_id == job_id) & (_items.c.item_index == index)
        with self._transaction():
            return str(self._connection.execute(sql.select(_items.c.line).where(where)).scalar_one())

    def results(self, job_id: str, after_cursor: int, limit: int) -> tuple[ItemResult, ...]:
        """The next results in the order of their commits."""
        query = (
            sql.select(
                _items.c.custom_id, _results.c.item_index, _results.c.cursor, _results.c.succeeded, _results.c.body
            )
            .join(_items, (_items.c.job_id == _results.c.job_id) & (_items.c.item_index == _results.c.item_index))
            .where((_results.c.job_id == job_id) & (_results.c.cursor > min(after_cursor, MAX_INTEGER)))
            .order_by(_results.c.cursor)
            .limit(limit)
        )
        with self._transaction():
            rows = self._connection.execute(query).all()
        return tuple(
            ItemResult(
                custom_id=row.custom_id,
                index=row.item_index,
                cursor=row.cursor,
                completion=job_codec.completion(row.body) if row.succeeded else None,
                error=None if row.succeeded else job_codec.error(row.body),
            )
            for row in rows
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with self._connection.begin():
                yield
        except DBAPIError as error:
            if isinstance(error, sql.exc.IntegrityError):
                raise  # a second result of one item, say: a defect of ours, never full storage
            raise OverloadedError(
                f"the job store failed: {error.orig}; look at the state directory and its free space",
                reason="JOURNAL_UNAVAILABLE",
            ) from error

    def _insert(self, new: NewJob) -> None:
        self._connection.execute(
            sql.insert(_jobs).values(
                job_id=new.job_id,
                digest=new.digest,
                model=new.model,
                state=JobState.QUEUED.value,
                total=len(new.items),
                create_unix_s=new.create_unix_s,
            )
        )
        self._crash_point("create.job")
        rows = [
            {"job_id": new.job_id, "item_index": index, "custom_id": item.custom_id, "line": item.line}
            for index, item in enumerate(new.items)
        ]
        self._connection.execute(sql.insert(_items), rows)
        self._crash_point("create.items")

    def _write(self, write: Write) -> None:
        execute = self._connection.execute
        match write:
            case StateChanged(job_id, state, unix_s):
                times = {"start_unix_s": unix_s} if state is JobState.RUNNING else {}
                times |= {"end_unix_s": unix_s} if state.ended else {}
                execute(sql.update(_jobs).where(_jobs.c.job_id == job_id).values(state=state.value, **times))
                self._crash_point("write.finish" if state.ended else "write.state")
            case ItemRecorded(job_id, index, cursor, outcome):
                execute(sql.insert(_results).values(job_id=job_id, item_index=index, cursor=cursor, **_row(outcome)))
                self._crash_point("write.result")
            case ItemInterrupted(job_id, index):
                execute(sql.insert(_interruptions).values(job_id=job_id, item_index=index))

    def _stored(self, row: sql.Row[Any]) -> StoredJob:
        execute, job_id = self._connection.execute, row.job_id
        own = _results.c.job_id == job_id
        sums = [
            sql.func.coalesce(sql.func.sum(sql.type_coerce(_results.c[name], sql.Integer)), 0)
            for name in ("succeeded", *_USAGE)
        ]
        recorded, last_cursor, succeeded, *usage = execute(
            sql.select(sql.func.count(), sql.func.coalesce(sql.func.max(_results.c.cursor), 0), *sums).where(own)
        ).one()
        met = sql.select(_interruptions.c.item_index).where(_interruptions.c.job_id == job_id)
        interrupted = frozenset(execute(met).scalars())
        state = JobState(row.state)
        status = JobStatus(
            job_id=job_id,
            state=state,
            model=row.model,
            counts=ItemCounts(row.total, succeeded, recorded - succeeded, 0, len(interrupted)),
            usage=Usage(*usage),
            create_unix_s=row.create_unix_s,
            start_unix_s=row.start_unix_s,
            end_unix_s=row.end_unix_s,
        )
        done = () if state.ended else execute(sql.select(_results.c.item_index).where(own)).scalars()
        return StoredJob(status=status, done=frozenset(done), interrupted=interrupted, last_cursor=last_cursor)


def _row(outcome: Outcome) -> dict[str, object]:
    usage = outcome.usage if isinstance(outcome, Completion) else Usage()
    counts = {name: getattr(usage, name) for name in _USAGE}
    return {"succeeded": isinstance(outcome, Completion), "body": job_codec.dump(outcome), **counts}


def _configure(connection: Any, record: object) -> None:
    connection.isolation_level = None  # sqlite3 begins transactions late and by itself otherwise; _begin does it
    for pragma in ("busy_timeout=1000", "locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sql.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _migrate(connection: sql.Connection) -> None:
    version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if version == SCHEMA_VERSION:  # nothing to write: a disk that is full now must not keep a coordinator from starting
        return
    if version not in (0, SCHEMA_VERSION):
        have = f"the job store has schema {version}, this Echelon reads {SCHEMA_VERSION}"
        raise ConfigError(f"{have}; give another state-dir, or serve with the Echelon that wrote it", field="state_dir")
    _metadata.create_all(connection)
    connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")
