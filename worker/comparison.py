"""A model on every inference server that can be reached: loaded, and compared with what its trainer measured."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from core.base_models import BaseModelEntry
from core.database import unix_now
from core.errors import InferenceUnavailable
from core.inference_client import AdapterRefused, InferenceClient
from core.served_adapters import load_into_server
from core.tables.models import Model
from sdft_engine.contract.sealed_directory import file_sha256
from sdft_engine.contract.served_attestation import Verdict, compare_served
from worker.resources import Resources

CHAT_TEMPLATE_NAME = "chat_template.jinja"


def prove_on_servers(resources: Resources, model: Model) -> Verdict:
    """The verdict on the model: the worst of the servers', with what identifies model, base and chat template in its record. One
    that can't be reached is left out: it proves itself when it is asked for the model later.

    Raises InferenceUnavailable where none can be reached; InferenceFailed, AdapterRefused, ObjectDamaged or FileNotFoundError.
    """
    clients = resources.inference.clients
    with ThreadPoolExecutor(len(clients)) as threads:
        answers = list(threads.map(partial(_unless_unreachable, partial(_prove, resources, model)), clients))
    found = [answer for answer in answers if isinstance(answer, Verdict)]
    if not found:
        raise next(answer for answer in answers if isinstance(answer, InferenceUnavailable))
    worst = max(found, key=lambda verdict: (verdict.reason is not None, verdict.record["largest_difference"] or 0))
    record = worst.record | {
        "servers": len(found),
        "base_model": model.base_model,
        **_identity_of(resources, model.base_model),
        "archive_sha256": model.archive_sha256,
        "checked_at": unix_now(),
    }
    return Verdict(worst.reason, record)


def _prove(resources: Resources, model: Model, client: InferenceClient) -> Verdict:
    directory = resources.settings.served_adapters_dir
    load_into_server(model, resources.storage, directory, client)
    score, tolerance = client.prompt_logprobs, resources.settings.attestation_tolerance
    try:
        served_dtype = client.served_dtype(model.base_model)
        return compare_served(directory / model.serving_name, partial(score, model.serving_name), partial(score, model.base_model), served_dtype, tolerance)
    except BaseException:  # else it would answer for the model later, unproved
        with suppress(AdapterRefused, InferenceUnavailable):
            client.unload_adapter(model.serving_name)
        raise


def _unless_unreachable(prove: Callable[[InferenceClient], Verdict], client: InferenceClient) -> Verdict | InferenceUnavailable:
    try:
        return prove(client)
    except InferenceUnavailable as error:
        return error


def _identity_of(resources: Resources, base_model: str) -> dict[str, str | None]:
    """What the base model was made from, and its chat template, by which prompts of training and of serving are the same."""
    entry: BaseModelEntry | None = resources.settings.base_model(base_model)
    if entry is None:
        return {}
    template = entry.directory(resources.settings.cache_dir) / CHAT_TEMPLATE_NAME
    return {
        "base_source": entry.source,
        "base_revision": entry.revision,
        "chat_template_sha256": file_sha256(template) if template.exists() else None,
    }
