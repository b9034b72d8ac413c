"""Answers that are asked for before they are needed: sampled in a thread of their own while the policy is trained."""

import threading
from collections.abc import Callable

from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.core.failpoints import failpoint


class Ahead:
    """A batch of prompts, and the answers to it that are on their way.

    Args:
        prompts: what is answered; None: whoever waits draws them again (a resumed run).
        sample: gives the answers; called once, in a thread that this object starts.
    """

    def __init__(self, prompts: PromptBatch | None, sample: Callable[[], Generated]) -> None:
        self.prompts = prompts
        self._sample = sample
        self._answers: Generated | None = None
        self._error: BaseException | None = None
        # a daemon: an interpreter that is told to leave at once does not wait for answers
        self._thread = threading.Thread(target=self._work, name="rollout ahead", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            failpoint("ahead.before")
            self._answers = self._sample()
            failpoint("ahead.after")
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Until nothing runs any more, whether it went well or not."""
        self._thread.join()

    def answers(self) -> Generated:
        """Wait for the answers; an error that the thread ended with is raised here, each time."""
        self.wait()
        if self._error is not None:
            raise self._error
        assert self._answers is not None
        return self._answers
