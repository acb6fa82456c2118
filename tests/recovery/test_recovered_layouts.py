"""Recoveries of results that bring a modelling file."""

import shutil
from pathlib import Path

import pytest
from recovered import run
from tiny_models import differing, read_tensors

from hcsmoe_hub.errors import UnsupportedModelError
from hcsmoe_hub.result.verify import check_structure

pytestmark = pytest.mark.usefixtures("one_thread")


def own(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "own")
    return tmp_path / "own" / "model"


@pytest.mark.parametrize("layout", ["mapped", "factored"])
def test_results_with_a_modelling_file_are_recovered(layout, tmp_path, request):
    source = own(request.getfixturevalue(f"made_{layout}"), tmp_path)
    report = run(source)
    assert report.is_better
    result = source.parent / "result"
    found, before = read_tensors(report.output), read_tensors(result)
    assert found.keys() == before.keys()
    assert any(".experts." in name for name in differing(found, before))
    code = f"modeling_hcsmoe{'_factored' if layout == 'factored' else ''}.py"
    assert (report.output / code).read_bytes() == (result / code).read_bytes()
    check_structure(report.output)


def test_lora_works_on_a_mapped_result(made_mapped, tmp_path):
    report = run(own(made_mapped, tmp_path), train="lora")
    assert report.is_better
    check_structure(report.output)


def test_lora_on_factors_is_refused(made_factored, tmp_path):
    with pytest.raises(UnsupportedModelError, match="factors already"):
        run(own(made_factored, tmp_path), train="lora")
