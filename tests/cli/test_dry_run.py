"""``hcsmoe convert --dry-run``: what would be done and needed, from headers alone."""

import re

import pytest
from rich.console import Console

from hcsmoe_hub.cli import summary
from hcsmoe_hub.planning import room as planned_room

KEYS = {
    "dry_run",
    "source",
    "experts",
    "parameters",
    "weights_bytes",
    "needs",
    "available",
    "method",
    "calibration",
    "statistics",
    "output",
    "warnings",
    "dropped_tensors",
}


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """The working folder, with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_document_has_the_keys_of_the_contract_and_integers_for_bytes(run, measuring):
    result = run(*measuring, "--dry-run", "--json")
    document = result.document()
    assert result.code == 0
    assert document.keys() >= KEYS
    assert document["dry_run"] is True
    assert document["weights_bytes"] == {"before": 6170880, "after": 3807488}
    needs = document["needs"]
    assert all(isinstance(needs[key], int) for key in needs if key.endswith("_bytes"))
    assert needs["download_bytes"] == 0
    assert needs["seconds"] > 0


def test_document_agrees_with_the_conversion(run, measuring, converted):
    planned, (_, done) = run(*measuring, "--dry-run", "--json").document(), converted
    report = done.document()
    for key in ("experts", "parameters", "weights_bytes", "method"):
        assert planned[key] == report[key]
    assert planned["is_final"]
    assert "experts_by_layer" not in planned


def test_document_says_what_the_result_quantises_to_and_what_it_does_not(run, measuring):
    quantises = run(*measuring, "--dry-run", "--json").document()["quantises"]
    assert (quantises["expert_width"], quantises["hidden_size"]) == (192, 128)
    assert quantises["to"] == ["GGUF Q8_0 and Q4_0", "FP8 per channel", "MXFP4", "NVFP4", "MLX in groups of 64"]
    assert quantises["not_to"]["GGUF K-quants"].startswith("expert width 192 is not a multiple of 256")
    assert quantises["tensor_parallel"] == {"divides": [1, 2], "whole_tiles": []}
    assert quantises["expert_parallel"] == [1, 2, 4]


def test_person_sees_what_the_result_quantises_to_and_what_it_does_not(run, measuring, empty_folder):
    lines = " ".join(run(*measuring, "--dry-run").stdout.split())
    assert "quantises to GGUF Q8_0 and Q4_0, FP8 per channel, MXFP4, NVFP4, MLX in groups of 64" in lines
    assert "not to GGUF K-quants (expert width 192 is not a multiple of 256 and hidden size 128" in lines
    assert "serving 1 or 2 parts of an expert, not of 128 neurons or a multiple each, do not suit" in lines


def test_a_layout_that_only_transformers_loads_is_not_said_to_quantise(run, measuring):
    arguments = (*measuring, "--layout", "mapped", "--dry-run")
    assert run(*arguments, "--json").document()["quantises"] is None
    assert "quantises to" not in run(*arguments).stdout


def test_nothing_is_written(run, measuring, empty_folder):
    assert run(*measuring, "--dry-run").code == 0
    assert list(empty_folder.iterdir()) == []


def test_person_sees_sizes_needs_and_method(run, measuring, empty_folder):
    result = run(*measuring, "--dry-run")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0].endswith("examples/tiny-mixtral (mixtral, BF16, 4 MoE layers)")
    assert "experts per layer 8 4" in lines
    assert "parameters 3.09 M 1.90 M -38.3 %" in lines
    assert "shards 2 1" in lines
    assert "download nothing" in lines
    assert any(line.startswith("disk 3.8 MB ") and " free on /" in line for line in lines)
    assert any(line.startswith("memory ") and line.endswith(" available") for line in lines)
    assert "calibration bundled, 2 x 64 tokens, seed 42" in lines
    assert "output tiny-mixtral-hcsmoe-4e" in lines
    assert lines[-1] == "Nothing was downloaded or written."
    assert result.stderr == "Hint: drop --dry-run to convert\n"


def test_active_parameters_stay_but_for_the_router(run, measuring):
    document = run(*measuring, "--dry-run", "--json").document()
    active, layers, hidden_size = document["active_parameters"], 4, 128
    assert active["before"] - active["after"] == (8 - 4) * hidden_size * layers


def test_quiet_prints_the_path_that_would_be_written(run, measuring, empty_folder):
    result = run(*measuring, "--dry-run", "--quiet")
    assert (result.stdout, result.stderr) == ("tiny-mixtral-hcsmoe-4e\n", "")


@pytest.mark.parametrize("limits", [["1KB"], ["cpu=1KB", "cuda:0=40GB"]])
def test_plan_that_does_not_fit_is_a_known_failure(run, measuring, limits):
    words = [word for limit in limits for word in ("--max-memory", limit)]
    result = run(*measuring, "--dry-run", *words, "--json")
    assert (result.code, result.stdout) == (1, "")
    assert "--max-memory" in result.stderr


def test_a_plan_that_this_machine_has_no_room_for_is_shown_with_warnings(run, measuring, empty_folder, monkeypatch):
    monkeypatch.setattr(planned_room, "available_memory", lambda: 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    result = run(*measuring, "--dry-run")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert result.code == 0
    assert "parameters 3.09 M 1.90 M -38.3 %" in lines
    assert any(re.fullmatch(r"disk 3\.8 MB 1\.0 KB free on /\S*", line) for line in lines)
    disk, memory = result.stderr.splitlines()
    # Saved states are in the dtype that layers compute in.
    assert re.match(r"Warning: the result needs 4\.[14] MB, but ", disk)
    assert memory.startswith("Warning: the conversion needs about ")
    assert memory.endswith(" or set --max-memory above the estimate to start regardless.")
    document = run(*measuring, "--dry-run", "--json").document()
    assert [warning.partition(" needs ")[0] for warning in document["warnings"]] == ["the result", "the conversion"]
    assert document["available"]["disk_bytes"] == 1000
    assert run(*measuring).code == 1
    assert list(empty_folder.iterdir()) == []


def test_repository_device_download_and_dropped_tensors_are_shown(run, measuring, capsys):
    document = run(*measuring, "--dry-run", "--json").document()
    document["source"] |= {"repo_id": "org/model", "revision": "0123456789abcdef", "quantization": "mxfp4"}
    document["needs"] |= {"download_bytes": 93_400_000_000, "device_bytes": 6_200_000_000, "seconds": 400.0}
    document["dropped_tensors"] = {"mtp.0": "a prediction head", "mtp.1": "a prediction head"}
    room = {"disk": "/data", "disk_bytes": 10**12, "memory_bytes": 10**10}
    room |= {"device": "cuda:0", "device_bytes": 24 * 10**9}
    Console(width=200).print(summary.dry_run(document, room))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "org/model @ 0123456 (mixtral, mxfp4, 4 MoE layers)"
    assert "download 93.4 GB" in lines
    assert "device 6.2 GB 24.0 GB free on cuda:0" in lines
    assert "time about 6 min 40 s without the download" in lines
    assert "dropped 2 tensors: a prediction head" in lines


@pytest.mark.parametrize(("held", "words"), [(2_100_000_000, ", part of the download at a time"), (93_400_000_000, "")])
def test_disk_that_the_download_takes_is_shown(run, measuring, capsys, held, words):
    document = run(*measuring, "--dry-run", "--json").document()
    document["needs"] |= {"download_bytes": 93_400_000_000, "cache_bytes": held}
    room = {"disk": "/data", "disk_bytes": 10**12, "memory_bytes": 10**10, "cache": "/home", "cache_bytes": 10**11}
    Console(width=200).print(summary.dry_run(document, room))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"cache {held / 1e9:.1f} GB 100.0 GB free on /home{words}" in lines


def test_layers_that_differ_are_counted_one_by_one(run, measuring):
    words = ("--layout", "mapped", "--layers", "0,2-3")
    document = run(*measuring, "--dry-run", "--json", *words).document()
    assert document["experts"]["after"] == 4
    assert document["experts_by_layer"] == {"0": 4, "1": 8, "2": 4, "3": 4}
    assert document["method"]["layers"] == [0, 2, 3]
    lines = [" ".join(line.split()) for line in run(*measuring, "--dry-run", *words).stdout.splitlines()]
    assert "experts per layer 8 4 to 8 5.0 on average" in lines


@pytest.mark.parametrize(("layout", "stored"), [("mapped", 4), ("full", 8)])
def test_tokens_meet_as_many_parameters_where_the_router_keeps_its_rows(run, measuring, layout, stored):
    document = run(*measuring, "--dry-run", "--json", "--layout", layout).document()
    assert document["active_parameters"]["before"] == document["active_parameters"]["after"]
    # Three matrices of 128 x 192 for each of the experts that are gone from 4 layers.
    assert document["parameters"]["before"] - document["parameters"]["after"] == 4 * (8 - stored) * 3 * 128 * 192


def test_person_sees_that_a_budget_needs_statistics_first(run, measuring):
    result = run(*measuring, "--dry-run", "--layout", "mapped", "--budget", "frequency")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "experts per layer 8 4 on average" in lines
    (passes,) = [line for line in lines if line.startswith("passes ")]
    assert passes.endswith("so the weights are read again after the model has run")


def test_statistics_are_shown_before_and_after_they_exist(run, measuring, tmp_path):
    file = tmp_path / "model.stats"
    words = (*measuring, "--statistics", file, "--dry-run")
    planned = run(*words, "--json").document()
    assert planned["statistics"]["bytes"] == planned["needs"]["statistics_bytes"] > 0
    assert {key: planned["statistics"][key] for key in ("path", "reused")} == {"path": str(file), "reused": False}
    assert f"statistics {file}, will be written (" in " ".join(run(*words).stdout.split())
    small = run(*words, "--no-states", "--json").document()["statistics"]
    assert small["bytes"] < planned["statistics"]["bytes"]
    assert run(*measuring, "--statistics", file, "--output", tmp_path / "result", "--quiet").code == 0
    reused = {"path": str(file), "reused": True, "bytes": file.stat().st_size}
    assert run(*words, "--json").document()["statistics"] in ({**reused, "runs": "result"}, {**reused, "runs": None})
    assert re.search(rf"statistics {file} \(.*\), reused, ", " ".join(run(*words).stdout.split()))


def test_where_a_result_goes_is_shown_and_not_looked_up(run, example):
    words = ("convert", example, "--experts", "4", "--dry-run", "--push-to", "me/model-4e")
    assert re.search(r"push to +me/model-4e", run(*words).stdout)
    assert run(*words, "--json").document()["push_to"] == "me/model-4e"
    assert "does not name a user or an organization" in run(*words[:-1], "model-4e").stderr
