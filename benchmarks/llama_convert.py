"""Runs llama.cpp's ``convert_hf_to_gguf.py`` without a tokenizer: the benchmark needs the tensors alone.

Run: python benchmarks/llama_convert.py LLAMA_CPP MODEL --outfile OUT.gguf --outtype bf16

The converter refuses a BPE tokenizer whose pre-tokenizer is not in its list, and llama.cpp's quantiser reads none.
"""

import sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv.pop(1))
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    from conversion.base import TextModel
    from conversion.llama import LlamaModel
    from convert_hf_to_gguf import main as convert

    for kind in (TextModel, LlamaModel):
        kind.set_vocab = TextModel._set_vocab_none
    convert()


if __name__ == "__main__":
    main()
