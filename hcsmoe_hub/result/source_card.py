"""The metadata that a result inherits from the source's model card.

Scores, training data, widget examples and gating questions apply only to the source, so they are not inherited.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from huggingface_hub import repocard

from hcsmoe_hub.checkpoint.source import Source
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.report import CARD_FILE

Words = str | list[str] | None

# Keys of the questions that the owners of a repository ask before granting access.
GATE_PREFIX = "extra_gated_"
# What the YAML library raises for values that do not match their tags, or that are nested too deeply.
_MALFORMED = (ValueError, LookupError, AttributeError, TypeError, RecursionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inherited:
    """Front matter that still applies after a conversion; ``None`` where the source has no value.

    Attributes:
        license: Licence of the base model, as a Hub identifier.
        license_name: Name of the licence if the identifier is ``other``.
        license_link: Text of the licence: a URL, or a file in the source's repository.
        language: Languages of the base model.
        pipeline_tag: Task of the base model.
        gated: Whether access to the base model must be requested.
    """

    license: Words = None
    license_name: str | None = None
    license_link: str | None = None
    language: Words = None
    pipeline_tag: str | None = None
    gated: bool = False

    @classmethod
    def of_source(cls, source: Mapping[str, Any]) -> Self:
        """Reads the ``source`` section of a report; missing keys become ``None``."""
        return cls(
            license=_words(source.get("license")),
            license_name=_line(source.get("license_name")),
            license_link=_line(source.get("license_link")),
            language=_words(source.get("language")),
            pipeline_tag=_line(source.get("pipeline_tag")),
            gated=source.get("gated") is True,
        )


def inherit_from(source: Source) -> dict[str, Any]:
    """The part of a source's card that ``hcsmoe.json`` records.

    Args:
        source: The checkpoint, with or without a README.md.

    Returns:
        The fields of ``Inherited`` as JSON values.

    Raises:
        SourceError: If its card cannot be downloaded or read.
    """
    front_matter = {}
    if CARD_FILE in source.files():
        try:
            front_matter = read_front_matter(source.fetch(CARD_FILE).read_bytes())
        except (ValueError, OSError) as error:
            raise SourceError(
                f"{CARD_FILE} of {source.repo_id or source.name} cannot be read: {str(error).rstrip('.')}.",
                hint="correct its front matter",
            ) from error
    return inherit(front_matter, gated=bool(source.gated))


def read_front_matter(content: bytes) -> dict[Any, Any]:
    """The YAML block at the beginning of a README.md; empty if it has none.

    Raises:
        ValueError: If it is not valid YAML, or not a mapping.
    """
    match = repocard.REGEX_YAML_BLOCK.search(content.decode("utf-8-sig", errors="replace"))
    if match is None:
        return {}
    try:
        found = repocard.yaml.safe_load(match.group(2))
    except (repocard.yaml.YAMLError, *_MALFORMED) as error:
        raise ValueError(f"its front matter is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict | None):
        raise ValueError("its front matter has no keys")
    return found or {}


def inherit(front_matter: Mapping[Any, Any], *, gated: bool = False) -> dict[str, Any]:
    """The part of a source's front matter that ``hcsmoe.json`` records, as JSON values.

    Args:
        front_matter: Front matter of the source's README.md; values of unexpected types are ignored.
        gated: Whether the Hub gates the source, whatever its card says.

    Returns:
        The fields of ``Inherited``, ``None`` where the source has no value.
    """
    asks = any(isinstance(key, str) and key.startswith(GATE_PREFIX) for key in front_matter)
    return asdict(Inherited.of_source({**front_matter, "gated": gated or asks}))


def _line(value: Any) -> str | None:
    """A text on one line; ``None`` if the value is not text or is blank."""
    return " ".join(value.split()) or None if isinstance(value, str) else None


def _words(value: Any) -> Words:
    """One text, or a list of texts."""
    if isinstance(value, list):
        found = [word for item in value if (word := _word(item)) is not None]
        return found or None
    return _word(value)


def _word(value: Any) -> str | None:
    # YAML reads the language code of Norwegian as a boolean.
    return "no" if value is False else _line(value)
