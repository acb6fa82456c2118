"""Converts a checkpoint with every preset in this process.

Run: python converted.py SOURCE IDS FOLDER [BATCH_TOKENS]; results are in ``FOLDER/PRESET/result``.
"""

import sys
from pathlib import Path

from hcsmoe_hub import CalibrationOptions, ConvertOptions, MethodOptions, convert
from hcsmoe_hub.cli.libraries import prepare_libraries
from hcsmoe_hub.options import Preset


def main() -> None:
    source, ids, folder, *batch = sys.argv[1:]
    prepare_libraries()
    for preset in Preset:
        options = ConvertOptions(
            experts=4,
            method=MethodOptions(preset=preset),
            calibration=CalibrationOptions(dataset=ids),
            output=Path(folder, preset, "result"),
            device="cpu",
            batch_tokens=int(batch[0]) if batch else None,
        )
        convert(source, options)


if __name__ == "__main__":
    main()
