"""A small Hugging Face Hub on 127.0.0.1: enough of its HTTP API for the real client to read and write repositories.

    with Hub(tokens={"hf_reader": {"org/secret"}, "hf_me": Account(name="me", role="write")}) as hub:
        hub.add("org/name", folder)
        hub.add("org/secret", folder).private = True
        hub.faults = RandomFaults(0, rate=0.1)
        ...  # run a client whose HF_ENDPOINT is hub.url
        hub.requests  # every request, with the bytes of both bodies
        hub.model("me/new").contents()

A repository is a set of commits, a commit a set of files; a branch or tag is a name for a commit.

The client sends large files over one of two protocols: with hf_xet installed it speaks Xet without asking the server,
otherwise Git LFS. Only LFS is spoken here, so clients need what a user can set as well: ``HF_HUB_DISABLE_XET=1``.
Downloads need nothing: a client uses Xet for those files only whose answers name a Xet hash.
"""

from hub.connection import Request
from hub.faults import Fault, ListedFaults, RandomFaults
from hub.repository import Account, Repository
from hub.server import Hub

__all__ = ["Account", "Fault", "Hub", "ListedFaults", "RandomFaults", "Repository", "Request"]
