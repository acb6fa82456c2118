"""Does what tests ask for in a process that has the pretended accelerator: one request, and one answer, per line.

{"do": "convert", "case": "hc-smoe"}
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CONVERSIONS, MISTAKES, SCARCE
from held_out_text import held_out_ids, hold_out
from plant import planted
from pretended import CAPACITY, Counts, switch_on
from quantized_models import BUILDERS
from rules import Rules
from tiny_models import VOCABULARY, build, read_tensors
from torch.nn.attention import SDPBackend, sdpa_kernel

import hcsmoe_hub.layer.deviation
from hcsmoe_hub import CalibrationOptions, ConvertOptions, CurveOptions, EvaluateOptions, MethodOptions, convert, curve
from hcsmoe_hub.errors import HcsmoeError
from hcsmoe_hub.evaluation.evaluate import evaluate
from hcsmoe_hub.report import ConversionReport

DEVICES = ("cpu", "cuda")


class Worker:
    """Sources, results and the device.

    Args:
        folder: A folder of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.device = switch_on()
        self._folder = folder
        self._results = 0
        self._on_host: dict[str, tuple[list[Any], Path]] = {}
        # Of token ids nothing is held out otherwise.
        patch = pytest.MonkeyPatch()
        hold_out(patch, held_out_ids())
        # The device says that it does not multiply bfloat16.
        patch.setattr(torch.cpu, "get_capabilities", dict)
        # Of so few tokens all would be compared otherwise.
        patch.setattr(hcsmoe_hub.layer.deviation, "LEAST_TOKENS", 32)

    # Sources

    def _source(self, name: str) -> Path:
        folder = self._folder / name
        if not folder.exists():
            if name in BUILDERS:
                BUILDERS[name](folder)
            elif name == "one-layer":
                build(folder, dtype=torch.bfloat16, num_hidden_layers=1)
            else:
                build(folder, {"mixtral": "mixtral", "qwen": "qwen3_moe"}[name], dtype=torch.bfloat16)
        return folder

    def _ids(self, sequences: int, length: int) -> Path:
        file = self._folder / f"ids-{sequences}-{length}.npy"
        if not file.exists():
            np.save(file, np.random.default_rng(0).integers(3, VOCABULARY, (sequences, length)))
        return file

    def _options(self, device: str, case: Mapping[str, Any]) -> ConvertOptions:
        method = dict(case)
        self._results += 1
        file = self._ids(16, 16) if method.pop("square", False) else self._ids(8, 16)
        calibration = CalibrationOptions(dataset=str(file), feature_tokens=64)
        outer: dict[str, Any] = {"experts": method.pop("experts", 4), "expert_width": method.pop("expert_width", None)}
        kept = method.pop("statistics", None)
        if kept is not None:
            # What is reused was written on the host.
            outer["statistics"] = self._folder / (f"statistics-{device}" if kept == "written" else "statistics-cpu")
            if kept == "written":
                outer["statistics"].unlink(missing_ok=True)
            elif outer["statistics"].exists():
                calibration = CalibrationOptions()
        return ConvertOptions(
            method=MethodOptions(**method),
            calibration=calibration,
            device=device,
            batch_tokens=64,
            output=self._folder / f"result-{self._results}",
            **outer,
        )

    @staticmethod
    def _labels(report: ConversionReport) -> list[Any]:
        return [layer["labels"] for layer in report.as_dict()["layers"]]

    def _convert(
        self, source: str, device: str, case: Mapping[str, Any], *, room: int | None = None
    ) -> tuple[list[Any], Path]:
        options = self._options(device, case)
        if room is not None:
            options = replace(options, max_memory={"cuda": room})
        assert options.output is not None
        # One kernel of attention on both sides.
        with sdpa_kernel(SDPBackend.MATH):
            report = convert(self._source(source), options)
        return self._labels(report), options.output

    # Answers

    def rules(self) -> list[str]:
        """The rules of the device that do not hold."""
        return Rules(self.device).broken()

    def convert(self, case: str) -> dict[str, Any]:
        """Converts on both sides and compares labels and weights."""
        source, options = CONVERSIONS[case]
        labels, folder = self._convert(source, "cpu", options)
        with Counts(self.device) as counts:
            our_labels, our_folder = self._convert(source, "cuda", options)
        ours, host = read_tensors(our_folder), read_tensors(folder)
        return {
            "names": sorted(ours) == sorted(host),
            "labels": our_labels == labels,
            "furthest": max(self._distance(ours[name], host[name]) for name in host),
            "launches": counts.launches,
            "lines": counts.lines(),
        }

    @staticmethod
    def _distance(ours: torch.Tensor, host: torch.Tensor) -> float:
        """How far two tensors are apart, relative to the second."""
        if torch.equal(ours.view(torch.uint8), host.view(torch.uint8)):
            return 0.0
        return float((ours.double() - host.double()).norm() / host.double().norm())

    def evaluate(self, *, stream: bool) -> dict[str, list[float]]:
        """All figures of an evaluation, on either side."""
        text, choices = self._folder / "text.jsonl", self._folder / "choices.jsonl"
        words = ["the cat sat on the mat", "a dog ran after it", "and nobody came"]
        lines = [{"text": " ".join(words * 3), "domain": "cats"}, {"text": " ".join(reversed(words)), "domain": "dogs"}]
        text.write_text("".join(json.dumps(line) + "\n" for line in lines))
        question = {"context": "the cat sat on", "choices": [" the mat", " a dog"], "gold": 0, "domain": "cats"}
        choices.write_text(json.dumps(question) + "\n")
        return {device: self._evaluated(device, stream, text, choices) for device in DEVICES}

    def _evaluated(self, device: str, stream: bool, text: Path, choices: Path) -> list[float]:
        example = Path(__file__).parents[2] / "examples" / "tiny-mixtral"
        output = self._folder / f"evaluation-{device}-{stream}.json"
        options = EvaluateOptions(
            base=example,
            perplexity=text,
            choices=choices,
            generate=1,
            window=32,
            device=device,
            stream=stream,
            output=output,
        )
        evaluate(example, options)
        return self._figures(json.loads(output.read_text()))

    def _figures(self, value: Any) -> list[float]:
        """All numbers of a document but times."""
        if isinstance(value, dict):
            parts = [item for name, item in sorted(value.items()) if "second" not in name]
            return [figure for item in parts for figure in self._figures(item)]
        if isinstance(value, list):
            return [figure for item in value for figure in self._figures(item)]
        return [value] if isinstance(value, float) else []

    def curve(self) -> dict[str, list[float]]:
        """All figures of a curve, on either side."""
        calibration = CalibrationOptions(dataset=str(self._ids(8, 16)))
        found = {}
        for device in DEVICES:
            options = CurveOptions(
                experts=(4, 8), expert_width=("50%", "100%"), calibration=calibration, device=device, batch_tokens=64
            )
            found[device] = self._figures(curve(self._source("mixtral"), options).as_dict())
        return found

    def mistake(self, name: str) -> str:
        """Where a conversion fails that has a mistake planted: ``file:line: message``."""
        function, right, wrong, _ = MISTAKES[name]
        with planted(function, right, wrong):
            try:
                self._convert("mixtral", "cuda", {"preset": "hc-smoe"})
            except RuntimeError as error:
                ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "hcsmoe_hub" in frame.filename]
                place = f"{ours[-1].filename.rpartition('hcsmoe_hub/')[2]}:{ours[-1].lineno}"
                return f"{place}: {str(error).splitlines()[0]}"
        return "nothing failed"

    # Scarce memory

    def allocations(self, recipe: str) -> dict[str, int]:
        """How many allocations a conversion of one layer makes, and the most that they take at once."""
        self._scarce(recipe, lambda: None)
        memory = self.device.memory()
        return {"allocations": memory["allocations"], "peak": memory["peak"]}

    def fail(self, recipe: str, allocation: int) -> str:
        """What becomes of a conversion whose n-th allocation fails."""
        return self._scarce(recipe, lambda: self.device.fail_at(allocation))

    def limit(self, recipe: str, capacity: int) -> str:
        """What becomes of a conversion on a device of some bytes."""
        return self._scarce(recipe, lambda: self.device.limit(capacity))

    def _scarce(self, recipe: str, restrict: Callable[[], None]) -> str:
        if recipe not in self._on_host:
            self._on_host[recipe] = self._convert("one-layer", "cpu", SCARCE[recipe])
        self.device.reset(True)
        restrict()
        try:
            # The user's word that there is enough, which there is not.
            labels, _ = self._convert("one-layer", "cuda", SCARCE[recipe], room=CAPACITY)
        except HcsmoeError as error:
            return f"message: {error.message} | {error.hint}"
        except RuntimeError as error:
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "hcsmoe_hub" in frame.filename]
            place = f"{ours[-1].filename.rpartition('hcsmoe_hub/')[2]}:{ours[-1].lineno}"
            return f"{type(error).__name__} at {place}: {str(error).splitlines()[0]}"
        finally:
            self.device.fail_at(0)
            self.device.limit(CAPACITY)
        return "done" if labels == self._on_host[recipe][0] else "other labels"


def main() -> None:
    """Answers until there is nothing more to read."""
    # What libraries print must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder))
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = {"answer": getattr(worker, request.pop("do"))(**request)}
            except (HcsmoeError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
                answer = {"failure": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
