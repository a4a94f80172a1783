"""All tables at once: foreign keys name their target's table, which must be known by the time a statement runs."""

from core.tables import audit, base, exports, files, idempotency, jobs, models, projects, webhooks, workers

metadata = base.Table.metadata

__all__ = ["audit", "exports", "files", "idempotency", "jobs", "metadata", "models", "projects", "webhooks", "workers"]
