"""The command line against the scripted server: what is printed where, exit codes, and Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from echelon import convert, convert_cluster, convert_jobs
from echelon.cli.app import app
from echelon.cli.sampling import OPTIONS
from echelon.errors import InvalidRequestError, NotFoundError
from echelon.sampling import SamplingParams
from echelon.types import (
    Choice,
    Cluster,
    ClusterEvent,
    Completion,
    FinishReason,
    ItemCounts,
    ItemResult,
    JobState,
    JobStatus,
    Model,
    Rank,
    Replica,
    Spare,
    SpareDevice,
    Usage,
)
from echelon.v1 import generation_pb2, jobs_pb2
from tests.unit.scripted import IDS, WORDS, ScriptedServer, completion, fail, tokens


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        yield scripted


def echelon(*arguments: str, address: str = "localhost:1", stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, env={"ECHELON_ADDRESS": address}, input=stdin)


def job(state: JobState, succeeded: int = 0, failed: int = 0) -> JobStatus:
    counts = ItemCounts(2, succeeded, failed, 2 - succeeded - failed)
    return JobStatus(job_id="j", state=state, model="tiny", counts=counts, usage=Usage(3, 4), create_unix_s=1.5)


def answers_job(*states: JobStatus) -> Any:
    def watch(request: Any, context: Any) -> Iterator[Any]:
        for state in states:
            yield jobs_pb2.WatchBatchJobResponse(batch_job=convert_jobs.job_to_proto(state))

    return watch


RESULTS = (
    ItemResult(custom_id="a", index=0, cursor=1, completion=completion("r0")),
    ItemResult(custom_id="b", index=1, cursor=2, error=InvalidRequestError("too long", reason="CONTEXT_TOO_LONG")),
)


def answers_results(*items: ItemResult) -> Any:
    def results(request: Any, context: Any) -> Iterator[Any]:
        for item in items:
            yield jobs_pb2.StreamBatchJobResultsResponse(result=convert_jobs.item_to_proto(item))

    return results


def test_generate_prints_the_text(server: ScriptedServer) -> None:
    server.on("StreamGenerate", tokens(0, 6, end=True), tokens(0, 6, end=True))
    for flags in ([], ["--no-stream"]):
        result = echelon("generate", "once", "--max-tokens", "6", "--temperature", "0", *flags, address=server.address)
        assert (result.exit_code, result.stdout) == (0, "".join(WORDS) + "\n")
    request = server.requests["StreamGenerate"][0]
    assert (request.text, request.sampling.max_tokens, request.sampling.temperature) == ("once", 6, 0.0)


def test_generate_prints_json(server: ScriptedServer) -> None:
    server.on("StreamGenerate", tokens(0, 6, end=True))
    result = echelon("generate", "once", "--json", address=server.address)
    answer = json.loads(result.stdout)
    assert answer["choices"][0]["token_ids"] == list(IDS)
    details = {"cached_tokens": 0}
    counts = {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert answer["usage"] == counts | {"prompt_tokens_details": details}


def test_generate_reads_standard_input_and_chats(server: ScriptedServer) -> None:
    server.on("StreamGenerate", tokens(0, 6, end=True))
    assert echelon("generate", "-", "--chat", address=server.address, stdin="hello").exit_code == 0
    (message,) = server.requests["StreamGenerate"][0].chat.messages
    assert (message.role, message.content) == ("user", "hello")


def test_bad_input_is_one_line_and_exit_2(server: ScriptedServer) -> None:
    result = echelon("generate", "once", "--temperature", "-1", address=server.address)
    assert result.exit_code == 2
    assert result.stderr == "echelon: error: temperature must be a finite number >= 0, got -1.0\n"
    assert echelon("generate", address=server.address).exit_code == 2
    assert echelon("generate", "once", "--no-such-flag", address=server.address).exit_code == 2
    assert echelon("status", address="nowhere").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (("generate", "-"), b"\xe9t\xe9", "standard input is not UTF-8 at byte 0"),
        (("generate", "caf\udce9"), b"", "prompt must be text, but its character 3 is half of a surrogate pair"),
        (("generate", "--chat", "caf\udce9"), b"", "messages[0].content must be text, but its character 3 is half"),
        (("events", "--after", "-1"), b"", "after must be 0 or more, got -1"),
    ],
)
def test_what_no_message_can_carry_is_wrong_use(arguments: tuple[str, ...], stdin: bytes, message: str) -> None:
    result = CliRunner().invoke(app, arguments, input=stdin)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"echelon: error: {message}") and result.stderr.count("\n") == 1


def test_the_servers_error_is_one_line_with_the_request(server: ScriptedServer) -> None:
    error = NotFoundError("model x is not served", request_id="r-7")
    server.on("StreamGenerate", tokens(0, 0, then=lambda context: fail(context, error)))
    result = echelon("generate", "once", address=server.address)
    assert (result.exit_code, result.stderr) == (1, "echelon: error: model x is not served (request_id=r-7)\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_status_of_nothing_is_one_line_and_exit_1(as_json: bool) -> None:
    result = echelon("status", *["--json"][: int(as_json)], address="localhost:1")
    assert result.exit_code == 1
    remedy = "is `echelon serve --address localhost:1` running?"
    told = f"echelon: error: cannot reach localhost:1: Connection refused; {remedy}\n"
    assert (result.stdout, result.stderr) == ("", told)


def test_why_a_command_waits_is_told_once() -> None:
    result = echelon("generate", "once", "--timeout", "1", address="localhost:1")
    waiting, ended = result.stderr.splitlines()
    assert waiting.startswith("echelon: cannot reach localhost:1: Connection refused; is `echelon serve")
    assert waiting.endswith("; trying again until the deadline")
    assert ended.startswith("echelon: error: the deadline passed")  # at an attempt, or between two
    assert not logging.getLogger("echelon").handlers


def cluster() -> Cluster:
    rank = Rank(
        replica=0,
        pipeline=0,
        data=0,
        tensor=1,
        expert=0,
        leader=False,
        pid=4242,
        node_id="node-a",
        epoch=5,
        state="ready",
        parameter_bytes=3 * 2**29,
    )
    replica = Replica(index=0, epoch=5, state="ready", kv_blocks_total=9, kv_blocks_referenced=2, step=77)
    model = Model(
        name="tiny", source="/m", state="active", dtype="float32", architecture="LlamaForCausalLM", max_context=512
    )
    return Cluster(
        version="0.1.0",
        term=3,
        coordinator_pid=41,
        queued=1,
        running=2,
        parked=0,
        models=(model,),
        replicas=(replica,),
        ranks=(rank,),
        spares=(
            Spare(replica=0, rank=0, pid=4343, node_id="node-a", state="warming"),
            Spare(replica=0, rank=1, pid=4344, node_id="node-a", state="warm", on_spare_device=True),
        ),
        spare_devices=(
            SpareDevice(slot="device/0", node_id="node-b", state="used", rank="0/0"),
            SpareDevice(slot="0/0", node_id="node-a", state="out"),
        ),
    )


def test_status_shows_models_replicas_and_ranks(server: ScriptedServer) -> None:
    for _ in range(2):
        server.on("GetCluster", lambda request, context: convert_cluster.cluster_to_proto(cluster()))
    shown = echelon("status", address=server.address).stdout
    for part in (
        "term 3",
        "1 queued",
        "LlamaForCausalLM",
        "2/9",
        "0/p0-d0-t1",
        "4242",
        "0/0 spare",
        "4343",
        "warming",
        "device/1 spare",
        "used by 0/0",
        "0/0 device",
        "1.5 GiB",
        "1/1 replicas ready",
    ):
        assert part in shown
    answer = json.loads(echelon("status", "--json", address=server.address).stdout)
    assert answer["ranks"][0]["pid"] == 4242
    assert answer["replicas"][0]["epoch"] == 5


def test_events_are_lines(server: ScriptedServer) -> None:
    events = [ClusterEvent(s, 1.5, "rank.died", f"rank/{s}", {"signal": 9}) for s in (1, 2)]
    for _ in range(2):
        server.on("WatchClusterEvents", lambda r, c: map(convert_cluster.event_to_proto, events))
    lines = echelon("events", address=server.address).stdout.splitlines()
    assert [line.split()[3:] for line in lines] == [["rank.died", f"rank/{s}", "signal=9"] for s in (1, 2)]
    lines = echelon("events", "--json", "--after", "1", address=server.address).stdout.splitlines()
    assert [json.loads(line)["sequence"] for line in lines] == [2]
    assert not server.requests["WatchClusterEvents"][0].follow


def test_batch_submit_prints_the_id_and_may_watch(server: ScriptedServer, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"custom_id": "a", "prompt": "once"}\n')
    for _ in range(2):
        server.on("CreateBatchJob", lambda request, context: convert_jobs.job_to_proto(job(JobState.QUEUED)))
    result = echelon("batch", "submit", str(source), "--job-id", "j", address=server.address)
    assert (result.exit_code, result.stdout) == (0, "j\n")
    server.on("WatchBatchJob", answers_job(job(JobState.RUNNING, 1), job(JobState.SUCCEEDED, 2)))
    result = echelon("batch", "submit", str(source), "--job-id", "j", "--watch", address=server.address)
    assert (result.exit_code, result.stdout) == (0, "j\n")
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["j running", "j succeeded"]
    assert server.requests["CreateBatchJob"][0].source.jsonl == source.read_bytes()


def test_a_file_that_is_not_there_is_wrong_use() -> None:
    result = echelon("batch", "submit", "/no/such/file.jsonl")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "/no/such/file.jsonl" in result.stderr


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (job(JobState.SUCCEEDED, 2), 0),
        (job(JobState.SUCCEEDED, 1, 1), 3),
        (job(JobState.CANCELLED, 1), 1),
    ],
)
def test_batch_watch_exits_by_the_jobs_end(server: ScriptedServer, end: JobStatus, code: int) -> None:
    server.on("GetBatchJob", lambda request, context: convert_jobs.job_to_proto(job(JobState.RUNNING)))
    server.on("WatchBatchJob", answers_job(job(JobState.RUNNING), end))
    assert echelon("batch", "watch", "j", address=server.address).exit_code == code


def test_batch_list_get_and_cancel(server: ScriptedServer) -> None:
    for _ in range(2):
        server.on(
            "ListBatchJobs",
            lambda r, c: jobs_pb2.ListBatchJobsResponse(
                batch_jobs=[convert_jobs.job_to_proto(job(JobState.RUNNING, 1))]
            ),
        )
    assert echelon("batch", "list", address=server.address).stdout.splitlines()[1].split()[:3] == ["j", "running", "2"]
    (listed,) = json.loads(echelon("batch", "list", "--json", address=server.address).stdout)
    assert (listed["job_id"], listed["state"], listed["counts"]["succeeded"]) == ("j", "running", 1)
    for _ in range(4):
        server.on("GetBatchJob", lambda request, context: convert_jobs.job_to_proto(job(JobState.RUNNING, 1)))
    assert "1/2 done" in echelon("batch", "get", "j", address=server.address).stdout
    server.on("CancelBatchJob", lambda request, context: convert_jobs.job_to_proto(job(JobState.CANCELLING)))
    result = echelon("batch", "cancel", "j", "--json", address=server.address)
    assert json.loads(result.stdout)["state"] == "cancelling"
    assert server.requests["CancelBatchJob"][0].name == "batchJobs/j"


def test_batch_results_are_openai_lines(server: ScriptedServer, tmp_path: Path) -> None:
    for _ in range(3):
        server.on("GetBatchJob", lambda request, context: convert_jobs.job_to_proto(job(JobState.SUCCEEDED, 1, 1)))
    server.on("StreamBatchJobResults", answers_results(*RESULTS), answers_results(*RESULTS))
    server.on("StreamBatchJobResults", answers_results(RESULTS[0]))
    result = echelon("batch", "results", "j", address=server.address)
    assert result.exit_code == 3
    good, bad = map(json.loads, result.stdout.splitlines())
    assert set(good) == set(bad) == {"id", "custom_id", "response", "error"}
    assert (good["custom_id"], good["error"], good["response"]["status_code"]) == ("a", None, 200)
    assert good["response"]["request_id"] == "r0"
    assert good["response"]["body"]["choices"][0]["text"] == "".join(WORDS)
    assert (bad["custom_id"], bad["response"]) == ("b", None)
    assert bad["error"] == {"code": "CONTEXT_TOO_LONG", "message": "too long"}
    target = tmp_path / "out.jsonl"
    echelon("batch", "results", "j", "--output", str(target), address=server.address)
    assert target.read_text() == result.stdout
    assert echelon("batch", "results", "j", "--no-follow", address=server.address).exit_code == 0
    assert not server.requests["StreamBatchJobResults"][2].follow


def test_help_names_every_verb() -> None:
    shown = echelon("--help").stdout
    for verb in ("serve", "generate", "chat", "batch", "checkpoint", "eval", "status", "events", "doctor"):
        assert verb in shown


def test_every_command_that_prints_data_speaks_json() -> None:
    root: Any = typer.main.get_command(app)
    groups = [root, *(root.commands[name] for name in ("batch", "checkpoint", "eval"))]
    commands = [command for group in groups for command in group.commands.values() if command not in groups]
    assert {command.name for command in commands} >= {
        "generate",
        "chat",
        "status",
        "events",
        "doctor",
        "results",
        "perplexity",
        "prune",
    }
    flags = {command.name: {flag for option in command.params for flag in option.opts} for command in commands}
    assert [name for name, found in flags.items() if "--json" not in found] == []


SAMPLING_FLAGS = """
    --n 1 --min-p 0.1 --presence-penalty 1 --frequency-penalty -1 --repetition-penalty 1.5 --top-k 3
    --logit-bias 7=-2.5 --logit-bias 8=1 --bad-word x --bad-word y --stop end --include-stop
    --stop-token-id 5 --min-tokens 2 --prompt-logprobs 1 --priority 4
