"""The one exception that a user caused and can mend."""


class UserError(ValueError):
    """A mistake in what the user gave: a config, a record, a file, a reward function.

    The message names the value, where it came from and the remedy. The command line prints it alone and exits
    with code 2; from Python it is an ordinary ``ValueError``.
    """
