"""``hcsmoe architectures``: what is supported, and why the rest is not."""

from places import ROOT

from hcsmoe_hub.model.architectures import ARCHITECTURES, FAMILIES


def test_every_architecture_has_a_line(run):
    result = run("architectures")
    assert (result.code, result.stderr) == (0, "")
    title, *lines = result.stdout.splitlines()
    assert title.split() == ["MODEL", "TYPE", "SUPPORTED", "WIDTH", "EXAMPLE", "ROUTER", "NOTE"]
    assert [line.split()[:4] for line in lines] == [
        [family.model_type, "no" if family.refusal else "yes", family.width or "fixed", family.example]
        for family in FAMILIES
    ]


def test_architectures_are_listed_by_the_model_types_that_are_published(run):
    listed = {line.split()[0] for line in run("architectures").stdout.splitlines()}
    assert {"llama4", "gemma4", "mistral3", "aria", "qwen3_vl_moe", "glm4v_moe", "kimi_k2"} <= listed
    assert not [name for name in listed if name.endswith("_text")]


def test_language_models_within_others_are_found_by_their_own_type():
    for family in FAMILIES:
        assert ARCHITECTURES[family.model_type] is family
        assert ARCHITECTURES[family.language_model].router == family.router


def test_refusal_is_explained(run):
    (line,) = [line for line in run("architectures").stdout.splitlines() if line.startswith("jetmoe ")]
    assert ARCHITECTURES["jetmoe"].refusal in line


def test_document_lists_every_architecture(run):
    result = run("architectures", "--json")
    assert (result.code, result.stderr, result.stdout.count("\n")) == (0, "", 1)
    rows = {row.pop("model_type"): row for row in result.document()}
    assert list(rows) == [family.model_type for family in FAMILIES]
    assert rows["llama4"] == {
        "text_type": "llama4_text",
        "example": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        "supported": True,
        "width": None,
        "router": "top-k of the logits, then sigmoid",
        "note": "the router weight multiplies the expert's input",
        "refusal": None,
    }
    assert rows["mixtral"]["text_type"] is None
    assert (rows["mixtral"]["width"], rows["deepseek_v3"]["width"]) == ("any", "divisors")
    assert rows["doge"]["supported"] is False
    assert rows["doge"]["refusal"]


def test_the_documentation_lists_the_same_architectures():
    page = (ROOT / "docs" / "architectures.md").read_text("utf-8")
    _, *rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.strip("| ").split(" | ") for row in rows] == [
        [f"`{family.model_type}`", f"`{family.example}`", family.width or "fixed", family.refusal or family.router]
        for family in FAMILIES
    ]
