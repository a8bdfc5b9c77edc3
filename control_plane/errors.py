"""The errors of the control plane; their causes are chained and printed with them."""


class ControlPlaneError(Exception):
    """A command cannot be carried out; the message names the object and the remedy."""


class ConfigError(ControlPlaneError):
    """The configuration of the environment is not there, or cannot be read."""
