"""Opens a checkpoint: a local folder, or a repository of the Hub."""

from pathlib import Path

from hcsmoe_hub.checkpoint.source import LocalSource, Source
from hcsmoe_hub.errors import SourceError


def open_source(
    source: str, *, revision: str | None = None, token: str | None = None, cache_dir: Path | None = None
) -> Source:
    """Opens a local folder if one of that name exists, otherwise a Hub repository.

    Args:
        source: Folder, ``org/name``, ``hf://org/name`` or ``hf://org/name@revision``.
        revision: Branch, tag or commit of the repository; ``main`` when ``None``.
        token: Access token; ``None`` uses the stored login.
        cache_dir: Hub cache; ``None`` uses the default one.

    Raises:
        SourceError: If neither a folder nor a repository of that name can be opened.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise SourceError(
                f"`revision='{revision}'` was given, but {source} is a local folder, which has no revisions.",
                hint=f"drop `revision`, or write hf://{source} if you mean the Hub repository",
            )
        return LocalSource(path)
    if path.exists():
        raise SourceError(f"{source} is a file.", hint="pass the folder that holds config.json and the shards")
    if source.startswith((".", "/", "~")) or (source.count("/") > 1 and not source.startswith("hf://")):
        raise SourceError(f"there is no folder {source}.", hint="check the path")
    from hcsmoe_hub.hub.source import open_hub_source

    return open_hub_source(source, revision=revision, token=token, cache_dir=cache_dir)
