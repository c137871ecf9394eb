"""The one exception for what the user can mend."""


class HRMError(Exception):
    """A mistake the user can mend; its text is one line that says how."""
