"""The shape of ``hcsmoe-evaluation.json``: every kind of measure, with the keys that cards and later runs rely on."""

# Pydantic takes those of Python itself from 3.12 on.
from typing import NotRequired

from typing_extensions import TypedDict

from hcsmoe_hub.report import Tool


class Checkpoint(TypedDict):
    """Which checkpoint was measured; its fingerprint identifies its weights."""

    repo_id: NotRequired[str | None]
    path: NotRequired[str | None]
    revision: NotRequired[str | None]
    fingerprint: NotRequired[str | None]


class Measured(TypedDict):
    """The checkpoint that the measures of a file belong to."""

    fingerprint: str


class File(TypedDict):
    """The text or the questions that were used."""

    name: str
    sha256: str
    tokens: int


class Settings(TypedDict):
    """Where a measure was computed, and in which precision."""

    dtype: str
    device: str


class WindowSettings(Settings):
    """The same of text that was cut into windows of so many tokens, or of targets that were predicted from sources."""

    window: int
    predicts: NotRequired[str]


class LoopSettings(Settings):
    """The same of greedy continuations; sources that an encoder reads have as many tokens as they have."""

    prompt_tokens: NotRequired[int]
    continuation_tokens: int


class TaskSettings(Settings):
    """The same of tasks of lm-eval, and how many questions of each were asked if not all."""

    tasks: list[str]
    limit: NotRequired[int]


class TextRow(TypedDict):
    """Perplexity per token."""

    perplexity: float
    tokens: int


class AgreementRow(TypedDict):
    """Kullback-Leibler divergence from the base model in nats, and the share of equal most likely tokens."""

    kl: float
    top1_agreement: float
    tokens: int


class ChoiceRow(TypedDict):
    """Share of questions answered right, with its standard error."""

    accuracy: float
    accuracy_stderr: float | None
    items: int


class LoopRow(TypedDict):
    """Share of continuations that end in a loop, with its standard error."""

    loop_rate: float
    loop_rate_stderr: float | None
    prompts: int


class TextTable(TypedDict):
    """Perplexity of everything, and of each domain."""

    overall: TextRow
    domains: dict[str, TextRow]


class AgreementTable(TypedDict):
    """Agreement on everything, and on each domain."""

    overall: AgreementRow
    domains: dict[str, AgreementRow]


class ChoiceTable(TypedDict):
    """Accuracy on everything, and on each domain."""

    overall: ChoiceRow
    domains: dict[str, ChoiceRow]


class LoopTable(TypedDict):
    """Loops of everything, and of each domain."""

    overall: LoopRow
    domains: dict[str, LoopRow]


class TaskTable(TypedDict):
    """Metrics by task, and the mean accuracy where every task has one."""

    tasks: dict[str, dict[str, float | None]]
    average: float | None


class Spread(TypedDict):
    """Median and range of repeated runs."""

    median: float
    min: float
    max: float


class Rate(TypedDict):
    """How long so many tokens took, and how many of them there were per second."""

    seconds: Spread
    tokens_per_second: Spread


class Throughput(TypedDict):
    """Throughput of one batch size."""

    prefill: Rate
    decode: Rate


class PeakMemory(TypedDict):
    """Bytes of a fresh process before it loaded the model, and peak bytes by batch size."""

    process: int
    batches: dict[str, int]


class CostFigures(TypedDict):
    """What one model costs; where a figure is ``None``, the entry ending in ``_problem`` says why."""

    parameters: int
    active_parameters: int | None
    embedding_parameters: int
    disk_bytes: int
    memory_bytes: int
    prefill_flops: int | None
    decode_flops: int | None
    is_attention_masked: bool | None
    flops_problem: str | None
    throughput: dict[str, Throughput] | None
    throughput_problem: str | None
    peak_memory: PeakMemory | None
    peak_memory_problem: str | None


class CostSettings(Settings):
    """How cost was counted and measured; ``order`` is that in which two models ran."""

    engine: str
    machine: str
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    batch_sizes: list[int]
    timing: bool
    order: str | None
    attention: NotRequired[str]
    experts: NotRequired[str]


class Measure(TypedDict):
    """What every measure records: the model it was compared with, and the libraries."""

    base_model: NotRequired[Checkpoint | None]
    versions: dict[str, str]


class Perplexity(Measure):
    """Perplexity of a text."""

    file: File
    settings: WindowSettings
    model: TextTable
    base: NotRequired[TextTable | None]


class Agreement(Measure):
    """Agreement with the base model on a text."""

    file: File
    settings: WindowSettings
    model: AgreementTable


class Choices(Measure):
    """Multiple choice."""

    file: File
    settings: Settings
    model: ChoiceTable
    base: NotRequired[ChoiceTable | None]


class Loops(Measure):
    """Greedy continuations that end in a loop."""

    file: File
    settings: LoopSettings
    model: LoopTable
    base: NotRequired[LoopTable | None]


class TaskVersions(TypedDict):
    """The version of lm-eval that the tasks come from."""

    lm_eval: str


class Tasks(TypedDict):
    """Tasks of lm-eval."""

    base_model: NotRequired[Checkpoint | None]
    versions: TaskVersions
    settings: TaskSettings
    model: TaskTable
    base: NotRequired[TaskTable | None]


class Cost(Measure):
    """What it costs to run the model."""

    settings: CostSettings
    model: CostFigures
    base: NotRequired[CostFigures | None]


class Measures(TypedDict, total=False):
    """Measures by kind."""

    perplexity: Perplexity
    agreement: Agreement
    choices: Choices
    loops: Loops
    tasks: Tasks
    cost: Cost


class Evaluation(TypedDict):
    """The whole file."""

    schema_version: int
    tool: Tool
    model: Measured
    measures: Measures
