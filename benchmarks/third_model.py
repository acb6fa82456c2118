"""Trains a model of another kind on other text, from this repository and the running Python alone.

Run: python benchmarks/third_model.py --output FOLDER [--family WORD] [--size WORD] [--experts N] [--packages]
     [--steps N | --minutes N] [--seed N]

By default the text is the prose of Python's standard library: docstrings, comments and the topics of ``help()``, one
document per module, class or topic (``python_text.py``). ``--packages`` adds code and manuals, and those of the
installed packages, with a domain for each kind. The default model is an OLMoE of 4 layers, 16 experts of which a token
visits 4, and 3.2 M parameters, in the vocabulary of ``examples/tiny-mixtral``; ``model_shapes.py`` has the others. The
folder receives ``model``, ``calibration.jsonl``, ``heldout.jsonl`` and ``choices.jsonl``, and the output ends with the
command lines of ``quality.py`` for them.

Training the default takes about 20 minutes on one CPU thread. The same seed, Python and torch on the same kind of CPU
give the same model, unless ``--minutes`` ends the training; another Python has another library, so figures are
comparable only within one version.
"""

import argparse
import itertools
import math
import time
from collections import Counter
from pathlib import Path

import torch
from model_shapes import FAMILIES, SIZES, balance_biases, loads, untrained
from python_text import Document, by_domain, choices, documents, records, write
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hcsmoe_hub.evaluation.evaluate import evaluate
from hcsmoe_hub.evaluation.options import EvaluateOptions

TOKENIZER = Path(__file__).resolve().parents[1] / "examples" / "tiny-mixtral"
# Of all domains together, and of each domain with ``--packages``.
RECORDS, RECORDS_EACH = {"calibration": 150, "heldout": 100}, {"calibration": 150, "heldout": 70}
ITEMS, ITEMS_EACH = 150, 150
LENGTH, BATCH = 256, 8
LEARNING_RATE, WARM_UP, START, WEIGHT_DECAY, CLIP = 3e-3, 0.04, 1 / 25, 0.1, 1.0


