"""One push: what is there, what may be replaced, what was sent, and the commit that shows it."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hcsmoe_hub.events import Delivered, Listener, Sending, Warned, ignore
from hcsmoe_hub.hub.additions import Addition, RemoteFile
from hcsmoe_hub.hub.repository import HubRepository, sends_over_xet
from hcsmoe_hub.hub.write_errors import AGAIN, PushError
from hcsmoe_hub.machine.versions import tool
from hcsmoe_hub.options import PushOptions
from hcsmoe_hub.report import REPORT_FILE, Pushed

# What the Hub, or a person who makes a repository there, puts into one that is still empty.
OWN_FILES = frozenset({".gitattributes", "README.md"})
# Larger files are weights, and hold no text in which a token could be.
MAX_TEXT_BYTES = 10_000_000
EVENT_BYTES = 1 << 20


class Publisher:
    """Sends files of one folder as they are finished, and shows them all at once.

        publisher = Publisher(folder, options)
        publisher.open()
        for shard in shards:
            for held in publisher.upload(shard):
                held.unlink()
        publisher.commit(folder / "config.json")

    A push that ends before its commit leaves nothing that anybody sees. Another one with the same files goes on: the
    Hub knows large files by their content. One thread at a time may call.

    Args:
        folder: The files lie in it, by the names that they will have in the repository.
        options: Where they go.
        token: Access token; ``None`` uses the stored login.
        listener: Called with ``Sending`` and ``Delivered``, from several threads.

    Raises:
        PushError: If the name of the repository is none, the Hub is switched off, or there is no token.
    """

    def __init__(
        self, folder: Path, options: PushOptions, *, token: str | None = None, listener: Listener = ignore
    ) -> None:
        self._folder = folder
        self._options = options
        self._hub = HubRepository(options, token=token)
        self._emit = listener
        self._lock = threading.Lock()
        self._additions: dict[str, Addition] = {}
        self._files: dict[str, RemoteFile] = {}
        self._head = ""
        self._is_private = False
        self._is_cancelled = False

    def open(self, expected: Sequence[Path] = (), *, recipe: Mapping[str, Any] | None = None) -> None:
        """Finds or makes the repository and the branch, and refuses whatever must not be written to.

        Args:
            expected: The files that will be pushed, if they are known: a repository that holds nothing else is no
                reason for a refusal.
            recipe: What ``hcsmoe.json`` will say of the making, if the files are not known yet: a repository that holds
                a result of the same making is no reason either.

        Raises:
            PushError: Every refusal that is not due to the files themselves happens here.
        """
        options, hub = self._options, self._hub
        is_private = hub.is_private()
        if is_private is None:
            hub.create(private=options.private)
            is_private = hub.is_private()
        elif not options.create_pr:
            hub.check_write()
        if options.private and not is_private:
            raise PushError(
                f"{options.repo_id} is public, but --private was asked for.",
                hint=f"run 'hf repos settings {options.repo_id} --private' first, or drop --private",
            )
        self._is_private = bool(is_private)
        head = self._find_head()
        self._head = head or hub.first_commit()
        self._files = hub.files(self._head)
        self._check_room(expected, recipe)
        if head is None:
            hub.create_branch(at=self._head)

    def _find_head(self) -> str | None:
        """Commit of the branch; ``None`` if there is no such branch yet.

        Raises:
            PushError: If the name is not that of a branch.
        """
        branch, refs = self._options.branch, self._hub.refs()
        found = refs.branches.get(branch) or refs.pull_requests.get(branch)
        if found is not None:
            return found
        is_commit = len(branch) == 40 and all(letter in "0123456789abcdef" for letter in branch)
        if branch in refs.tags or is_commit or branch.startswith("refs/"):
            kind = "a tag" if branch in refs.tags else "a commit" if is_commit else "no branch"
            raise PushError(
                f"{branch} is {kind} of {self._options.repo_id}, and a push goes to a branch.",
                hint="drop --revision, or name a branch; one that is not there is made",
            )
        return None

    def _check_room(self, expected: Sequence[Path], recipe: Mapping[str, Any] | None) -> None:
        """Refuses to mix a result with other files, unless it may replace them.

        Raises:
            PushError: If there are files that nobody allowed to replace.
        """
        foreign = self._files.keys() - OWN_FILES
        if not foreign or self._options.overwrite or self._holds(expected) or self._is_made_by(recipe):
            return
        names = ", ".join(sorted(foreign)[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        branch = "" if self._options.revision is None else f" (branch {self._options.branch})"
        count = "1 file" if len(foreign) == 1 else f"{len(foreign)} files"
        raise PushError(
            f"{self._options.repo_id}{branch} holds {count} already: {names}.",
            hint="pass --overwrite to replace the checkpoint there, or push to another repository or --revision",
        )

    def _holds(self, expected: Sequence[Path]) -> bool:
        """Whether the repository holds these very files: then a push before this one has succeeded."""
        additions = [self._addition(path) for path in expected]
        if self._files.keys() - OWN_FILES - {addition.path_in_repo for addition in additions}:
            return False
        # The small files first: a difference there saves reading the shards.
        additions.sort(key=lambda addition: addition.size)
        return all(addition.equals(self._files.get(addition.path_in_repo)) for addition in additions)

    def _is_made_by(self, recipe: Mapping[str, Any] | None) -> bool:
        """Whether the repository holds a result of just this making, and nothing else: then it was pushed before."""
        if recipe is None or REPORT_FILE not in self._files:
            return False
        from hcsmoe_hub.publishing.files import is_of_a_checkpoint

        if not all(is_of_a_checkpoint(name) for name in self._files.keys() - OWN_FILES):
            return False
        try:
            report = json.loads(self._hub.read(REPORT_FILE, revision=self._head))
        except ValueError:
            return False
        return isinstance(report, dict) and all(report.get(key) == value for key, value in recipe.items())

    def cancel(self) -> None:
        """Ends an upload that is under way on another thread as soon as it sends the next bytes."""
        self._is_cancelled = True

    def upload(self, *paths: Path) -> list[Path]:
        """Sends finished files that are large; small ones wait for the commit.

        Args:
            paths: Files that will not change any more.

        Returns:
            Those that the Hub holds, and that are not needed here any more.

        Raises:
            PushError: If they cannot be sent.
        """
        additions = [self._addition(path) for path in paths]
        for addition in additions:
            self._refuse_secrets(addition)
        self._hub.upload(additions)
        held = [addition for addition in additions if addition.is_held]
        for addition in held:
            sent = None if sends_over_xet() else addition.bytes_sent
            self._emit(Delivered(addition.path_in_repo, addition.size, sent))
        return [addition.path for addition in held]

    def _addition(self, path: Path) -> Addition:
        name = path.relative_to(self._folder).as_posix()
        if name not in self._additions:
            self._additions[name] = Addition(path, name, self._counter(name, path.stat().st_size))
        return self._additions[name]

    def _counter(self, name: str, file_bytes: int) -> Callable[[int], None]:
        """Counts the bytes of a file that are sent, and tells of every megabyte."""
        sent = told = 0

        def count(more: int) -> None:
            nonlocal sent, told
            if self._is_cancelled:
                raise PushError("the push was cancelled.", hint=AGAIN)
            with self._lock:
                sent += more
                if sent - told < EVENT_BYTES:
                    return
                told = sent
            self._emit(Sending(name, file_bytes, sent))

        return count

    def _refuse_secrets(self, addition: Addition) -> None:
        """Refuses to publish the token that everything is published with.

        Raises:
            PushError: If a file holds it.
        """
        is_text = addition.size <= MAX_TEXT_BYTES and addition.path.suffix != ".safetensors"
        if is_text and not addition.is_held and self._hub.token.encode() in addition.path.read_bytes():
            raise PushError(
                f"{addition.path} holds your access token, which would be published with it.",
                hint="remove it from the file, and push again",
            )

    def commit(self, *paths: Path) -> Pushed:
        """Sends the last files and makes everything visible in one commit.

        Args:
            paths: Files beside those that were uploaded; files that were may be named once more.

        Raises:
            PushError: If the commit fails; then nothing has changed that anybody sees.
        """
        self.upload(*(path for path in paths if not self._addition(path).is_held))
        additions = list(self._additions.values())
        names = {addition.path_in_repo for addition in additions}
        deleted = self._stale(names)
        new = [addition for addition in additions if not addition.equals(self._files.get(addition.path_in_repo))]
        done = self._hub.commit(additions, deleted, parent=self._head, title=f"Upload a model made by {_maker()}")
        for remark in done.remarks:
            self._emit(Warned(remark))
        large = sum(addition.bytes_sent for addition in additions if addition.is_held)
        small = sum(addition.size for addition in new if not addition.is_held)
        is_known = not (sends_over_xet() and any(addition.is_held for addition in additions))
        return Pushed(
            repo_id=self._options.repo_id,
            private=self._is_private,
            revision=done.pull_request or self._options.branch,
            commit=done.oid,
            url=done.url,
            pull_request=done.pull_request_url,
            changed=done.oid != self._head,
            files=sorted(names),
            bytes=sum(addition.size for addition in additions),
            bytes_sent=large + small if is_known else None,
            deleted=deleted,
            left_out=[],
        )

    def _stale(self, names: set[str]) -> list[str]:
        """Files of the checkpoint that is replaced which the new one has not."""
        foreign = sorted(self._files.keys() - OWN_FILES - names)
        if not foreign:
            return []
        from hcsmoe_hub.publishing.files import is_of_a_checkpoint

        return [name for name in foreign if is_of_a_checkpoint(name)]


def _maker() -> str:
    return " ".join(tool().values())
