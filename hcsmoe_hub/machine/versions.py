"""Versions of this program and of the libraries that it uses."""

import platform
from importlib.metadata import version
from importlib.util import find_spec

LIBRARIES = ("torch", "transformers", "accelerate", "huggingface_hub", "safetensors", "scipy", "numpy")


def tool() -> dict[str, str]:
    """Name and version of this program."""
    return {"name": "hcsmoe", "version": version("hcsmoe")}


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect the bytes of a result."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def version_of(library: str) -> str:
    """Version of an installed library."""
    return version(library)


def has_matplotlib() -> bool:
    """Whether matplotlib is installed; does not import it."""
    return find_spec("matplotlib") is not None
