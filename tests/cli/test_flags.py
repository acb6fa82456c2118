"""Messages of the library name fields; the command line shows its options in their place."""

from dataclasses import fields
from typing import Any

import pytest
from typer.main import get_command

from hcsmoe_hub.cli.app import app
from hcsmoe_hub.cli.flags import flag, with_flags
from hcsmoe_hub.options import CalibrationOptions, ConvertOptions, MethodOptions, Target


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("`linkage='ward'` would have no effect", "--linkage ward would have no effect"),
        ("leave `max_cluster_size` out", "leave --max-cluster-size out"),
        ("use `experts=4` or more", "use --experts 4 or more"),
        ("add `overwrite=True`", "add --overwrite"),
        ("pass token ids with `dataset='IDS.npy'`", "pass token ids with --calibration IDS.npy"),
        ("raise `max_memory`", "raise --max-memory"),
        ("such as `dominant_weights=(2, 1)`", "such as --dominant-weights 2,1"),
        ("pass another `token` or `cache_dir`", "pass another --token or --cache-dir"),
        ("`similarity='weight+router-logits'` names", "--similarity weight+router-logits names"),
        ("see `config.json`, `from_pretrained` and ` code `", "see `config.json`, `from_pretrained` and ` code `"),
        ("without any", "without any"),
    ],
)
def test_a_field_is_shown_as_its_option(text: str, typed: str) -> None:
    assert with_flags(text) == typed


def test_every_field_of_a_conversion_has_an_option_of_the_command() -> None:
    declared = {word for parameter in get_command(app).commands["convert"].params for word in parameter.opts}
    kinds = (MethodOptions, CalibrationOptions, ConvertOptions, Target)
    # A target is one of the options that stand for its own fields.
    named = {field.name for kind in kinds for field in fields(kind)} - {"target"}
    assert {flag(name) for name in named} - declared == set()


def test_the_command_line_prints_its_options(run: Any, example: Any) -> None:
    result = run("convert", example, "--experts", "4", "--method", "prune", "--linkage", "ward", "--dry-run")
    assert result.code == 1
    assert result.stderr == (
        "Error: --linkage ward would have no effect: only hierarchical clustering has a linkage.\n"
        "Hint: leave --linkage out\n"
    )


def test_warnings_print_options_too(run: Any, example: Any) -> None:
    result = run("convert", example, "--experts", "8", "--dry-run")
    assert "Warning: --experts 8 keeps all that the model has; the result will not be smaller.\n" in result.stderr
