"""How a start ends early."""


class StackError(Exception):
    """The stack can't start or go on; the message says why and what to do. `sdft up` prints it and exits with 1."""


class StopRequested(Exception):
    """A signal asked to stop while something was being waited for."""
