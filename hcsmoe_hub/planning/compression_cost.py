"""What making factors of the expert matrices of a layer will need."""

from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.factored_layout import matrix_sides

# Of the larger side squared, in float64: the Gram matrix, its eigenvectors, both roots, and what the solver works with.
_SQUARES = 6
# Of one matrix, in float64: itself, what the factors miss, and what both give on the inputs.
_MATRICES = 6
# Operations of an eigenvalue decomposition with vectors, by the side cubed.
_EIGEN_FLOPS = 14
# Choices of rows that are tried for a matrix; a guess, as they end when the error no longer falls.
_ROUNDS = 3


def compression_bytes(plan: ConversionPlan) -> int:
    """Memory for decomposing one matrix at a time, and for the tokens that reach its layer."""
    if plan.factors is None:
        return 0
    _, neurons, hidden = matrix_sides(plan.model, plan.model.blocks[0])
    tokens = plan.calibration.tokens * hidden * plan.model.skeleton.dtype.itemsize
    return 2 * tokens + 8 * (_SQUARES * max(neurons, hidden) ** 2 + _MATRICES * neurons * hidden)


def compression_flops(plan: ConversionPlan) -> int:
    """Operations of all layers: Gram matrices, decompositions, and singular values of all experts for the report."""
    if plan.factors is None:
        return 0
    parts, neurons, hidden = matrix_sides(plan.model, plan.model.blocks[0])
    experts, before = plan.experts, plan.model.settings.experts
    rounds = _ROUNDS if plan.factors.incoming_rows else 1
    smaller = min(neurons, hidden)
    grams = 2 * plan.calibration.tokens * plan.settings.experts_per_token * (neurons**2 + hidden**2)
    split = rounds * (_EIGEN_FLOPS * smaller**3 + 6 * neurons * hidden * max(neurons, hidden))
    roots = _EIGEN_FLOPS * (hidden**3 if neurons > hidden else neurons**3)
    spectra = (experts + before) * (parts + 1) * 4 * neurons * hidden * smaller
    return len(plan.experts_by_layer) * (grams + experts * ((parts + 1) * split + roots) + spectra)
