"""A model on every inference server that can be reached: loaded, and compared with what its trainer measured."""

import hashlib
import math
from functools import partial

from core.base_models import BaseModelEntry
from core.database import unix_now
from core.errors import InferenceFailed, InferenceUnavailable
from core.inference_client import AdapterRefused, InferenceClient
from core.logging import get_logger
from core.served_adapters import load_proved
from core.tables.models import Model
from sdft_engine.contract.prompts import template_source
from sdft_engine.contract.served_attestation import Verdict, compare_served
from worker.interruptible import side_by_side
from worker.resources import Resources

log = get_logger(__name__)


def prove_on_servers(resources: Resources, model: Model) -> Verdict:
    """The verdict on the model, with what identifies model, base and chat template in its record: good where a server proved itself,
    because no other ever answers for the model. One that could not be asked proves itself when it is asked for the model later.

    Raises InferenceUnavailable, InferenceFailed or AdapterRefused where none could be asked; ObjectDamaged, FileNotFoundError,
    StorageUnavailable or StorageFull.
    """
    clients = resources.inference.clients
    answers = side_by_side(partial(_prove, resources, model), clients)
    verdicts = [answer for answer in answers if isinstance(answer, Verdict)]
    if not verdicts:
        raise next(answer for answer in answers if isinstance(answer, Exception))
    good = [verdict for verdict in verdicts if verdict.reason is None]
    worst = max(good or verdicts, key=_furthest_off)
    record = worst.record | {
        "servers": len(good),
        "base_model": model.base_model,
        **_identity_of(resources, model.base_model),
        "archive_sha256": model.archive_sha256,
        "checked_at": unix_now(),
    }
    return Verdict(worst.reason, record)


def _furthest_off(verdict: Verdict) -> float:
    difference: float | None = verdict.record["largest_difference"]
    return math.inf if difference is None else difference  # JSON has no infinity


def _prove(resources: Resources, model: Model, client: InferenceClient) -> Verdict | InferenceUnavailable | InferenceFailed | AdapterRefused:
    settings = resources.settings
    try:
        verdict = load_proved(model, resources.storage, settings.served_adapters_dir, client, compare_served, settings.attestation_tolerance)
    except (InferenceUnavailable, InferenceFailed, AdapterRefused) as error:
        log.warning("server_not_compared", model=model.id, server=client.url, error=str(error))
        return error
    if verdict.reason is not None:
        log.error("served_model_differs", model=model.id, server=client.url, reason=verdict.reason)
    return verdict


def _identity_of(resources: Resources, base_model: str) -> dict[str, str | None]:
    """What the base model was made from, and its chat template, by which prompts of training and of serving are the same."""
    entry: BaseModelEntry | None = resources.settings.base_model(base_model)
    if entry is None:
        return {}
    template = template_source(entry.directory(resources.settings.cache_dir))
    return {
        "base_source": entry.source,
        "base_revision": entry.revision,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if template is not None else None,
    }