"""


def test_each_sampling_field_is_a_flag_and_travels(server: ScriptedServer, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    server.on("StreamGenerate", *[tokens(0, 6, end=True)] * 2)
    flags = SAMPLING_FLAGS.split()
    result = echelon("generate", "once", *flags, "--json-schema", f"@{schema}", address=server.address)
    assert result.exit_code == 0, result.stderr
    request = server.requests["StreamGenerate"][0]
    expected = SamplingParams(
        n=1, min_p=0.1, presence_penalty=1.0, frequency_penalty=-1.0, repetition_penalty=1.5, top_k=3,
        logit_bias={7: -2.5, 8: 1.0}, bad_words=("x", "y"), stop=("end",), include_stop=True, stop_token_ids=(5,),
        min_tokens=2, prompt_logprobs=1, json_schema='{"type": "object"}',
    )  # fmt: skip
    assert request.sampling == convert.sampling_to_proto(expected)
    assert request.priority == 4
    assert OPTIONS.keys() == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--logit-bias", "7"), "logit_bias must be ID=BIAS, a token id and a number, got '7'"),
        (("--grammar", "@/no/such"), "grammar @/no/such cannot be read"),
        (("--regex", "a", "--choice", "b"), "choice cannot be combined with regex"),
    ],
)
def test_sampling_flags_that_say_nothing_are_wrong_use(flags: tuple[str, ...], message: str) -> None:
    result = echelon("generate", "once", *flags)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


def test_several_answers_are_told_apart(server: ScriptedServer) -> None:
    def answer(request: Any, context: Any) -> Iterator[Any]:
        choices = tuple(
            Choice(index=index, text=text, token_ids=(index,), finish_reason=FinishReason.STOP)
            for index, text in enumerate(("this", "that"))
        )
        final = Completion(request_id=request.request_id, model="tiny", choices=choices)
        yield convert.stream_to_proto(final)

    server.on("StreamGenerate", answer, answer)
    assert echelon("generate", "once", "--n", "2", address=server.address).stdout == "[0] this\n[1] that\n"
    told = json.loads(echelon("generate", "once", "--n", "2", "--json", address=server.address).stdout)
    assert [choice["text"] for choice in told["choices"]] == ["this", "that"]


def test_a_profile_names_the_address(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "echelon").mkdir()
    (tmp_path / "echelon" / "config.toml").write_text(f"[here]\naddress = '{server.address}'\n")
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "ECHELON_ADDRESS": ""}
    server.on("GetCluster", *[lambda request, context: convert_cluster.cluster_to_proto(cluster())] * 2)
    for extra in ({}, {"ECHELON_PROFILE": "here"}):
        flags = [] if extra else ["--profile", "here"]
        result = CliRunner().invoke(app, ["status", *flags], env={**environment, **extra})
        assert (result.exit_code, result.stdout.split(":")[0]) == (0, "localhost")
    result = CliRunner().invoke(app, ["status", "--profile", "there"], env=environment)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "no profile 'there' in" in result.stderr and "it has here" in result.stderr


def test_submit_watch_and_results_speak_json(server: ScriptedServer, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"custom_id": "a", "prompt": "once"}\n')
    server.on("CreateBatchJob", lambda request, context: convert_jobs.job_to_proto(job(JobState.QUEUED)))
    server.on("WatchBatchJob", answers_job(job(JobState.RUNNING, 1), job(JobState.SUCCEEDED, 2)))
    result = echelon("batch", "submit", str(source), "--watch", "--json", address=server.address)
    first, *states = [json.loads(line) for line in result.stdout.splitlines()]
    assert (first, result.stderr) == ({"job_id": "j"}, "")
    assert [state["state"] for state in states] == ["running", "succeeded"]
    server.on("GetBatchJob", lambda request, context: convert_jobs.job_to_proto(job(JobState.SUCCEEDED, 1)))
    server.on("StreamBatchJobResults", answers_results(RESULTS[0]))
    result = echelon("batch", "results", "j", "--json", address=server.address)
    assert json.loads(result.stdout)["custom_id"] == "a"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs_and_the_flags_of_serve(shell: str) -> None:
    def complete(*words: str) -> str:
        environment = os.environ | {"_ECHELON_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": " ".join(words)}
        environment |= {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
        environment |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        command = [sys.executable, "-m", "echelon"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

    assert "generate" in complete("echelon", "gen")
    flags = complete("echelon", "serve", "--max-")
    for name in ("--max-context", "--max-running", "--max-queue-tokens"):
        assert name in flags
    assert "--tensor" not in flags


def test_ctrl_c_while_the_command_is_loaded_is_silent() -> None:
    """Whatever is being imported then: here, the first import below main() is when it comes."""
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "from echelon.cli import main\n"
        "assert [name for name in sys.modules if name.startswith('echelon')] == ['echelon', 'echelon.cli']\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def interrupt(server: ScriptedServer, entered: threading.Event, *arguments: str) -> tuple[int, str, str]:
    """The command in a process of its own, with Ctrl-C while the server keeps it waiting."""
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    # The tests may run where SIGINT is ignored, as a shell's background jobs do, and children inherit that.
    through = [sys.executable, "-S", "-c", heed]
    command = [*through, sys.executable, "-m", "echelon", *arguments, "--address", server.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        try:
            assert entered.wait(30)
            if arguments[0] == "generate":  # what was streamed is there before the end
                assert process.stdout is not None
                assert process.stdout.read(1) == b"o"
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, stdout.decode(), stderr.decode()


def hang(entered: threading.Event, context: Any) -> None:
    gone = threading.Event()
    context.add_callback(gone.set)
    entered.set()
    gone.wait(30)


def test_ctrl_c_in_generate_exits_130_and_cancels_at_the_server(server: ScriptedServer) -> None:
    entered = threading.Event()
    server.on("StreamGenerate", tokens(0, 1, then=lambda context: hang(entered, context)))
    server.on("CancelGeneration", lambda request, context: generation_pb2.CancelGenerationResponse())
    ended = interrupt(server, entered, "generate", "once")
    assert ended == (130, "ne ", "")
    request_id = server.requests["StreamGenerate"][0].request_id
    assert list(server.requests["CancelGeneration"][0].request_ids) == [request_id]


def test_ctrl_c_in_batch_watch_exits_130_and_leaves_the_job(server: ScriptedServer) -> None:
    entered = threading.Event()

    def watch(request: Any, context: Any) -> Iterator[Any]:
        yield from answers_job(job(JobState.RUNNING, 1))(request, context)
        hang(entered, context)

    server.on("GetBatchJob", lambda request, context: convert_jobs.job_to_proto(job(JobState.RUNNING)))
    server.on("WatchBatchJob", watch)
    code, stdout, stderr = interrupt(server, entered, "batch", "watch", "j")
    assert (code, stdout) == (130, "")
    assert set(stderr.splitlines()) <= {"j running: 1/2 done, 0 failed, 1 running"}
    assert set(server.requests) == {"GetBatchJob", "WatchBatchJob"}
