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


def gap(after: int, forgotten_seq: int, last_seq: int) -> bytes:
    """Says that what follows does not join on to the event `after`.

    Events up to `forgotten_seq` may be forgotten; or when `last_seq`, the newest, is less than `after`, there never
    was such an event here, and what follows comes after `last_seq`. It names that as its id then; else it has none,
    since who comes back is told again.
    """
    name = f"id: {last_seq}\n" if last_seq < after else ""
    told = f'{{"after":{after},"forgotten_seq":{forgotten_seq},"last_seq":{last_seq}}}'
    return f"{name}event: gap\ndata: {told}\n\n".encode()
