"""The nouns of `link.py` as protobuf messages, both directions; one pair of functions a noun.

Used at the two ends of ReplicaLink, in the coordinator and in each leader, and by the journal. Pure; knows no
stream and makes no judgement: fences are compared elsewhere.
"""

from __future__ import annotations

from echelon.internal import link
from echelon.internal.v1 import control_pb2, link_pb2

_FINISHES = {
    None: link_pb2.FINISH_UNSPECIFIED,
    link.Finish.STOP: link_pb2.FINISH_STOP,
    link.Finish.LENGTH: link_pb2.FINISH_LENGTH,
}


def fence_to_proto(fence: link.Fence) -> control_pb2.Fence:
    return control_pb2.Fence(term=fence.term, replica=fence.replica, epoch=fence.epoch)


def fence_from_proto(message: control_pb2.Fence) -> link.Fence:
    return link.Fence(term=message.term, replica=message.replica, epoch=message.epoch)


def sampling_to_proto(sampling: link.Sampling) -> link_pb2.Sampling:
    return link_pb2.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        stop_token_ids=sampling.stop_token_ids,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
    )


def sampling_from_proto(message: link_pb2.Sampling) -> link.Sampling:
    return link.Sampling(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        max_tokens=message.max_tokens,
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def logprob_to_proto(logprob: link.Logprob) -> link_pb2.Logprob:
    return link_pb2.Logprob(logprob=logprob.logprob, top_ids=logprob.top_ids, top_logprobs=logprob.top_logprobs)


def logprob_from_proto(message: link_pb2.Logprob) -> link.Logprob:
    return link.Logprob(message.logprob, tuple(message.top_ids), tuple(message.top_logprobs))


def finish_to_proto(finish: link.Finish | None) -> link_pb2.Finish:
    return _FINISHES[finish]


def finish_from_proto(value: int) -> link.Finish | None:
    return link.Finish(value) if value else None


def command_to_proto(command: link.Command) -> link_pb2.ReplicaCommand:
    return link_pb2.ReplicaCommand(
        fence=fence_to_proto(command.fence),
        acked_report=command.acked_report,
        assigns=[
            link_pb2.Assign(
                request=assign.request,
                attempt=assign.attempt,
                prompt=assign.prompt,
                generated=assign.generated,
                sampling=sampling_to_proto(assign.sampling),
            )
            for assign in command.assigns
        ],
        abandons=[link_pb2.Abandon(request=a.request, attempt=a.attempt) for a in command.abandons],
    )


def command_from_proto(message: link_pb2.ReplicaCommand) -> link.Command:
    return link.Command(
        fence=fence_from_proto(message.fence),
        acked_report=message.acked_report,
        assigns=tuple(
            link.Assign(
                request=assign.request,
                attempt=assign.attempt,
                prompt=tuple(assign.prompt),
                generated=tuple(assign.generated),
                sampling=sampling_from_proto(assign.sampling),
            )
            for assign in message.assigns
        ),
        abandons=tuple(link.Abandon(a.request, a.attempt) for a in message.abandons),
    )


def run_to_proto(run: link.TokenRun) -> link_pb2.TokenRun:
    return link_pb2.TokenRun(
        request=run.request,
        choice=run.choice,
        attempt=run.attempt,
        first_token=run.first_token,
        ids=run.ids,
        logprobs=[logprob_to_proto(logprob) for logprob in run.logprobs],
        finish=finish_to_proto(run.finish),
    )


def run_from_proto(message: link_pb2.TokenRun) -> link.TokenRun:
    return link.TokenRun(
        request=message.request,
        choice=message.choice,
        attempt=message.attempt,
        first_token=message.first_token,
        ids=tuple(message.ids),
        logprobs=tuple(logprob_from_proto(logprob) for logprob in message.logprobs),
        finish=finish_from_proto(message.finish),
    )


def hello_to_proto(hello: link.ReplicaHello) -> link_pb2.ReplicaHello:
    return link_pb2.ReplicaHello(
        slots=hello.slots,
        kv_blocks=hello.kv_blocks,
        block_tokens=hello.block_tokens,
        max_context=hello.max_context,
        running=[link_pb2.Running(request=r.request, attempt=r.attempt, generated=r.generated) for r in hello.running],
    )


def hello_from_proto(message: link_pb2.ReplicaHello) -> link.ReplicaHello:
    return link.ReplicaHello(
        slots=message.slots,
        kv_blocks=message.kv_blocks,
        block_tokens=message.block_tokens,
        max_context=message.max_context,
        running=tuple(link.Running(r.request, r.attempt, r.generated) for r in message.running),
    )


def stats_to_proto(stats: link.ReplicaStats) -> link_pb2.ReplicaStats:
    return link_pb2.ReplicaStats(step=stats.step, blocks_referenced=stats.blocks_referenced, counters=stats.counters)


def stats_from_proto(message: link_pb2.ReplicaStats) -> link.ReplicaStats:
    return link.ReplicaStats(message.step, message.blocks_referenced, dict(message.counters))


def report_to_proto(report: link.Report) -> link_pb2.ReplicaReport:
    return link_pb2.ReplicaReport(
        fence=fence_to_proto(report.fence),
        report_seq=report.report_seq,
        hello=hello_to_proto(report.hello) if report.hello else None,
        runs=[run_to_proto(run) for run in report.runs],
        released=[link_pb2.Released(request=r.request, attempt=r.attempt, error=r.error) for r in report.released],
        stats=stats_to_proto(report.stats) if report.stats else None,
    )


def report_from_proto(message: link_pb2.ReplicaReport) -> link.Report:
    return link.Report(
        fence=fence_from_proto(message.fence),
        report_seq=message.report_seq,
        runs=tuple(run_from_proto(run) for run in message.runs),
        released=tuple(link.Released(r.request, r.attempt, r.error) for r in message.released),
        hello=hello_from_proto(message.hello) if message.HasField("hello") else None,
        stats=stats_from_proto(message.stats) if message.HasField("stats") else None,
    )
