"""The front end: defaults, limits with their arithmetic, and a digest of what was sent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.frontend import GenerateFields, check_client_request_id, digest_of, resolve
from coordinator.grammars import Grammars
from coordinator.model_facts import ModelFacts
from coordinator.requests.nouns import Request
from coordinator.settle import Served
from coordinator.tokenizer import Tokenizer
from echelon.chat import ChatMessage, ChatPrompt, ToolCall
from echelon.errors import InvalidRequestError, NotFoundError
from echelon.internal.link import Sampling
from echelon.sampling import SamplingParams
from models.config import DefaultSampling
from tests.tiny import make_checkpoint

FACTS = ModelFacts(name="tiny", vocab_size=320, max_context=64, end_ids=(1, 7))
IDS = GenerateFields(prompt=(5, 6, 7))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)


@pytest.fixture
def run(tokenizer: Tokenizer, directory: Path) -> Run:
    return Run(tokenizer, directory)


class Run:
    def __init__(self, tokenizer: Tokenizer, directory: Path) -> None:
        self.tokenizer = tokenizer
        self.directory = directory

    def __call__(self, fields: GenerateFields, facts: ModelFacts = FACTS, now: float = 100.0) -> Request:
        served = Served(facts, self.tokenizer, Grammars(self.directory, facts))
        return resolve(fields, served, now, drawn_seed=99, drawn_id="drawn")


def test_what_is_left_open_is_drawn_or_documented(run: Run) -> None:
    request = run(IDS)
    assert request.request_id == "drawn" and request.model == "tiny" and request.prompt == (5, 6, 7)
    assert request.sampling == Sampling(1.0, 1.0, 0, 16, 99, (1, 7), None)
    assert (request.opened_unix_s, request.deadline_unix_s) == (100.0, 700.0)


def test_generation_config_comes_before_the_documented_defaults_and_after_the_client(run: Run) -> None:
    facts = replace(FACTS, default_sampling=DefaultSampling(temperature=0.6, top_p=0.9, top_k=20))
    assert run(IDS, facts).sampling == Sampling(0.6, 0.9, 20, 16, 99, (1, 7))
    sent = SamplingParams(temperature=0.0, top_p=0.5, top_k=0, max_tokens=3, seed=-4, logprobs=0)
    assert run(replace(IDS, sampling=sent), facts).sampling == Sampling(0.0, 0.5, 0, 3, -4, (1, 7), 0)


def test_stop_ids_join_the_end_ids_unless_those_are_ignored(run: Run) -> None:
    def stops(sampling: SamplingParams) -> tuple[int, ...]:
        return run(replace(IDS, sampling=sampling)).sampling.stop_token_ids

    assert stops(SamplingParams(stop_token_ids=(9, 1))) == (9, 1, 7)
    assert stops(SamplingParams(stop_token_ids=(9, 1), ignore_eos=True)) == (9, 1)


def test_text_and_chat_are_encoded(run: Run) -> None:
    chat = ChatPrompt((ChatMessage("user", "fox"),), (), {"add_generation_prompt": False})
    assert run(GenerateFields(prompt="fox")).prompt == run.tokenizer.encode("fox")
    assert run(GenerateFields(prompt=chat)).prompt == run.tokenizer.chat(chat)


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "message"),
    [
        (60, 5, r"60 prompt tokens \+ max_tokens=5 = 65, over max_context=64 of 'tiny'; set max_tokens to 4 or less"),
        (64, 1, r"64 prompt tokens \+ max_tokens=1 = 65, over max_context=64 of 'tiny'; shorten the prompt to 63"),
    ],
)
def test_a_request_over_the_context_gets_the_arithmetic(
    run: Run, prompt_tokens: int, max_tokens: int, message: str
) -> None:
    fields = GenerateFields(prompt=(5,) * prompt_tokens, sampling=SamplingParams(max_tokens=max_tokens))
    with pytest.raises(InvalidRequestError, match=message) as caught:
        run(fields)
    assert caught.value.reason == "CONTEXT_TOO_LONG"
    fits = replace(fields, prompt=(5,) * 60, sampling=SamplingParams(max_tokens=4))
    assert len(run(fits).prompt) == 60


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        (GenerateFields(prompt=None), "prompt", "no input; set one of text, token_ids or messages"),
        (GenerateFields(prompt=""), "text", "text is empty"),
        (GenerateFields(prompt=()), "prompt", "has no tokens"),
        (GenerateFields(prompt=ChatPrompt(())), "messages", "messages is empty"),
        (GenerateFields(prompt=(5, 320)), "token_ids", r"token_ids\[1\] = 320 is outside the vocabulary of 'tiny'"),
        (GenerateFields(prompt=(-1,)), "token_ids", r"token_ids\[0\] = -1 is outside"),
        (
            replace(IDS, sampling=SamplingParams(stop_token_ids=(400,))),
            "sampling.stop_token_ids",
            r"stop_token_ids\[0\] = 400 is outside the vocabulary",
        ),
    ],
)
def test_bad_input_names_its_field(run: Run, fields: GenerateFields, field: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        run(fields)
    assert caught.value.field == field


def test_an_unknown_model_is_not_found_and_the_served_one_is_named(run: Run) -> None:
    with pytest.raises(NotFoundError, match="model 'gpt' is not served; leave model empty, or take 'tiny'") as caught:
        run(replace(IDS, model="gpt"))
    assert caught.value.reason == "MODEL_NOT_FOUND"
    assert run(replace(IDS, model="tiny")).model == "tiny"


def test_the_digest_covers_the_content_and_nothing_else(run: Run) -> None:
    same = replace(IDS, request_id="r1", deadline_unix_s=5000.0)
    assert run(IDS).digest == run(same, now=200.0).digest
    others = [
        replace(IDS, prompt=(5, 6, 8)),
        replace(IDS, prompt="fox"),
        replace(IDS, prompt=ChatPrompt((ChatMessage("user", "fox"),))),
        replace(IDS, prompt=ChatPrompt((ChatMessage("user", "fox"),), ({"type": "function"},))),
        replace(IDS, prompt=ChatPrompt((ChatMessage("user", "fox"),), (), {"type": "function"})),
        replace(IDS, prompt=ChatPrompt((ChatMessage("user", "fox", (ToolCall("1", "f"),)),))),
        replace(IDS, prompt=ChatPrompt((ChatMessage("user", "fox", (), "1"),))),
        replace(IDS, model="tiny"),
        replace(IDS, sampling=SamplingParams(seed=99)),  # sent, though equal to the drawn one
        replace(IDS, sampling=SamplingParams(max_tokens=16)),
        replace(IDS, sampling=SamplingParams(n=2)),
        replace(IDS, sampling=SamplingParams(stop=("a", "b"))),
        replace(IDS, sampling=SamplingParams(stop=("b", "a"))),
        replace(IDS, sampling=SamplingParams(logit_bias={5: 1.0})),
        replace(IDS, sampling=SamplingParams(logit_bias={6: 1.0})),
        replace(IDS, priority=-1),
        replace(IDS, cache_salt="tenant"),
    ]
    assert len({digest_of(fields) for fields in (IDS, *others)}) == len(others) + 1


@pytest.mark.parametrize("request_id", ["", "a", "3f2b/x:1._-", "jobs.1"])
def test_a_client_may_choose_plain_ids(request_id: str) -> None:
    check_client_request_id(request_id)


@pytest.mark.parametrize("request_id", ["job.nightly.3", "a b", "é", "x" * 129, "a\n"])
def test_ids_of_job_items_and_odd_ones_are_refused(request_id: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_client_request_id(request_id)
    assert caught.value.field == "request_id"


def test_a_constraint_becomes_a_grammar_that_was_tried_on_the_vocabulary(run: Run) -> None:
    assert run(replace(IDS, sampling=SamplingParams(regex="[ab]{3}"))).sampling.grammar
    assert run(IDS).sampling.grammar == ""


@pytest.mark.parametrize(
    ("sampling", "field", "words"),
    [
        (SamplingParams(regex="[a"), "sampling.regex", "regex cannot be used"),
        (SamplingParams(json_schema='{"type": "nothing"}'), "sampling.json_schema", "cannot be used"),
        (SamplingParams(json_schema="{"), "sampling.json_schema", "it is not JSON"),
        (SamplingParams(grammar="start: missing"), "sampling.grammar", "missing"),
        (SamplingParams(json_object=True, ignore_eos=True), "sampling.ignore_eos", "json_object"),
        (SamplingParams(regex="a+", min_tokens=2), "sampling.min_tokens", "cannot go with regex"),
        (SamplingParams(regex="a" * 100_001), "sampling.regex", "100001 characters, over the limit of 100000"),
    ],
)
def test_a_constraint_that_cannot_be_followed_is_refused_by_name(
    run: Run, sampling: SamplingParams, field: str, words: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        run(replace(IDS, sampling=sampling))
    assert caught.value.field == field and words in caught.value.message


def test_a_model_without_end_tokens_takes_no_constraint(run: Run) -> None:
    with pytest.raises(InvalidRequestError, match="needs a model that has an end token"):
        run(replace(IDS, sampling=SamplingParams(regex="a")), replace(FACTS, end_ids=()))


def test_a_text_that_can_never_fit_is_refused_before_it_is_encoded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token stands for more characters than the longest one."""
    longest = run.tokenizer.longest_token_characters
    limit = FACTS.max_context * longest
    monkeypatch.setattr(Tokenizer, "_encode", lambda *_: pytest.fail("it was encoded"))
    chat = ChatPrompt((ChatMessage("user", "x" * limit),))
    for prompt in ("x" * (limit + 1), chat):
        with pytest.raises(InvalidRequestError, match=f"tokens of at most {longest} characters, {limit};") as caught:
            run(replace(IDS, prompt=prompt))
        assert (caught.value.reason, caught.value.field) == ("CONTEXT_TOO_LONG", "prompt")


