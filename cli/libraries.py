"""Settings of other libraries: what they print, and what must be decided before they are imported."""

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def prepare_libraries() -> None:
    """Switches off progress bars and logs below errors, and huge pages on; variables that the user has set win.

    The environment comes first: datasets and huggingface_hub read it when they are imported, and the fresh process of
    ``verify`` inherits it.
    """
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    # Large tensors on huge pages: loading and freeing a layer then costs far fewer page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def warnings_hidden() -> Iterator[None]:
    """Keeps the warnings of other libraries off the terminal: they are about code, which a user cannot change.

    ``python -W`` and ``PYTHONWARNINGS`` show them.
    """
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses the garbage collector, and then exempts the objects that were created meanwhile.

    Libraries and model skeletons are a million objects that live as long as the process.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
