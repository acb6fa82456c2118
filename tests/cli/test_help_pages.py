"""Help answers at once, fits its terminal, and names everything that scripts may depend on."""

import subprocess
import sys
from enum import StrEnum
from importlib.metadata import entry_points
from typing import get_args, get_type_hints

import pytest
import typer
from typer.core import TyperArgument

from hcsmoe_hub.cli.app import app
from hcsmoe_hub.cli.help_page import RARE_PANELS, one_of
from hcsmoe_hub.cli.method_options import MethodFlags
from hcsmoe_hub.options import Align, Clustering, Device, Merge, MethodOptions, Preset, Refit
from hcsmoe_hub.recipe.resolve import resolve

OPTIONS = {
    "convert": (
        "--experts -e --expert-width --experts-per-token --like --preset --method --refit --refit-passes --size "
        "--parameters --active --ratio --budget --layers --protect --router --layout --compress --propagate "
        "--clustering --similarity --distance --linkage --kmeans-start --dominant --max-cluster-size --merge "
        "--dominant-weights --align --align-to --features --saliency --calibration --samples --sequence-length "
        "--source-length --seed --text-column --feature-tokens --statistics --no-states --no-measure --device "
        "--batch-tokens --max-memory "
        "--output -o --dtype --max-shard-size --mtp --figure --overwrite --restart --no-checkpoint --dry-run "
        "--json --quiet -q --push-to --private --create-pr --low-disk --revision --token --cache-dir --help-methods "
        "--help -h"
    ),
    "curve": (
        "--experts -e --expert-width --measure-points --figure --json --quiet -q --calibration --samples "
        "--sequence-length --source-length --seed --text-column --feature-tokens --statistics --no-states "
        "--device --batch-tokens --max-memory --revision --token --cache-dir --help -h"
    ),
    "recover": (
        "--teacher --data --samples --sequence-length --source-length --text-column --held-out --train --lora-rank "
        "--temperature --kd-weight --text-weight --learning-rate --batch-size --gradient-accumulation "
        "--seed --max-steps --max-minutes --evaluate-every --patience --device --dtype --gradient-checkpointing "
        "--teacher-logits --top-logits --output -o --overwrite --restart --dry-run --json --quiet -q --token --help -h"
    ),
    "inspect": "--layer --json --revision --token --cache-dir --help -h",
    "verify": "--against --json --revision --token --cache-dir --help -h",
    "evaluate": (
        "--base --perplexity --choices --tasks --limit --generate --window --stream --device --output -o --json --cost "
        "--engine --prompt-tokens --new-tokens --repetitions --batch-sizes --no-timing --revision --token "
        "--cache-dir --help -h"
    ),
    "card": "--repo-id --overwrite --json --quiet -q --help -h",
    "push": "--private --create-pr --overwrite --revision --token --json --quiet -q --help -h",
    "architectures": "--json --help -h",
}
HEAVY = {"torch", "transformers", "datasets", "huggingface_hub", "numpy", "scipy"}
COMMANDS = typer.main.get_command(app).commands
# Words that print the whole page of a command.
PAGES = {name: (name, "--help-methods" if name == "convert" else "--help") for name in OPTIONS}
# A screen is 80 columns by 48 lines: a terminal that fills half the height of a common monitor.
SCREEN_COLUMNS, SCREEN_LINES = 80, 48
WIDTHS = (60, 80, 120)


def flat(page):
    """A page as one line; a word that was broken in the middle has a space there."""
    return " ".join(page.split())


