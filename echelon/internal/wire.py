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
_SCALARS = (
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "seed",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "include_stop",
    "n",
    "grammar",
)
_PLAIN_SAMPLING = (*_SCALARS, "stop_token_ids", "stop", "logprobs", "prompt_logprobs")


def fence_to_proto(fence: link.Fence) -> control_pb2.Fence:
    return control_pb2.Fence(term=fence.term, replica=fence.replica, epoch=fence.epoch)


def fence_from_proto(message: control_pb2.Fence) -> link.Fence:
    return link.Fence(term=message.term, replica=message.replica, epoch=message.epoch)


def sampling_to_proto(sampling: link.Sampling) -> link_pb2.Sampling:
    return link_pb2.Sampling(
        **{name: getattr(sampling, name) for name in _PLAIN_SAMPLING},
        logit_bias=dict(sampling.logit_bias),
        bad_words=[link_pb2.Ids(ids=ids) for ids in sampling.bad_words],
    )


def sampling_from_proto(message: link_pb2.Sampling) -> link.Sampling:
    def given(name: str) -> int | None:
        return getattr(message, name) if message.HasField(name) else None

    return link.Sampling(
        **{name: getattr(message, name) for name in _SCALARS},
        stop_token_ids=tuple(message.stop_token_ids),
        stop=tuple(message.stop),
        logprobs=given("logprobs"),
        prompt_logprobs=given("prompt_logprobs"),
        logit_bias=tuple(sorted(message.logit_bias.items())),
        bad_words=tuple(tuple(word.ids) for word in message.bad_words),
    )


def logprob_to_proto(logprob: link.Logprob) -> link_pb2.Logprob:
    return link_pb2.Logprob(logprob=logprob.logprob, top_ids=logprob.top_ids, top_logprobs=logprob.top_logprobs)


def logprob_from_proto(message: link_pb2.Logprob) -> link.Logprob:
    return link.Logprob(message.logprob, tuple(message.top_ids), tuple(message.top_logprobs))


def finish_to_proto(finish: link.Finish | None) -> link_pb2.Finish:
    return _FINISHES[finish]


def finish_from_proto(value: int) -> link.Finish | None:
    return link.Finish(value) if value else None


def assign_to_proto(assign: link.Assign) -> link_pb2.Assign:
    return link_pb2.Assign(
        request=assign.request,
        attempt=assign.attempt,
        prompt=assign.prompt,
        sampling=sampling_to_proto(assign.sampling),
        choices=[link_pb2.Progress(choice=p.choice, generated=p.generated) for p in assign.choices],
        priority=assign.priority,
        cache_salt=assign.cache_salt,
    )


def assign_from_proto(message: link_pb2.Assign) -> link.Assign:
    return link.Assign(
        request=message.request,
        attempt=message.attempt,
        prompt=tuple(message.prompt),
        choices=tuple(link.Progress(p.choice, tuple(p.generated)) for p in message.choices),
        sampling=sampling_from_proto(message.sampling),
        priority=message.priority,
        cache_salt=message.cache_salt,
    )


def abandon_from_proto(message: link_pb2.Abandon) -> link.Abandon:
    return link.Abandon(message.request, message.attempt, message.choice if message.HasField("choice") else None)


def command_to_proto(command: link.Command) -> link_pb2.ReplicaCommand:
    return link_pb2.ReplicaCommand(
        fence=fence_to_proto(command.fence),
        acked_report=command.acked_report,
        assigns=[assign_to_proto(assign) for assign in command.assigns],
        abandons=[link_pb2.Abandon(request=a.request, attempt=a.attempt, choice=a.choice) for a in command.abandons],
    )


def command_from_proto(message: link_pb2.ReplicaCommand) -> link.Command:
    return link.Command(
        fence=fence_from_proto(message.fence),
        acked_report=message.acked_report,
        assigns=tuple(assign_from_proto(assign) for assign in message.assigns),
        abandons=tuple(abandon_from_proto(abandon) for abandon in message.abandons),
    )


def prompted_to_proto(prompted: link.Prompted) -> link_pb2.Prompted:
    return link_pb2.Prompted(
        request=prompted.request,
        attempt=prompted.attempt,
        cached_tokens=prompted.cached_tokens,
        prompt_logprobs=[logprob_to_proto(logprob) for logprob in prompted.prompt_logprobs],
    )


def prompted_from_proto(message: link_pb2.Prompted) -> link.Prompted:
    logprobs = tuple(logprob_from_proto(logprob) for logprob in message.prompt_logprobs)
    return link.Prompted(message.request, message.attempt, message.cached_tokens, logprobs)


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
        running=[link_pb2.Running(request=r.request, attempt=r.attempt) for r in hello.running],
        last_attempt=hello.last_attempt,
    )


def hello_from_proto(message: link_pb2.ReplicaHello) -> link.ReplicaHello:
    return link.ReplicaHello(
        slots=message.slots,
        kv_blocks=message.kv_blocks,
        block_tokens=message.block_tokens,
        max_context=message.max_context,
        running=tuple(link.Running(r.request, r.attempt) for r in message.running),
        last_attempt=message.last_attempt,
    )


def stats_to_proto(stats: link.ReplicaStats) -> link_pb2.ReplicaStats:
    return link_pb2.ReplicaStats(
        step=stats.step,
        blocks_referenced=stats.blocks_referenced,
        counters=stats.counters,
        blocks_cached=stats.blocks_cached,
    )


def stats_from_proto(message: link_pb2.ReplicaStats) -> link.ReplicaStats:
    return link.ReplicaStats(message.step, message.blocks_referenced, dict(message.counters), message.blocks_cached)


def report_to_proto(report: link.Report) -> link_pb2.ReplicaReport:
    return link_pb2.ReplicaReport(
        fence=fence_to_proto(report.fence),
        report_seq=report.report_seq,
        hello=hello_to_proto(report.hello) if report.hello else None,
        runs=[run_to_proto(run) for run in report.runs],
        released=[
            link_pb2.Released(request=r.request, attempt=r.attempt, error=r.error, reason=r.reason)
            for r in report.released
        ],
        stats=stats_to_proto(report.stats) if report.stats else None,
        prompted=[prompted_to_proto(prompted) for prompted in report.prompted],
    )


def report_from_proto(message: link_pb2.ReplicaReport) -> link.Report:
    return link.Report(
        fence=fence_from_proto(message.fence),
        report_seq=message.report_seq,
        runs=tuple(run_from_proto(run) for run in message.runs),
        released=tuple(link.Released(r.request, r.attempt, r.error, r.reason) for r in message.released),
        hello=hello_from_proto(message.hello) if message.HasField("hello") else None,
        stats=stats_from_proto(message.stats) if message.HasField("stats") else None,
        prompted=tuple(prompted_from_proto(prompted) for prompted in message.prompted),
    )
