"""One push: checks what may be replaced, uploads files, and commits them."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hcsmoe_hub.checkpoint.tensors import local_header
from hcsmoe_hub.events import Delivered, Listener, Sending, Warned, ignore
from hcsmoe_hub.hub.additions import Addition, EarlierAddition, RemoteFile
from hcsmoe_hub.hub.repository import HubRepository, sends_over_xet
from hcsmoe_hub.hub.write_errors import RESUME_HINT, PushError
from hcsmoe_hub.machine.versions import tool
from hcsmoe_hub.options import PushOptions
from hcsmoe_hub.publishing.sent import SentShard
from hcsmoe_hub.report import REPORT_FILE, Pushed

# Files that an otherwise empty repository may have.
OWN_FILES = frozenset({".gitattributes", "README.md"})
# Larger files are weights, which cannot contain a token.
MAX_TEXT_BYTES = 10_000_000
EVENT_BYTES = 1 << 20


class Publisher:
    """Uploads the files of one folder as they are finished, and commits them all at once.

        publisher = Publisher(folder, options)
        publisher.open()
        for shard in shards:
            for held in publisher.upload(shard):
                held.unlink()
        publisher.commit(folder / "config.json")

    A push that ends before its commit leaves the repository unchanged. Another push of the same files resumes it: the
    Hub knows large files by their content. Only one thread at a time may call the methods.

    Args:
        folder: Folder of the files, under the names that they will have in the repository.
        options: Target repository and branch.
        token: Access token; ``None`` uses the stored login.
        listener: Called with ``Sending`` and ``Delivered``, from several threads.

    Raises:
        PushError: If the repository id is not valid, offline mode is on, or there is no token.
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
        """Finds or creates the repository and the branch, and checks that they may be written to.

        Args:
            expected: The files to push, if they are known; a repository that holds exactly these is accepted.
            recipe: Provenance that ``hcsmoe.json`` will record, if the files are not known yet; a repository that holds
                a result with the same provenance is accepted.

        Raises:
            PushError: For every reason that does not depend on the files' content.
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
                f"{options.repo_id} is public, but `private=True` was given.",
                hint=f"run 'hf repos settings {options.repo_id} --private' first, or drop `private`",
            )
        self._is_private = bool(is_private)
        head = self._find_head()
        self._head = head or hub.first_commit()
        self._files = hub.files(self._head)
        self._check_overwrite(expected, recipe)
        if head is None:
            hub.create_branch(at=self._head)

    def _find_head(self) -> str | None:
        """Commit of the branch; ``None`` if the branch does not exist yet.

        Raises:
            PushError: If the name is not that of a branch.
        """
        branch, refs = self._options.branch, self._hub.refs()
        found = refs.branches.get(branch) or refs.pull_requests.get(branch)
        if found is not None:
            return found
        is_commit = len(branch) == 40 and all(letter in "0123456789abcdef" for letter in branch)
        if branch in refs.tags or is_commit or branch.startswith("refs/"):
            kind = "a tag" if branch in refs.tags else "a commit" if is_commit else "not a branch"
            raise PushError(
                f"{branch} is {kind} of {self._options.repo_id}; results can only be pushed to branches.",
                hint="drop `revision`, or name a branch; a missing one is created",
            )
        return None

    def _check_overwrite(self, expected: Sequence[Path], recipe: Mapping[str, Any] | None) -> None:
        """Checks that a push would not mix a result with other files, or may replace them.

        Raises:
            PushError: If the branch holds other files and ``overwrite`` is not set.
        """
        foreign = self._files.keys() - OWN_FILES
        if not foreign or self._options.overwrite or self._has_exactly(expected) or self._has_recipe(recipe):
            return
        names = ", ".join(sorted(foreign)[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        branch = "" if self._options.revision is None else f" (branch {self._options.branch})"
        count = "1 file" if len(foreign) == 1 else f"{len(foreign)} files"
        raise PushError(
            f"{self._options.repo_id}{branch} already holds {count}: {names}.",
            hint="add `overwrite=True` to replace the checkpoint there, or push to another repository or `revision`",
        )

    def _has_exactly(self, expected: Sequence[Path]) -> bool:
        """Whether the repository holds exactly these files, as after an earlier push of the same result."""
        additions = [self._addition(path) for path in expected]
        if self._files.keys() - OWN_FILES - {addition.path_in_repo for addition in additions}:
            return False
        # Small files first: a difference there saves hashing the shards.
        additions.sort(key=lambda addition: addition.size)
        return all(addition.matches(self._files.get(addition.path_in_repo)) for addition in additions)

    def _has_recipe(self, recipe: Mapping[str, Any] | None) -> bool:
        """Whether the repository holds only a result with this provenance, as after an earlier push."""
        if recipe is None or REPORT_FILE not in self._files:
            return False
        from hcsmoe_hub.publishing.files import is_checkpoint_file

        if not all(is_checkpoint_file(name) for name in self._files.keys() - OWN_FILES):
            return False
        try:
            report = json.loads(self._hub.read(REPORT_FILE, revision=self._head))
        except ValueError:
            return False
        return isinstance(report, dict) and all(report.get(key) == value for key, value in recipe.items())

    def cancel(self) -> None:
        """Cancels an upload on another thread as soon as it sends the next bytes."""
        self._is_cancelled = True

    def upload(self, *paths: Path) -> list[Path]:
        """Uploads large files; small ones are sent with the commit.

        Args:
            paths: Finished files, which must not change after this call.

        Returns:
            The uploaded files, which are no longer needed locally.

        Raises:
            PushError: If the upload fails.
        """
        additions = [self._addition(path) for path in paths]
        for addition in additions:
            self._refuse_secrets(addition)
        self._hub.upload(additions)
        uploaded = [addition for addition in additions if addition.is_uploaded]
        for addition in uploaded:
            sent = None if sends_over_xet() else addition.bytes_sent
            self._emit(Delivered(addition.path_in_repo, addition.size, sent))
        return [addition.path for addition in uploaded]

    def describe(self, path: Path) -> SentShard:
        """What a later process needs to commit a file that was uploaded, without its content.

        Args:
            path: The file, a shard, which is still here.
        """
        addition = self._addition(path)
        header, data_start = local_header(path)
        return SentShard(
            shard=addition.path_in_repo,
            repo_id=self._options.repo_id,
            size=addition.size,
            sha256=addition.upload_info.sha256.hex(),
            sample=addition.upload_info.sample,
            header=header,
            data_start=data_start,
        )

    def restore(self, records: Sequence[SentShard]) -> None:
        """Takes over files that an earlier process has uploaded; they belong to the commit.

        Args:
            records: What ``describe`` has returned of them.

        Raises:
            PushError: If the Hub says that it no longer has one of them.
        """
        for record in records:
            name = record.shard
            addition = EarlierAddition(
                self._folder / name, name, size=record.size, sha256=record.sha256, sample=record.sample
            )
            addition.compare(self._files.get(name))
            self._additions[name] = addition
        self._hub.check_held([each for each in self._additions.values() if isinstance(each, EarlierAddition)])

    def moved(self, folder: Path) -> None:
        """Called when all files of the folder have been moved to another one; no upload may be running.

        Args:
            folder: Where they are now.
        """
        self._folder = folder
        for name, addition in self._additions.items():
            addition.moved(folder / name)

    def _addition(self, path: Path) -> Addition:
        name = path.relative_to(self._folder).as_posix()
        if name not in self._additions:
            self._additions[name] = Addition(path, name, self._counter(name, path.stat().st_size))
        return self._additions[name]

    def _counter(self, name: str, file_bytes: int) -> Callable[[int], None]:
        """Counts the bytes of a file that are sent, and reports every megabyte."""
        sent = reported = 0

        def count(more: int) -> None:
            nonlocal sent, reported
            if self._is_cancelled:
                raise PushError("the push was cancelled.", hint=RESUME_HINT)
            with self._lock:
                sent += more
                if sent - reported < EVENT_BYTES:
                    return
                reported = sent
            self._emit(Sending(name, file_bytes, sent))

        return count

    def _refuse_secrets(self, addition: Addition) -> None:
        """Refuses to publish the access token.

        Raises:
            PushError: If a text file contains it.
        """
        is_text = addition.size <= MAX_TEXT_BYTES and addition.path.suffix != ".safetensors"
        if is_text and not addition.is_uploaded and self._hub.token.encode() in addition.path.read_bytes():
            raise PushError(
                f"{addition.path} contains your access token, which would be published with it.",
                hint="remove the token from the file, and push again",
            )

    def commit(self, *paths: Path) -> Pushed:
        """Uploads the remaining files and commits everything at once.

        Args:
            paths: Files to add to those that were uploaded; uploaded ones may be named again.

        Raises:
            PushError: If the commit fails; the branch is then unchanged.
        """
        self.upload(*(path for path in paths if not self._addition(path).is_uploaded))
        additions = list(self._additions.values())
        names = {addition.path_in_repo for addition in additions}
        deleted = self._files_to_delete(names)
        new = [addition for addition in additions if not addition.matches(self._files.get(addition.path_in_repo))]
        done = self._hub.commit(additions, deleted, parent=self._head, title=f"Upload a model made by {_tool_name()}")
        for remark in done.remarks:
            self._emit(Warned(remark))
        large = sum(addition.bytes_sent for addition in additions if addition.is_uploaded)
        small = sum(addition.size for addition in new if not addition.is_uploaded)
        is_known = not (sends_over_xet() and any(addition.is_uploaded for addition in additions))
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

    def _files_to_delete(self, names: set[str]) -> list[str]:
        """Files of the replaced checkpoint that the new one does not have."""
        foreign = sorted(self._files.keys() - OWN_FILES - names)
        if not foreign:
            return []
        from hcsmoe_hub.publishing.files import is_checkpoint_file

        return [name for name in foreign if is_checkpoint_file(name)]


def _tool_name() -> str:
    return " ".join(tool().values())
