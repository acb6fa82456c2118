"""Every command and every Python block of README and docs is run, against the loopback Hub where one names the Hub.

Repositories that the pages name are tiny models of the same architecture and number of experts. ``SOURCE`` and
``RESULT`` are folders of these names. Commands run in the order of their page, in one folder per page. What is changed:

- calibration takes 256 tokens where a command does not say how many (``docs_shell.py``);
- a recovery trains for two steps on short sequences;
- ``--device cuda`` becomes ``--device cpu``, and ``--tasks hc-smoe``, whose data sets are on the Hub, a task file;
- before a push the namespace ``me`` is emptied, and before a conversion or a recovery its own output: pages show
  alternatives.
"""

import gzip
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from hub_client import WRITER, Machine
from hub_server import Account, Hub
from places import EXAMPLE, ROOT, TESTS
from sided_models import build_switch
from tiny_models import build

from hcsmoe_hub.cli.app import app

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_WORDS = 900
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
HERE_DOCUMENT = re.compile(r"^cat > (\S+) <<'(\w+)'\n(.*?)^\2$", re.MULTILINE | re.DOTALL)

# Words that commands begin with, where they are not run, and why.
NOT_RUN = {
    "python3 -m venv": "makes an environment: the tests run in one",
    "pip install": "needs a package index: .ci/run runs the README's",
    "pytest": "would run this test",
    ".ci/run": "would run this test",
    "ruff": "run by .ci/run",
    "mkdocs": "run by .ci/run",
    "hf extensions install": "needs a repository on GitHub: tests/cli/test_hf_extension.py",
    "hf auth login": "asks for a token",
    "python benchmarks/": "takes minutes to hours",
    "python convert_hf_to_gguf.py": "needs llama.cpp",
    "llama-": "needs llama.cpp",
    "python fp8.py": "needs llm-compressor and a GPU",
    "mlx_lm.": "needs mlx-lm",
    "torchrun": "starts several processes: tests/distributed",
    "accelerate launch": "starts several processes: tests/distributed",
    "sbatch": "needs Slurm",
    "hf jobs run": "needs several GPUs",
}
# Options in the text that belong to other programs.
OTHER_OPTIONS = {"--strict", "--check", "--json", "--folder", "--q-group-size"}
# Of an option that is given twice, the last one counts.
SHORT = ["--max-steps", "2", "--samples", "48", "--sequence-length", "16", "--batch-size", "2"]
VOCABULARY = 4096
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_shard_size": "1MB",
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", {"num_local_experts": 8}),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ("mixtral", {"num_local_experts": 8}),
    "Qwen/Qwen3-30B-A3B": ("qwen3_moe", {"num_experts": 128, "num_experts_per_tok": 8}),
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": (
        "qwen2_moe",
        {"num_experts": 60, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 32},
    ),
    "deepseek-ai/DeepSeek-V2-Lite": (
        "deepseek_v2",
        {
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "n_shared_experts": 2,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": None,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "topk_group": None,
            "n_group": None,
            "topk_method": "greedy",
        },
    ),
}
SWITCH: dict[str, dict[str, Any]] = {
    "google/switch-base-8": {},
    "google/switch-base-32": {
        "num_experts": 32,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_sparse_encoder_layers": 6,
        "num_sparse_decoder_layers": 6,
    },
}
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TASK = """\
task: questions
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}]
"""


# Reading pages


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return FENCE.findall(page.read_text("utf-8"))


def commands(block: str, folder: Path) -> Iterator[list[str]]:
    """The commands of a shell block, without comments, each as its words; files of here-documents are written."""
    for name, _, content in HERE_DOCUMENT.findall(block):
        (folder / name).write_text(content)
    for line in HERE_DOCUMENT.sub("", block).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def runnable(words: list[str]) -> list[str] | None:
    """What to run for a command of a page; ``None`` for one that is not run."""
    words = [words[0].removeprefix(".venv/bin/"), *words[1:]]
    line = " ".join(words)
    if any(line.startswith(beginning) for beginning in NOT_RUN):
        return None
    if line.startswith(("hf jobs uv run ", "hf hcsmoe ")):
        words = words[len(words) - words[::-1].index("hcsmoe") - 1 :]
    assert words[0] == "hcsmoe" or words[:2] == ["hf", "download"], f"neither run nor listed: {line}"
    if words[1] == "recover":
        words += SHORT
    line = f"{' '.join(words)} ".replace(" --device cuda ", " --device cpu ")
    return line.replace(" --tasks hc-smoe ", " --tasks task.yaml ").split()


