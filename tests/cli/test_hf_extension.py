"""``hf hcsmoe``: the client's own command finds this program once it is installed as an extension."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(sys.executable).parent
# What ``hf extensions install`` leaves behind, but for the environment of its own that it makes.
INSTALL = """
import sys
from datetime import datetime, timezone

from huggingface_hub.cli.extensions import ExtensionManifest, _get_extension_dir

manifest = ExtensionManifest(
    owner="acme",
    repo="hf-hcsmoe",
    repo_id="acme/hf-hcsmoe",
    short_name="hcsmoe",
    executable_path=sys.argv[1],
    type="python",
    installed_at=datetime.now(timezone.utc),
)
manifest.save(_get_extension_dir("hcsmoe"))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A home in which the extension is installed."""
    home = tmp_path_factory.mktemp("home")
    variables = {**os.environ, "HOME": str(home), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    subprocess.run([sys.executable, "-c", INSTALL, SCRIPTS / "hf-hcsmoe"], env=variables, check=True)
    return variables


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPTS / "hf", *words], env=environment, capture_output=True, text=True, check=False)


def test_hf_runs_the_commands_of_the_extension(environment: dict[str, str]) -> None:
    found = run(environment, "hcsmoe", "--version")
    assert (found.returncode, found.stdout.split()[0]) == (0, "hcsmoe")


def test_hf_hands_on_arguments_and_exit_codes(environment: dict[str, str], tmp_path: Path) -> None:
    found = run(environment, "hcsmoe", "inspect", str(tmp_path / "nothing"))
    assert found.returncode == 1
    assert "there is no folder" in found.stderr
