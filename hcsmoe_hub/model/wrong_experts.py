"""NLLB-MoE in versions of transformers that take the router's mask for expert numbers, and so run the wrong experts.

transformers 5.23 is one: every token runs through experts 0 and 1, whatever the router chooses. Models were trained, by
fairseq and by transformers 4, with the experts that have a weight.
"""

from functools import cache

import torch
import transformers
from transformers import NllbMoeConfig, PreTrainedModel

from hcsmoe_hub.checkpoint.auto_class import WRONG_EXPERTS
from hcsmoe_hub.checkpoint.modeling_hcsmoe import expert_modules, tie_experts
from hcsmoe_hub.model.transformers_seam import nllb_block

MODEL_TYPE = "nllb-moe"


@cache
def runs_wrong_experts() -> bool:
    """Whether the installed version of transformers runs other experts than the router of NLLB-MoE chooses.

    Tried on one token and three experts, of which the router chooses the last two.
    """
    config = NllbMoeConfig(d_model=2, num_experts=3, router_bias=True, moe_token_dropout=0.0)
    # Building a module draws random numbers, which others count on.
    with torch.random.fork_rng(devices=[]):
        block = nllb_block(config, 2).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.router.classifier.bias.copy_(torch.tensor([-100.0, 0.0, 0.0]))
        # What expert 0 adds must not be seen.
        block.experts["expert_0"].fc2.bias.fill_(1.0)
        return bool(block(torch.ones(1, 1, 2)).any())


def wrong_experts_warning(model_type: str) -> str | None:
    """What to say about plain checkpoints of a model type that the installed transformers runs wrongly, if it does."""
    if model_type != MODEL_TYPE or not runs_wrong_experts():
        return None
    return (
        f"transformers {transformers.__version__} {WRONG_EXPERTS} of an NLLB-MoE model, whatever its router chooses. "
        "hcsmoe computes with the chosen experts; to generate text, load the result with transformers 4, or convert "
        "with `layout='mapped'`, whose modelling file runs them."
    )


def run_chosen_experts(model: PreTrainedModel) -> None:
    """Lets a loaded model of plain transformers run the experts that its router chooses; others stay as they are.

    Args:
        model: With all of its weights.
    """
    if model.config.model_type == MODEL_TYPE and runs_wrong_experts():
        modules = expert_modules(model)
        tie_experts(model, {layer: range(experts.num_experts) for layer, experts in modules.items()})
