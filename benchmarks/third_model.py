"""Trains a third kind of model on other text, from this repository and the running Python alone.

Run: python benchmarks/third_model.py --output FOLDER [--steps N] [--seed N]

The text is the prose of Python's standard library: docstrings, comments and the topics of ``help()``, one document per
module, class or topic. No paragraph occurs twice, and all documents of a module (or topic) go to one part: training,
calibration or held-out text. The model is an OLMoE of 4 layers, 16 experts of which a token visits 4, and 3.2 M
parameters, in the vocabulary of ``examples/tiny-mixtral``. The folder receives ``model``, ``calibration.jsonl``,
``heldout.jsonl`` and ``choices.jsonl``, and the output ends with the command lines of ``quality.py`` for them.

Training takes about 20 minutes on one CPU thread. The same seed, Python and torch on the same kind of CPU give the same
model; another Python has another library, so figures are comparable only within one version.
"""

import argparse
import ast
import hashlib
import io
import itertools
import json
import random
import re
import sysconfig
import textwrap
import time
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerBase

from hcsmoe_hub.evaluation.evaluate import evaluate
from hcsmoe_hub.evaluation.options import EvaluateOptions

TOKENIZER = Path(__file__).resolve().parents[1] / "examples" / "tiny-mixtral"
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
LEGAL = re.compile(r"copyright|licen[sc]e|warrant|permission", re.IGNORECASE)
RECORDS = {"calibration": 150, "heldout": 100}
MIN_CHARACTERS, MAX_CHARACTERS = 300, 4_000
ITEMS, CONTEXT_WORDS, CHOICE_WORDS = 150, 45, 25
LENGTH, BATCH = 256, 8
LEARNING_RATE, WARM_UP, WEIGHT_DECAY, CLIP = 3e-3, 0.04, 0.1, 1.0


class Document(NamedTuple):
    """The prose of one module, class or topic."""

    domain: str
    text: str


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs that read like prose, each on one line: without examples, tables, code or legal notices."""
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        letters = sum(character.isalpha() or character in " ,." for character in line)
        if len(line.split()) >= 4 and letters >= 0.88 * len(line) and not LEGAL.search(line) and ">>>" not in line:
            yield line


def comments(source: str) -> Iterator[tuple[int, str]]:
    """First line and text of every block of full-line comments."""
    block: list[str] = []
    start = end = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or not token.line.lstrip().startswith("#"):
            continue
        if token.start[0] != end + 1:
            yield start, "\n".join(block)
            block, start = [], token.start[0]
        block.append(token.string.lstrip("#!: "))
        end = token.start[0]
    yield start, "\n".join(block)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring; that of a function begins with the function's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, f"{node.name}: {text}"


def sources() -> Iterator[tuple[str, str, str]]:
    """Module, domain and raw text of every document, in the order of the modules' names."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root).with_suffix("")
        if SKIPPED.intersection(place.parts):
            continue
        with tokenize.open(file) as lines:
            source = lines.read()
        tree = ast.parse(source)
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        pieces: defaultdict[str, list[str]] = defaultdict(list)
        for line, text in sorted([*docstrings(tree), *comments(source)]):
            inside = [node.name for node in classes if node.lineno <= line <= (node.end_lineno or 0)]
            pieces[inside[0] if inside else ""].append(text)
        for name, texts in pieces.items():
            yield ".".join(place.parts), "class" if name else "module", "\n\n".join(texts)
    for name, text in sorted(topics.items()):
        yield f"help({name})", "topic", text


def documents() -> dict[str, list[Document]]:
    """The documents of every part, by a hash of the module's name; repeated paragraphs are left out."""
    parts: dict[str, list[Document]] = {"training": [], "calibration": [], "heldout": []}
    seen: set[str] = set()
    for module, domain, raw in sources():
        kept = [line for line in dict.fromkeys(paragraphs(raw)) if line not in seen]
        seen.update(kept)
        place = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100
        part = "calibration" if place < 14 else "heldout" if place < 24 else "training"
        if kept:
            parts[part].append(Document(domain, "\n".join(kept)))
    return parts


