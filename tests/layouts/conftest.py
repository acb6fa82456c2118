"""Loading code that lies in a checkpoint leaves traces in transformers; here they end with each file of tests."""

import sys
from collections.abc import Iterator

import pytest
from transformers import dynamic_module_utils
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)


@pytest.fixture(scope="module", autouse=True)
def own_modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps copied modelling files out of the user's cache, and their classes out of the auto classes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING):
            patch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
        yield
