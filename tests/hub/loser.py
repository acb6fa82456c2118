"""Plans a conversion from a full cache, deletes the cache, converts, and prints what the result has."""

import shutil
import sys
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from hcsmoe_hub import CalibrationOptions, ConvertOptions, execute
from hcsmoe_hub import plan as plan_conversion

if __name__ == "__main__":
    repo_id, ids, output = sys.argv[1:]
    snapshot_download(repo_id)
    options = ConvertOptions(experts=4, calibration=CalibrationOptions(dataset=ids), output=Path(output))
    plan = plan_conversion(repo_id, options)
    shutil.rmtree(constants.HF_HUB_CACHE)
    report = execute(plan)
    print(report.experts["after"], "experts")