def spaced(things: list[Any], count: int) -> list[Any]:
    """At most ``count`` evenly spaced items."""
    return [things[number * len(things) // count] for number in range(count)] if count < len(things) else things


def records(found: list[Document], count: int) -> list[dict[str, Any]]:
    """Evenly spaced pieces of some length, cut at the ends of words."""
    pieces = [
        {"text": text, "domain": document.domain}
        for document in found
        for text in textwrap.wrap(document.text, MAX_CHARACTERS, replace_whitespace=False, break_on_hyphens=False)
        if len(text) >= MIN_CHARACTERS
    ]
    return spaced(pieces, count)


def choices(found: list[Document], seed: int) -> list[dict[str, Any]]:
    """Items that ask for the continuation of a passage, among continuations of three other passages of its domain."""
    passages: list[tuple[str, str, str, str]] = []
    size = CONTEXT_WORDS + CHOICE_WORDS
    for document in found:
        words = document.text.split()
        for start in range(0, len(words) - size + 1, size):
            context, true = words[start : start + CONTEXT_WORDS], words[start + CONTEXT_WORDS : start + size]
            passages.append((document.text, document.domain, " ".join(context), f" {' '.join(true)}"))
    chance = random.Random(seed)
    items: list[dict[str, Any]] = []
    for text, domain, question, answer in spaced(passages, ITEMS):
        mixed = chance.sample(passages, len(passages))
        others = {other: wrong for other, kind, _, wrong in mixed if other != text and kind == domain}
        options = [answer, *itertools.islice(others.values(), 3)]
        chance.shuffle(options)
        items.append({"context": question, "choices": options, "gold": options.index(answer), "domain": domain})
    return items


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    print(f"{file}: {len(rows)} records")


def encoded(found: list[Document], tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Token ids [tokens] of every document, int64."""
    return [torch.tensor(tokenizer(document.text, verbose=False)["input_ids"]) for document in found]


def epoch(tokens: list[torch.Tensor], chance: torch.Generator) -> torch.Tensor:
    """All documents, joined in random order and cut into shuffled sequences [sequences, LENGTH] of ids."""
    stream = torch.cat([tokens[number] for number in torch.randperm(len(tokens), generator=chance)])
    sequences = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    return sequences[torch.randperm(len(sequences), generator=chance)]


def untrained(tokenizer: PreTrainedTokenizerBase) -> OlmoeForCausalLM:
    """The model with random weights."""
    shape = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    router = {"num_experts": 16, "num_experts_per_tok": 4, "output_router_logits": True}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 2 * LENGTH, "tie_word_embeddings": True}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings: dict[str, Any] = shape | router | text | ids
    return OlmoeForCausalLM(OlmoeConfig(**settings))


def train(model: OlmoeForCausalLM, tokens: list[torch.Tensor], heldout: torch.Tensor, steps: int, seed: int) -> None:
    """AdamW on float32 weights: the rate rises and falls by cosines; the loss balances the router.

    The loss of the sequences ``heldout`` is only printed, and without the part that balances (4 is even).
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, steps, pct_start=max(WARM_UP, 2 / steps), cycle_momentum=False, final_div_factor=1
    )
    start, chance = time.perf_counter(), torch.Generator().manual_seed(seed)
    batches = (batch for _ in itertools.count() for batch in torch.split(epoch(tokens, chance), BATCH))
    for step, batch in enumerate(itertools.islice(batches, steps), 1):
        result = model(input_ids=batch, labels=batch)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            with torch.no_grad():
                unseen = model(input_ids=heldout, labels=heldout, output_router_logits=False).loss
            speed = step * BATCH * LENGTH / (time.perf_counter() - start)
            figures = f"loss {result.loss:.2f}, held-out {unseen:.3f}, balance {result.aux_loss:.2f}"
            print(f"step {step}: {figures}, {speed:.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3200, help="at least 3")
    parser.add_argument("--seed", type=int, default=42)
    wanted = parser.parse_args()
    # One thread, so that sums are taken in the same order on every machine.
    torch.set_num_threads(1)
    torch.manual_seed(wanted.seed)
    folder: Path = wanted.output
    folder.mkdir(parents=True, exist_ok=True)
    parts = documents()
    files = {name: folder / f"{name}.jsonl" for name in ("calibration", "heldout", "choices")}
    for name, count in RECORDS.items():
        write(files[name], records(parts[name], count))
    write(files["choices"], choices(parts["heldout"], wanted.seed))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    training, heldout = (encoded(parts[part], tokenizer) for part in ("training", "heldout"))
    print(f"training: {len(training)} documents, {sum(map(len, training))} tokens", flush=True)
    model = untrained(tokenizer)
    unseen = epoch(heldout, torch.Generator().manual_seed(wanted.seed))[:32]
    train(model, training, unseen, wanted.steps, wanted.seed)
    model.config.output_router_logits = False
    model.bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    asked = EvaluateOptions(perplexity=files["heldout"], choices=files["choices"], output=folder / "evaluation.json")
    measures = evaluate(folder / "model", asked)[0]["measures"]
    figures = {name: found["model"]["overall"] for name, found in measures.items()}
    print(f"perplexity {figures['perplexity']['perplexity']:.2f}, choices {figures['choices']['accuracy']:.3f}")
    texts = f"--calibration {files['calibration']} --text {files['heldout']} --choices {files['choices']}"
    for samples in (64, 256):
        sizes = f"--keep 0.5 0.75 --length {LENGTH} --samples {samples}"
        print(f"python benchmarks/quality.py --model {folder / 'model'} {texts} {sizes}")


if __name__ == "__main__":
    main()
