"""A Hub repository that is written to."""

import importlib.util
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.lfs import post_lfs_batch_info
from huggingface_hub.utils import validate_repo_id

from hcsmoe_hub.hub.additions import Addition, EarlierAddition, RemoteFile
from hcsmoe_hub.hub.retry import REQUEST_ERRORS, is_transient, with_retries
from hcsmoe_hub.hub.session import session_problem
from hcsmoe_hub.hub.write_errors import (
    CHANGED_STATUS,
    TOKENS_PAGE,
    PushError,
    changed_meanwhile,
    lost_meanwhile,
    misses_content,
    translate_write_errors,
)
from hcsmoe_hub.machine.versions import tool
from hcsmoe_hub.options import PushOptions


@dataclass(frozen=True, slots=True)
class Refs:
    """Branches, tags and pull requests of a repository, by name, with the commits that they point to."""

    branches: Mapping[str, str]
    tags: Collection[str]
    pull_requests: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Committed:
    """A commit; ``pull_request`` is the ref of its pull request, ``remarks`` are the Hub's warnings about the card."""

    oid: str
    url: str
    pull_request: str | None = None
    pull_request_url: str | None = None
    remarks: tuple[str, ...] = ()


def sends_over_xet() -> bool:
    """Whether the client sends large files over Xet, which does not report the bytes that it sends."""
    return not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None


def check_repo_id(repo_id: str) -> None:
    """Checks the form of a repository id.

    Raises:
        PushError: If it is not valid.
    """
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        reason = str(error).split(": '")[0].rstrip(".")
        raise PushError(f"{repo_id!r} is not a repository id: {reason}.", hint="write it as NAMESPACE/NAME") from None
    if "/" not in repo_id:
        raise PushError(
            f"{repo_id!r} does not name a user or an organization.",
            hint=f"write it as NAMESPACE/{repo_id}; 'hf auth whoami' shows your own",
        )


def resolve_token(token: str | None) -> str:
    """Returns the given token, or that of the stored login.

    Raises:
        PushError: If there is no token, or it is malformed.
    """
    found = token or huggingface_hub.get_token()
    if not found:
        raise PushError(
            "no access token was found, and a push needs one.",
            hint=f"create one with write access on {TOKENS_PAGE}, then run 'hf auth login' or pass `token`",
        )
    if not found.isascii() or not found.isprintable() or " " in found:
        # Refused here: the transport's own error would repeat the token.
        raise PushError("the access token contains invalid characters.", hint=f"copy it again from {TOKENS_PAGE}")
    return found


