"""All tables at once: foreign keys name their target's table, which must be known by the time a statement runs."""

from core.tables import base, exports, files, jobs, models, projects, webhooks

metadata = base.Table.metadata

__all__ = ["exports", "files", "jobs", "metadata", "models", "projects", "webhooks"]
