"""What can go wrong with a private server, said so that the reader knows what to do next."""


class StackError(RuntimeError):
    """A private server cannot be started, reached or stopped; the message says why and what to try."""


class ProcessExitedError(StackError):
    """A process ended before it was ready; the message holds the tail of its log."""


class NotReadyError(StackError):
    """A process is alive but was not ready in time; the message holds the tail of its log."""
