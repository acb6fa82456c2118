"""How a result is loaded, in every program that is known to run it."""

import json
import shlex
from collections.abc import Iterator, Sequence

from hcsmoe_hub.model_cards.facts import Facts
from hcsmoe_hub.model_cards.markdown import fence, joined, table
from hcsmoe_hub.model_cards.programs import (
    LLAMA_CPP,
    MLX_LM,
    SGLANG,
    VLLM,
    Program,
    expert_parallel_sizes,
    programs_for,
    tensor_parallel_sizes,
)
from hcsmoe_hub.options import Layout

CONSENT = {"trust_remote_code": True}
MAPPED = (
    "The router keeps all its rows, and `modeling_hcsmoe.py` in this repository leads them to fewer experts. Loading "
    "it means running that file, and only transformers does."
)
OTHERS = (
    "No checkpoint of this architecture with fewer experts was tried in other programs. Tensor names, their layout and "
    "`config.json` are the base model's, but for {difference}: what runs the base model may well run this one."
)
NO_TOKENIZER = "It has no tokenizer, and programs that answer prompts need one: add that of the base model's family."


def usage(facts: Facts) -> str:
    """The section on usage."""
    parts = ["## Use", *_transformers(facts)]
    programs = programs_for(facts)
    if facts.layout is Layout.MAPPED:
        return "\n\n".join(parts)
    if not facts.has_tokenizer:
        parts.append(NO_TOKENIZER)
    elif programs:
        parts.append(_table(programs))
        commands = _commands(facts)
        parts += [part for program in programs for part in commands[program.name]]
    else:
        difference = "nothing" if facts.layout is Layout.FULL else "the number of experts"
        parts.append(OTHERS.format(difference=difference))
    return "\n\n".join(parts)


def _transformers(facts: Facts) -> Iterator[str]:
    yield fence("python", *_snippet(facts))
    made = f"Made with transformers {facts.report['versions']['transformers']}"
    if facts.layout is Layout.MAPPED:
        yield f"{MAPPED} {made}; it needs version 5, and accelerate for `device_map`."
    else:
        yield f"{made}; loading runs no code from this repository. `device_map` needs accelerate."


def _snippet(facts: Facts) -> Iterator[str]:
    name = json.dumps(facts.location)
    consent = "".join(f", {key}={value}" for key, value in CONSENT.items()) if facts.layout is Layout.MAPPED else ""
    loaded = f'model = AutoModelForCausalLM.from_pretrained({name}, device_map="auto"{consent})'
    if not facts.has_tokenizer:
        yield from ("from transformers import AutoModelForCausalLM", "", loaded)
        return
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield f"tokenizer = AutoTokenizer.from_pretrained({name})"
    yield loaded
    if facts.is_chat:
        yield 'messages = [{"role": "user", "content": "Why is the sky blue?"}]'
        yield "inputs = tokenizer.apply_chat_template("
        yield '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        yield ").to(model.device)"
    else:
        yield 'inputs = tokenizer("The sky is blue because", return_tensors="pt").to(model.device)'
    yield "output = model.generate(**inputs, max_new_tokens=100)"
    yield "print(tokenizer.decode(output[0], skip_special_tokens=True))"


def _table(programs: Sequence[Program]) -> str:
    """What is known of every program."""
    rows = [(f"{program.name} {program.version}", program.evidence) for program in programs]
    note = "What is known of other programs; this checkpoint itself was not run in them:"
    lines = table(("program", "known"), rows).replace("---:", "---")
    return f"{note}\n\n{lines}"


def _commands(facts: Facts) -> dict[str, list[str]]:
    """Commands and remarks for every program."""
    here, quoted = facts.repo_id is None, shlex.quote(facts.location)
    folder, gguf = shlex.quote(facts.title), shlex.quote(f"{facts.title}.gguf")
    download = [] if here else [f"hf download {quoted} --local-dir {folder}"]
    prompt = "Why is the sky blue?" if facts.is_chat else "The sky is blue because"
    return {
        VLLM.name: [
            "vLLM:",
            fence("bash", f"vllm serve {quoted}"),
            *_sizes("`--tensor-parallel-size`", tensor_parallel_sizes(facts), _TENSOR),
        ],
        SGLANG.name: [
            "SGLang:",
            fence("bash", f"python -m sglang.launch_server --model-path {quoted}"),
            *_sizes("`--tp-size`", tensor_parallel_sizes(facts), _TENSOR),
            *_sizes("`--ep-size`", expert_parallel_sizes(facts), _EXPERT),
        ],
        LLAMA_CPP.name: [
            "llama.cpp, whose repository holds the converter:",
            fence(
                "bash", *download, f"python convert_hf_to_gguf.py {folder} --outfile {gguf}", f"llama-server -m {gguf}"
            ),
            "The converter has to know the tokenizer, which is the base model's, byte for byte.",
        ],
        MLX_LM.name: ["MLX:", fence("bash", f'mlx_lm.generate --model {quoted} --prompt "{prompt}"')],
    }


_TENSOR = "sizes that divide its attention heads and expert widths and do not exceed its experts"
_EXPERT = "sizes that divide its experts"


def _sizes(option: str, sizes: list[int], why: str) -> list[str]:
    """Which sizes of a kind of parallelism fit; nothing where only the config of the base model would tell."""
    if not sizes:
        return []
    fitting = joined([str(size) for size in sizes], "or")
    return [f"{option} can be {fitting}: the {why}."]
