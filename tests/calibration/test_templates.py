"""Chat templates run in a process of their own, which is ended when they take too much time or memory."""

import json
from pathlib import Path
from typing import Any

import pytest
from calibration_text import write_tokenizer

from hcsmoe_hub.calibration.library_failures import RejectedError
from hcsmoe_hub.calibration.templates import Templates
from hcsmoe_hub.calibration.tokenizer import load_tokenizer
from hcsmoe_hub.errors import CalibrationError

TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "hello \ud800 there", "name": None},
    {"role": "assistant", "content": "hé"},
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
USUAL = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message | tojson }}\n{% endfor %}{{ tools }}"
    "{{ eos_token }}{% generation %}x{% endgeneration %}"
)


def rendered(folder: Path, template: str, *, seconds: float = 1.0, memory: int = 2**27) -> str:
    """What a template makes of a conversation."""
    tokenizer = load_tokenizer(write_tokenizer(folder, eos_token="</s>", chat_template=template), failed)
    with Templates(folder, seconds=seconds, memory_bytes=memory) as templates:
        return templates.render(tokenizer, TURNS, TOOLS)


def failed(error: BaseException) -> CalibrationError:
    return CalibrationError(str(error), hint="")


def test_a_conversation_is_rendered_as_transformers_does_it(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model", eos_token="</s>", chat_template=USUAL)
    tokenizer = load_tokenizer(folder, failed)
    with Templates(folder) as templates:
        for turns in (TURNS, TURNS[:1], [{"role": "user", "content": "x" * 100_000}]):
            for tools in (None, TOOLS):
                expected = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)
                assert templates.render(tokenizer, turns, tools) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 9 ** (9 ** 9) }}", "takes more than 1 seconds"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 1 seconds"),
        ("{{ 'x' * 10 ** 11 }}", "needs too much memory"),
        (
            "{% set n = namespace(x=['x' * 999]) %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "needs",
        ),
    ],
)
def test_a_template_that_takes_too_much_is_named(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        rendered(tmp_path / "model", template)
    assert not isinstance(caught.value, RejectedError)
    file = next(path for path in (tmp_path / "model").iterdir() if path.name in ("chat_template.jinja",))
    assert f"the chat template in {file} {reason}" in caught.value.message


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ raise_exception('not this one') }}", "not this one"),
        ("{% include '/etc/passwd' %}", ""),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_fails_rejects_the_conversation(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(RejectedError) as caught:
        rendered(tmp_path / "model", template)
    assert reason in caught.value.message


def test_the_file_of_a_template_among_several_is_named(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model", eos_token="</s>", chat_template="{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 9 ** (9 ** 9) }}")
    tokenizer = load_tokenizer(folder, failed)
    with Templates(folder, seconds=1.0) as templates:
        assert "hello" in templates.render(tokenizer, TURNS, None)
        with pytest.raises(CalibrationError, match=r"additional_chat_templates/tool_use\.jinja takes more than 1"):
            templates.render(tokenizer, TURNS, TOOLS)


def test_a_template_in_the_settings_of_a_tokenizer_is_named_by_their_file(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model", eos_token="</s>")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ 9 ** (9 ** 9) }}"}))
    with Templates(folder, seconds=1.0) as templates, pytest.raises(CalibrationError, match=r"tokenizer_config\.json"):
        templates.render(load_tokenizer(folder, failed), TURNS, None)
