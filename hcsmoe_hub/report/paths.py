"""Keeps the folders of somebody's machine out of what is published."""

import re
from collections.abc import Mapping

# A path on somebody's machine, however it begins.
_PLACE = re.compile(r"(?<![\w:/.~-])(?:~|\.{1,2})?/(?:[^\s/]+/)*([^\s/]+)")


def strip_paths(text: str, names: Mapping[str, str]) -> str:
    """A message as reports keep it: files and folders without the folders that they lie in.

    Args:
        text: The message.
        names: Names by the paths that the message may hold, for paths that look like other words.
    """
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return _PLACE.sub(r"\1", text)
