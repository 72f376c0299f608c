"""The tokenizer: special tokens once, chat as the template says, and no torch on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.tokenizer import Tokenizer
from echelon import convert
from echelon.chat import ChatMessage, ChatPrompt, ToolCall
from echelon.errors import ConfigError, InvalidRequestError
from tests.tiny import BEGIN, make_checkpoint

HELLO = ChatPrompt((ChatMessage("user", "The quick brown fox"),))


def with_args(**template_args: object) -> ChatPrompt:
    return replace(HELLO, template_args=template_args)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)


@pytest.mark.parametrize("text", ["The quick brown fox", "a  b ,c . don 't", "敏捷的棕色狐狸 \U0001f98a", " \n"])
def test_text_comes_back_unchanged_and_begins_with_one_begin_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    begin = tokenizer.encode("")[0]
    assert ids[0] == begin and begin not in ids[1:]
    assert tokenizer.decode(ids) == text
    assert max(ids) < tokenizer.vocab_size


def test_a_chat_is_what_transformers_makes_of_it_with_one_begin_token(tokenizer: Tokenizer, directory: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    conversation = [{"role": "user", "content": "The quick brown fox"}]
    for prompted in (True, False):
        ids = tokenizer.chat(with_args(add_generation_prompt=prompted))
        assert list(ids) == theirs.apply_chat_template(conversation, add_generation_prompt=prompted)["input_ids"]
        assert ids.count(theirs.convert_tokens_to_ids(BEGIN)) == 1
    assert tokenizer.chat(HELLO) == tokenizer.chat(with_args(add_generation_prompt=True))


def test_a_client_cannot_bring_its_own_template(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match=r"template_args\.chat_template cannot be set") as caught:
        tokenizer.chat(with_args(chat_template="{{ 1 }}"))
    assert caught.value.field == "template_args.chat_template"


def test_what_the_template_refuses_is_the_requests_fault(tmp_path: Path) -> None:
    directory = _tokenizer_only(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="refuses these messages: roles must alternate"):
        Tokenizer.from_directory(directory).chat(HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[7]['content'] }}",
        "{{ messages[0].content() }}",
        "{{ 1 // 0 }}",
        "{{ '{}'.format() }}",
        "{{ odd | dictsort }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_whatever_a_template_stumbles_over_is_the_requests_fault(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.from_directory(_tokenizer_only(tmp_path, template))
    with pytest.raises(InvalidRequestError, match="the chat template refuses these messages") as caught:
        tokenizer.chat(with_args(odd=5))
    assert caught.value.field == "messages"


def test_a_conversation_may_go_on_with_the_assistants_own_words(tokenizer: Tokenizer) -> None:
    begun = replace(HELLO, messages=(*HELLO.messages, ChatMessage("assistant", "jumps over")))
    goes_on = replace(begun, template_args={"continue_final_message": True})
    assert tokenizer.decode(tokenizer.chat(goes_on)).endswith("[assistant] jumps over")
    assert tokenizer.decode(tokenizer.chat(begun)).endswith("[assistant] jumps over\n[assistant] ")


TOOLS_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }};{% endif %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<{{ call.id }} {{ call.type }} {{ call.function.name }} {{ call.function.arguments | tojson }}>"
    "{% endfor %}"
    "{% if message.tool_call_id %}({{ message.tool_call_id }}){% endif %};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ mood }}{% endif %}"
)


def test_tools_calls_and_their_answers_come_to_the_template_as_they_were_sent(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(_tokenizer_only(tmp_path, TOOLS_TEMPLATE))
    days = {"type": "integer", "default": 3, "maximum": 9}
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"days": days}}}
    sent = ChatPrompt(
        (
            ChatMessage("user", "rain?"),
            ChatMessage("assistant", "", (ToolCall("c1", "weather", '{"days": 3}'), ToolCall("c2", "f", "not JSON"))),
            ChatMessage("tool", "no", (), "c1"),
        ),
        ({"type": "function", "function": function},),
        {"mood": "calm"},
    )
    expected = (
        '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": '
        '{"days": {"type": "integer", "default": 3, "maximum": 9}}}}}];'
        "[user]rain?;"
        '[assistant]<c1 function weather {"days": 3}><c2 function f "not JSON">;'
        "[tool]no(c1);"
        "[assistant]calm"
    )
    over_the_wire = convert.chat_from_proto(convert.chat_to_proto(sent))
    for prompt in (sent, over_the_wire):
        ids = tokenizer.chat(prompt)
        assert tokenizer.decode(ids) == expected
        assert ids.count(tokenizer.encode("")[0]) == 1, "one beginning of text"
    bare = tokenizer.chat(ChatPrompt((ChatMessage("user", "rain?"),)))
    assert tokenizer.decode(bare) == "[user]rain?;[assistant]"


def test_arguments_that_are_nested_too_deeply_stay_a_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(_tokenizer_only(tmp_path, TOOLS_TEMPLATE))
    deep = "[" * 100_000
    prompt = ChatPrompt((ChatMessage("assistant", "", (ToolCall("c", "f", deep),)),))
    assert f'"{deep}"' in tokenizer.decode(tokenizer.chat(prompt))


def test_without_a_chat_template_a_chat_is_refused_and_text_is_not(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(_tokenizer_only(tmp_path, None))
    with pytest.raises(InvalidRequestError, match="no chat template; send text or token_ids") as caught:
        tokenizer.chat(HELLO)
    assert caught.value.field == "messages"
    assert tokenizer.encode("fox")


def test_a_missing_and_a_broken_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        Tokenizer.from_directory(tmp_path)


def test_threads_share_one_tokenizer(tokenizer: Tokenizer) -> None:
    texts = [f"fox number {n} jumps over {n * n} dogs" for n in range(200)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        assert list(pool.map(tokenizer.decode, pool.map(tokenizer.encode, texts))) == texts


def test_loading_and_chatting_import_no_torch(directory: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from coordinator.tokenizer import Tokenizer;"
        "from echelon.chat import ChatMessage, ChatPrompt;"
        f"t = Tokenizer.from_directory(Path({str(directory)!r})); t.chat(ChatPrompt((ChatMessage('user', 'fox'),)));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120, check=False).returncode == 0


def _tokenizer_only(directory: Path, chat_template: str | None) -> Path:
    whole = make_checkpoint(directory / "whole")
    bare = directory / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((whole / "tokenizer.json").read_bytes())
    config = json.loads((whole / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    if chat_template is not None:
        config["chat_template"] = chat_template
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    return bare
