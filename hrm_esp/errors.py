"""Exceptions of the package. Each message is one line that says what the user can do."""


class HRMError(Exception):
    """A mistake that the user can correct: a bad file, option or checkpoint."""


class PeerLost(HRMError):
    """Another process of a distributed run has gone."""

    def __init__(self) -> None:
        super().__init__("another process of this run is gone: continue with --resume")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped a run after its state was saved."""
