"""Opens a checkpoint: a local folder, or a repository of the Hub."""

import os
from pathlib import Path

from hcsmoe_hub.checkpoint.source import LocalSource, Source
from hcsmoe_hub.checkpoint.unfinished import refuse_unfinished
from hcsmoe_hub.errors import SourceError


def open_source(
    source: str, *, revision: str | None = None, token: str | None = None, cache_dir: Path | None = None
) -> Source:
    """Opens a local folder if one of that name exists, otherwise a Hub repository.

    Args:
        source: Folder, ``org/name``, ``hf://org/name``, ``hf://org/name@revision``, or the address of a repository's
            page on the Hub.
        revision: Branch, tag or commit of the repository; ``main`` when ``None``.
        token: Access token; ``None`` uses the stored login.
        cache_dir: Hub cache; ``None`` uses the default one.

    Raises:
        SourceError: If neither a folder nor a repository of that name can be opened.
    """
    path = Path(os.path.expanduser(source))
    whole = os.fsencode(path.absolute())
    shown = whole.decode("utf-8", "backslashreplace")
    if shown.encode() != whole:
        raise SourceError(
            f"the name {shown} is not UTF-8, and not every library can open such a folder.", hint="rename the folder"
        )
    if os.path.isdir(path):
        if revision is not None:
            raise SourceError(
                f"`revision='{revision}'` was given, but {source} is a local folder, which has no revisions.",
                hint=f"drop `revision`, or write hf://{source} if you mean the Hub repository",
            )
        refuse_unfinished(path)
        return LocalSource(path)
    if os.path.exists(path):
        raise SourceError(f"{source} is a file.", hint="pass the folder that holds config.json and the shards")
    if os.path.islink(path):
        raise SourceError(f"{source} is a link to {os.readlink(path)}, which does not exist.", hint="check the path")
    from hcsmoe_hub.hub.address import is_address
    from hcsmoe_hub.hub.source import open_hub_source

    is_named_like_hub = source.startswith("hf://") or is_address(source)
    if source.startswith((".", "/", "~")) or (source.count("/") > 1 and not is_named_like_hub):
        raise SourceError(f"there is no folder {source}.", hint="check the path")
    return open_hub_source(source, revision=revision, token=token, cache_dir=cache_dir)
