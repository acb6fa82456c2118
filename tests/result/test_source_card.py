"""What a result inherits from the card of its source, and what it must not."""

from dataclasses import asdict
from pathlib import Path

import pytest

from hcsmoe_hub.checkpoint.source import LocalSource
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.result.source_card import Inherited, inherit, inherit_from, read_front_matter

CARD = b"""\xef\xbb\xbf---
license: other
license_name: "  tongyi\\n qianwen "
license_link: LICENSE
language: [en, no, 'zh']
pipeline_tag: text-generation
datasets: [c4]
widget: [{text: Hello}]
model-index: [{name: base, results: []}]
extra_gated_prompt: Say please.
---
# Base
"""


def test_licence_languages_task_and_gate_are_inherited_and_nothing_else() -> None:
    assert inherit(read_front_matter(CARD)) == {
        "license": "other",
        "license_name": "tongyi qianwen",
        "license_link": "LICENSE",
        # Norwegian is not a boolean.
        "language": ["en", "no", "zh"],
        "pipeline_tag": "text-generation",
        "gated": True,
    }


def test_what_was_kept_is_read_back() -> None:
    kept = inherit(read_front_matter(CARD))
    assert Inherited.of_source({"repo_id": "a/b", **kept}) == Inherited(**kept)


def test_a_source_without_metadata_leaves_every_field_empty() -> None:
    found = inherit({})
    assert found == {
        "license": None,
        "license_name": None,
        "license_link": None,
        "language": None,
        "pipeline_tag": None,
        "gated": False,
    }


@pytest.mark.parametrize("content", [b"", b"# Only a title\n", b"---\n---\n# Nothing\n", b"\xff\xfe no text"])
def test_a_card_without_front_matter_is_empty(content: bytes) -> None:
    assert read_front_matter(content) == {}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"---\nlicense: [mit\n---\n", "is not valid YAML"),
        (b"---\ndate: 2020-99-99\n---\n", "is not valid YAML"),
        (b"---\ndate: !!timestamp soon\n---\n", "is not valid YAML"),
        (b"---\ncount: !!int ''\n---\n", "is not valid YAML"),
        (b"---\nflag: !!bool maybe\n---\n", "is not valid YAML"),
        (b"---\ndeep: " + b"[" * 600 + b"\n---\n", "is not valid YAML"),
        (b"---\n- mit\n---\n", "has no keys"),
    ],
    ids=["bracket", "date", "timestamp", "int", "bool", "deep", "list"],
)
def test_damaged_front_matter_is_an_error(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_front_matter(content)


def test_values_of_another_kind_are_left_out() -> None:
    found = inherit({"license": 3, "license_name": ["x"], "language": [1, "en"], "pipeline_tag": "", 5: "five"})
    assert {name: value for name, value in found.items() if value} == {"language": ["en"]}


def test_a_gate_of_the_hub_counts_whatever_the_card_says() -> None:
    assert inherit({}, gated=True)["gated"]
    assert not inherit({"gated": True})["gated"]


def test_a_source_without_a_card_is_empty(tmp_path: Path) -> None:
    assert inherit_from(LocalSource(tmp_path)) == asdict(Inherited())


def test_a_card_is_read_from_its_source(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(CARD)
    assert inherit_from(LocalSource(tmp_path)) == inherit(read_front_matter(CARD))


def test_a_broken_card_is_named_without_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("---\n- mit\n---\n", "utf-8")
    with pytest.raises(SourceError) as caught:
        inherit_from(LocalSource(folder))
    assert caught.value.message == "README.md of model cannot be read: its front matter has no keys."
