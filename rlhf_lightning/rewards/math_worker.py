"""A process of its own that compares answers: python math_worker.py SECONDS, one JSON object a line in and out.

Reads {"gold": text, "answer": text}, writes {"equal": true or false}. It is told no more than these two texts, holds no
secrets (its environment is emptied by who starts it) and dies by the clock if a comparison takes longer than SECONDS.

Why the answer's text cannot run. math-verify reads LaTeX by a grammar (antlr) and builds the expression node by node;
its reader of plain expressions, which is sympy's `parse_expr` and so `eval`, is not used. Two ways to `eval` remain
inside sympy: a string that is made a number (`Number("12")`), and `lambdify`. So `parse_expr` is replaced by a reader
of numbers, and an audit hook, which Python code cannot take off again, refuses every other `eval` and `exec` of text,
new processes, sockets and files opened for writing. Resource limits hold memory down and files at size 0.
"""

import json
import logging
import re
import resource
import signal
import sys
from typing import Any

MEMORY = 2 << 30
"""Bytes of address space."""
REFUSED = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "os.kill")
REFUSED += ("os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown")
REFUSED += ("os.putenv", "os.mkdir", "subprocess.Popen", "pty.spawn", "ctypes.", "socket.", "shutil.", "winreg.")
NUMBER = re.compile(r"[0-9]{1,2000}|([0-9]+\.[0-9]*|[0-9]*\.[0-9]+|[0-9]+)([eE][-+]?[0-9]{1,4})?", re.ASCII)
DEFINERS = ("collections", "dataclasses", "enum", "typing")
"""Modules that build classes from templates of their own, when a part of sympy is first needed."""


class Refused(RuntimeError):
    """Something tried what a comparison of answers has no need of."""


def forbid_evaluation() -> None:
    """From here on no text becomes code in this process; there is no way back."""
    import sympy
    from sympy.parsing import sympy_parser

    def number_only(text: str, **options: Any) -> Any:
        if NUMBER.fullmatch(text) is None:
            raise Refused("text was to be evaluated")
        return sympy.Integer(int(text)) if text.isdigit() else sympy.Float(text)

    sympy_parser.parse_expr = number_only

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "exec":
            name = getattr(arguments[0], "co_filename", "<string>")
            caller = sys._getframe(1).f_globals.get("__name__")
            if name.startswith("<") and not name.startswith("<frozen") and caller not in DEFINERS:
                raise Refused(f"{caller} was to evaluate text")
        elif event == "open":
            mode, flags = arguments[1], arguments[2]
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & 0o1103):
                raise Refused("a file was to be written")
        elif event.startswith(REFUSED):
            raise Refused(event)

    sys.addaudithook(hook)


def limit_resources() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def equal(gold: str, answer: str) -> bool:
    """Whether math-verify takes the two for the same; False for what it cannot read."""
    from math_verify import LatexExtractionConfig, parse, verify

    # as if boxed: the reader then takes all of it, whatever stands around
    read = [LatexExtractionConfig(boxed_match_priority=0)]
    expected, said = (
        parse(f"\\boxed{{{text}}}", read, parsing_timeout=None, fallback_mode="no_fallback") for text in (gold, answer)
    )
    return bool(expected and said and verify(expected, said, timeout_seconds=None))


def main() -> None:
    seconds = float(sys.argv[1])
    logging.disable(logging.CRITICAL)
    equal(r"\frac{1}{2}+x", "0.5+x")  # what is imported late, is imported now
    equal(r"x > 1, \sqrt{2}", r"(1, \infty)")
    limit_resources()
    forbid_evaluation()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        # the kernel ends this process at the limit, even inside a loop that never comes back to Python
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = equal(job["gold"], job["answer"])
        except (Exception, RecursionError, MemoryError):
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"equal": verdict}), flush=True)


if __name__ == "__main__":
    main()
