"""The result file of a finished job: its metrics as CSV, the customary columns first."""

import csv
import io
from collections.abc import Iterable
from typing import Any

from sqlalchemy import select

from core.database import Database, unix_now
from core.ids import new_id
from core.storage import Storage
from core.tables.files import File
from core.tables.jobs import JobMetrics
from sdft_engine.contract.metrics import StepMetrics

PURPOSE = "fine-tune-results"
FILENAME = "step_metrics.csv"
CUSTOMARY = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}
"""Column to the field of StepMetrics that it shows."""


def store_result_file(database: Database, storage: Storage, project_id: str, job_id: str) -> File:
    """Write the CSV to storage. Returns its row, which the caller adds with the job's success."""
    with database.reading() as session:
        rows = session.scalars(select(JobMetrics.metrics).where(JobMetrics.job_id == job_id).order_by(JobMetrics.step)).all()
    content = metrics_as_csv(rows)
    file_id = new_id("file")
    writer = storage.open_writer(f"files/{file_id}")
    try:
        writer.write(content)
        stored = writer.commit()
    finally:
        writer.abort()
    return File(
        id=file_id,
        project_id=project_id,
        filename=FILENAME,
        purpose=PURPOSE,
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        storage_key=stored.key,
        created_at=unix_now(),
    )


def metrics_as_csv(rows: Iterable[dict[str, Any]]) -> bytes:
    """One line a step, in order; what was not measured stays empty."""
    ours = [name for name in StepMetrics.model_fields if name not in CUSTOMARY.values()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*CUSTOMARY, *ours])
    for metrics in rows:
        writer.writerow([metrics.get(name) for name in [*CUSTOMARY.values(), *ours]])
    return text.getvalue().encode()
