"""The section on quantising: formats that fit the shape, and commands for programs that are known to run the result."""

import ast
import json
import shlex
from typing import Any

import pytest

from hcsmoe_hub.model_cards.folder import read_card_data
from hcsmoe_hub.model_cards.render import render_body
from hcsmoe_hub.options import Layout, MethodOptions
from hcsmoe_hub.recipe.resolve import resolve


@pytest.fixture
def section(make_folder: Any) -> Any:
    """Makes the section on quantising of a result."""

    def make(**arguments: Any) -> str:
        card, _ = read_card_data(make_folder(**arguments), arguments.pop("repo_id", None))
        return render_body(card, "").partition("\n## Quantise next\n")[2].partition("\n## Quality\n")[0]

    return make


def test_wide_experts_take_every_format(section: Any) -> None:
    text = section()
    assert "Experts are 14336 neurons wide and the hidden size is 4096, so these formats fit as they are" in text
    assert "does not fit" not in text
    assert "llama-quantize mixtral-tiny-hcsmoe-4e.gguf mixtral-tiny-hcsmoe-4e-Q8_0.gguf Q8_0" in text
    assert "llama-quantize mixtral-tiny-hcsmoe-4e.gguf mixtral-tiny-hcsmoe-4e-Q4_K_M.gguf Q4_K_M" in text
    assert 'scheme="FP8_BLOCK"' in text
    assert (
        "mlx_lm.convert --hf-path mixtral-tiny-hcsmoe-4e --mlx-path mixtral-tiny-hcsmoe-4e-4bit -q --q-bits 4\n" in text
    )


def test_narrow_experts_take_other_commands_and_reasons_are_given(section: Any) -> None:
    counts = {"width_before": 14336, "width_after": 96}
    text = section(changes={"experts": counts}, config={"intermediate_size": 96})
    assert "| GGUF K-quants | expert width 96 is not a multiple of 256 | llama.cpp takes Q4_0 for Q2_K" in text
    assert "Q4_0.gguf Q4_0\n" in text
    assert "Q4_K_M" not in text
    assert 'scheme="FP8_DYNAMIC"' in text
    assert "-q --q-bits 4 --q-group-size 32\n" in text


def test_a_width_that_no_format_takes_has_no_commands(section: Any) -> None:
    text = section(config={"intermediate_size": 1001})
    assert "| NVFP4 | expert width 1001 is not a multiple of 16 |" in text
    assert "```" not in text


def test_commands_are_python_and_words_of_a_shell(section: Any) -> None:
    text = section(name="it's 4e")
    code = text.partition("```python\n")[2].partition("```")[0]
    assert ast.parse(code)
    assert json.dumps("it's 4e-FP8") in code
    (command,) = (line for line in text.splitlines() if line.startswith("mlx_lm.convert"))
    assert shlex.split(command)[2:5] == ["it's 4e", "--mlx-path", "it's 4e-4bit"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"files": ()},
        {"config": {"quantization_config": {"quant_method": "fp8"}}},
        {"config": {"hidden_size": None}},
        {"changes": {"source": {"model_type": "glm4_moe"}}},
        {"changes": {"method": resolve(MethodOptions(layout=Layout.MAPPED)).as_dict()}},
    ],
    ids=["no tokenizer", "quantised", "no hidden size", "unknown to other programs", "mapped"],
)
def test_there_is_no_section_where_nothing_is_known(section: Any, arguments: Any) -> None:
    assert section(**arguments) == ""