def kinds(annotation):
    """The enums that an annotation speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        yield annotation
    for part in get_args(annotation):
        yield from kinds(part)


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
    words = run(*PAGES[command]).stdout.replace(",", " ").split()
    assert [option for option in OPTIONS[command].split() if option not in words] == []


@pytest.mark.parametrize("command", OPTIONS)
def test_contract_names_every_option(command):
    known = {name for parameter in COMMANDS[command].params for name in parameter.opts if name.startswith("-")}
    assert known - set(OPTIONS[command].split()) == ({"--correct"} if command == "convert" else set())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("words", [("--help",), ("convert", "--help"), *PAGES.values()], ids=" ".join)
def test_no_line_is_longer_than_the_terminal_is_wide(run, words, width):
    lines = run(*words, COLUMNS=str(width)).stdout.splitlines()
    assert [line for line in lines if len(line) > width] == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", OPTIONS)
def test_no_name_and_no_value_is_broken_in_the_middle(run, command, width):
    page = flat(run(*PAGES[command], COLUMNS=str(width)).stdout)
    for parameter in COMMANDS[command].params:
        if isinstance(parameter, TyperArgument):
            assert f"{parameter.metavar} {parameter.help}" in page
        elif not parameter.hidden:
            names = ", ".join(sorted(parameter.opts, key=len))
            assert flat(f"{names} {parameter.metavar} {parameter.help}") in page
            if isinstance(parameter.show_default, str):
                assert f"[default: {parameter.show_default}]" in page


def test_every_value_of_a_choice_is_in_the_help_of_its_option():
    for name, annotation in get_type_hints(MethodFlags, include_extras=True).items():
        declared, option = get_args(annotation)
        for kind in kinds(declared):
            if not option.hidden:
                words = option.help.replace(",", " ").replace(".", " ").split()
                assert [value for value in kind if value not in words] == [], name


@pytest.mark.parametrize("command", ["convert", "curve", "evaluate"])
def test_devices_are_those_that_the_library_knows(run, command):
    assert f"{one_of((*Device, 'cuda:N'))}." in flat(run(command, "--help").stdout)


@pytest.mark.parametrize("command", ["convert", "curve"])
def test_everyday_options_take_at_most_two_screens(run, command):
    page = run(command, "--help", COLUMNS=str(SCREEN_COLUMNS)).stdout
    assert len(page.splitlines()) <= 2 * SCREEN_LINES


@pytest.mark.parametrize("command", sorted(OPTIONS.keys() - {"convert", "curve", "recover"}))
def test_other_commands_take_one_screen(run, command):
    assert len(run(command, "--help", COLUMNS=str(SCREEN_COLUMNS)).stdout.splitlines()) <= SCREEN_LINES


def test_rare_panels_are_shown_when_asked_for(run):
    everyday, whole = (run("convert", flag) for flag in ("--help", "--help-methods"))
    assert (everyday.code, whole.code) == (0, 0)
    assert [panel for panel in RARE_PANELS if f"\n{panel}\n" in everyday.stdout] == []
    assert [panel for panel in RARE_PANELS if f"\n{panel}\n" not in whole.stdout] == []
    assert "--linkage" not in everyday.stdout
    assert "--help-methods" in everyday.stdout


@pytest.mark.parametrize("panel", ["Options", "Method", *RARE_PANELS, "Calibration", "Compute", "Output", "Hub"])
def test_convert_help_groups_options_in_panels(run, panel):
    assert f"\n{panel}\n  -" in run("convert", "--help-methods").stdout


def test_convert_help_shows_choices_and_defaults(run):
    page = flat(run("convert", "--help-methods").stdout)
    assert "average, single, complete, ward or loss (what a merge would lose). [default: loss; average" in page
    assert "[default: hc-refit; hc-smoe or reap with options of theirs]" in page
    assert "merge or prune. [default: the preset's]" in page
    assert "[default: ./NAME-hcsmoe-Ke]" in page
    assert "[env: HF_TOKEN]" in page


def test_a_command_that_is_too_long_for_its_line_can_still_be_copied(run):
    page = run("convert", "--help", COLUMNS="60").stdout
    assert "--experts 4 \\\n    --dry-run\n" in page


@pytest.mark.parametrize(
    ("name", "asked", "default"),
    [
        ("budget", {}, "uniform"),
        ("layout", {}, "reduced"),
        ("layout", {"compress": "32"}, "factored with --compress"),
        ("propagate", {"refit": Refit.DOWN}, "original with others"),
        ("propagate", {"preset": Preset.HC_REFIT}, "merged"),
        ("clustering", {}, "hierarchical"),
        ("similarity", {}, "expert-output with hc-smoe"),
        ("distance", {}, "euclidean with hc-smoe"),
        ("distance", {"clustering": Clustering.SINGLE_SHOT}, "cosine if single-shot"),
        ("linkage", {}, "average with hc-smoe"),
        ("linkage", {"preset": Preset.HC_REFIT}, "loss"),
        ("kmeans_start", {"clustering": Clustering.KMEANS}, "k-means++"),
        ("dominant", {}, "frequency with hc-smoe"),
        ("dominant", {"preset": Preset.HC_REFIT}, "saliency"),
        ("dominant", {"merge": Merge.FIX_DOM}, "center if the merge follows one"),
        ("merge", {}, "frequency with hc-smoe"),
        ("merge", {"preset": Preset.HC_REFIT}, "neurons"),
        ("merge", {"clustering": Clustering.FUZZY}, "membership if fuzzy"),
        ("align", {}, "none"),
        ("align_to", {"align": Align.WEIGHT}, "dominant"),
        ("align_to", {"preset": Preset.M_SMOE}, "first with m-smoe"),
        ("features", {"merge": Merge.ZIPIT}, "activation"),
        ("saliency", {"preset": Preset.REAP}, "reap"),
        ("router", {}, "dominant with hc-smoe"),
        ("router", {"preset": Preset.HC_REFIT}, "fit"),
        ("router", {"clustering": Clustering.FUZZY}, "membership if fuzzy"),
    ],
)
def test_defaults_in_words_are_those_that_the_library_takes(name, asked, default):
    _, option = get_args(get_type_hints(MethodFlags, include_extras=True)[name])
    assert default in option.show_default.split("; ")
    method = MethodOptions(**{"preset": Preset.HC_SMOE, **asked})
    assert resolve(method).as_dict()[name] == default.split()[0]


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
    assert f"hcsmoe[{extra}]" in run(command, "--help").stdout
