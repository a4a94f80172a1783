"""`sdft webhooks`: list, create, delete, test."""

from typing import Annotated

import typer

from cli import output
from cli.client import Client, segment
from cli.files import AsJson

ENDPOINTS = "/webhook_endpoints"

app = typer.Typer(help="URLs that are called when jobs end.", no_args_is_help=True)
EndpointId = Annotated[str, typer.Argument(help="An endpoint's id, as in `webhooks list`.")]


@app.command("list")
def list_endpoints(limit: Annotated[int, typer.Option(min=1, help="How many at most, the newest first.")] = 20, as_json: AsJson = False) -> None:
    """List webhook endpoints."""
    found = list(Client.from_environment().pages(ENDPOINTS, limit))
    if as_json:
        output.print_json(found)
        return
    rows = ((e["id"], e["name"], e["url"], ", ".join(e["event_types"]), "yes" if e["enabled"] else e["disabled_reason"]) for e in found)
    output.print_table(("id", "name", "url", "events", "enabled"), rows)


@app.command()
def create(
    url: Annotated[str, typer.Argument(help="Where events are sent to, beginning with https://.")],
    name: Annotated[str, typer.Option(help="For people.")] = "sdft",
    event: Annotated[list[str] | None, typer.Option(help="An event to be told of, several times for several. Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Create a webhook endpoint, and print its id and its signing secret, which nothing shows again."""
    client = Client.from_environment()
    event_types = event or client.get("/webhook_event_types")["data"]
    created = client.post(ENDPOINTS, {"name": name, "url": url, "event_types": event_types})
    if as_json:
        output.print_json(created)
        return
    print(f"{output.clean(created['id'])}\n{output.clean(created['signing_secret'])}")


@app.command()
def delete(endpoint: EndpointId) -> None:
    """Delete a webhook endpoint; what waits for it is not sent any more."""
    Client.from_environment().delete(f"{ENDPOINTS}/{segment(endpoint)}")
    print(f"deleted {output.clean(endpoint)}")


@app.command("test")
def send_test(endpoint: EndpointId, event: Annotated[str, typer.Option(help="The event to send a sample of.")] = "fine_tuning.job.succeeded") -> None:
    """Send a sample event now. Exit status 0 only where the endpoint answered 2xx."""
    result = Client.from_environment().post(f"{ENDPOINTS}/{segment(endpoint)}/test", {"event_type": event})
    print(f"the endpoint answered {result['status_code']}")
    raise typer.Exit(0 if 200 <= result["status_code"] < 300 else 1)
