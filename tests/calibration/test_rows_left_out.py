"""Rows that give nothing to calibrate on: left out and counted where they are some, refused where they are most."""

from pathlib import Path
from typing import Any

import pytest
from calibration_text import USER, VOCABULARY, ids, load_token_ids, plan, refusal, text, write_rows, write_tokenizer

from hcsmoe_hub.events import Event, Warned

pytestmark = pytest.mark.usefixtures("no_network", "short_wait")

PLAIN = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
# Renders its own sentence whatever the row says, like a template that knows other roles.
CONSTANT = "You are a helpful robot."
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + PLAIN


def load(folder: Path, rows: list[Any], *, template: Any = PLAIN, **options: Any) -> tuple[list[int], list[str]]:
    """Token ids of some rows, and the warnings about them."""
    tokenizer = write_tokenizer(folder / "tokenizer", chat_template=template)
    events: list[Event] = []
    chosen = plan(write_rows(folder / "rows.jsonl", rows), samples=99, sequence_length=2, **options)
    found = load_token_ids(chosen, tokenizer_folder=tokenizer, vocab_size=VOCABULARY, emit=events.append)
    return found.flatten().tolist(), [event.message for event in events if isinstance(event, Warned)]


def chats(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Conversations of one turn with a word of their own."""
    return [{"messages": [{"role": "user", "content": text(start + number, 1)}]} for number in range(count)]


ODD: dict[str, Any] = {
    "a turn without role and content": [{"a": "w1"}],
    "a turn that is empty": [{}],
    "a content that is a number": [{"role": "user", "content": 5}],
    "a turn with nothing but a role": [{"role": "user"}],
    "a list that is not JSON": "[{'role': 'user', 'content': 'w1'} {'role': 'assistant'}]",
    "a number": 7,
}


@pytest.mark.parametrize("messages", ODD.values(), ids=ODD)
def test_some_unreadable_rows_are_left_out_with_a_warning(tmp_path: Path, messages: Any) -> None:
    found, warnings = load(tmp_path, [*chats(3), {"messages": messages}, {"messages": messages}])
    assert sorted(found) == [USER] * 3 + ids(0, 3)
    assert len(warnings) == 1
    assert "rows of rows.jsonl left out: 2 of 5: 2 neither text nor chat messages" in warnings[0]


@pytest.mark.parametrize("messages", ODD.values(), ids=ODD)
def test_unreadable_rows_are_refused_where_they_are_most(tmp_path: Path, messages: Any) -> None:
    error = refusal(lambda: load(tmp_path, [*chats(2), *[{"messages": messages}] * 3]))
    assert "most rows" in error.message
    assert "3 of 5: 3 neither text nor chat messages (column 'messages'" in error.message
    assert "`text_column`" in error.hint


def test_a_template_that_renders_none_of_the_words_of_a_row_is_refused(tmp_path: Path) -> None:
    error = refusal(lambda: load(tmp_path, chats(9), template=CONSTANT))
    assert "9 of 9: 9 rendered by the model's chat template without their own words" in error.message
    assert "chat template" in error.hint


def test_a_template_that_renders_different_rows_to_the_same_text_is_refused(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "w200"}]
    rows = [{"messages": [*turns, {"role": "assistant", "content": text(number, 1)}]} for number in range(9)]
    error = refusal(lambda: load(tmp_path, rows, template="w200 w201 w202"))
    assert "9: 8 rendered by the model's chat template to the same text as another row" in error.message


def test_rows_that_are_themselves_the_same_are_not_faults(tmp_path: Path) -> None:
    found, warnings = load(tmp_path, chats(1) * 9)
    assert (len(found), warnings) == (18, [])


def test_a_template_may_leave_out_a_part_of_a_turn(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }} {{ m.content.split('</think>')[-1] }} {% endfor %}"
    thought = f"<think> {text(100, 90)} </think> w3"
    rows = [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": thought}]}]
    assert load(tmp_path, rows, template=template)[1] == []


def test_some_rows_that_the_template_rejects_are_left_out_with_its_own_words(tmp_path: Path) -> None:
    system = {"messages": [{"role": "system", "content": "w9"}]}
    found, warnings = load(tmp_path, [*chats(3), system], template=STRICT)
    assert sorted(found) == [USER] * 3 + ids(0, 3)
    assert "1 of 4: 1 rejected by the model's chat template (begin with the user)" in warnings[0]


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_conversations_that_say_nothing_are_counted(tmp_path: Path, role: str) -> None:
    silent = {"messages": [{"role": role, "content": ""}, {"role": role, "content": [{"type": "image"}]}]}
    _, warnings = load(tmp_path, [*chats(3), silent])
    assert "1 of 4: 1 without tokens" in warnings[0]


def test_tools_that_cannot_be_read_make_a_row_unreadable(tmp_path: Path) -> None:
    error = refusal(lambda: load(tmp_path, [{**row, "tools": "none"} for row in chats(3)]))
    assert "its tools are not a list of objects" in error.message


def test_many_unusable_rows_are_refused_before_the_end_of_an_endless_set(tmp_path: Path) -> None:
    error = refusal(lambda: load(tmp_path, chats(390), template=CONSTANT))
    assert "100 of 100" in error.message


def test_a_set_that_is_too_short_says_which_rows_were_left_out(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", chat_template=PLAIN)
    rows = write_rows(tmp_path / "rows.jsonl", [*chats(1), {"messages": [{"a": "w1"}]}])
    chosen = plan(rows, sequence_length=5)
    error = refusal(lambda: load_token_ids(chosen, tokenizer_folder=tokenizer, vocab_size=VOCABULARY))
    assert "gives 2 tokens" in error.message
    assert "1 of 2: 1 neither text nor chat messages" in error.message


# Templates and tokenizers that fail in any way

TEMPLATES: dict[str, Any] = {
    "division by zero": "{{ 1 // 0 }}",
    "syntax": "{% for %}",
    "nothing to look into": "{{ messages[0].a.b }}",
    "no such turn": "{{ messages[9]['content'] }}",
    "wrong type": "{{ messages + 1 }}",
    "endless": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "named ones without a default": {"rag": PLAIN, "tool_use": PLAIN},
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_fails_in_any_way_is_refused_with_one_message(tmp_path: Path, template: Any) -> None:
    error = refusal(lambda: load(tmp_path, chats(3), template=template))
    assert "3 of 3: 3 rejected by the model's chat template (" in error.message
