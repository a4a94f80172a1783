"""Tuned models that tests begin with, their adapters in storage."""

from typing import Any

from core.archives import store_directory
from core.database import unix_now
from core.ids import new_token
from core.tables.models import Model
from sdft_engine.contract.run_directory import Attestation, AttestationProbe
from tests.api.inference_stub import ADAPTER
from tests.api.serving import Api
from tests.fixtures.scripted_model import logps
from tests.rows import add_job

PROBE = [1, 2, 3, 4]


def add_model(api: Api, model_id: str, *, project_id: str | None = None, status: str = "servable", parent: str | None = None, **columns: Any) -> Model:
    owner = project_id or api.project_id
    serving_name = new_token()
    adapter_dir = api.settings.data_dir / f"adapter-{serving_name}"
    adapter_dir.mkdir(parents=True)
    (adapter_dir / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter_dir / "adapter_model.safetensors").write_bytes(serving_name.encode() * 5000)
    probe = AttestationProbe(token_ids=PROBE, adapter_logps=logps(ADAPTER, PROBE), base_logps=logps(None, PROBE))
    (adapter_dir / "attestation.json").write_text(Attestation(dtype="float32", probes=[probe]).model_dump_json())
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
