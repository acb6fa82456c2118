"""What a result inherits from the card of the model it was made from, and nothing else of it.

Scores, training data, widget examples and the questions of a gate were made for the base model and speak of it alone.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from huggingface_hub import repocard

from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.errors import SourceError

Words = str | list[str] | None

CARD_FILE = "README.md"
# Keys with which the owners of a repository ask something of whoever downloads it.
GATE_PREFIX = "extra_gated_"
# What the YAML library lets through of values that are not what their tags say, or nested without end.
_MALFORMED = (ValueError, LookupError, AttributeError, TypeError, RecursionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inherited:
    """Front matter that stays true after a conversion; ``None`` where the source names none.

    Attributes:
        license: Licence of the base model, an identifier of the Hub.
        license_name: Its name, where the identifier is ``other``.
        license_link: Where its text is: a URL, or a file of the source's repository.
        language: Languages of the base model.
        pipeline_tag: Task of the base model.
        gated: Whether the base model is only given to those who agree to conditions.
    """

    license: Words = None
    license_name: str | None = None
    license_link: str | None = None
    language: Words = None
    pipeline_tag: str | None = None
    gated: bool = False

    @classmethod
    def of_source(cls, source: Mapping[str, Any]) -> Self:
        """Reads what the ``source`` of a report says; a key that is not there says nothing."""
        return cls(
            license=_words(source.get("license")),
            license_name=_line(source.get("license_name")),
            license_link=_line(source.get("license_link")),
            language=_words(source.get("language")),
            pipeline_tag=_line(source.get("pipeline_tag")),
            gated=source.get("gated") is True,
        )


def inherit_from(source: Source) -> dict[str, Any]:
    """What ``hcsmoe.json`` keeps of the card of a source.

    Args:
        source: The checkpoint; one without a README.md says nothing.

    Returns:
        The fields of ``Inherited`` as JSON values.

    Raises:
        SourceError: If its card cannot be had, or cannot be read.
    """
    front_matter = {}
    if CARD_FILE in source.files():
        try:
            front_matter = read_front_matter(source.fetch(CARD_FILE).read_bytes())
        except (ValueError, OSError) as error:
            raise SourceError(
                f"{CARD_FILE} of {source.repo_id or source.name} cannot be read: {str(error).rstrip('.')}.",
                hint="correct that file",
            ) from error
    return inherit(front_matter, gated=bool(source.gated))


def read_front_matter(content: bytes) -> dict[Any, Any]:
    """The YAML block at the beginning of a README.md; empty if it has none.

    Raises:
        ValueError: If there is one that is no YAML, or holds no keys.
    """
    match = repocard.REGEX_YAML_BLOCK.search(content.decode("utf-8-sig", errors="replace"))
    if match is None:
        return {}
    try:
        found = repocard.yaml.safe_load(match.group(2))
    except (repocard.yaml.YAMLError, *_MALFORMED) as error:
        raise ValueError(f"its front matter is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict | None):
        raise ValueError("its front matter holds no keys")
    return found or {}


def inherit(front_matter: Mapping[Any, Any], *, gated: bool = False) -> dict[str, Any]:
    """What ``hcsmoe.json`` keeps of the front matter of a source, as JSON values.

    Args:
        front_matter: Of the source's README.md; it is input, so whatever is of another kind is left out.
        gated: Whether the Hub gates the source, whatever its card says.

    Returns:
        The fields of ``Inherited``, ``None`` where the source names nothing.
    """
    asks = any(isinstance(key, str) and key.startswith(GATE_PREFIX) for key in front_matter)
    return asdict(Inherited.of_source({**front_matter, "gated": gated or asks}))


def _line(value: Any) -> str | None:
    """A text on one line; ``None`` if it is none."""
    return " ".join(value.split()) or None if isinstance(value, str) else None


def _words(value: Any) -> Words:
    """One text, or several."""
    if isinstance(value, list):
        found = [word for item in value if (word := _word(item)) is not None]
        return found or None
    return _word(value)


def _word(value: Any) -> str | None:
    # To YAML the code of Norwegian is a boolean.
    return "no" if value is False else _line(value)