# What pages need


@dataclass
class Shell:
    """A process that runs what pages say, and the Hub that it talks to."""

    process: "subprocess.Popen[str]"
    hub: Hub

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(self, folder: Path, words: list[str]) -> str:
        """Runs one command in a folder; returns what it printed."""
        if "--push-to" in words or words[1] == "push":
            for key in [key for key in self.hub.repositories if key[1].startswith("me/")]:
                del self.hub.repositories[key]
        if words[1] == "convert" and "--output" not in words:
            name = words[2].rpartition("/")[2]
            kept = f"{words[words.index('--experts') + 1]}e" if "--experts" in words else ""
            for result in folder.glob(f"{name}-hcsmoe-{kept}*"):
                shutil.rmtree(result)
        if words[1] == "recover" and "--overwrite" not in words:
            shutil.rmtree(folder / f"{words[2].rstrip('/').rpartition('/')[2]}-recovered", ignore_errors=True)
        answer = self.ask(folder=str(folder), words=words)
        assert answer["failure"] is None, f"{' '.join(words)}\n{answer['failure']}"
        return str(answer["output"])


def with_tokenizer(folder: Path) -> Path:
    """Adds the example's tokenizer, with a chat template."""
    for file in EXAMPLE.glob("tokenizer*"):
        shutil.copy(file, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT_TEMPLATE}))
    return folder


