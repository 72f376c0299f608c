"""`make demo` as a stranger sees it, watched from outside: processes, faults, answers, and what is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from echelon.internal.processes import find_process
from examples.tiny.texts import MODEL

COMPARED = 5
NEAR_TIE = 1e-9  # float64: two ranks add in another order than one
MARK = "ECHELON_TEST_MARK"

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def marked_processes(mark: str) -> Iterator[int]:
    """Every process that inherited the mark, wherever it has gone since."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except (OSError, ValueError):
                continue
            if f"{MARK}={mark}".encode() in environment:
                yield int(entry.name)


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def assert_equals_transformers(job: Path, results: list[dict[str, Any]]) -> None:
    """Greedy answers, token by token: each is transformers' first choice after the ones before it."""
    reference = DeepseekV3ForCausalLM.from_pretrained(MODEL, dtype=torch.float64, experts_implementation="eager").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    bodies = {line["custom_id"]: line["body"] for line in map(json.loads, job.read_text().splitlines())}
    chosen = [item for item in results if bodies[item["custom_id"]]["temperature"] == 0][
        :: len(results) // COMPARED // 2
    ]
    assert len(chosen) >= COMPARED
    for item in chosen:
        prompt, answer = tokenizer.encode(bodies[item["custom_id"]]["prompt"]), item["token_ids"]
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        behind = logits.max(dim=-1).values - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert behind.max() < NEAR_TIE, item["custom_id"]
        assert item["text"] == tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.long
def test_the_demo(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    demo = subprocess.Popen(
        [sys.executable, "-m", "examples.demo", "--json", "--folder", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, MARK: mark},
    )
    with demo:
        assert demo.stdout is not None
        serving = json.loads(demo.stdout.readline())
        running = filter(None, map(find_process, marked_processes(mark)))
        assert any(process.name == "raylet" for process in running)
        assert len(serving["rank_pids"]) == 2 and set(serving["rank_pids"]) <= set(marked_processes(mark))
        assert all("libtorch" in maps(pid) for pid in serving["rank_pids"])
        assert "libtorch" not in maps(serving["coordinator_pid"])
        summary = json.loads(demo.stdout.readline())
        assert demo.wait() == 0
    assert summary["items"] == summary["succeeded"] >= 200
    assert summary["interrupted"] >= 1 and summary["recomputed_tokens"] >= 1
    assert summary["epoch_after"] == summary["epoch_before"] + 1
    assert summary["victim_pid"] in serving["rank_pids"] and not Path(f"/proc/{summary['victim_pid']}").exists()
    assert list(marked_processes(mark)) == []
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(results) == summary["items"] and all(item["error"] is None for item in results)
    assert_equals_transformers(tmp_path / "job.jsonl", results)
    assert summary["identical"] and summary["tokens_per_step"] > 1.3
    assert summary["drafts"]["mtp"]["accepted_tokens"] > summary["drafts"]["off"]["drafted_tokens"] == 0
    assert summary["perplexity"] == pytest.approx(summary["transformers_perplexity"], rel=1e-6)
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
