"""The one error of the control plane; its causes are chained and printed with it."""


class ControlPlaneError(Exception):
    """A command cannot be carried out; the message names the object and the remedy."""
