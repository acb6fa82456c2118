"""Runs pushes in a process of its own: reads named calls as JSON, and prints what each returned or refused.

The calls of one process run side by side, so that one waits while another does.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.events import Event
from hcsmoe_hub.hub import retry
from hcsmoe_hub.options import PushOptions
from hcsmoe_hub.publishing.publisher import Publisher
from hcsmoe_hub.publishing.sent import SentShard
from hcsmoe_hub.push import push


def publish(folder: Path, options: PushOptions, token: str | None, delete: bool, seen: list[Event]) -> Any:
    """Publishes a folder file by file, as a conversion does."""
    publisher = Publisher(folder, options, token=token, listener=seen.append)
    publisher.open()
    for shard in sorted(folder.glob("*.safetensors")):
        held = publisher.upload(shard)
        for path in held if delete else ():
            path.unlink()
    rest = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors")
    return publisher.commit(*rest).as_dict()


def send(folder: Path, options: PushOptions, token: str | None) -> None:
    """Sends and deletes the shards of a folder, and keeps what is needed to commit them, as a conversion does."""
    publisher = Publisher(folder, options, token=token)
    publisher.open()
    for shard in sorted(folder.glob("*.safetensors")):
        (held,) = publisher.upload(shard)
        kept = json.dumps(publisher.describe(held).as_dict())
        held.with_suffix(".kept").write_text(kept)
        held.unlink()


def finish(folder: Path, options: PushOptions, token: str | None, seen: list[Event]) -> Any:
    """Commits a folder whose shards another process has sent, or some of them."""
    publisher = Publisher(folder, options, token=token, listener=seen.append)
    publisher.open()
    kept = sorted(folder.glob("*.kept"))
    publisher.restore([SentShard.from_dict(json.loads(path.read_text())) for path in kept])
    rest = sorted(path for path in folder.rglob("*") if path.is_file() and path not in kept)
    return publisher.commit(*rest).as_dict()


def answer(action: str, token: str | None = None, delete: bool = False, **call: Any) -> Any:
    """Makes one call."""
    if action == "api":
        made = getattr(HfApi(token=token), call.pop("method"))(**call)
        return [str(item) for item in made] if isinstance(made, list) else str(made)
    if action == "download":
        return snapshot_download(call["repo_id"], token=token, revision=call.get("revision"))
    folder, seen = Path(call.pop("folder")), list[Event]()
    options = PushOptions(**call)
    if action == "send":
        return send(folder, options, token)
    if action == "finish":
        pushed = finish(folder, options, token, seen)
    elif action == "push":
        pushed = push(folder, options, token=token, listener=seen.append).as_dict()
    else:
        pushed = publish(folder, options, token, delete, seen)
    return {**pushed, "events": [[type(event).__name__, asdict(event)] for event in seen]}


def refusal_or_answer(call: dict[str, Any] | list[dict[str, Any]]) -> Any:
    """Makes one call, or several after each other."""
    if isinstance(call, list):
        return [refusal_or_answer(step) for step in call]
    try:
        return answer(**call)
    except HcsmoeError as error:
        return {"refused": type(error).__name__, "message": error.message, "hint": error.hint}


def main() -> None:
    calls = json.load(sys.stdin)
    # Our own pauses; those of the client are a second and more.
    retry.PAUSES_SECONDS = (0.05,) * 4
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = dict(zip(calls, pool.map(refusal_or_answer, calls.values()), strict=True))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
