"""Feeds of a repository's shards: whole ones into the client's cache, or pieces that are deleted after use."""

import glob
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hcsmoe_hub.checkpoint.feed import Feed
from hcsmoe_hub.checkpoint.pieces import Piece
from hcsmoe_hub.errors import SourceError
from hcsmoe_hub.hub.client_download import abort_xet, check_size, download_file, remove_unfinished
from hcsmoe_hub.hub.download_folder import download_folder, remove_left
from hcsmoe_hub.hub.errors import WrongHash
from hcsmoe_hub.hub.read_errors import translate_read_errors
from hcsmoe_hub.hub.shard_hash import ShardHashes
from hcsmoe_hub.hub.transfer import SUMS, Remote, receive

# Folder of unfinished downloads inside the repository's cache folder, so that cleaning the cache removes them too.
DOWNLOADS = "hcsmoe"

# Called with the name of a shard when a download from it begins.
Note = Callable[[str], None]
Steps = Sequence[Sequence[Piece]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteShards:
    """The shards of a repository at one commit.

    Attributes:
        repo_id: Repository.
        revision: Commit.
        token: Access token; ``None`` uses the stored login.
        cache: Folder of the client's cache.
        folder: Folder of the repository in the cache.
        remote: Address, size and hash of a shard.
        header: Header of a shard, if it was downloaded.
    """

    repo_id: str
    revision: str
    token: str | None
    cache: Path
    folder: Path
    remote: Callable[[str], Remote]
    header: Callable[[str], bytes | None]


@contextmanager
def feed_of_shards(shards: RemoteShards, steps: Steps, note: Note) -> Iterator[Feed]:
    """Whole shards, which the client downloads into its cache.

    Args:
        shards: Where they are.
        steps: Shards of a pass, by step.
        note: Called when a download begins.
    """
    for piece in (piece for step in steps for piece in step):
        check_size(shards.repo_id, piece.shard, piece.nbytes)
    downloads = shards.folder / DOWNLOADS
    if downloads.is_dir():
        # Pieces that a killed run has left would never be used.
        with translate_read_errors(shards.repo_id, shards.revision, cache=shards.cache):
            remove_left(downloads)
    running: set[str] = set()

    def fetch(piece: Piece, stop: threading.Event) -> Path:
        etag = shards.remote(piece.shard).etag
        note(piece.shard)
        running.add(etag)
        with translate_read_errors(shards.repo_id, shards.revision, cache=shards.cache):
            path = download_file(
                shards.repo_id,
                piece.shard,
                revision=shards.revision,
                token=shards.token,
                cache=shards.cache,
                stop=stop,
            )
        running.discard(etag)
        return path

    feed = Feed(steps, fetch, removes=False)
    try:
        yield feed
    # Whatever it is, nobody needs the downloads any more.
    except BaseException:
        feed.stop()
        abort_xet()
        raise
    finally:
        if not feed.close():
            remove_unfinished(shards.folder / "blobs", running)


@contextmanager
def feed_of_pieces(shards: RemoteShards, steps: Steps, note: Note) -> Iterator[Feed]:
    """The bytes of each step, which are deleted after it.

    Args:
        shards: Where they are.
        steps: Pieces of a pass, by step.
        note: Called when the first download from a shard begins.
    """
    # Leftovers from the middle of an earlier pass would take up disk space until this one reaches them.
    names = [_file_name(piece) for step in steps[:2] for piece in step]
    wanted = {*names, *(f"{name}{SUMS}" for name in names)}
    hashes = ShardHashes(shards.header, shards.remote)

    with ExitStack() as stack:
        with translate_read_errors(shards.repo_id, shards.revision, cache=shards.cache):
            folder = stack.enter_context(download_folder(shards.folder / DOWNLOADS, shards.revision, wanted))

        def fetch(piece: Piece, stop: threading.Event) -> Path:
            note(piece.shard)
            path = folder / _file_name(piece)
            with translate_read_errors(shards.repo_id, shards.revision, cache=shards.cache):
                receive(shards.remote(piece.shard), path, start=piece.start, end=piece.end, stop=stop)
                try:
                    hashes.add(piece, path)
                except WrongHash:
                    # The next run must not take it over.
                    for file in folder.glob(f"{glob.escape(_shard_name(piece.shard))}.*"):
                        file.unlink(missing_ok=True)
                    raise SourceError(
                        f"what was downloaded of {piece.shard} of {shards.repo_id} does not have the hash that the Hub "
                        "gives for it.",
                        hint="add `restart=True` to begin anew",
                    ) from None
            return path

        feed = Feed(steps, fetch, removes=True)
        stack.callback(feed.close)
        yield feed


def _shard_name(shard: str) -> str:
    return shard.replace("/", "--")


def _file_name(piece: Piece) -> str:
    """Name of a piece in the download folder."""
    return f"{_shard_name(piece.shard)}.{piece.start}-{piece.end}"
