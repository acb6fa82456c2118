"""Quantises a GGUF file with the libllama of the wheel ``llama-cpp-py-sync``, as the program ``llama-quantize`` does.

Run by a Python that has the wheel, which needs glibc 2.38: python benchmarks/llama_quantize.py IN.gguf OUT.gguf Q4_K_M
"""

import sys

from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib


def quantize(source: str, target: str, name: str) -> None:
    """Quantises a file.

    Args:
        source: GGUF file in float32, float16 or bfloat16.
        target: File to write.
        name: One of llama.cpp's formats of files, such as ``Q4_K_M``.

    Raises:
        SystemExit: If llama.cpp could not.
    """
    ffi, lib = get_ffi(), get_lib()
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.nthread = 1
    settings = ffi.new("llama_model_quantize_params *", params)
    if lib.llama_model_quantize(source.encode(), target.encode(), settings) != 0:
        raise SystemExit(f"llama.cpp could not quantise {source} to {name}.")


if __name__ == "__main__":
    quantize(*sys.argv[1:4])
