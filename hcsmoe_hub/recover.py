"""Trains a result on the logits of its source, and writes it again.

Importing this module is cheap; torch and transformers are imported when a recovery begins.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hcsmoe_hub.events import EventLog, Listener, Stage, Warned, ignore
from hcsmoe_hub.recovery.options import RecoverOptions
from hcsmoe_hub.report.recovery import RecoveryRecord

if TYPE_CHECKING:
    from hcsmoe_hub.recovery.models import Opened
    from hcsmoe_hub.result.claim import Claim


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """What a recovery did.

    Attributes:
        output: Folder of the recovered result.
        record: The section ``recovery`` of its ``hcsmoe.json``.
        warnings: Messages of all warnings.
    """

    output: Path
    record: RecoveryRecord
    warnings: list[str]

    @property
    def is_better(self) -> bool:
        """Whether training helped; otherwise the result was written as it was."""
        return self.record["kept_step"] > 0


def recover(
    result: str | Path, options: RecoverOptions, *, token: str | None = None, listener: Listener = ignore
) -> RecoveryReport:
    """Trains a result on the logits of its source, and writes it with the weights that score best on held-out text.

    In a process group of ``torch.distributed``, every rank calls this with the same arguments.

    Args:
        result: A result of ``hcsmoe convert``: local folder or Hub repository.
        options: What to train it on, and where it goes.
        token: Hub token; ``None`` uses the stored login.
        listener: Called with every event.

    Returns:
        What was done.

    Raises:
        HcsmoeError: For every known failure. Nothing is left that looks finished; what the same options go on from
            stays in the output folder.
    """
    from hcsmoe_hub.hub.open import open_source
    from hcsmoe_hub.machine import ranks
    from hcsmoe_hub.machine.device import measuring_memory, resolve_device
    from hcsmoe_hub.machine.out_of_memory import explaining
    from hcsmoe_hub.recovery.identity import asked, identity
    from hcsmoe_hub.recovery.lora import check_peft
    from hcsmoe_hub.recovery.models import open_models
    from hcsmoe_hub.recovery.place import check_output, finish_earlier, output_folder, prepare_folder
    from hcsmoe_hub.recovery.room import check_disk
    from hcsmoe_hub.result.claim import noting_what_is_kept

    log, device = EventLog(listener), resolve_device(options.device)
    if options.is_lora:
        check_peft()
    output = output_folder(result, options)
    with ExitStack() as stack:
        ranks.on_first(lambda: check_output(output, options))
        claim = _claim(output, options, stack)
        stack.enter_context(noting_what_is_kept(claim, lambda: log.place))
        if ranks.first(lambda: finish_earlier(claim, asked(result, options), options)):
            return _read_finished(output, log)
        opened = ranks.alike(
            lambda: open_models(
                open_source(str(result), token=token), open_source(str(options.teacher), token=token), log.emit
            )
        )
        ranks.on_first(lambda: check_disk(opened, options, output))
        ranks.on_first(lambda: prepare_folder(claim, identity(result, options, opened), options))
        stack.enter_context(measuring_memory(device))
        stack.enter_context(explaining(device, where=lambda: log.place, helps=lambda: _savings(options)))
        record = _recover(opened, options, claim, log)
        ranks.on_first(lambda: _finish(claim, log))
    return RecoveryReport(output=output, record=record, warnings=log.warnings)


def _savings(options: RecoverOptions) -> list[str]:
    """What takes less memory, as parts of a sentence."""
    found = [] if options.batch_size == 1 else ["a smaller `batch_size` with `gradient_accumulation`"]
    found += [] if options.gradient_checkpointing else ["`gradient_checkpointing`"]
    found += [] if options.is_lora else ["`train='lora'`"]
    found += [] if options.teacher_logits is not None else ["`teacher_logits`"]
    return [*found, "a shorter `sequence_length`"]


def _claim(output: Path, options: RecoverOptions, stack: ExitStack) -> "Claim":
    """Locks the output folder, of which there is one however many ranks take part."""
    from hcsmoe_hub.checkpoint.unfinished import Work
    from hcsmoe_hub.machine import ranks
    from hcsmoe_hub.result.claim import Claim, claim_folder

    claim = Claim(output, Work.RECOVERY)

    def lock() -> "Claim":
        return stack.enter_context(claim_folder(claim, overwrite=options.overwrite, restart=options.restart))

    return ranks.on_first(lock) or claim


def _read_finished(output: Path, log: EventLog) -> RecoveryReport:
    """The report of a recovery whose files an earlier run was moving to their place."""
    from hcsmoe_hub.report import REPORT_FILE
    from hcsmoe_hub.report.read import read_report
    from hcsmoe_hub.result.verify import check_structure

    report = read_report(check_structure(output).source.text(REPORT_FILE), label=str(output / REPORT_FILE))
    assert report.recovery is not None, "its identity is that of a recovery"
    return RecoveryReport(output=output, record=report.recovery, warnings=log.warnings)


def _recover(opened: "Opened", options: RecoverOptions, claim: "Claim", log: EventLog) -> RecoveryRecord:
    """Trains, and writes everything but the card to the folder of the unfinished result."""
    from hcsmoe_hub.checkpoint.unfinished import progress, staging
    from hcsmoe_hub.machine import ranks
    from hcsmoe_hub.recovery.record import make_record
    from hcsmoe_hub.recovery.run import train_result
    from hcsmoe_hub.recovery.text import plan_text, read_text
    from hcsmoe_hub.recovery.writing import changed_tensors, write_recovered

    plan = plan_text(opened.result, options)
    with log.timed(Stage.CALIBRATION, 1):
        text = ranks.alike(lambda: read_text(opened.result, options, plan, log.emit))

    def keep() -> None:
        claim.goes_on = True

    outcome = train_result(opened, text, options, progress(claim.output), log, keep)
    tensors = changed_tensors(opened, outcome.tensors)
    record = make_record(opened, text, options, outcome, changed=len(tensors))
    with log.timed(Stage.VERIFY, 1):
        ranks.on_first(lambda: write_recovered(opened, tensors, record, staging(claim.output)))
    return record


def _finish(claim: "Claim", log: EventLog) -> None:
    """Writes the card, unless a person's own would be lost, and moves the complete result to its place."""
    from hcsmoe_hub.checkpoint.unfinished import staging
    from hcsmoe_hub.errors import OutputError
    from hcsmoe_hub.model_cards import write_card

    try:
        write_card(staging(claim.output), place=claim.output)
    except OutputError as error:
        log.emit(Warned(f"{error.message} It stays as it is; 'hcsmoe card {claim.output} --overwrite' replaces it."))
    claim.commit()
