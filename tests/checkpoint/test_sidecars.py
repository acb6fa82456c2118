"""Which files a result needs besides its weights, and what is said of the others."""

from collections.abc import Mapping

import pytest

from hcsmoe_hub.checkpoint.sidecars import has_tokenizer, is_legal, left_files, sidecar_files


def copied(files: Mapping[str, str]) -> list[str]:
    """Files that are copied, of some with their texts."""
    return sidecar_files(list(files), files.__getitem__)


TOKENIZERS = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "spiece.model",
    "source.spm",
    "vocab.json",
    "vocab.txt",
]


@pytest.mark.parametrize("file", TOKENIZERS)
def test_what_counts_as_a_tokenizer_is_copied(file: str) -> None:
    assert has_tokenizer([file])
    assert copied({file: ""}) == [file]


@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "merges.txt", "chat_template.jinja", "old/tokenizer.json", "model.safetensors"]
)
def test_other_files_are_not_a_tokenizer(file: str) -> None:
    assert not has_tokenizer([file])


@pytest.mark.parametrize(
    "file",
    [
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
        "image_processor_config.json",
        "chat_template.json",
        "chat_template_tools.jinja",
        "template.jinja",
        "additional_chat_templates/rag.jinja",
        "SYSTEM_PROMPT.txt",
        "encoding/encoding_dsv32.py",
        "processing_kimi.py",
        "image_processing_kimi.py",
        "kimi_k25_processor.py",
    ],
)
def test_processors_and_chat_templates_are_copied(file: str) -> None:
    assert copied({file: ""}) == [file]


@pytest.mark.parametrize(
    "file",
    [
        "LICENSE",
        "License.txt",
        "LICENCE.md",
        "MODEL_LICENSE",
        "LICENSE-CODE",
        "Notice",
        "notice.txt",
        "THIRD_PARTY_NOTICES.md",
        "USAGE_POLICY",
        "Use_Policy.md",
        "USE-POLICY.pdf",
        "COPYING",
        "Copyright",
        "TERMS_OF_USE.md",
    ],
)
def test_licences_are_copied_in_any_case(file: str) -> None:
    assert is_legal(file)
    assert copied({file: ""}) == [file]


@pytest.mark.parametrize(
    "file",
    ["onnx/preprocessor_config.json", "tokenizer_old/tokenizer.json", "docs/LICENSE", "config.json", "LICENSE\udcff"],
)
def test_other_files_are_not_copied(file: str) -> None:
    assert copied({file: ""}) == []


# Python code


def test_code_that_copied_code_imports_is_copied_too() -> None:
    files = {
        "tokenization_kimi.py": "import os\nfrom .tool_declaration_ts import encode\nfrom transformers import x\n",
        "tool_declaration_ts.py": "if True:\n    from .helpers import (\n        join,\n    )\n",
        "helpers.py": "from . import tables, colours as c",
        "tables.py": "from .tokenization_kimi import K  # a circle",
        "colours.py": "from ..outside import x",
        "convert.py": "from .helpers import join",
        "outside.py": "",
    }
    assert copied(files) == sorted(files.keys() - {"convert.py", "outside.py"})


def test_code_that_a_config_names_is_copied() -> None:
    files = {
        "config.json": '{"auto_map": {"AutoModelForCausalLM": "my_model.Model", "AutoConfig": "org/other--far.C"}}',
        "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["words.Slow", null]}}',
        "processor_config.json": '{"auto_map": {"AutoProcessor": "sights.Processor"}}',
        "my_model.py": "",
        "words.py": "",
        "sights.py": "",
        "far.py": "",
        "unnamed.py": "",
    }
    assert copied(files) == ["my_model.py", "processor_config.json", "sights.py", "tokenizer_config.json", "words.py"]


def test_nothing_is_read_where_no_code_needs_an_explanation() -> None:
    files = ["config.json", "tokenizer_config.json", "modeling_x.py"]
    assert sidecar_files(files, lambda file: pytest.fail(file)) == ["modeling_x.py", "tokenizer_config.json"]
    assert sidecar_files(["config.json", "scripts/run.py"], lambda file: pytest.fail(file)) == []


def test_code_in_folders_is_copied_if_code_imports_it() -> None:
    files = {
        "modeling_x.py": "from .parts.attention import Attention\nfrom . import ops",
        "parts/attention.py": "from .kernels import run\nfrom ..shared import constant\nfrom ...outside import x",
        "parts/__init__.py": "",
        "parts/kernels.py": "",
        "parts/unused.py": "",
        "ops/__init__.py": "from .add import add",
        "ops/add.py": "",
        "shared.py": "",
        "scripts/run.py": "from .helper import y",
        "scripts/helper.py": "",
    }
    left = {"parts/unused.py", "scripts/run.py", "scripts/helper.py"}
    assert copied(files) == sorted(files.keys() - left)


# What stays behind


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("pytorch_model.bin", "weights in a format that is not read"),
        ("pytorch_model.bin.index.json", "weights in a format that is not read"),
        ("model.gguf", "weights in a format that is not read"),
        ("consolidated.safetensors", "weights of the source under Mistral's own names"),
        ("consolidated.00.pth", "weights of the source under Mistral's own names"),
        ("params.json", "weights of the source under Mistral's own names"),
        ("adapter_model.safetensors", "an adapter; the weights are converted without it"),
        ("adapter_config.json", "an adapter; the weights are converted without it"),
        ("model.fp16.safetensors", "weights that the checkpoint does not load"),
        ("model.safetensors.index.fp16.json", "weights that the checkpoint does not load"),
        ("optimizer.pt", "the state of a training run"),
        ("training_args.bin", "the state of a training run"),
        ("LICENSES/Apache-2.0.txt", "a licence in a sub-folder, to be added by hand if it applies"),
        ("README.md", "the card of the source; the result has a card of its own"),
        ("inference.py", "code that the checkpoint does not name"),
        ("figure.png", "not needed to load the model"),
    ],
)
def test_a_file_that_stays_behind_is_named_with_the_reason(file: str, reason: str) -> None:
    name = file if "/" not in file else f"{file.partition('/')[0]}/"
    assert left_files([file, "config.json"], {"config.json"}) == {name: reason}


def test_a_folder_is_one_line_with_its_weightiest_reason() -> None:
    files = ["original/README.md", "original/model.00.pth", "original/tokenizer.model", "metal/model.bin"]
    reason = "weights in a format that is not read"
    assert left_files(files, ()) == {"metal/": reason, "original/": reason}


def test_files_of_other_programs_are_not_mentioned() -> None:
    files = [".gitattributes", ".git/objects/00/ff", ".cache/huggingface/x", "__pycache__/a.pyc", "figures/.DS_Store"]
    assert left_files(files, ()) == {}


def test_a_name_that_is_not_utf8_is_written_so_that_any_program_can_read_it() -> None:
    assert left_files(["LICENSE-\udcff", "caf\udce9/a.png"], ()) == {
        "LICENSE-\\xff": "its name is not UTF-8",
        "caf\\xe9/": "its name is not UTF-8",
    }
