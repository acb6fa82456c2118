"""Choices of another conversion, taken from its repository."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hub_client import OPENER, Answers, Machine
from hub_server import Hub
from tiny_models import build, options, token_ids

from hcsmoe_hub import convert
from hcsmoe_hub.options import MethodOptions

Found = tuple[Answers, Hub, Path, Machine]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What conversions on a machine of its own answer, the Hub, the result that it has, and the machine."""
    folder = tmp_path_factory.mktemp("served")
    source, result = build(folder / "base"), folder / "result"
    convert(source, options(source, 5, output=result, method=MethodOptions(refit="none")))
    machine = Machine(tmp_path_factory.mktemp("machine"))
    np.save(machine.folder / "ids.npy", token_ids().numpy())
    with Hub(tokens={OPENER: {"me/hidden"}}) as hub:
        hub.add("me/base", source)
        hub.add("me/result", result)
        hub.add("me/hidden", result).private = True
        calls = {
            "result": {"like": "me/result"},
            "hidden": {"like": "me/hidden", "token": OPENER, "action": "plan"},
            "stranger": {"like": "me/hidden"},
            "no result": {"like": "me/base"},
            "nothing": {"like": "me/nothing"},
        }
        answers = machine.run(
            hub.url,
            {
                name: {**machine.convert("me/base", name.replace(" ", "-")), "action": "alike", **call}
                for name, call in calls.items()
            },
        )
    return answers, hub, result, machine


def test_a_repository_gives_its_choices_without_its_weights(found: Found) -> None:
    answers, hub, result, machine = found
    commit = hub.model("me/result").at("main").sha
    digest = sha256((result / "hcsmoe.json").read_bytes()).hexdigest()
    assert answers["result"] == {"repo_id": "me/result", "revision": commit, "sha256": digest, "neurons": True}
    assert machine.weights("result") == {file.name: file.read_bytes() for file in result.glob("*.safetensors")} != {}
    asked = [request.path for request in hub.requests if "/me/result/" in request.path]
    assert asked
    assert [path for path in asked if "safetensors" in path] == []


def test_a_private_repository_needs_the_token(found: Found) -> None:
    answers, *_ = found
    assert answers["hidden"]["warnings"] == []
    assert answers["stranger"]["refused"] == "SourceError"
    assert "me/hidden" in answers["stranger"]["message"]


def test_what_is_not_a_result_is_refused(found: Found) -> None:
    answers, *_ = found
    assert answers["no result"]["message"] == ("me/base has no hcsmoe.json, so it is not a result of 'hcsmoe convert'.")
    assert answers["nothing"]["refused"] == "SourceError"
