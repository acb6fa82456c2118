"""Plans that the loopback Hub must lead to a refusal of, each with what its message and its hint must say."""

from collections.abc import Mapping

from hub_client import BROKEN, EXPIRED, OPENER, STRANGER, Call, plan
from places import EXAMPLE

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARD_BYTES = sum((EXAMPLE / shard).stat().st_size for shard in SHARDS)
LAST_SHARD = (EXAMPLE / SHARDS[1]).read_bytes()
CUT = 1000

# The call, what its message must say, and what its hint must say.
REFUSALS: Mapping[str, tuple[Call, str, str]] = {
    "unknown repository": (
        plan("org/unknown"),
        "neither a local folder nor a Hub repository named org/unknown was found",
        "spelling",
    ),
    "unknown repository with a token": (plan("org/unknown", token=OPENER), "this login cannot read it", "spelling"),
    "private without a token": (plan("org/private"), "it is private and you are not logged in", "pass `token`"),
    "private to this token": (
        plan("org/private", token=STRANGER),
        "is private and this login cannot read it",
        "pass a `token`",
    ),
    "gated without a token": (plan("org/gated"), "org/gated is gated and you are not logged in", "run 'hf auth login'"),
    "gated for this token": (
        plan("org/gated", token=STRANGER),
        "this login does not have access",
        "co/org/gated, or pass",
    ),
    "expired token": (plan("org/tiny", token=EXPIRED), "refused the access token for org/tiny", "hf auth login"),
    "broken token": (plan("org/tiny", token=BROKEN), "contains invalid characters", "copy it again"),
    "disabled": (plan("org/disabled"), "org/disabled was disabled on the Hub", "another copy"),
    "failing server": (plan("org/failing"), "refused a request for org/failing: 500 Internal", "try again later"),
    "unknown branch": (plan("org/tiny", revision="v9"), "org/tiny has no revision v9", "org/tiny/tree/main"),
    "unknown commit": (plan("org/tiny", revision="0" * 40), f"org/tiny has no revision {'0' * 40}", "drop `revision`"),
    "two revisions": (plan("hf://org/tiny@main", revision="v1"), "two revisions were given: main and v1", "keep one"),
    "invalid id": (plan("org/two words"), "'org/two words' is neither a local folder nor a valid", "org/name"),
    "invalid uri": (plan("hf://org/name/config.json"), "'org/name/config.json' is neither", "org/name"),
    "only pickles": (plan("org/bin-only"), "holds only pytorch_model.bin", "org/bin-only/discussions"),
    "only a GGUF file": (plan("org/gguf-only"), "has no config.json, only model.Q4.gguf", "that holds config.json"),
    "no config": (
        plan("org/bare"),
        "org/bare has no config.json, so it is not a transformers",
        "that holds config.json",
    ),
    "an address of a dataset": (
        plan("https://huggingface.co/datasets/org/elsewhere"),
        "org/elsewhere is a dataset on the Hub, not a model",
        "id of a model",
    ),
    "an address of a user": (
        plan("https://huggingface.co/org"),
        "https://huggingface.co/org is not the address of a repository",
        "org/name",
    ),
    "an address of another site": (
        plan("https://example.com/org/tiny"),
        "Unrecognized host 'example.com'",
        "org/name",
    ),
    "an address to clone from": (
        plan("git@hf.co:org/tiny.git"),
        "git@hf.co:org/tiny.git is not the address of a repository",
        "org/name",
    ),
    "an address of a folder": (
        plan("https://huggingface.co/org/tiny/tree/main/onnx"),
        "is the folder onnx of org/tiny, but hcsmoe reads whole repositories",
        "`revision`",
    ),
    "an address and a revision": (
        plan("https://huggingface.co/org/tiny/tree/main", revision="v2"),
        "two revisions were given: main and v2",
        "keep one",
    ),
    "a gap": (
        plan("org/gap"),
        f"org/gap lacks 1 of 2 shards, by the names of the others: {SHARDS[1]}",
        "the owners",
    ),
    "a pointer": (plan("org/pointer"), f"{SHARDS[1]} is a Git LFS pointer for 2727464 bytes", "hf download"),
    "a dataset": (plan("org/texts"), "org/texts is a dataset on the Hub, not a model", "id of a model"),
    "lost shard": (plan("org/lost-shard"), f"lacks 1 of 2 shards that its index lists: {SHARDS[1]}", "the owners"),
    "outside": (plan("org/outside"), "lists the file '../../x.safetensors', which is outside", "hostile"),
    "truncated": (
        plan("org/truncated"),
        f"{len(LAST_SHARD) - CUT} bytes long, but its header describes",
        "shard again",
    ),
    "unusable cache": (plan("org/tiny", cache_dir="file/cache"), "org/tiny cannot be downloaded", "`cache_dir`"),
}
