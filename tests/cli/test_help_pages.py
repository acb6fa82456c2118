"""Help answers at once, and names everything that scripts may depend on."""

import subprocess
import sys
from importlib.metadata import entry_points
from typing import get_args, get_type_hints

import pytest

from hcsmoe_hub.cli.method_options import MethodFlags
from hcsmoe_hub.options import Clustering, Merge, Method, MethodOptions, Refit
from hcsmoe_hub.recipe.resolve import resolve

OPTIONS = {
    "convert": (
        "--experts -e --experts-per-token --method --budget --layers --protect --router --layout --clustering "
        "--similarity --distance --linkage --kmeans-start --dominant --max-cluster-size --merge --dominant-weights "
        "--align --features --saliency --calibration --samples --sequence-length --seed --text-column "
        "--feature-tokens --statistics --device --batch-tokens --max-memory --output -o --max-shard-size --figure "
        "--overwrite --dry-run --json --quiet -q --push-to --private --create-pr --low-disk --revision --token "
        "--cache-dir"
    ),
    "inspect": "--layer --json --revision --token --cache-dir",
    "verify": "--against --json --revision --token --cache-dir",
    "architectures": "--json",
}
HEAVY = {"torch", "transformers", "datasets", "huggingface_hub", "numpy", "scipy"}


def test_help_imports_no_heavy_library():
    code = (
        "import sys\n"
        "from hcsmoe_hub.cli import main\n"
        "sys.argv = ['hcsmoe', 'convert', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        f"print('heavy:', sorted({HEAVY} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_root_help_lists_every_command(run):
    result = run("--help")
    assert result.code == 0
    assert all(command in result.stdout for command in OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_help_page_lists_every_option_of_the_contract(run, command):
    words = run(command, "-h").stdout.replace(",", " ").split()
    assert [option for option in OPTIONS[command].split() if option not in words] == []


@pytest.mark.parametrize(
    "panel", ["Method", "Grouping", "Merging", "Pruning", "Calibration", "Compute", "Output", "Hub"]
)
def test_convert_help_groups_options_in_panels(run, panel):
    assert f"─ {panel} ─" in run("convert", "--help").stdout


def test_convert_help_shows_choices_and_defaults(run):
    page = run("convert", "--help").stdout
    assert "[average|single|complete|ward]" in page
    assert "[default: (refit; hc-smoe with options of grouping or merging)]" in page
    assert "[default: (the preset's)]" in page
    assert "[default: (hierarchical)]" in page
    assert "./NAME-hcsmoe-Ke" in page


@pytest.mark.parametrize(
    ("name", "asked", "default"),
    [
        ("budget", {}, "uniform"),
        ("layout", {}, "reduced"),
        ("propagate", {"refit": Refit.EXPERTS}, "original"),
        ("clustering", {}, "hierarchical"),
        ("similarity", {}, "expert-output"),
        ("distance", {}, "euclidean"),
        ("distance", {"clustering": Clustering.SINGLE_SHOT}, "cosine if single-shot"),
        ("linkage", {}, "average"),
        ("kmeans_start", {"clustering": Clustering.KMEANS}, "k-means++"),
        ("dominant", {}, "usage"),
        ("dominant", {"merge": Merge.FIX_DOM}, "center if the merge follows one"),
        ("merge", {}, "frequency"),
        ("merge", {"clustering": Clustering.FUZZY}, "membership if fuzzy"),
        ("align", {}, "none"),
        ("features", {"merge": Merge.ZIPIT}, "activation"),
        ("saliency", {"method": Method.PRUNE}, "reap"),
        ("router", {}, "dominant"),
        ("router", {"clustering": Clustering.FUZZY}, "membership if fuzzy"),
    ],
)
def test_defaults_in_words_are_those_that_the_library_takes(name, asked, default):
    _, option = get_args(get_type_hints(MethodFlags, include_extras=True)[name])
    assert default in option.show_default.split("; ")
    assert resolve(MethodOptions(**asked)).as_dict()[name] == default.split()[0]


def test_no_words_show_help_as_a_usage_error(run):
    result = run()
    assert result.code == 2
    assert "Usage: hcsmoe" in result.everything


def test_version_is_one_line_on_stdout(run):
    result = run("--version")
    assert (result.code, result.stderr) == (0, "")
    name, number = result.stdout.split()
    assert name == "hcsmoe"
    assert number[0].isdigit()


def test_completion_commands_are_left_out(run):
    assert "completion" not in run("--help").stdout


@pytest.mark.parametrize("script", ["hcsmoe", "hf-hcsmoe"])
def test_console_script_is_installed(script):
    (found,) = entry_points(group="console_scripts", name=script)
    assert found.value == "hcsmoe_hub.cli:main"


@pytest.mark.parametrize(("command", "extra"), [("convert", "plots"), ("evaluate", "eval")])
def test_help_names_the_extras_that_an_option_needs(run, command, extra):
    text = " ".join(run(command, "--help").stdout.replace("│", " ").split())
    assert f"hcsmoe[{extra}]" in text
