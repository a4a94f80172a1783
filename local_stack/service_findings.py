"""`sdft doctor` on what the service talks to: the database, the broker and inference servers that are not its own. Only reads."""

import sqlite3
from pathlib import Path

import httpx2
import psycopg
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from core.database import DATABASE_REMEDY
from core.doorbell import broker_answers
from core.inference_client import FILES_PATH
from core.schema_revision import HEAD, describe_misfit, fit_of
from core.settings import Settings
from local_stack.directories import filesystem_of
from local_stack.finding import Finding

LIMIT_SECONDS = 5
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs", "fuse.sshfs", "fuse.glusterfs")
POSTGRES_QUESTION = "select to_regclass('alembic_version') is not null, has_schema_privilege(current_schema(), 'CREATE'), current_schema()"


def database_finding(settings: Settings) -> Finding:
    if settings.database_url is None:
        return _sqlite(settings.data_dir / "database.sqlite3")
    try:
        url = make_url(settings.database_url)
    except ArgumentError:
        return Finding("SDFT_DATABASE_URL", "it is no URL", "write postgresql+psycopg://user:password@host:5432/name, or unset it")
    if url.get_backend_name() == "sqlite":
        return _sqlite(Path(url.database or ""))
    if url.get_backend_name() not in ("postgresql", "postgres"):
        return Finding("SDFT_DATABASE_URL", f"{url.get_backend_name()} is not supported", "write a URL that begins with postgresql+psycopg:// or sqlite:///")
    return _postgres(url)


def _sqlite(path: Path) -> Finding:
    what = f"database {path}"
    if (kind := filesystem_of(path)) in NETWORK_FILE_SYSTEMS:
        problem = f"SQLite's locks are unreliable on a network file system ({kind})"
        return Finding(what, problem, "choose a local directory with --data-dir, or set SDFT_DATABASE_URL to a Postgres database")
    if not path.exists():
        return Finding(f"{what} (will be made at the first start)", None)
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=LIMIT_SECONDS) as connection:
            has_table = connection.execute("select 1 from sqlite_master where name = 'alembic_version'").fetchone()
            row = connection.execute("select version_num from alembic_version").fetchone() if has_table else None
    except sqlite3.Error as error:
        return Finding(what, f"it can't be read: {error}", "restore it from a backup, or choose another directory with --data-dir")
    return _schema(what, row[0] if row else None)


def _postgres(url: URL) -> Finding:
    what = f"database {url.render_as_string(hide_password=True)}"
    try:
        with psycopg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False), connect_timeout=LIMIT_SECONDS) as connection:
            migrated, may_create, schema = connection.execute(POSTGRES_QUESTION).fetchone() or (False, False, None)
            row = connection.execute("select version_num from alembic_version").fetchone() if migrated and may_create else None
    except psycopg.Error as error:
        said = " ".join(str(error).split())
        return Finding(what, f"it can't be used: {said}", DATABASE_REMEDY)
    if not may_create:
        mend = f'as its owner: GRANT USAGE, CREATE ON SCHEMA "{schema or "public"}" TO "{url.username}"'
        return Finding(what, f"the user {url.username} may make no tables in its schema, which migrations do", mend)
    return _schema(what, row[0] if row else None)


def _schema(what: str, revision: str | None) -> Finding:
    """An older one is no problem here: `sdft up` migrates."""
    if fit_of(revision) == "newer":
        return Finding(what, describe_misfit(revision), "install the newer version of sdft, or restore the backup")
    if revision == HEAD:
        return Finding(f"{what} (schema {HEAD})", None)
    return Finding(f"{what} ({'empty' if revision is None else f'schema {revision}'}; the start will migrate it to {HEAD})", None)


def broker_finding(redis_url: str) -> Finding:
    try:
        answers = broker_answers(redis_url, LIMIT_SECONDS)
    except ValueError as error:
        return Finding("SDFT_REDIS_URL", f"it is no URL of a Redis: {error}", "write redis://host:6379/0, or unset it for the embedded Valkey")
    return Finding("broker: SDFT_REDIS_URL", None if answers else "it doesn't answer a ping", "start it, or unset SDFT_REDIS_URL for the embedded Valkey")


def inference_findings(settings: Settings) -> list[Finding]:
    """Of servers that run already; one that `sdft up` starts needs no look."""
    return [_inference(url, settings) for url in settings.inference_urls] if "inference_urls" in settings.model_fields_set else []


def _inference(url: str, settings: Settings) -> Finding:
    what, key = f"inference server {url}", settings.inference_api_key
    headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    try:
        answer = httpx2.get(f"{url}/v1/models", headers=headers, timeout=LIMIT_SECONDS, trust_env=False)
        served = [str(model["id"]) for model in answer.json()["data"]] if answer.status_code == 200 else []
    except httpx2.HTTPError as error:
        return Finding(what, f"it doesn't answer: {error}", "start it, or correct SDFT_INFERENCE_URLS; chats wait for it", is_warning=True)
    except (ValueError, KeyError, TypeError):
        return Finding(what, "it answers, but not as an inference server does", "correct SDFT_INFERENCE_URLS")
    if answer.status_code in (401, 403):
        said = "it refuses SDFT_INFERENCE_API_KEY" if key else "it asks for a key, and SDFT_INFERENCE_API_KEY is not set"
        return Finding(what, said, "set SDFT_INFERENCE_API_KEY to the key that it was started with (vLLM: VLLM_API_KEY)")
    if answer.status_code != 200:
        return Finding(what, f"it answers {answer.status_code} to GET /v1/models", "look at its log, or correct SDFT_INFERENCE_URLS")
    known = [entry.id for entry in settings.base_models]
    if not set(known) & set(served):
        problem = f"it serves {', '.join(served[:5]) or 'nothing'}, and no base model of the catalogue ({', '.join(known)})"
        return Finding(what, problem, f"start it with the base model {known[0]} (vLLM: --served-model-name {known[0]})")
    if settings.inference_adapters == "upload" and not _takes_adapters(url, headers):
        mend = "start it with a directory of its own for them (vLLM: ADAPTER_UPLOADS_DIR; inference/: --uploads-dir), or unset the variable"
        return Finding(what, "it takes no adapters over HTTP, which SDFT_INFERENCE_ADAPTERS=upload wants", mend)
    return Finding(what, None)


def _takes_adapters(url: str, headers: dict[str, str]) -> bool:
    try:
        return httpx2.get(f"{url}{FILES_PATH}", headers=headers, timeout=LIMIT_SECONDS, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False