def encoded(found: list[Document], tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Token ids [tokens] of every document, int64."""
    return [torch.tensor(tokenizer(document.text, verbose=False)["input_ids"]) for document in found]


def epoch(tokens: list[torch.Tensor], chance: torch.Generator) -> torch.Tensor:
    """All documents, joined in random order and cut into shuffled sequences [sequences, LENGTH] of ids."""
    stream = torch.cat([tokens[number] for number in torch.randperm(len(tokens), generator=chance)])
    sequences = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    return sequences[torch.randperm(len(sequences), generator=chance)]


def rate(progress: float, warm_up: float) -> float:
    """Share of the highest learning rate at a point of the training, from 0 to 1: it rises and falls by cosines."""
    if progress < warm_up:
        return START + (1 - START) * (1 - math.cos(math.pi * progress / warm_up)) / 2
    return START + (1 - START) * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up))) / 2


def train(
    model: PreTrainedModel, tokens: list[torch.Tensor], heldout: torch.Tensor, wanted: argparse.Namespace
) -> None:
    """AdamW on float32 weights; a loss or a bias balances the router.

    The loss of the sequences ``heldout`` is only printed, and without the part that balances.

    Args:
        model: The model, trained in place.
        tokens: Token ids of every document.
        heldout: Ids [sequences, LENGTH] of text that is not trained on.
        wanted: ``steps``, ``minutes`` and ``seed``.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    start, chance = time.process_time(), torch.Generator().manual_seed(wanted.seed)
    warm_up = max(WARM_UP, 2 / wanted.steps)
    batches = (batch for _ in itertools.count() for batch in torch.split(epoch(tokens, chance), BATCH))
    for step, batch in enumerate(batches, 1):
        elapsed = time.process_time() - start
        progress = max((step - 1) / max(1, wanted.steps - 1), elapsed / (60 * wanted.minutes) if wanted.minutes else 0)
        is_last = step == wanted.steps or progress >= 1
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate(min(progress, 1), warm_up)
        with loads(model) as counts:
            result = model(input_ids=batch, labels=batch)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        balance_biases(model, counts)
        if step % 100 == 0 or is_last:
            with torch.no_grad(), loads(model) as counts:
                unseen = model(input_ids=heldout, labels=heldout, output_router_logits=False).loss
            largest = max(float(count.max() / count.mean()) for count in counts.values())
            speed = step * BATCH * LENGTH / (time.process_time() - start)
            figures = f"loss {result.loss:.2f}, held-out {unseen:.3f}, busiest expert {largest:.1f} times the mean"
            print(f"step {step}: {figures}, {speed:.0f} tokens/s of CPU time", flush=True)
        if is_last:
            break


def unigram_perplexity(training: list[torch.Tensor], heldout: torch.Tensor, vocabulary: int) -> float:
    """Perplexity of held-out ids under the frequencies of the training text, with one added to every count."""
    counts = torch.bincount(torch.cat(training), minlength=vocabulary).double() + 1
    return math.exp(-float((counts / counts.sum()).log()[heldout.flatten()].mean()))


def write_text(parts: dict[str, list[Document]], folder: Path, wanted: argparse.Namespace) -> dict[str, Path]:
    """Writes the records of both parts, and the choices; returns their files by name."""
    files = {name: folder / f"{name}.jsonl" for name in ("calibration", "heldout", "choices")}
    for name in RECORDS:
        kinds = by_domain(parts[name]).values() if wanted.packages else [parts[name]]
        count = (RECORDS_EACH if wanted.packages else RECORDS)[name]
        write(files[name], [record for found in kinds for record in records(found, count)])
    kinds = by_domain(parts["heldout"]).values() if wanted.packages else [parts["heldout"]]
    count = ITEMS_EACH if wanted.packages else ITEMS
    write(files["choices"], [item for found in kinds for item in choices(found, count, wanted.seed)])
    return files


def report(folder: Path, files: dict[str, Path]) -> None:
    """Prints what the model can do, and how to measure conversions of it."""
    asked = EvaluateOptions(perplexity=files["heldout"], choices=files["choices"], output=folder / "evaluation.json")
    measures = evaluate(folder / "model", asked)[0]["measures"]
    figures = {name: found["model"]["overall"] for name, found in measures.items()}
    print(f"perplexity {figures['perplexity']['perplexity']:.2f}, choices {figures['choices']['accuracy']:.3f}")
    texts = f"--calibration {files['calibration']} --text {files['heldout']} --choices {files['choices']}"
    print(f"python benchmarks/quality.py --model {folder / 'model'} {texts} --keep 0.5 0.75 --length {LENGTH}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--family", choices=list(FAMILIES), default="olmoe")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--experts", type=int, default=16, help="experts of every MoE layer")
    parser.add_argument("--packages", action="store_true", help="code and manuals too, also of installed packages")
    parser.add_argument("--steps", type=int, default=3200, help="at least 3")
    parser.add_argument(
        "--minutes", type=float, help="end after this CPU time at the latest; the learning rate falls in time"
    )
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def main() -> None:
    wanted = parse()
    # One thread, so that sums are taken in the same order on every machine.
    torch.set_num_threads(1)
    torch.manual_seed(wanted.seed)
    folder: Path = wanted.output
    folder.mkdir(parents=True, exist_ok=True)
    parts = documents(packages=wanted.packages)
    files = write_text(parts, folder, wanted)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    training, heldout = (encoded(parts[part], tokenizer) for part in ("training", "heldout"))
    sizes = Counter(document.domain for document in parts["training"])
    print(f"training: {dict(sizes)} documents, {sum(map(len, training))} tokens", flush=True)
    model = untrained(tokenizer, wanted.family, wanted.size, experts=wanted.experts, length=2 * LENGTH)
    print(f"{wanted.family}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters")
    unseen = epoch(heldout, torch.Generator().manual_seed(wanted.seed))[:32]
    print(f"unigram perplexity {unigram_perplexity(training, unseen, len(tokenizer)):.1f}", flush=True)
    train(model, training, unseen, wanted)
    model.config.output_router_logits = False
    model.bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    report(folder, files)


if __name__ == "__main__":
    main()
