"""One repository of the Hub, seen by someone who wants to write to it."""

import importlib.util
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from hcsmoe_hub.hub.additions import Addition, RemoteFile
from hcsmoe_hub.hub.retry import REQUEST_ERRORS, is_passing, with_retries
from hcsmoe_hub.hub.write_errors import (
    CHANGED_STATUS,
    TOKENS_PAGE,
    PushError,
    changed,
    translate_errors,
)
from hcsmoe_hub.machine.versions import tool
from hcsmoe_hub.options import PushOptions


@dataclass(frozen=True, slots=True)
class Refs:
    """Names of a repository and the commits that they stand for."""

    branches: Mapping[str, str]
    tags: Collection[str]
    pull_requests: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Committed:
    """A commit; ``pull_request`` is the ref of the one that proposes it, ``remarks`` are the Hub's about the card."""

    oid: str
    url: str
    pull_request: str | None = None
    pull_request_url: str | None = None
    remarks: tuple[str, ...] = ()


def sends_over_xet() -> bool:
    """Whether the client sends large files over Xet, which tells nothing of what it sends."""
    return not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None


def check_repo_id(repo_id: str) -> None:
    """Checks the form of a name.

    Raises:
        PushError: If no repository can have it.
    """
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        reason = str(error).split(": '")[0].rstrip(".")
        raise PushError(f"{repo_id!r} is no repository id: {reason}.", hint="write it as NAMESPACE/NAME") from None
    if "/" not in repo_id:
        raise PushError(
            f"{repo_id!r} names no user or organization.",
            hint=f"write it as NAMESPACE/{repo_id}; 'hf auth whoami' tells your own",
        )


def find_token(token: str | None) -> str:
    """The token that is given, or that of the stored login.

    Raises:
        PushError: If there is none, or it can be none.
    """
    found = token or huggingface_hub.get_token()
    if not found:
        raise PushError(
            "no access token was found, and nothing is pushed without one.",
            hint=f"make one with write access on {TOKENS_PAGE}, then run 'hf auth login' or pass --token",
        )
    if not found.isascii() or not found.isprintable() or " " in found:
        # Refused here: the transport's own error would repeat the token.
        raise PushError(
            "the access token holds characters that no token has.", hint=f"copy it again from {TOKENS_PAGE}"
        )
    return found


