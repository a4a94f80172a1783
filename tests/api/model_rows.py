"""Tuned models that tests begin with, their adapters in storage."""

from typing import Any

from core.archives import store_directory
from core.database import unix_now
from core.ids import new_token
from core.tables.models import Model
from tests.api.serving import Api
from tests.rows import add_job


def add_model(api: Api, model_id: str, *, project_id: str | None = None, status: str = "servable", parent: str | None = None, **columns: Any) -> Model:
    owner = project_id or api.project_id
    serving_name = new_token()
    adapter_dir = api.settings.data_dir / f"adapter-{serving_name}"
    adapter_dir.mkdir(parents=True)
    (adapter_dir / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter_dir / "adapter_model.safetensors").write_bytes(serving_name.encode() * 5000)
    stored = store_directory(api.state.storage, f"models/{serving_name}.tar.gz", adapter_dir, api.settings.data_dir)
    model = Model(
        id=model_id,
        project_id=owner,
        job_id=add_job(api.database, owner, "cancelled"),
        base_model=columns.pop("base_model", "tiny"),
        parent_model=parent,
        status=status,
        serving_name=serving_name,
        storage_key=stored.key,
        archive_bytes=stored.size_bytes,
        archive_sha256=stored.sha256,
        created_at=columns.pop("created_at", unix_now()),
        **columns,
    )
    with api.database.transaction() as session:
        session.add(model)
    return model
