"""What tables and pages say of a run in a sentence, from the data of `coordinator.report`."""

from __future__ import annotations

from typing import Any

from storage.recovery import RECORD_NAME
from storage.rundir import METRICS_NAME


def missing_sentence() -> str:
    """Where the figures are from if the record is not there."""
    return (
        f"{RECORD_NAME} is gone, and with it the answers. These figures are those of {METRICS_NAME}, which was made "
        "when it was there"
    )


def energy_sentence(used: dict[str, Any]) -> str:
    """What the GPUs used, in all and for an output token."""
    gpus = "1 GPU" if used["gpus"] == 1 else f"{used['gpus']} GPUs"
    each = used["joules_per_output_token"]
    a_token = "no output tokens" if each is None else f"{each:.3g} J an output token ({used['output_tokens']:,} tokens)"
    return f"energy: {used['joules']:,.0f} J on {gpus} · {a_token} · from {used['from']}"


def collectives_sentence(took_part: str) -> str:
    """Who was asked for the metrics at the end, if not all ranks; '' if all."""
    if " of " in took_part:
        return f"metrics: {took_part} took part in the collectives; what the others did is from the record"
    return f"collectives: {took_part}" if took_part.startswith("none") else ""


def uncounted_sentence(data: dict[str, Any]) -> str:
    """What the counters of ranks lack."""
    return (
        f"counters: {data['uncounted']:,} of {data['requests']:,} recorded requests are in no rank's. A job that is "
        "killed leaves those up to its last interval, or none (--metrics-interval)"
    )


def unread_sentence(data: dict[str, Any]) -> str:
    """What could not be read of the measurements."""
    return (
        f"measurements: {data['unread_segment_bytes']:,} bytes in metrics.d are damaged, or a job was killed while it "
        "wrote them. Telemetry, gaps between tokens or counters of ranks lack what was there"
    )
