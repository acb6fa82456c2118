"""How much memory a conversion takes at its peak, on the host and on the accelerator, from shapes alone.

Bytes are counted in the phase in which they coexist, where they are then. On the host everything is in one memory.
T calibration tokens, E source experts, K experts of the result, I and W their neurons, H hidden size.
"""

from collections.abc import Iterator

from hcsmoe_hub.calibration.measured import MEASURED_TOKENS
from hcsmoe_hub.model.width import neurons_of
from hcsmoe_hub.observation.visits import CHUNK_ELEMENTS, choice_elements
from hcsmoe_hub.planning.conversion_plan import ConversionPlan
from hcsmoe_hub.planning.layer_sizes import LayerSizes, Memory, at_work, layer_sizes, matrices, measured_tokens
from hcsmoe_hub.planning.model_refit import model_refit_bytes
from hcsmoe_hub.planning.step_memory import step_memory

# Resident size of a Python process that has imported torch and transformers and run a first layer, without weights.
PROCESS_BYTES = 480_000_000
# What reading text adds: the datasets library, Arrow and the tokenizer.
TEXT_BYTES = 150_000_000
# Experts are read to their places; transformers holds all other tensors twice while it converts them.
CONVERTED = 2
# Hidden-sized values per token of a micro-batch while a layer runs, one expert after the other.
ACTIVATIONS = 16
# The same around experts that run all at once, some tokens at a time.
GROUPED_ACTIVATIONS = 6
# Copies of the scores of one head between all tokens of a sequence, where attention is computed as it is written down.
SCORES = 4
# Pinned buffers through which weights go to an accelerator, and results come back.
STAGING_BYTES = 4 * 32_000_000
# Sets of hidden states: input and output of the layer, input of its MoE block, and what its experts returned.
STATES = 4
# Predictions of both models, and their logarithms in float64: bytes per token and entry of the vocabulary.
LOGIT_BYTES = 48
# Memory that predictions may take at a time.
LOGITS_BYTES = 256_000_000


def memory_use(plan: ConversionPlan) -> Memory:
    """The peak of a conversion."""
    sizes = layer_sizes(plan)
    process = Memory(host=PROCESS_BYTES + (0 if plan.calibration.is_token_ids else TEXT_BYTES))
    if plan.on_device:
        # What is written waits on the host for the disk.
        process += Memory(host=STAGING_BYTES + sizes.merged)
    rest = Memory(host=sizes.rest)
    converting = Memory()
    for phase in _phases(plan, sizes):
        converting |= phase
    converting += rest
    # The layers are gone when the head runs, and when a training begins.
    training, kept = model_refit_bytes(plan, plan.width)
    after = (rest + _states(plan, sizes) + _head(plan)) | (Memory(host=kept) + at_work(plan, training))
    return process + (converting | after)


