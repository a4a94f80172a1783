"""Signatures, checked by the stock client and by hand."""

import base64
import hashlib
import hmac
import time

import pytest
from openai import InvalidWebhookSignatureError, OpenAI

from core.webhooks.events import EVENT_TYPES, new_event_body
from core.webhooks.signing import hint_of, new_secret, signed_headers

client = OpenAI(api_key="unused", base_url="http://127.0.0.1:1")


@pytest.mark.parametrize("event_type", EVENT_TYPES)
def test_stock_client_accepts_it(event_type: str) -> None:
    secret, body = new_secret(), new_event_body(event_type, "ftjob-1")
    event = client.webhooks.unwrap(body, signed_headers("wh_1", body, [secret], int(time.time())), secret=secret)
    assert (event.type, event.object, event.data.id) == (event_type, "event", "ftjob-1")  # type: ignore[union-attr]
    assert event.id.startswith("evt_")
    assert abs(event.created_at - time.time()) < 10


def test_signature_is_that_of_the_specification() -> None:
    secret = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
    headers = signed_headers("wh_1", '{"ü": 1}', [secret], 1_700_000_000)
    expected = hmac.new(b"0123456789abcdef0123456789abcdef", 'wh_1.1700000000.{"ü": 1}'.encode(), hashlib.sha256).digest()
    assert headers == {
        "webhook-id": "wh_1",
        "webhook-timestamp": "1700000000",
        "webhook-signature": f"v1,{base64.b64encode(expected).decode()}",
    }


def test_two_secrets_make_two_signatures_and_either_is_enough() -> None:
    body, old, new = new_event_body(EVENT_TYPES[0], "ftjob-1"), new_secret(), new_secret()
    headers = signed_headers("wh_1", body, [new, old], int(time.time()))
    assert len(headers["webhook-signature"].split(" ")) == 2
    for secret in (old, new):
        client.webhooks.unwrap(body, headers, secret=secret)
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret=new_secret())


def test_stock_client_refuses_what_is_old_or_changed() -> None:
    body, secret = new_event_body(EVENT_TYPES[0], "ftjob-1"), new_secret()
    with pytest.raises(InvalidWebhookSignatureError, match="too old"):
        client.webhooks.unwrap(body, signed_headers("wh_1", body, [secret], int(time.time()) - 301), secret=secret)
    for headers in ({"webhook-id": "wh_2"}, {"webhook-timestamp": str(int(time.time()) + 2)}):
        with pytest.raises(InvalidWebhookSignatureError):
            client.webhooks.unwrap(body, signed_headers("wh_1", body, [secret], int(time.time())) | headers, secret=secret)


def test_secrets() -> None:
    secrets = {new_secret() for _ in range(50)}
    assert len(secrets) == 50
    assert all(len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32 for secret in secrets)
    assert all(secret.rstrip("=").endswith(hint_of(secret)[-4:]) and len(hint_of(secret)) == 11 for secret in secrets)
