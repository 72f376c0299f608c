"""`echelon eval perplexity` through a whole cluster says what transformers says of the same windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from echelon.cli.app import app
from echelon.evaluation import Score, windows
from echelon.testing import LocalCluster
from examples.tiny.export import write_model
from examples.tiny.model import TinyModel
from examples.tiny.sources import Document
from examples.tiny.tokens import learn_tokenizer
from examples.tiny.train import SHAPES

pytestmark = [pytest.mark.cluster, pytest.mark.long]

SHAPE = SHAPES["small"]
WINDOW, STRIDE = 96, 40


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [path.read_text(encoding="utf-8")[:900] for path in sorted(Path(__file__).parent.glob("test_*.py"))]


@pytest.fixture(scope="module")
def model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough that tokens differ."""
    made = TinyModel(SHAPE)
    made.initialise(4)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_model(made, learn_tokenizer([Document("here", "", text) for text in texts], SHAPE.vocab_size), folder)
    return folder


@pytest.fixture(scope="module")
def expected(model: Path, texts: list[str]) -> Score:
    """transformers' score of the texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(
        model, dtype=torch.float64, experts_implementation="eager"
    )
    total = Score()
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        total += Score(1, len(text.encode()))
        for part in windows(ids.shape[1], WINDOW, STRIDE):
            given, first = ids[:, part.first : part.last], part.scored - part.first
            with torch.inference_mode():
                logprobs = theirs(given).logits[0, first - 1 : -1].log_softmax(-1)
            targets = given[0, first:]
            nats = -logprobs.gather(-1, targets[:, None]).sum().item()
            total += Score(scored=len(targets), nats=nats, correct=int((logprobs.argmax(-1) == targets).sum()))
    return total


def evaluated(cluster: LocalCluster, path: Path) -> Result:
    flags = ["--window", str(WINDOW), "--stride", str(STRIDE), "--json"]
    return CliRunner().invoke(app, ["eval", "perplexity", str(path), "--address", cluster.target, *flags])


@pytest.mark.parametrize("degrees", [{}, {"tensor": 2, "expert": 2, "pipeline": 2}], ids=["one", "tensor-pipeline"])
def test_perplexity_is_that_of_transformers(
    degrees: dict[str, int], model: Path, texts: list[str], expected: Score, ray_address: str, tmp_path: Path
) -> None:
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    flags: dict[str, Any] = {"max_step_tokens": 64, "max_running": 8, **degrees}
    with LocalCluster(model=model, dtype="float64", ray_address=ray_address, **flags) as cluster:
        result = evaluated(cluster, path)
        assert result.exit_code == 0, result.output
        again = json.loads(evaluated(cluster, path).stdout)  # prefixes are cached now
    found = json.loads(result.stdout)
    assert (found["documents"], found["scored_tokens"]) == (len(texts), expected.scored)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    assert found["accuracy"] == pytest.approx(expected.accuracy, abs=1.5 / expected.scored)
    assert again["perplexity"] == pytest.approx(found["perplexity"], rel=1e-9)