def _phases(plan: ConversionPlan, sizes: LayerSizes) -> Iterator[Memory]:
    """What is in memory in each phase of the largest layer, besides what is outside the layers."""
    states = _states(plan, sizes)
    others, experts = at_work(plan, sizes.others), _experts(plan, sizes.experts)
    current = others + experts
    if plan.experts_on_host:
        # One expert at work, and the next one on its way.
        current += Memory(device=2 * sizes.experts // plan.model.settings.experts)
    result = _experts(plan, sizes.merged)
    loading = at_work(plan, CONVERTED * sizes.others) + experts
    # The experts of the last layer are being written meanwhile.
    yield states + current + loading + result + at_work(plan, activation_bytes(plan))
    both = current + others + experts
    merged = both + result + _experts(plan, encoding_bytes(plan, sizes.merged))
    # The block of the result, where it runs in another dtype than it is written in, or on another device.
    reduced = merged + at_work(plan, sizes.merged if plan.experts_on_host else sizes.reduced)
    yield reduced + step_memory(plan) + (_held_out(plan, sizes) if _converts_apart(plan) else states)
    if plan.recipe.propagates:
        yield states + reduced + at_work(plan, activation_bytes(plan))


def _experts(plan: ConversionPlan, nbytes: int) -> Memory:
    """Bytes where the experts of a layer are kept."""
    return Memory(host=nbytes) if plan.experts_on_host else at_work(plan, nbytes)


def _states(plan: ConversionPlan, sizes: LayerSizes) -> Memory:
    """Hidden states of the calibration set in one model or both, and of held-out tokens in both."""
    sets = (2 if plan.recipe.propagates else 1) * STATES * plan.calibration.tokens
    return _kept(plan, sets * sizes.token) + _held_out(plan, sizes)


def _held_out(plan: ConversionPlan, sizes: LayerSizes) -> Memory:
    """Hidden states of held-out tokens in both models: only input and output of the layer."""
    return _kept(plan, 4 * measured_tokens(plan) * sizes.token)


def _kept(plan: ConversionPlan, nbytes: int) -> Memory:
    """Bytes where hidden states are kept."""
    return Memory(device=nbytes) if plan.keeps_states_on_device else Memory(host=nbytes)


def _converts_apart(plan: ConversionPlan) -> bool:
    """Whether layers are converted in a pass of their own, from sums over the calibration sequences and a sample."""
    is_apart = not plan.is_final and plan.statistics is None
    return is_apart and not (plan.works_on_tokens or plan.recipe.propagates or plan.keeps_states)


def activation_bytes(plan: ConversionPlan) -> int:
    """Memory for one micro-batch while it runs through a layer."""
    config, itemsize = plan.model.skeleton.text_config, plan.model.skeleton.dtype.itemsize
    tokens = min(plan.batch_tokens, plan.calibration.tokens)
    choices = tokens * plan.model.settings.experts_per_token
    values = tokens * config.hidden_size
    found = ACTIVATIONS * values * itemsize + _score_bytes(plan, tokens)
    if plan.on_device and not plan.experts_on_host:
        neurons = neurons_of(plan.model)
        a_choice = choice_elements(config.hidden_size, neurons, (matrices(plan) - 1) * neurons)
        chunk = min(max(CHUNK_ELEMENTS, plan.model.settings.experts_per_token * a_choice), choices * a_choice)
        return max(found, itemsize * (GROUPED_ACTIVATIONS * values + chunk))
    # The outputs of all choices, whose products are added up.
    return found + (4 * choices * config.hidden_size if plan.needs_gram or plan.writes_statistics else 0)


def _score_bytes(plan: ConversionPlan, tokens: int) -> int:
    """Memory for the attention of an encoder and a decoder, of which no implementation of transformers saves scores."""
    config, source = plan.model.skeleton.text_config, plan.calibration.source_length
    length = plan.calibration.sequence_length
    if not source:
        return 0
    sequences = max(1, tokens // length)
    pairs = max(source * source, (length - source) * length)
    return SCORES * sequences * int(config.num_attention_heads) * pairs * plan.model.skeleton.dtype.itemsize


def _head(plan: ConversionPlan) -> Memory:
    """Memory for comparing predictions at the end: the head, where it runs on a device, and some logits."""
    if not measured_tokens(plan):
        return Memory()
    config = plan.model.skeleton.text_config
    head = config.vocab_size * config.hidden_size * plan.model.skeleton.dtype.itemsize if plan.on_device else 0
    return at_work(plan, head + LOGIT_BYTES * config.vocab_size * min(logit_tokens(config.vocab_size), MEASURED_TOKENS))


def logit_tokens(vocabulary: int) -> int:
    """Tokens whose predictions are compared at a time.

    Args:
        vocabulary: Number of logits.
    """
    return max(16, LOGITS_BYTES // (LOGIT_BYTES * vocabulary))


def encoding_bytes(plan: ConversionPlan, experts_bytes: int) -> int:
    """Memory for the experts of a layer in the format of the source: their parts, and what is decoded from them.

    Args:
        plan: The conversion.
        experts_bytes: Bytes of these experts in the dtype of the model.
    """
    # In between, stored tensors are taken out of those of the model and put together again.
    return 3 * experts_bytes if plan.keeps_format else 0
