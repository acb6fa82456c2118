"""Settings of the libraries below that must be made before they are imported."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


def prepare_libraries() -> None:
    """Switches off progress bars and all logs but errors, and huge pages on; a variable that the user has set wins.

    The environment comes first: datasets and huggingface_hub read it when they are imported, and the fresh process of
    ``verify`` inherits it.
    """
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    # Large tensors on huge pages: a layer that comes and goes then costs far fewer page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keeps the garbage collector from going through what will never be garbage.

    The libraries and the models' skeletons are a million objects that live as long as the process.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
