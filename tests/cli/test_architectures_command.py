"""``hcsmoe architectures``: what is supported, and why the rest is not."""

from hcsmoe_hub.model.architectures import ARCHITECTURES


def test_every_architecture_has_a_line(run):
    result = run("architectures")
    assert (result.code, result.stderr) == (0, "")
    title, *lines = result.stdout.splitlines()
    assert title.split() == ["MODEL", "TYPE", "SUPPORTED", "ROUTER", "NOTE"]
    assert [line.split()[:2] for line in lines] == [
        [name, "no" if architecture.refusal else "yes"] for name, architecture in ARCHITECTURES.items()
    ]


def test_refusal_is_explained(run):
    (line,) = [line for line in run("architectures").stdout.splitlines() if line.startswith("jetmoe ")]
    assert ARCHITECTURES["jetmoe"].refusal in line


def test_document_lists_every_architecture(run):
    result = run("architectures", "--json")
    assert (result.code, result.stderr, result.stdout.count("\n")) == (0, "", 1)
    rows = {row.pop("model_type"): row for row in result.document()}
    assert rows.keys() == ARCHITECTURES.keys()
    assert rows["mixtral"] == {
        "supported": True,
        "router": "softmax over all experts, then top-k, renormalised",
        "note": None,
        "refusal": None,
    }
    assert rows["doge"]["supported"] is False
    assert rows["doge"]["refusal"]
