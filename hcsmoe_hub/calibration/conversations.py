"""Reads conversations in the forms that datasets give them: OpenAI's, ShareGPT's, and their many relatives."""

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Turn = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
# What datasets call them.
_SPEAKERS: Mapping[str, str] = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
# Only where a turn says whom it is from: templates of some models have these as roles.
_SHAREGPT: Mapping[str, str] = {
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
# Turns that hold a question along with its answer, by the names of their keys.
_BOTH: Mapping[str, str] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "input": "user",
    "instruction": "user",
    "prompt": "user",
    "question": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "output": "assistant",
    "response": "assistant",
    "answer": "assistant",
}
# A list of objects as Python prints it, which pandas writes into tables.
_PRINTED = re.compile(r"\s*(\[\s*)?\{\s*'")
_SPOKEN_BY = ("role", "from", "speaker", "author")
_CONTENTS = ("content", "value", "text", "message")


class UnreadableError(Exception):
    """A row holds something that is neither text nor a conversation; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A conversation for a chat template.

    Attributes:
        turns: Its turns, with ``role`` and ``content``, and what else the row has of them.
        tools: Tools that the assistant may call, ``None`` if there are none.
        text: The same as plain text, for a tokenizer without a chat template; ``None`` where it has no usual form.
    """

    turns: list[Turn]
    tools: list[dict[str, Any]] | None = None
    text: str | None = None

    def texts(self) -> Iterator[str]:
        """What is said in each turn that says something: its content and its reasoning, or the tools that it calls."""
        for turn in self.turns:
            said = [turn.get(name) for name in ("content", "reasoning_content", "reasoning")]
            for call in turn.get("tool_calls") or ():
                called = call.get("function", call) if isinstance(call, dict) else {}
                said.append(called.get("name") if isinstance(called, dict) else None)
            text = " ".join(part for part in said if isinstance(part, str))
            if text.strip():
                yield text


def parse_listed(value: str) -> Any:
    """The list or object that a text holds as JSON, or as Python prints it; the text itself if it holds neither."""
    if not value.lstrip().startswith(("[", "{")):
        return value
    try:
        if not _PRINTED.match(value):
            return json.loads(value)
        with warnings.catch_warnings(category=SyntaxWarning, action="ignore"):
            return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def are_turns(value: Any) -> bool:
    """Whether a value is a list of objects, as conversations are."""
    return _is_list(value) and bool(value) and all(isinstance(turn, dict) for turn in value)


def read_turns(value: Any) -> list[Turn]:
    """The turns of a conversation, each with a ``role``; standard ones are unchanged.

    Args:
        value: A list of turns, or an object of lists.

    Raises:
        UnreadableError: If it is something else, or a turn says neither who speaks nor what.
    """
    if isinstance(value, dict):
        value = _transposed(value)
    if not are_turns(value):
        raise UnreadableError("it is not a list of turns")
    return [turn for given in value for turn in _read_turn(given)]


def _transposed(value: dict[str, Any]) -> Any:
    """Lists by key as a list of objects; a single turn as a list of one."""
    columns = [column for column in value.values() if isinstance(column, list)]
    if len(columns) == len(value) > 0 and len({len(column) for column in columns}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return [value]


def _read_turn(given: Turn) -> list[Turn]:
    """The turn or, where one object holds a question along with its answer, the turns."""
    speaker_key = next((key for key in _SPOKEN_BY if isinstance(given.get(key), str | dict)), None)
    if speaker_key is None:
        turns = [
            {"role": role, "content": given[key]} for key, role in _BOTH.items() if isinstance(given.get(key), str)
        ]
        if not turns:
            raise UnreadableError(
                f"a turn has the keys {', '.join(map(str, given))}, and no role" if given else "a turn is empty"
            )
        return [turn for turn in turns if turn["content"]]
    content_key = next((key for key in _CONTENTS if given.get(key) is not None), None)
    others = {key: value for key, value in given.items() if key not in (*_SPOKEN_BY, *_CONTENTS) and value is not None}
    if content_key is None and not any(others.get(key) for key in ("tool_calls", "function_call", "reasoning_content")):
        if any(key in given for key in _CONTENTS):
            return [{"role": _role(given[speaker_key], speaker_key), "content": "", **others}]
        raise UnreadableError(f"a turn has the keys {', '.join(map(str, given))}, and no content")
    turn: Turn = {"role": _role(given[speaker_key], speaker_key)}
    if content_key is not None:
        turn["content"] = _read_content(given[content_key])
    if "tool_calls" in others:
        others["tool_calls"] = _read_calls(others["tool_calls"])
    return [{**turn, **others}]


def _role(speaker: Any, key: str) -> str:
    if isinstance(speaker, dict):
        speaker = str(speaker.get("role"))
    name = speaker.strip().lower()
    if name in ROLES:
        return str(name)
    known = _SPEAKERS if key == "role" else {**_SPEAKERS, **_SHAREGPT}
    return known.get(name, str(speaker))


def _read_content(content: Any) -> str:
    """The text of a content: of its parts, those that hold text, a line each."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        inner = next((content[key] for key in ("text", "parts", "content") if content.get(key) is not None), None)
        # An image or a recording has nothing to read.
        return "" if inner is None else _read_content(inner)
    if _is_list(content):
        return "\n".join(text for part in content if part is not None and (text := _read_content(part)))
    raise UnreadableError(f"the content of a turn is {content!r:.40}, which is not text")


def _read_calls(calls: Any) -> list[Any]:
    """Tool calls with their arguments as objects, as chat templates take them."""
    found = parse_listed(calls) if isinstance(calls, str) else calls
    if not isinstance(found, list):
        raise UnreadableError("its tool_calls are not a list")
    return [_read_call(without_nulls(call)) for call in found]


def _read_call(call: Any) -> Any:
    if not isinstance(call, dict):
        raise UnreadableError("a tool call is not an object")
    if isinstance(call.get("function"), dict):
        return {**call, "function": _read_call(call["function"])}
    if isinstance(call.get("arguments"), str):
        return {**call, "arguments": parse_listed(call["arguments"])}
    return call


def with_text_arguments(turns: list[Turn]) -> list[Turn]:
    """The same turns with the arguments of tool calls as JSON text, which some chat templates take instead."""

    def rewrite(call: Any) -> Any:
        if isinstance(call.get("function"), dict):
            return {**call, "function": rewrite(call["function"])}
        arguments = call.get("arguments")
        is_object = not isinstance(arguments, str) and arguments is not None
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)} if is_object else call

    return [
        {**turn, "tool_calls": [rewrite(call) for call in turn["tool_calls"]]} if "tool_calls" in turn else turn
        for turn in turns
    ]


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a row: a list of objects, or JSON text of it.

    Raises:
        UnreadableError: If it is something else.
    """
    found = parse_listed(value) if isinstance(value, str) else value
    if not found:
        return None
    tools = [parse_listed(tool) if isinstance(tool, str) else tool for tool in found] if _is_list(found) else []
    if not tools or not all(isinstance(tool, dict) for tool in tools):
        raise UnreadableError("its tools are not a list of objects")
    return [without_nulls(tool) for tool in tools]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def without_nulls(value: Any) -> Any:
    """A value without keys that hold null: columnar files give every object the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value
