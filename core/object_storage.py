"""The storage that the settings name."""

from core.s3_storage import S3Storage
from core.settings import Settings
from core.storage import LocalStorage, Storage


def open_storage(settings: Settings) -> Storage:
    """Files below the data directory, or a bucket. Nothing is asked of the bucket yet."""
    if settings.storage_url is None:
        return LocalStorage(settings.storage_dir)
    secret = settings.s3_secret_access_key
    return S3Storage(
        settings.storage_url,
        endpoint_url=settings.s3_endpoint_url,
        region=settings.s3_region,
        access_key_id=settings.s3_access_key_id,
        secret_access_key=secret.get_secret_value() if secret else None,
    )
