"""Finds the text or the conversation of a row, by the names of its columns or in the one that the user names."""

from collections.abc import Mapping
from typing import Any

from hcsmoe_hub.calibration.conversations import (
    Conversation,
    Turn,
    UnreadableError,
    are_turns,
    parse_listed,
    read_tools,
    read_turns,
)

Row = Mapping[str, Any]
Document = str | Conversation

# Columns that hold all of a document, the first that is not empty counts; some hold conversations as JSON text.
WHOLE = ("messages", "text", "content", "conversations", "conversation", "dialogue", "dialog", "chat")
CONVERSATIONS = frozenset(WHOLE) - {"text", "content"}
# Columns that hold what is asked and what is answered.
ASKED = ("instruction", "prompt", "question", "query", "problem", "inputs", "input")
ANSWERED = ("completion", "output", "response", "answer", "chosen", "solution", "targets")
# What belongs to an instruction.
_ADDED = ("context", "input")
_SYSTEM = ("system", "system_prompt")


def is_known(row: Row) -> bool:
    """Whether a row has a column that holds a document, or two that hold question and answer."""
    names = row.keys()
    return any(name in names for name in (*WHOLE, "chosen")) or (
        any(name in names for name in ASKED) and any(name in names for name in ANSWERED)
    )


def find_document(row: Row) -> Document | None:
    """The document of a row whose columns are known; ``None`` if it is blank.

    Raises:
        UnreadableError: If it is neither text nor a conversation.
    """
    column = next((name for name in WHOLE if row.get(name)), None)
    if column is not None:
        return read_document(row, column)
    return _read_pair(row)


def read_document(row: Row, column: str) -> Document:
    """The document in a column that is not blank.

    Raises:
        UnreadableError: If it is neither text nor a conversation.
    """
    value = row[column]
    if isinstance(value, str):
        # Plain text may be JSON of any kind; only what is a list of turns is a conversation.
        found = value if column in ("text", "content") else parse_listed(value)
        if not are_turns(found):
            if column in CONVERSATIONS and value.lstrip().startswith("[{"):
                raise UnreadableError(f"column {column!r} holds a list that is not JSON")
            return value
        value = found
    if not are_turns(value) and not isinstance(value, dict):
        raise UnreadableError(f"column {column!r} holds neither text nor chat messages")
    try:
        turns = read_turns(value)
    except UnreadableError as error:
        raise UnreadableError(f"column {column!r} holds neither text nor chat messages: {error}") from None
    return _conversation(row, turns)


def _conversation(row: Row, turns: list[Turn], text: str | None = None) -> Conversation:
    """A conversation with what other columns of its row say: a system prompt, and tools."""
    system = next((row[name] for name in _SYSTEM if isinstance(row.get(name), str) and row[name].strip()), None)
    if system is not None and turns and turns[0]["role"] not in ("system", "developer"):
        turns = [{"role": "system", "content": system}, *turns]
        text = None if text is None else f"{system}\n\n{text}"
    return Conversation(turns=turns, tools=read_tools(row.get("tools")), text=text)


def _read_pair(row: Row) -> Document | None:
    """A question with its answer, as a conversation of two turns, or of more if the columns hold turns."""
    asked = next((name for name in ASKED if row.get(name)), None)
    answered = next((name for name in ANSWERED if row.get(name)), None)
    if asked is None:
        # Preference data without a prompt: the preferred text is the document.
        return read_document(row, "chosen") if row.get("chosen") else None
    if answered is not None and are_turns(row[answered]):
        answers = read_turns(row[answered])
        is_reply = not answers or answers[0]["role"] == "assistant"
        return _conversation(row, [*_asked_turns(row, asked), *answers] if is_reply else answers)
    questions = _asked_turns(row, asked)
    answer = _text(row, answered) if answered is not None else ""
    turns = [*questions, *([{"role": "assistant", "content": answer}] if answer else [])]
    text = _joined(_question(row, asked), answer) if isinstance(row[asked], str) else None
    history = _history(row)
    return _conversation(row, [*history, *turns], None if history else text)


def _asked_turns(row: Row, column: str) -> list[Turn]:
    if are_turns(row[column]):
        return read_turns(row[column])
    return [{"role": "user", "content": _question(row, column)}]


def _question(row: Row, column: str) -> str:
    """What is asked; an instruction with its input."""
    added = [name for name in _ADDED if name != column and row.get(name)] if column == "instruction" else []
    return "\n\n".join(_text(row, name) for name in (column, *added))


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise UnreadableError(f"column {column!r} holds {value!r:.40}, which is not text")
    return value


def _joined(question: str, answer: str) -> str:
    """Question and answer as one text; a completion may continue the words of its prompt."""
    is_continued = not answer or question[-1:].isspace() or answer[:1].isspace()
    return question + answer if is_continued else f"{question}\n\n{answer}"


def _history(row: Row) -> list[Turn]:
    """Earlier questions and answers, as a list of pairs."""
    pairs = row.get("history")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return []
    roles = ("user", "assistant")
    return [{"role": role, "content": str(said)} for pair in pairs for role, said in zip(roles, pair, strict=True)]
