"""Server-sent events (WHATWG HTML, 9.2): how an event looks on the wire, and who asks for them."""

from fastapi import Request

from leveret.shared.documents import EventView

MEDIA_TYPE = "text/event-stream"
#: Nobody on the way may keep or collect them.
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

#: What a browser waits before it connects again, in milliseconds.
RETRY = b"retry: 1000\n\n"
#: A comment: the connection lives.
HEARTBEAT = b": heartbeat\n\n"


def is_wanted(request: Request) -> bool:
    """Whether the Accept header asks for a stream, and no more for JSON."""
    weights = {"application/json": 0.0, MEDIA_TYPE: 0.0}
    for part in ",".join(request.headers.getlist("accept")).split(","):
        media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if media_type in weights:
            weights[media_type] = _weight(parameters)
    return 0.0 < weights[MEDIA_TYPE] >= weights["application/json"]


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def event(view: EventView) -> bytes:
    """An event; who has seen it resumes after its id."""
    name = view.type if "." in view.type else f"vm.{view.type}"
    return f"id: {view.seq}\nevent: {name}\ndata: {view.model_dump_json()}\n\n".encode()


def gap(after: int, forgotten_seq: int) -> bytes:
    """Says that events between these may be forgotten. It has no id: there is nothing to resume after."""
    return f'event: gap\ndata: {{"after":{after},"forgotten_seq":{forgotten_seq}}}\n\n'.encode()
