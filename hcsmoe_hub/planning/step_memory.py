"""How much memory the steps of one layer take besides its forward pass, where the layer runs: from shapes alone.

Steps follow each other, so the peak is that of the largest. Where less is free they go on in smaller pieces; these are
the bytes of the fastest way. T calibration tokens, K experts per token, C experts of the result, I and J neurons of an
expert of the result and of the source, H hidden size.
"""

from hcsmoe_hub.methods.clustering.energies import ENERGY_CHUNK, ENERGY_TOKENS
from hcsmoe_hub.methods.refit.cost import FittedLayer
from hcsmoe_hub.methods.refit.down_projections import KEPT_BYTES
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.options import Align, Linkage, Merge, Refit
from hcsmoe_hub.planning.compression_cost import compression_bytes
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.layer_sizes import Memory, at_work, kept_parameters, matrices

# Tokens of a step of a descent, of a chunk that judges it, and of a chunk of the equations of down projections.
STEP_TOKENS, JUDGED_TOKENS, CHUNK_TOKENS = 512, 2048, 4096
# Tokens that a router is fitted to.
ROUTER_TOKENS = 16384
# The share of the tokens that is fitted.
_FITTED = 7 / 8
# Bytes per pair of neurons: similarity in float32; on the host its copy in float64 and the assignment (measured).
_SIMILARITY_BYTES, _ASSIGNMENT_BYTES = 4, 21
# Copies of the hidden activations of one expert while the energies of its neurons are added up.
_ENERGY_COPIES = 4


def step_memory(plan: ConversionPlan) -> Memory:
    """The peak of all steps: energies, matching of neurons, refit, fit of the router, factors."""
    steps = (_energy_bytes(plan), _router_bytes(plan), compression_bytes(plan))
    return at_work(plan, max(steps)) | _matching(plan) | _refit(plan)


def fitted_layer(plan: ConversionPlan) -> FittedLayer:
    """Sizes of a layer that is refitted."""
    return FittedLayer(
        hidden=plan.model.skeleton.text_config.hidden_size,
        neurons=plan.width,
        experts=plan.experts,
        top_k=plan.settings.experts_per_token,
        tokens=plan.calibration.tokens,
        matrices=matrices(plan),
    )


def _refit(plan: ConversionPlan) -> Memory:
    """Memory for a refit: its own experts, its tokens, and what its equations or its optimiser need."""
    match plan.recipe.refit:
        case Refit.DOWN:
            return _down(plan, fitted_layer(plan))
        case Refit.BLOCK | Refit.MODEL:
            return _block(plan, fitted_layer(plan))
        case _:
            return Memory()


def _with_states(plan: ConversionPlan, nbytes: int) -> Memory:
    """Bytes for inputs and outputs of a block, which are fitted where hidden states are kept."""
    return Memory(device=nbytes) if plan.keeps_states_on_device else Memory(host=nbytes)


def _down(plan: ConversionPlan, layer: FittedLayer) -> Memory:
    itemsize, neurons, hidden, tokens = plan.model.skeleton.dtype.itemsize, layer.neurons, layer.hidden, layer.tokens
    parameters = kept_parameters(plan) // len(plan.model.blocks)
    # As they are and in float32: while they are joined, and while parts of them are fitted.
    states = int(tokens * hidden * max(4 * itemsize + 8, 2.9 * itemsize + 11))
    features = int(4 * _FITTED * tokens * layer.top_k) * neurons
    room = KEPT_BYTES if plan.device_room is None else plan.device_room // 4
    # What is kept where little is free is computed again.
    kept = sum(size for size in (features, 8 * layer.experts * neurons**2) if size <= room)
    if plan.on_device and not plan.keeps_states_on_device:
        kept = 0
    # Gram matrix and factor; right-hand side and solution of one expert; a chunk of features; the projections so far.
    equations = 20 * neurons**2 + 16 * neurons * hidden + 16 * min(CHUNK_TOKENS, tokens * layer.top_k) * neurons
    fitted = 4 * parameters + kept + equations + 4 * layer.experts * neurons * hidden
    return at_work(plan, fitted) + _with_states(plan, states)


def _block(plan: ConversionPlan, layer: FittedLayer) -> Memory:
    itemsize, neurons, hidden = plan.model.skeleton.dtype.itemsize, layer.neurons, layer.hidden
    # A number in the matrix products is a copy where these are not in float32.
    copy = itemsize if itemsize < 4 else 0
    parameters = kept_parameters(plan) // len(plan.model.blocks)
    rows = layer.top_k * max(2 * min(STEP_TOKENS, layer.tokens), min(JUDGED_TOKENS, layer.tokens))
    # Parameters, gradient and two moments in float32, and what one step computes.
    fitted = (16 + copy) * parameters + 16 * layer.experts * hidden
    fitted += rows * (itemsize * (hidden + 4 * neurons) + 8 * hidden)
    best = itemsize * parameters
    return (
        at_work(plan, fitted)
        + (Memory(host=best) if plan.experts_on_host else at_work(plan, best))
        + _with_states(plan, 2 * itemsize * layer.tokens * hidden)
    )


def _router_bytes(plan: ConversionPlan) -> int:
    if not plan.recipe.fits_router:
        return 0
    hidden = plan.model.skeleton.text_config.hidden_size
    return 4 * min(ROUTER_TOKENS, plan.calibration.tokens) * (2 * hidden + 4 * plan.experts)


def _matching(plan: ConversionPlan) -> Memory:
    """Memory for comparing the neurons of one cluster with each other, in the worst case.

    They are compared where the layer is, two experts at a time, and matched on the host. ZipIt holds one float32 matrix
    over all neurons of a cluster there, which can have as many members as experts are merged away, and one more.
    """
    recipe, experts, neurons = plan.recipe, plan.model.settings.experts, neurons_of(plan.model)
    hidden = plan.model.skeleton.text_config.hidden_size
    # Features of a neuron: what it does on the sampled tokens, or its weights.
    features = max(plan.feature_tokens, matrices(plan) * hidden)
    if recipe.merge is Merge.ZIPIT:
        members = min(experts - plan.experts + 1, recipe.max_cluster_size or experts)
        compared = 4 * neurons**2 + 4 * (members + 2) * features * neurons
        return at_work(plan, compared) + Memory(host=4 * (members * neurons) ** 2)
    if recipe.features is None and recipe.align in (None, Align.NONE):
        return Memory()
    compared = _SIMILARITY_BYTES * neurons**2 + 4 * 4 * features * neurons
    return at_work(plan, compared) + Memory(host=_ASSIGNMENT_BYTES * neurons**2)


def _energy_bytes(plan: ConversionPlan) -> int:
    """Memory for the energies of neurons, and for what clusters of them have added up."""
    if not plan.recipe.needs_energies:
        return 0
    experts, neurons = plan.model.settings.experts, neurons_of(plan.model)
    tables = (2 if plan.recipe.linkage is Linkage.LOSS else 1) * 4 * experts**2 * neurons
    hidden = plan.model.skeleton.text_config.hidden_size * plan.model.skeleton.dtype.itemsize
    tokens = min(ENERGY_TOKENS, plan.calibration.tokens)
    return tables + _ENERGY_COPIES * 4 * min(ENERGY_CHUNK, tokens * neurons) + tokens * hidden
