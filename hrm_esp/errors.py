"""Exceptions of the package. Each message is one line that says what the user can do."""


class HRMError(Exception):
    """A mistake that the user can correct: a bad file, option or checkpoint."""


class NotFinite(HRMError):
    """What a model computes is not finite, though its weights are."""

    def __init__(self) -> None:
        super().__init__(
            "the model's output is not finite: its training diverged; train it again with a lower "
            "--lr"
        )


class PeerLost(HRMError):
    """Another process of a distributed run has gone."""

    def __init__(self) -> None:
        super().__init__("another process of this run is gone: continue with --resume")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped a run after its state was saved."""
