"""What a user writes for a repository: its id, or the address of its page."""

import huggingface_hub
from huggingface_hub import constants, errors

from hcsmoe_hub.errors import SourceError


def is_address(source: str) -> bool:
    """Whether a source is an address from a browser, with or without ``https://``, or one to clone from."""
    lowered = source.lower()
    return lowered.startswith(("https://", "http://", "git@")) or lowered.split("/")[0] in constants.HF_URL_HOSTS


def parse_address(source: str) -> tuple[str, str]:
    """Repository and revision that a source names; the revision is empty if it names none.

    Raises:
        SourceError: If it is an address, but not that of a model repository.
    """
    if not is_address(source):
        repo_id, _, revision = source.removeprefix("hf://").partition("@")
        return repo_id, revision
    hint = "pass the repository as org/name, and a branch with `revision`"
    try:
        found = huggingface_hub.parse_hf_uri(source, endpoint=constants.ENDPOINT)
    except (errors.HfUriError, ValueError) as error:
        reason = error.msg if isinstance(error, errors.HfUriError) else str(error)
        raise SourceError(f"{source} is not the address of a repository: {reason.rstrip('.')}.", hint=hint) from None
    if found.type != "model":
        raise not_a_model(found.id, found.type)
    # The page of a file belongs to its repository; that of a folder may hold another checkpoint.
    if found.path_in_repo and "/tree/" in source:
        raise SourceError(
            f"{source} is the folder {found.path_in_repo} of {found.id}, but hcsmoe reads whole repositories.",
            hint="download that folder with 'hf download' and pass it, or write a branch with a slash as `revision`",
        )
    return found.id, found.revision or ""


def not_a_model(repo_id: str, kind: str) -> SourceError:
    return SourceError(f"{repo_id} is a {kind} on the Hub, not a model.", hint="pass the id of a model repository")
