"""`events` and `timeline`: what happened, and where the time went."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from leveret.client.cli.failing import Exit
from leveret.client.cli.output import Format, Output, emit_document, paint
from leveret.client.cli.session import complete_vm, connect, run

if TYPE_CHECKING:
    from uuid import UUID

    from leveret.client.errors import EventGap
    from leveret.client.leveret import Leveret
    from leveret.client.timeline import Span
    from leveret.shared.documents import EventView, VmView

DEFAULT_LINES = 20
#: The greatest number that an event may have.
LAST_POSSIBLE = 2**63 - 1
OneVm = Annotated[str | None, typer.Argument(metavar="VM", help="Name or id.", autocompletion=complete_vm)]


def events(
    ctx: typer.Context,
    vm: OneVm = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as they come, until Ctrl-C.")] = False,
    after: Annotated[
        int | None,
        typer.Option(
            min=0, max=LAST_POSSIBLE, metavar="SEQ", help="Only those after this number: resume where you were."
        ),
    ] = None,
    lines: Annotated[
        int, typer.Option("-n", min=0, metavar="N", help="How many of the newest to begin with.")
    ] = DEFAULT_LINES,
    output: Output = Format.TABLE,
) -> None:
    """Show what happened to one VM, or in the whole project.

    With -o json every line is a document. Following goes on when the API is restarted, without a gap.
    """
    writer = Writer(output, with_name=not vm)

    async def body() -> None:
        async with connect(ctx) as leveret:
            vm_id = (await leveret.find(vm)).id if vm else None
            if after is None:
                await _newest(leveret, vm_id, lines, writer)
            else:
                writer.last = after
            if follow:
                async for event in leveret.watch(vm_id, after=writer.last, on_gap=writer.skip):
                    writer.write(event)
            elif after is not None:
                async for event in leveret.events(vm_id=vm_id, after=after):
                    writer.write(event)

    try:
        run(body())
    except KeyboardInterrupt:
        if follow:
            print(f"\nGo on from here:  leveret events -f --after {writer.last}{f' {vm}' * bool(vm)}", file=sys.stderr)
        raise typer.Exit(Exit.INTERRUPTED) from None


class Writer:
    """Writes events as they come; `last` is the number of the newest one that was seen."""

    def __init__(self, form: Format, *, with_name: bool) -> None:
        from leveret.client.cli.event_lines import EventLines

        self.form = form
        self.last = 0
        self._lines = EventLines(with_subject=with_name)

    def write(self, event: "EventView") -> None:
        from leveret.client.cli.event_lines import subject_of

        self.last = max(self.last, event.seq)
        match self.form:
            case Format.TABLE:
                print(self._lines.line(event), flush=True)
            case Format.JSON:
                print(json.dumps(event.model_dump(mode="json"), ensure_ascii=False), flush=True)
            case Format.YAML:
                print("---")
                emit_document(event.model_dump(mode="json"), self.form)
                sys.stdout.flush()
            case Format.NAME:
                print(subject_of(event), flush=True)

    def skip(self, gap: "EventGap") -> None:
        """Tell of events that are lost."""
        self.last = gap.until
        print(f"warning: {gap}.", file=sys.stderr, flush=True)


async def _newest(leveret: "Leveret", vm_id: "UUID | None", count: int, writer: Writer) -> None:
    """Write the last `count` events."""
    _, last = await leveret.events_page(after="latest")
    # A project's numbers have no gaps, so its newest are known; a VM has few events, so they are all read.
    writer.last = 0 if vm_id else max(0, last - count)
    newest = [event async for event in leveret.events(vm_id=vm_id, after=writer.last)]
    for event in newest[-count:] if count else ():
        writer.write(event)
    writer.last = newest[-1].seq if newest else max(writer.last, 0 if vm_id else last)


def timeline(
    ctx: typer.Context,
    vm: Annotated[str, typer.Argument(metavar="VM", help="Name or id.", autocompletion=complete_vm)],
    output: Output = Format.TABLE,
) -> None:
    """Draw where the time of its creation went."""
    from leveret.client.timeline import timeline as spans_of

    async def body() -> "tuple[VmView, tuple[Span, ...]]":
        async with connect(ctx) as leveret:
            found = await leveret.find(vm)
            return found, spans_of([event async for event in leveret.events(vm_id=found.id)])

    found, spans = run(body())
    if output is Format.NAME:
        print(found.name)
    elif output is not Format.TABLE:
        emit_document(
            [
                {"name": span.name, "starts_s": round(span.starts_s, 6), "seconds": round(span.seconds, 6)}
                | ({"note": span.note} if span.note else {})
                for span in spans
            ],
            output,
        )
    else:
        _draw(found, spans)


def _draw(vm: "VmView", spans: "tuple[Span, ...]") -> None:
    """One line a span: when it began, how long it took, and a bar on one scale."""
    import shutil

    if not spans:
        print(f"There are no events of {vm.name} any more.", file=sys.stderr)
        return
    total_s = spans[-1].ends_s
    names = max(len(span.name) for span in spans)
    notes = max(len(span.note) for span in spans)
    room = shutil.get_terminal_size().columns - names - notes - 15
    width = max(10, min(60, room))
    for span in spans:
        bar = _bar(span, total_s, width)
        style = "red" if span.failed else "green" if span.name in {"running", "guest ready"} else "magenta"
        note = f"{paint(span.note.ljust(notes), 'dim')}  " if room >= 10 else ""
        print(f"{span.name.ljust(names)}  {span.seconds:7.3f} s  {note}{paint(bar.rstrip(), style)}")
    print(paint(f"{'in all'.ljust(names)}  {total_s:7.3f} s", "bold"))


def _bar(span: "Span", total_s: float, width: int) -> str:
    """Where a span lies on the whole, in eighths of a character where the terminal can show them."""
    scale = width / total_s if total_s else 0.0
    offset, length = span.starts_s * scale, span.seconds * scale
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        return (" " * int(offset) + "#" * max(1, round(length))).ljust(width)[:width]
    full = int(length)
    part = " ▏▎▍▌▋▊▉"[int((length - full) * 8)]
    drawn = "█" * full + part.strip() or "▏"
    return (" " * min(int(offset), width - 1) + drawn)[:width].ljust(width)
