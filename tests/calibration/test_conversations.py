"""Conversations and instructions in the forms that datasets have them: the same turns whatever the columns are."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calibration_text import (
    ASSISTANT,
    USER,
    VOCABULARY,
    Load,
    ids,
    load_token_ids,
    plan,
    text,
    write_rows,
    write_tokenizer,
)

from hcsmoe_hub.calibration.conversations import Conversation
from hcsmoe_hub.calibration.documents import find_document

pytestmark = pytest.mark.usefixtures("no_network", "short_wait")

QUESTION, ANSWER = text(0, 3), text(50, 4)
# What the chat template of the tests makes of question and answer.
RENDERED = [USER, *ids(0, 3), ASSISTANT, *ids(50, 4)]
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
SHAREGPT = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]

# Rows by where they come from, all with the same two turns.
FORMS: dict[str, dict[str, Any]] = {
    "OpenAI": {"messages": MESSAGES},
    "JSON text": {"messages": json.dumps(MESSAGES)},
    "Python text": {"messages": str(MESSAGES)},
    "objects of lists": {"conversations": {"from": ["human", "gpt"], "value": [QUESTION, ANSWER]}},
    "ShareGPT": {"conversations": SHAREGPT},
    "ShareGPT with weights": {"conversations": [{**turn, "weight": None} for turn in SHAREGPT]},
    "ShareGPT in capitals": {
        "conversations": [{"from": "Human", "value": QUESTION}, {"from": "Assistant", "value": ANSWER}]
    },
    "LMSYS": {"conversation": MESSAGES, "model": "w9", "turn": 1},
    "names of ShareGPT under role": {
        "messages": [{"role": "human", "content": QUESTION}, {"role": "gpt", "content": ANSWER}]
    },
    "pairs": {"conversation": [{"human": QUESTION, "assistant": ANSWER}]},
    "inputs and outputs": {"conversation": [{"input": QUESTION, "output": ANSWER}]},
    "content parts": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ]
    },
    "ChatGPT export": {
        "messages": [
            {"author": {"role": "user"}, "content": {"content_type": "text", "parts": [QUESTION]}},
            {"author": {"role": "assistant"}, "content": {"content_type": "text", "parts": [ANSWER]}},
        ]
    },
    "prompt and completion": {"prompt": QUESTION, "completion": ANSWER},
    "conversational prompt and completion": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "prompt and response": {"prompt": QUESTION, "response": ANSWER},
    "preferences": {"prompt": QUESTION, "chosen": ANSWER, "rejected": text(90, 9)},
    "preferences with the prompt in them": {"prompt": QUESTION, "chosen": MESSAGES, "rejected": MESSAGES[:1]},
    "preferences after the prompt": {"prompt": QUESTION, "chosen": MESSAGES[1:], "rejected": []},
    "Alpaca": {"instruction": text(0, 1), "input": text(1, 2), "output": ANSWER},
    "Alpaca without input": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "Dolly": {"instruction": text(0, 2), "context": text(2, 1), "response": ANSWER, "category": "w9"},
    "instruction and response": {"instruction": QUESTION, "response": ANSWER},
    "question and answer": {"question": QUESTION, "answer": ANSWER},
    "query and response": {"query": QUESTION, "response": ANSWER, "type": "w9"},
    "problem and solution": {"problem": QUESTION, "solution": ANSWER},
    "FLAN": {"inputs": QUESTION, "targets": ANSWER},
}


@pytest.fixture
def chat(chat_tokenizer: Path, tmp_path: Path) -> Callable[..., list[int]]:
    """The ids of some rows, in a sequence as long as they are."""

    def load(rows: list[dict[str, Any]], *, length: int, **options: Any) -> list[int]:
        file = write_rows(tmp_path / "rows.jsonl", rows)
        chosen = plan(file, sequence_length=length, samples=1, **options)
        found: list[int] = load_token_ids(chosen, tokenizer_folder=chat_tokenizer, vocab_size=VOCABULARY).tolist()[0]
        return found

    return load


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_conversation_gives_the_same_turns(chat: Callable[..., list[int]], form: str) -> None:
    assert chat([FORMS[form]], length=len(RENDERED)) == RENDERED


@pytest.mark.parametrize("form", ["ShareGPT", "JSON text", "objects of lists", "content parts"])
def test_the_content_of_a_named_column_decides(chat: Callable[..., list[int]], form: str) -> None:
    (value,) = FORMS[form].values()
    row = {"text": text(90, 9), "mine": value}
    assert chat([row], length=len(RENDERED), text_column="mine") == RENDERED


def test_plain_text_in_the_usual_columns_is_preferred_to_conversations(chat: Callable[..., list[int]]) -> None:
    row = {"text": text(9, 4), "conversations": SHAREGPT, "instruction": QUESTION, "output": ANSWER}
    assert chat([row], length=4) == ids(9, 4)


def test_rows_of_several_forms_may_be_mixed(chat: Callable[..., list[int]]) -> None:
    rows = [FORMS["OpenAI"], FORMS["ShareGPT"], FORMS["Alpaca"]]
    assert chat(rows, length=3 * len(RENDERED)) == 3 * RENDERED


def test_text_that_is_json_is_not_a_conversation(load: Load, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"text": json.dumps([{"role": "user", "content": text(0, 9)}])}])
    assert load(file).tolist()[0][1:] != [USER, *ids(0, 2)]


def test_conversations_in_a_table_are_json_text(chat_tokenizer: Path, tmp_path: Path) -> None:
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["id", "messages"], [1, json.dumps(MESSAGES)]])
    chosen = plan(tmp_path / "a.tsv", sequence_length=len(RENDERED))
    assert load_token_ids(chosen, tokenizer_folder=chat_tokenizer, vocab_size=VOCABULARY).tolist() == [RENDERED]


# Instructions without a chat template


@pytest.mark.parametrize("form", ["prompt and completion", "Alpaca", "Dolly", "question and answer"])
def test_an_instruction_is_plain_text_where_the_tokenizer_has_no_chat_template(
    load: Load, tmp_path: Path, form: str
) -> None:
    file = write_rows(tmp_path / "a.jsonl", [FORMS[form]])
    assert load(file, sequence_length=7).tolist() == [[*ids(0, 3), *ids(50, 4)]]


def test_a_completion_that_begins_with_a_space_continues_its_prompt() -> None:
    joined = {"The sky is": " blue.", "What is it?": "Blue."}
    found = [find_document({"prompt": prompt, "completion": completion}) for prompt, completion in joined.items()]
    texts = [document.text for document in found if isinstance(document, Conversation)]
    assert texts == ["The sky is blue.", "What is it?\n\nBlue."]


# System prompts, tools and reasoning

TOOLS_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.role }} {{ m.content }} "
    "{% for call in m.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments.ARGUMENT }} {% endfor %}"
    "{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "w300", "description": "-", "parameters": None}}


def calls(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "w301", "arguments": arguments}}
    return [MESSAGES[0], {"role": "assistant", "content": ANSWER, "tool_calls": [call]}]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "text"])
@pytest.mark.parametrize("arguments", [{"ARGUMENT": "w302"}, '{"ARGUMENT": "w302"}'], ids=["object", "text"])
def test_tools_and_their_calls_reach_the_chat_template(tmp_path: Path, tools: Any, arguments: Any) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", chat_template=TOOLS_TEMPLATE)
    file = write_rows(tmp_path / "a.jsonl", [{"messages": calls(arguments), "tools": tools}])
    chosen = plan(file, sequence_length=len(RENDERED) + 3)
    found = load_token_ids(chosen, tokenizer_folder=folder, vocab_size=VOCABULARY)
    assert found.tolist() == [[*ids(300, 1), *RENDERED, *ids(301, 2)]]


@pytest.mark.parametrize("arguments", [{"a": "w302"}, '{"a": "w302"}'], ids=["object", "text"])
def test_a_chat_template_that_wants_arguments_as_text_gets_them(tmp_path: Path, arguments: Any) -> None:
    template = (
        "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.arguments + ' w303 ' }}{% endfor %}{% endfor %}"
    )
    folder = write_tokenizer(tmp_path / "tokenizer", chat_template=template)
    file = write_rows(tmp_path / "a.jsonl", [{"messages": calls(arguments)}])
    found = load_token_ids(plan(file, sequence_length=len(RENDERED)), tokenizer_folder=folder, vocab_size=VOCABULARY)
    assert found.tolist()[0] == RENDERED


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_column_with_the_system_prompt_becomes_the_first_turn(
    tmp_path: Path, chat: Callable[..., list[int]], column: str
) -> None:
    rows = [{column: text(20, 2), "conversations": SHAREGPT}]
    # The role itself is not a word that the tokenizer of the tests knows.
    assert chat(rows, length=len(RENDERED) + 3)[1:] == [*ids(20, 2), *RENDERED]


def test_earlier_turns_in_a_history_come_first(chat: Callable[..., list[int]]) -> None:
    row = {"instruction": QUESTION, "input": "", "output": ANSWER, "history": [[text(20, 2), text(30, 2)]]}
    earlier = [USER, *ids(20, 2), ASSISTANT, *ids(30, 2)]
    assert chat([row], length=len(earlier) + len(RENDERED)) == [*earlier, *RENDERED]