def test_no_token_spells_more_than_the_longest(run: Run) -> None:
    ids = range(run.tokenizer.vocab_size)
    assert max(len(run.tokenizer.decode([token_id])) for token_id in ids) <= run.tokenizer.longest_token_characters


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        (replace(IDS, cache_salt="x" * 257), "cache_salt", "cache_salt has 257 characters, over the limit of 256"),
        (
            replace(IDS, prompt=ChatPrompt((ChatMessage("user", "x"),) * 10_001)),
            "messages",
            "messages has 10001, over the limit of 10000",
        ),
    ],
)
def test_what_nobody_needs_is_refused_by_its_limit(run: Run, fields: GenerateFields, field: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        run(fields)
    assert (caught.value.field, caught.value.message) == (field, message)


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_long_texts_to_look_for_are_refused(name: str) -> None:
    SamplingParams(**{name: ("x" * 1000,)})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=f"{name} must be at most .* texts of 1 to 1000 characters"):
        SamplingParams(**{name: ("x" * 1001,)})  # type: ignore[arg-type]


def test_too_many_stop_ids_are_refused() -> None:
    SamplingParams(stop_token_ids=range(1024))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="at most 1024 token ids"):
        SamplingParams(stop_token_ids=range(1025))  # type: ignore[arg-type]


def test_more_scores_than_one_message_carries_are_refused(run: Run) -> None:
    fields = replace(IDS, prompt=(5,) * 150_000, sampling=SamplingParams(prompt_logprobs=19, max_tokens=1))
    facts = replace(FACTS, max_context=200_000)
    assert run(fields, facts).sampling.prompt_logprobs == 19
    with pytest.raises(InvalidRequestError, match="= 3150000 log-probabilities, over the limit of 3000000") as caught:
        run(replace(fields, sampling=SamplingParams(prompt_logprobs=20, max_tokens=1)), facts)
    assert caught.value.field == "sampling.prompt_logprobs"
