"""Which of transformers' auto classes loads a checkpoint, and for which task."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AutoClass:
    """How checkpoints of a kind are loaded and listed.

    Attributes:
        name: The auto class of transformers.
        task: What the Hub lists them under.
    """

    name: str
    task: str


CAUSAL = AutoClass("AutoModelForCausalLM", "text-generation")
# Model types with an encoder and a decoder.
ENCODER_DECODER = {
    "nllb-moe": AutoClass("AutoModelForSeq2SeqLM", "translation"),
    "switch_transformers": AutoClass("AutoModelForSeq2SeqLM", "text2text-generation"),
}
# In the warning about versions of transformers that run NLLB-MoE wrongly, by which a card finds it in the report.
WRONG_EXPERTS = "runs experts 0 and 1 only"


def auto_class(model_type: str) -> AutoClass:
    """How checkpoints of a model type are loaded, sources and results alike."""
    return ENCODER_DECODER.get(model_type, CAUSAL)


def loading(place: str, model_type: str, *, revision: str | None = None, runs_code: bool = False) -> str:
    """The expression that loads a checkpoint.

    Args:
        place: Its folder or repository.
        model_type: As in its config.
        revision: Branch or commit of the repository.
        runs_code: Whether it brings a modelling file.
    """
    branch = {} if revision is None else {"revision": revision}
    consent = {"trust_remote_code": True} if runs_code else {}
    named = (f"{name}={value!r}" for name, value in {**branch, **consent}.items())
    return f"{auto_class(model_type).name}.from_pretrained({', '.join([repr(place), *named])})"