def write_texts(folder: Path) -> None:
    """The files that pages name."""
    sentences = [f"Sentence {number} of the held-out text says that {number} is a number." for number in range(64)]

    def save(name: str, rows: list[Any]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    # Evaluation continues up to 64 of them.
    save("heldout.jsonl", [{"text": 3 * sentence, "domain": "prose"} for sentence in sentences])
    choices = [" a number", " a colour"]
    save(
        "questions.jsonl",
        [{"context": line, "choices": choices, "gold": 0, "domain": "prose"} for line in sentences[:3]],
    )
    turns = [[{"role": "user", "content": line}, {"role": "assistant", "content": line}] for line in sentences]
    save("my-chats.jsonl", [{"messages": turn} for turn in turns])
    save("pairs.jsonl", [{"source": line, "target": f"w{len(line)} {line}"} for line in sentences])
    (folder / "task.yaml").write_text(TASK)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub with a tiny model under every name that pages use, and the first shard of C4."""
    top = tmp_path_factory.mktemp("served")
    c4 = top / "c4" / "en" / "c4-train.00000-of-01024.json.gz"
    c4.parent.mkdir(parents=True)
    pages = [json.dumps({"text": f"Page {number} of the web speaks of page {number + 1}."}) for number in range(200)]
    c4.write_bytes(gzip.compress("\n".join(pages).encode(), mtime=0))
    with Hub(tokens={WRITER: Account(name="me", role="write")}) as server:
        server.add("allenai/c4", top / "c4", kind="datasets")
        for number, (repo_id, (model_type, settings)) in enumerate(MODELS.items()):
            server.add(repo_id, with_tokenizer(build(top / str(number), model_type, **(COMMON | settings))))
        for repo_id, settings in SWITCH.items():
            server.add(repo_id, build_switch(top / repo_id, **settings))
        yield server


@pytest.fixture(scope="module")
def shell(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    process = subprocess.Popen(
        [sys.executable, TESTS / "docs_shell.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=machine.environment(hub.url, HF_TOKEN=WRITER, HF_HUB_OFFLINE="0"),
        cwd=machine.folder,
        text=True,
    )
    yield Shell(process, hub)
    assert process.stdin is not None
    process.stdin.close()
    process.wait(30)


@pytest.fixture(scope="module")
def made(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every page may name."""
    folder = tmp_path_factory.mktemp("made")
    write_texts(folder)
    with_tokenizer(build(folder / "SOURCE", "mixtral", **COMMON))
    (folder / "examples").symlink_to(ROOT / "examples")
    shell.run(folder, shlex.split("hcsmoe convert SOURCE --experts 4 --preset reap --output RESULT"))
    return folder


# What pages say


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_and_python_block_of_a_page_works(page: Path, shell: Shell, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "page", symlinks=True)
    for language, block in blocks(page):
        assert language in ("", "bash", "python", "text", "json", "bibtex", "yaml", "toml", "jinja"), (
            f"blocks of {language} are not checked"
        )
        if language == "bash":
            for words in commands(block, folder):
                wanted = runnable(words)
                if wanted is not None:
                    shell.run(folder, wanted)
        elif language == "python":
            answer = shell.ask(folder=str(folder), page=page.name, code=block)
            assert answer["failure"] is None, f"{block}\n{answer['failure']}"


def test_the_readme_shows_the_rows_that_its_first_command_prints(shell: Shell, made: Path) -> None:
    printed = shell.run(made, shlex.split("hcsmoe convert examples/tiny-mixtral --experts 4 --samples 2"))
    result = next(block for language, block in blocks(README) if "Converted to" in block)
    labels = [line.split("  ")[0] for line in result.splitlines()[3:] if "  " in line.strip()]
    assert len(labels) > 5
    assert [label for label in labels if not re.search(f"^{re.escape(label)}  ", printed, re.MULTILINE)] == []


def options_of(command: Any) -> set[str]:
    """Every option of a command and of those below it."""
    found = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return found.union(*(options_of(each) for each in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_option_that_a_page_names_exists(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    named = {name for code in re.findall(r"`([^`\n]+)`", text) for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    known = options_of(typer.main.get_command(app)) | {"--help"} | OTHER_OPTIONS
    assert named - known == set()


def test_the_readme_is_short() -> None:
    text, marker, _ = README.read_text("utf-8").partition("\n## More\n")
    assert marker
    assert len(text.split()) <= MOST_WORDS


def row_of_readme(repo_id: str, plan: dict[str, Any]) -> str:
    """A recorded conversion as the README shows it."""
    experts, name = plan["experts"], repo_id.split("/")[1].removesuffix("-v0.1").removesuffix("-0924")
    parameters, weights = (
        " → ".join(f"{plan[of][when] / 1e9:.1f}" for when in ("before", "after"))
        for of in ("parameters", "weights_bytes")
    )
    memory = " / ".join(f"{plan['memory_bytes'][preset] / 1e9:.0f}" for preset in ("reap", "hc-refit"))
    arithmetic = " / ".join(f"{plan['flops'][preset] / 1e15:.1f}" for preset in ("reap", "hc-refit"))
    cells = (name, f"{experts['before']} → {experts['after']}", f"{parameters} B", f"{weights} GB", f"{memory} GB")
    return f"| {' | '.join(cells)} | {arithmetic} PFLOP |"


def test_the_readme_shows_exactly_the_recorded_models_that_are_meant_for_it() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "known_models.json").read_text())
    wanted = {
        row_of_readme(repo_id, plan) for repo_id, plans in recorded.items() for plan in plans if plan["in_readme"]
    }
    shown = re.findall(r"^\| [^|]+ \| \d+ → \d+ \| [^|]+ B \|.*$", README.read_text("utf-8"), flags=re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert set(shown) == wanted


def test_a_link_within_the_repository_leads_to_a_file() -> None:
    missing = [
        (page.name, link)
        for page in PAGES
        for link in re.findall(r"\]\(([^)#\s]+)", FENCE.sub("", page.read_text("utf-8")))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert missing == []


# The site


@pytest.fixture(scope="module")
def hooks() -> Any:
    """What fills the architecture page."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_architecture_page_shows_every_room_and_every_file(hooks: Any) -> None:
    page = hooks.fill((ROOT / "docs" / "architecture.md").read_text("utf-8"))
    shown = re.findall(r'font-weight="700">(\w+)</text>', page)
    assert sorted(shown) == sorted(
        {path.stem for path in (ROOT / "hcsmoe_hub").iterdir() if path.suffix in ("", ".py") and path.stem[0] != "_"}
        | {"cli", "model_cards"}
    )
    rows = [
        f"| `{file.relative_to(room).as_posix()}` |"
        for room in map(hooks.place, shown)
        for file in room.rglob("*.py")
        if file != room / "__init__.py"
    ]
    assert len(rows) > 100
    assert [row for row in rows if row not in page] == []
