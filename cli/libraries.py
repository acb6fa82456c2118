"""Keeps the libraries below from talking into the output of a command."""

import os


def silence_libraries() -> None:
    """Switches off progress bars and all logs but errors; a variable that the user has set wins.

    The environment comes first: datasets and huggingface_hub read it when they are imported, and the fresh process of
    ``verify`` inherits it.
    """
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    from transformers.utils import logging

    logging.disable_progress_bar()
