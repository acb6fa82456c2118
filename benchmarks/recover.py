"""What ``hcsmoe recover`` brings in a number of minutes, from three starts: a default result, HC-SMoE's, and REAP's.

Run: python benchmarks/recover.py MODEL=EXPERTS ... --data FILE --test FILE [--minutes 10] [--starts NAME ...]
         [--option NAME=VALUE ...] [--work FOLDER] [--json FILE]

Every model is converted to so many experts on the text of DATA, and then trained on it; TEST is scored before and
after, and nothing else is done with it. OPTION is a field of ``RecoverOptions`` with a JSON value; without any, it is
``sequence_length=256``. Converted results are kept in the folder of ``--work`` and used again. Rows that are in the
file already stay if they are not measured again; all of them are printed as a Markdown table.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from hcsmoe_hub import CalibrationOptions, ConvertOptions, EvaluateOptions, MethodOptions, convert, evaluate
from hcsmoe_hub.cli.libraries import prepare_libraries
from hcsmoe_hub.machine.versions import installed_versions
from hcsmoe_hub.options import Preset
from hcsmoe_hub.recover import recover
from hcsmoe_hub.recovery.options import RecoverOptions

STARTS = {
    "default": MethodOptions(),
    "HC-SMoE": MethodOptions(preset=Preset.HC_SMOE),
    "REAP": MethodOptions(preset=Preset.REAP),
}


def test_perplexity(model: Path, text: Path) -> float:
    """Perplexity of a checkpoint on text that nothing was fitted to."""
    with tempfile.TemporaryDirectory() as folder:
        document, _ = evaluate(model, EvaluateOptions(perplexity=text, output=Path(folder) / "scores.json"))
    found: float = document["measures"]["perplexity"]["model"]["overall"]["perplexity"]
    return found


def converted(model: Path, experts: int, start: str, arguments: argparse.Namespace) -> Path:
    """The result that a recovery begins with; made once."""
    folder = Path(arguments.work, f"{model.name}-{experts}-{start}")
    if not (folder / "config.json").exists():
        calibration = CalibrationOptions(dataset=str(arguments.data))
        options = ConvertOptions(experts=experts, method=STARTS[start], calibration=calibration, output=folder)
        convert(model, options)
    return folder


def measure(model: Path, experts: int, start: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Recovers once, and scores it before and after."""
    result = converted(model, experts, start, arguments)
    given = {name: json.loads(value) for name, _, value in (each.partition("=") for each in arguments.option)}
    with tempfile.TemporaryDirectory() as folder:
        options = RecoverOptions(
            teacher=model,
            data=str(arguments.data),
            output=Path(folder) / "recovered",
            **({"max_minutes": arguments.minutes} | given),
        )
        record = recover(result, options).record
        after = test_perplexity(options.output or result, arguments.test)
    return {
        "model": model.name,
        "experts": experts,
        "start": start,
        "minutes": arguments.minutes,
        "test_source": test_perplexity(model, arguments.test),
        "test_before": test_perplexity(result, arguments.test),
        "test_after": after,
        "held_out_before": record["before"],
        "held_out_after": record["after"],
        **{name: record[name] for name in ("kept_step", "steps", "tokens", "seconds", "stopped")},  # type: ignore[literal-required]
        "settings": record["settings"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; perplexities on the test text, held-out ones in brackets."""
    lines = [
        "| model | start | source | before | after | regained | kept step | tokens | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lost = row["test_before"] - row["test_source"]
        regained = (row["test_before"] - row["test_after"]) / lost if lost > 0 else 0.0
        before, after = (row[f"held_out_{when}"]["perplexity"] for when in ("before", "after"))
        lines.append(
            f"| {row['model']}, {row['experts']} experts | {row['start']} | {row['test_source']:.2f} "
            f"| {row['test_before']:.2f} ({before:.2f}) | {row['test_after']:.2f} ({after:.2f}) | {regained:.0%} "
            f"| {row['kept_step']} of {row['steps']} | {row['tokens'] / 1000:.0f} k | {row['seconds'] / 60:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL=EXPERTS")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--option", nargs="+", default=["sequence_length=256"], metavar="NAME=VALUE")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "hcsmoe-recover")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    prepare_libraries()
    found = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else {}
    for each in arguments.models:
        model, _, experts = each.rpartition("=")
        for start in arguments.starts:
            row = measure(Path(model), int(experts), start, arguments)
            found[f"{row['model']} {row['experts']} {start}"] = row
            print(json.dumps(row), flush=True)
            content = {"cores": os.cpu_count(), "versions": installed_versions(), "rows": found}
            arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    print(table(list(found.values())))


if __name__ == "__main__":
    main()
