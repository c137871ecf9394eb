"""The one exception for what the user can mend."""


class HRMError(Exception):
    """A mistake the user can mend; its text is one line that says how."""


class PeerLost(HRMError):
    """Another process of the run is gone."""

    def __init__(self) -> None:
        super().__init__("another process of this run is gone: go on with --resume")
