"""A dry run starts fast: libraries that it does not need are not imported."""

import subprocess
import sys

from places import ROOT

UNNEEDED = {"datasets", "pyarrow", "pandas", "sklearn", "matplotlib", "lm_eval", "torch.utils.tensorboard"}


def test_a_dry_run_imports_no_library_for_text_figures_or_evaluation() -> None:
    code = (
        "import sys\n"
        "from hcsmoe_hub.cli.app import app\n"
        "try:\n"
        f"    app(['convert', {str(ROOT / 'examples' / 'tiny-mixtral')!r}, '--experts', '4', '--dry-run', '-q'])\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('unneeded:', sorted({UNNEEDED} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "unneeded: []" in done.stdout, done.stdout + done.stderr
