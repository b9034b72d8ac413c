"""The one exception that a user caused and can mend."""


class UserError(ValueError):
    """A mistake in what the user gave: a config, a record, a file, a reward function.

    The message names the value, where it came from and the remedy. The command line prints it alone and exits
    with code 2; from Python it is an ordinary ``ValueError``.
    """


class Stopped(SystemExit):
    """A signal asked the run to end, and it did so in order; `code` is what a shell expects: 128 + the signal's number.

    Args:
        signal: name of the signal, such as SIGTERM.
        code: the exit code.
        saved: the checkpoint that was written, if one was.
    """

    def __init__(self, signal: str, code: int, saved: str | None) -> None:
        super().__init__(code)
        self.signal = signal
        self.saved = saved

    def __str__(self) -> str:
        if self.saved is None:
            return f"stopped by {self.signal}; --resume auto goes on from the last checkpoint, if there is one"
        return f"stopped by {self.signal}; the same command with --resume auto goes on from {self.saved}"
