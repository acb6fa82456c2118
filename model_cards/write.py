"""Writes a card into the folder of a result, and keeps what a person added to an earlier one."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from hcsmoe_hub.checkpoint.durable import write_bytes
from hcsmoe_hub.checkpoint.unfinished import refuse_unfinished
from hcsmoe_hub.errors import OutputError, SourceError
from hcsmoe_hub.model_cards.card_data import CardData
from hcsmoe_hub.model_cards.folder import read_card_data
from hcsmoe_hub.model_cards.metadata import benchmark_entries, license_link
from hcsmoe_hub.model_cards.render import render_body
from hcsmoe_hub.report import BENCHMARK_FILE, CARD_FILE

# The kind of measure that a conversion takes itself.
HELD_OUT_TEXT = "held-out text"
KEEP, END = "<!-- hcsmoe:keep -->", "<!-- /hcsmoe:keep -->"
INVITATION = "\n<!-- What you write between these two lines stays when the card is written again. -->\n"
_KEPT = re.compile(f"{re.escape(KEEP)}(.*?){re.escape(END)}", re.DOTALL)
_MARK = re.compile(r"<!-- hcsmoe:card ([0-9a-f]{16})(?: (\S+))? -->")


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenCard:
    """A card.

    Attributes:
        path: The README.md.
        repo_id: Repository that its commands name, ``None`` if they name the folder.
        measures: Kinds of measures that it shows; ``held-out text`` for what the conversion itself measured.
        kept_sections: Sections of an earlier card that were kept.
        warnings: What to look at before publishing.
    """

    path: Path
    repo_id: str | None
    measures: list[str]
    kept_sections: int
    warnings: list[str]


def write_card(
    folder: str | Path, repo_id: str | None = None, *, overwrite: bool = False, place: Path | None = None
) -> WrittenCard:
    """Writes ``README.md``, and ``.eval_results`` if there are results of a benchmark that the Hub ranks.

    Args:
        folder: A result of ``hcsmoe convert``.
        repo_id: Repository that it is, or will be, in; ``None`` keeps that of the card that is there.
        overwrite: Replace a card that hcsmoe did not write, or that was edited since; sections marked as kept stay.
        place: Where the files of a result that is not complete yet will be, and where its earlier card is; ``None`` for
            the folder itself.

    Returns:
        What was written.

    Raises:
        SourceError: If the folder holds no report, a damaged one, or an unfinished conversion.
        PlanError: If ``repo_id`` is not the name of a repository.
        OutputError: If there is a card that must not be replaced.
    """
    folder = Path(folder)
    if place is None:
        refuse_unfinished(folder)
        place = folder
    path = place / CARD_FILE
    earlier = _read(path)
    kept = [] if earlier is None else kept_sections(earlier, path)
    if earlier is not None and not overwrite:
        _check_ours(earlier, path)
    known = None if earlier is None else _repo_id(earlier)
    card, warnings = read_card_data(folder, known if repo_id is None else repo_id, name=place.resolve().name)
    content = render(card, kept)
    _write_benchmarks(card, folder)
    write_bytes(folder / CARD_FILE, content.encode())
    return WrittenCard(
        path=path,
        repo_id=card.repo_id,
        measures=[*([HELD_OUT_TEXT] if card.report.measured is not None else []), *card.measures],
        kept_sections=len(kept),
        warnings=[*warnings, *_doubts(card)],
    )


def render(card: CardData, kept: list[str]) -> str:
    """Text of a card.

    Args:
        card: What is known of the result.
        kept: Sections that a person wrote.
    """
    sections = "\n\n".join(KEEP + text + END for text in kept or [INVITATION])
    # Parsed and written by the client: what it does not understand, the Hub would not either.
    content = str(ModelCard(render_body(card, sections)))
    return _marked(content, f"# {card.title}", card.repo_id)


def kept_sections(content: str, path: Path) -> list[str]:
    """What a person wrote between the markers of an earlier card.

    Raises:
        OutputError: If a marker lacks its other half, so that nobody can tell what is to be kept.
    """
    found = _KEPT.findall(content)
    if any(content.count(mark) != len(found) for mark in (KEEP, END)) or any(KEEP in text for text in found):
        raise OutputError(
            f"{path} has a marker of a kept section without its other half.",
            hint=f"write {KEEP} before and {END} after every section, or remove the marker",
        )
    return [text for text in found if text != INVITATION]


def _read(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        # Windows, and the editor of the Hub, may have changed line ends.
        return path.read_text("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text: {error}.", hint="remove it, or save it as UTF-8") from None


def _digest(content: str) -> str:
    """Digest of all that a rewrite would lose: everything but the mark and kept sections, wherever they stand."""
    own = re.sub(r"\n{2,}", "\n\n", _KEPT.sub("", _MARK.sub("", content))).strip()
    return hashlib.sha256(own.encode()).hexdigest()[:16]


def _marked(content: str, title: str, repo_id: str | None) -> str:
    """The card with a mark from which a later run sees whose it is, and whether it was edited."""
    words = ["hcsmoe:card", _digest(content), *([repo_id] if repo_id is not None else [])]
    return content.replace(f"\n{title}\n", f"\n<!-- {' '.join(words)} -->\n\n{title}\n", 1)


def _repo_id(content: str) -> str | None:
    mark = _MARK.search(content)
    return None if mark is None else mark.group(2)


def _check_ours(content: str, path: Path) -> None:
    mark = _MARK.search(content)
    if mark is None:
        raise OutputError(
            f"{path} was not written by hcsmoe.",
            hint=f"add `overwrite=True` to replace it; what is between {KEEP} and {END} stays",
        )
    if mark.group(1) != _digest(content):
        raise OutputError(
            f"{path} was edited after hcsmoe wrote it.",
            hint=f"wrap what you want to keep in {KEEP} and {END}, then add `overwrite=True`",
        )


def _write_benchmarks(card: CardData, folder: Path) -> None:
    entries, path = benchmark_entries(card), folder / BENCHMARK_FILE
    if not entries:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode())


def _doubts(card: CardData) -> Iterator[str]:
    """What to know before publishing the result."""
    inherited, base = card.inherited, card.base
    if inherited.license is None:
        yield f"no licence of {base.name} is known; the card names none."
    if inherited.license_link is not None and license_link(card) is None:
        yield f"the licence of {base.name} is in {inherited.license_link}, which is not among the files of the result."
    if inherited.gated:
        yield f"{base.name} is gated; consider gating the repository of the result as well."