class HubRepository:
    """A repository that is written to.

    Args:
        options: Which one.
        token: Access token; ``None`` uses the stored login.

    Raises:
        PushError: If its id is not valid, offline mode is on, there is no token, or no request can be made.
    """

    def __init__(self, options: PushOptions, *, token: str | None) -> None:
        check_repo_id(options.repo_id)
        if constants.HF_HUB_OFFLINE:
            raise PushError("offline mode is on (HF_HUB_OFFLINE).", hint="unset HF_HUB_OFFLINE and push again")
        self.token = resolve_token(token)
        problem = session_problem()
        if problem is not None:
            raise PushError(problem[0], hint=problem[1])
        self._options = options
        self._id, self._branch = options.repo_id, options.branch
        self._api = HfApi(token=self.token, library_name="hcsmoe", library_version=tool()["version"])

    def is_private(self) -> bool | None:
        """Whether it is private; ``None`` if it does not exist or this login cannot see it."""
        with translate_write_errors(self._id, self._branch):
            try:
                return bool(with_retries(lambda: self._api.model_info(self._id), is_first=True).private)
            except errors.DisabledRepoError:
                raise
            except errors.RepositoryNotFoundError:
                return None

    def create(self, *, private: bool) -> None:
        """Creates it, with a first commit that holds no model files."""
        with translate_write_errors(self._id, self._branch):
            try:
                # None rather than False: an organization may make its repositories private by default.
                with_retries(lambda: self._api.create_repo(self._id, private=private or None, exist_ok=True))
            except errors.HfHubHTTPError as error:
                if error.response.status_code not in (401, 403, 404):
                    raise
                raise self._denied(error) from error

    def check_write(self) -> None:
        """Checks write access before anything is sent."""
        with translate_write_errors(self._id, self._branch):
            try:
                with_retries(lambda: self._api.auth_check(self._id, write=True))
            except errors.HfHubHTTPError as error:
                if error.response.status_code not in (401, 403):
                    raise
                raise self._denied(error) from error

    def _denied(self, error: errors.HfHubHTTPError) -> Exception:
        """Explains why this login cannot write, as far as the Hub reveals it."""
        namespace, name = self._id.split("/")
        try:
            login = with_retries(self._api.whoami)
        except REQUEST_ERRORS:
            return error
        user, role = login["name"], login.get("auth", {}).get("accessToken", {}).get("role")
        own = [user, *(org["name"] for org in login.get("orgs", ()))]
        if role == "read":
            return PushError(
                f"the access token of {user} is read-only, so it cannot push to {self._id}.",
                hint=f"create one with write access on {TOKENS_PAGE}, then run 'hf auth login' or pass `token`",
            )
        if namespace not in own:
            places = " or ".join(f"{place}/{name}" for place in own[:3])
            return PushError(
                f"{user} cannot write to the namespace {namespace}, or it does not exist.", hint=f"push to {places}"
            )
        return PushError(
            f"the access token of {user} cannot write to {self._id}.",
            hint=f"give it write access to {namespace} on {TOKENS_PAGE}, or create another one",
        )

    def refs(self) -> Refs:
        """Its branches, tags and pull requests."""
        with translate_write_errors(self._id, self._branch):
            found = with_retries(lambda: self._api.list_repo_refs(self._id, include_pull_requests=True))
        return Refs(
            branches={ref.name: ref.target_commit for ref in found.branches},
            tags=[ref.name for ref in found.tags],
            pull_requests={ref.ref: ref.target_commit for ref in found.pull_requests or ()},
        )

    def first_commit(self) -> str:
        """Its initial commit."""
        with translate_write_errors(self._id, self._branch):
            oid: str = self._api.list_repo_commits(self._id)[-1].commit_id
        return oid

    def create_branch(self, *, at: str) -> None:
        """Creates the branch that is pushed to."""
        with translate_write_errors(self._id, self._branch):
            with_retries(lambda: self._api.create_branch(self._id, branch=self._branch, revision=at, exist_ok=True))

    def files(self, revision: str) -> dict[str, RemoteFile]:
        """Every file of a commit, by name."""
        with translate_write_errors(self._id, self._branch):
            entries = list(self._api.list_repo_tree(self._id, recursive=True, revision=revision))
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def read(self, file: str, *, revision: str) -> bytes:
        """Content of a small file of a commit."""
        with translate_write_errors(self._id, self._branch), TemporaryDirectory(prefix="hcsmoe-") as folder:
            path = with_retries(lambda: self._api.hf_hub_download(self._id, file, revision=revision, local_dir=folder))
            return Path(path).read_bytes()

    def upload(self, additions: Sequence[Addition]) -> None:
        """Sends the large files that the Hub does not have yet; they stay invisible until the commit."""
        with translate_write_errors(self._id, self._branch):
            self._api.preupload_lfs_files(
                self._id,
                additions,
                revision=self._branch,
                create_pr=self._options.create_pr,
                # The repository's .gitignore must not keep a shard out of the commit.
                gitignore_content="",
            )

    def check_held(self, additions: Sequence[EarlierAddition]) -> None:
        """Checks that the Hub still has files that were uploaded earlier, as far as it says so before a commit.

        Raises:
            PushError: If it does not have one of them.
        """
        if not additions or sends_over_xet():
            # Whether Xet has a file shows with the commit only.
            return
        with translate_write_errors(self._id, self._branch):
            actions, _, _ = with_retries(
                lambda: post_lfs_batch_info(
                    [addition.upload_info for addition in additions],
                    token=self.token,
                    repo_type="model",
                    repo_id=self._id,
                    revision=None if self._options.create_pr else quote(self._branch, safe=""),
                    endpoint=self._api.endpoint,
                )
            )
        wanted = {action["oid"] for action in actions if action.get("actions") is not None}
        lost = [each.path_in_repo for each in additions if each.upload_info.sha256.hex() in wanted]
        if lost:
            raise lost_meanwhile(self._id, lost)

    def commit(self, additions: Sequence[Addition], deleted: Sequence[str], *, parent: str, title: str) -> Committed:
        """Makes one commit of uploaded files on top of ``parent``, or none at all.

        If the response to a commit is lost, looks up whether the commit was made, so that it is never made twice.

        Raises:
            PushError: If it fails, or someone else committed in the meantime.
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
                if not is_transient(error) and not _branch_moved(error):
                    earlier = [each.path_in_repo for each in additions if isinstance(each, EarlierAddition)]
                    if earlier and misses_content(error, earlier):
                        raise lost_meanwhile(self._id, earlier) from error
                    raise
                landed = self._find_landed(additions, deleted, parent=parent, before=before)
                if landed is None:
                    raise
                return landed
            remarks = tuple(" ".join(str(warning.message).split()) for warning in caught)
            return Committed(done.oid, done.commit_url, done.pr_revision, done.pr_url, remarks)

        with translate_write_errors(self._id, self._branch):
            return with_retries(attempt)

    def _find_landed(
        self, additions: Sequence[Addition], deleted: Sequence[str], *, parent: str, before: Mapping[str, str]
    ) -> Committed | None:
        """The commit, if it was made although its response was lost.

        Raises:
            PushError: If the branch has another commit.
        """
        refs = self.refs()
        if self._options.create_pr:
            heads = {ref: oid for ref, oid in refs.pull_requests.items() if ref not in before}
        else:
            everything = {**refs.branches, **refs.pull_requests}
            heads = {self._branch: everything[self._branch]} if everything.get(self._branch) != parent else {}
        for ref, oid in heads.items():
            files = self.files(oid)
            if all(one.matches(files.get(one.path_in_repo)) for one in additions) and not files.keys() & set(deleted):
                url = f"{self._api.endpoint}/{self._id}"
                if not self._options.create_pr:
                    return Committed(oid, f"{url}/commit/{oid}")
                return Committed(oid, f"{url}/commit/{oid}", ref, f"{url}/discussions/{ref.rpartition('/')[2]}")
        if heads and not self._options.create_pr:
            message, hint = changed_meanwhile(self._id)
            raise PushError(message, hint=hint)
        return None


def _branch_moved(error: Exception) -> bool:
    return isinstance(error, errors.HfHubHTTPError) and error.response.status_code == CHANGED_STATUS
