"""Errors that a user can mend."""


class UserError(ValueError):
    """Bad input. The message names the field, its value and the remedy; the command line prints it without a trace."""