class HubRepository:
    """A repository that is to be written to.

    Args:
        options: Which one.
        token: Access token; ``None`` uses the stored login.

    Raises:
        PushError: If its name is none, the Hub is switched off, or there is no token.
    """

    def __init__(self, options: PushOptions, *, token: str | None) -> None:
        check_repo_id(options.repo_id)
        if constants.HF_HUB_OFFLINE:
            raise PushError("the Hub is switched off (HF_HUB_OFFLINE).", hint="unset HF_HUB_OFFLINE and push again")
        self.token = find_token(token)
        self._options = options
        self._id, self._branch = options.repo_id, options.branch
        self._api = HfApi(token=self.token, library_name="hcsmoe", library_version=tool()["version"])

    def is_private(self) -> bool | None:
        """Whether it is a private one; ``None`` if there is none, or none that may be seen."""
        with translate_errors(self._id, self._branch):
            try:
                return bool(with_retries(lambda: self._api.model_info(self._id), is_first=True).private)
            except errors.DisabledRepoError:
                raise
            except errors.RepositoryNotFoundError:
                return None

    def create(self, *, private: bool) -> None:
        """Creates it, with a first commit that holds nothing of a model."""
        with translate_errors(self._id, self._branch):
            try:
                # Not private is not public: an organization may make its repositories private by itself.
                with_retries(lambda: self._api.create_repo(self._id, private=private or None, exist_ok=True))
            except errors.HfHubHTTPError as error:
                if error.response.status_code not in (401, 403, 404):
                    raise
                raise self._denied(error) from error

    def check_write(self) -> None:
        """Checks that it may be written to, before anything is sent."""
        with translate_errors(self._id, self._branch):
            try:
                with_retries(lambda: self._api.auth_check(self._id, write=True))
            except errors.HfHubHTTPError as error:
                if error.response.status_code not in (401, 403):
                    raise
                raise self._denied(error) from error

    def _denied(self, error: errors.HfHubHTTPError) -> Exception:
        """The reason why a login may not write, as far as it can be found out."""
        namespace, name = self._id.split("/")
        try:
            login = with_retries(self._api.whoami)
        except REQUEST_ERRORS:
            return error
        user, role = login["name"], login.get("auth", {}).get("accessToken", {}).get("role")
        own = [user, *(org["name"] for org in login.get("orgs", ()))]
        if role == "read":
            return PushError(
                f"the access token of {user} may read but not write, so it cannot push to {self._id}.",
                hint=f"make one with write access on {TOKENS_PAGE}, then run 'hf auth login' or pass --token",
            )
        if namespace not in own:
            places = " or ".join(f"{place}/{name}" for place in own[:3])
            return PushError(
                f"there is no user or organization {namespace} that {user} may write for.", hint=f"push to {places}"
            )
        return PushError(
            f"the access token of {user} may not write to {self._id}.",
            hint=f"give it write access to {namespace} on {TOKENS_PAGE}, or make another one",
        )

    def refs(self) -> Refs:
        """Its branches, tags and pull requests."""
        with translate_errors(self._id, self._branch):
            found = with_retries(lambda: self._api.list_repo_refs(self._id, include_pull_requests=True))
        return Refs(
            branches={ref.name: ref.target_commit for ref in found.branches},
            tags=[ref.name for ref in found.tags],
            pull_requests={ref.ref: ref.target_commit for ref in found.pull_requests or ()},
        )

    def first_commit(self) -> str:
        """The commit that it began with."""
        with translate_errors(self._id, self._branch):
            oid: str = self._api.list_repo_commits(self._id)[-1].commit_id
        return oid

    def create_branch(self, *, at: str) -> None:
        """Makes the branch that is pushed to."""
        with translate_errors(self._id, self._branch):
            with_retries(lambda: self._api.create_branch(self._id, branch=self._branch, revision=at, exist_ok=True))

    def files(self, revision: str) -> dict[str, RemoteFile]:
        """Every file of a commit by its name."""
        with translate_errors(self._id, self._branch):
            entries = list(self._api.list_repo_tree(self._id, recursive=True, revision=revision))
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def read(self, file: str, *, revision: str) -> bytes:
        """Content of a small file of a commit."""
        with translate_errors(self._id, self._branch), TemporaryDirectory(prefix="hcsmoe-") as folder:
            path = with_retries(lambda: self._api.hf_hub_download(self._id, file, revision=revision, local_dir=folder))
            return Path(path).read_bytes()

    def upload(self, additions: Sequence[Addition]) -> None:
        """Sends the large ones among some files, except those that the Hub holds; nobody sees them yet."""
        with translate_errors(self._id, self._branch):
            self._api.preupload_lfs_files(
                self._id,
                additions,
                revision=self._branch,
                create_pr=self._options.create_pr,
                # A .gitignore of the repository must not keep a shard out of the commit.
                gitignore_content="",
            )

    def commit(self, additions: Sequence[Addition], deleted: Sequence[str], *, parent: str, title: str) -> Committed:
        """Makes one commit of files that were uploaded, on top of ``parent`` or not at all.

        Whether a commit whose answer was lost has happened is looked up: it must not happen twice.

        Raises:
            PushError: If it fails, or someone else has committed in the meantime.
        """
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions]
        operations += [CommitOperationDelete(name, is_folder=False) for name in deleted]
        before = self.refs().pull_requests if self._options.create_pr else {}

        def attempt() -> Committed:
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    done = self._api.create_commit(
                        self._id,
                        operations,
                        commit_message=title,
                        revision=self._branch,
                        create_pr=self._options.create_pr,
                        parent_commit=parent,
                    )
            except REQUEST_ERRORS as error:
                if not is_passing(error) and not _is_changed(error):
                    raise
                landed = self._landed(additions, deleted, parent=parent, before=before)
                if landed is None:
                    raise
                return landed
            remarks = tuple(" ".join(str(warning.message).split()) for warning in caught)
            return Committed(done.oid, done.commit_url, done.pr_revision, done.pr_url, remarks)

        with translate_errors(self._id, self._branch):
            return with_retries(attempt)

    def _landed(
        self, additions: Sequence[Addition], deleted: Sequence[str], *, parent: str, before: Mapping[str, str]
    ) -> Committed | None:
        """The commit, if it has happened although no answer came.

        Raises:
            PushError: If another one has happened.
        """
        refs = self.refs()
        if self._options.create_pr:
            heads = {ref: oid for ref, oid in refs.pull_requests.items() if ref not in before}
        else:
            everything = {**refs.branches, **refs.pull_requests}
            heads = {self._branch: everything[self._branch]} if everything.get(self._branch) != parent else {}
        for ref, oid in heads.items():
            files = self.files(oid)
            if all(one.equals(files.get(one.path_in_repo)) for one in additions) and not files.keys() & set(deleted):
                url = f"{self._api.endpoint}/{self._id}"
                if not self._options.create_pr:
                    return Committed(oid, f"{url}/commit/{oid}")
                return Committed(oid, f"{url}/commit/{oid}", ref, f"{url}/discussions/{ref.rpartition('/')[2]}")
        if heads and not self._options.create_pr:
            message, hint = changed(self._id)
            raise PushError(message, hint=hint)
        return None


def _is_changed(error: Exception) -> bool:
    return isinstance(error, errors.HfHubHTTPError) and error.response.status_code == CHANGED_STATUS
