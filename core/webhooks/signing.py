"""Secrets of webhook endpoints, and signatures by the Standard Webhooks specification, which OpenAI's are too."""

import base64
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime

from standardwebhooks import Webhook

PREFIX = "whsec_"
SECRET_BYTES = 32


def new_secret() -> str:
    return PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def hint_of(secret: str) -> str:
    """Enough to tell one's secrets apart."""
    return f"{PREFIX}…{secret.rstrip('=')[-4:]}"


def signed_headers(webhook_id: str, body: str, secrets: Sequence[str], timestamp: int) -> dict[str, str]:
    """The headers by which a receiver knows the body to be ours and new: one signature for each of the secrets. `timestamp` in
    unix seconds; receivers refuse one that is older than five minutes."""
    time = datetime.fromtimestamp(timestamp, UTC)
    signatures = [Webhook(secret).sign(webhook_id, time, body) for secret in secrets]
    return {"webhook-id": webhook_id, "webhook-timestamp": str(timestamp), "webhook-signature": " ".join(signatures)}
