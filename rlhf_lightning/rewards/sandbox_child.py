"""What runs inside the sandbox. Its text is given to `python -I -S -B -c`; it imports nothing of ours.

Learns its role from one JSON line on the descriptor named by argv[1]:

    serve   holds a program and calls its functions as it is asked to: a model's code, which sees inputs and no tests
    check   runs test code whose calls go to a `serve` process: it holds the tests and none of the model's code
    script  runs a program as a script, standard input and output as they are

Values travel as tagged JSON, of plain types only: an object that claims to equal everything cannot be sent, and nothing
that is read is run.
"""

import builtins
import json
import os
import resource
import sys

MAX_LINE = 1 << 20
"""Bytes of a message; a longer one ends the run."""


def encode(x: object) -> object:
    """A value of plain types as JSON; anything else, subclasses included, is refused."""
    kind = type(x)
    if x is None or kind is bool or kind is str:
        return x
    if kind is int:
        return x if abs(x) < 1 << 53 else {"int": hex(x)}
    if kind is float:
        return {"float": x.hex()}
    if kind is list:
        return [encode(y) for y in x]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(y) for y in x]}
    if kind is dict:
        return {"dict": [[encode(k), encode(v)] for k, v in x.items()]}
    if kind is complex:
        return {"complex": [x.real.hex(), x.imag.hex()]}
    if kind in (bytes, bytearray):
        return {kind.__name__: x.hex()}
    if kind is range:
        return {"range": [x.start, x.stop, x.step]}
    raise TypeError(f"a value of type {kind.__name__} cannot leave the program")


def decode(x: object) -> object:
    """The value that `encode` was given."""
    if isinstance(x, list):
        return [decode(y) for y in x]
    if not isinstance(x, dict):
        return x
    ((kind, y),) = x.items()
    if kind == "int":
        return int(y, 16)
    if kind == "float":
        return float.fromhex(y)
    if kind in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(z) for z in y)
    if kind == "dict":
        return {decode(k): decode(v) for k, v in y}
    if kind == "complex":
        return complex(float.fromhex(y[0]), float.fromhex(y[1]))
    if kind == "range":
        return range(*y)
    return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(y)


class Channel:
    """Lines of JSON on two descriptors."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads, self.writes, self.buffer = reads, writes, b""

    def receive(self) -> dict:
        while b"\n" not in self.buffer:
            if len(self.buffer) > MAX_LINE:
                raise EOFError("the other side says too much")
            read = os.read(self.reads, 65536)
            if not read:
                raise EOFError("the other side is gone")
            self.buffer += read
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def send(self, message: dict) -> None:
        line = json.dumps(message).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise ValueError("a result of more than a megabyte")
        while line:
            line = line[os.write(self.writes, line) :]


def serve(order: dict) -> None:
    """Answer {"id", "call", "args", "kwargs"} with {"id", "result"} or {"id", "raised", "message"}."""
    channel = Channel(order["reads"], order["writes"])
    names = {"__name__": "solution"}
    try:
        exec(compile(order["program"], "solution.py", "exec"), names)
        broken = None
    except Exception as error:
        broken = error
    while True:
        request = channel.receive()
        answer = {"id": request["id"]}
        try:
            if broken is not None:
                raise broken
            args, kwargs = decode(request["args"]), decode(request["kwargs"])
            channel.send({**answer, "result": encode(names[request["call"]](*args, **kwargs))})
        except Exception as error:
            channel.send({**answer, "raised": type(error).__name__, "message": str(error)[:500]})


def check(order: dict) -> None:
    """Run each test; say which passed, with the nonce that only this process was told."""
    channel = Channel(order["reads"], order["writes"])

    class Names(dict):
        """Names of the tests; one that nobody defined is a function of the program."""

        def __missing__(self, name: str) -> object:
            if hasattr(builtins, name):
                return getattr(builtins, name)
            if name.startswith("__"):
                raise KeyError(name)
            return remote(name)

    def remote(name: str) -> object:
        def call(*args: object, **kwargs: object) -> object:
            number = os.urandom(16).hex()  # an answer cannot be written before its question
            channel.send({"id": number, "call": name, "args": encode(list(args)), "kwargs": encode(kwargs)})
            answer = channel.receive()
            if answer["id"] != number:
                raise EOFError("an answer to another question")
            if "raised" in answer:
                kind = getattr(builtins, str(answer["raised"]), None)
                known = isinstance(kind, type) and issubclass(kind, Exception) and kind is not AssertionError
                raise (kind if known else RuntimeError)(answer["message"])
            return decode(answer["result"])

        return call

    names = Names({"__name__": "tests", "__builtins__": builtins})
    for setup in (order["setup"] + "\n    pass\n", order["setup"]):  # it may end in the head of an unwritten function
        try:
            code = compile(setup, "setup.py", "exec")
        except SyntaxError:
            continue
        exec(code, names)
        break
    entry = order["entry_point"]
    if entry is not None:
        names[entry] = names["candidate"] = remote(entry)
    passed = []
    for test in order["tests"]:
        try:
            exec(compile(test, "tests.py", "exec"), names)
            checker = names.pop("check", None)
            if checker is not None:
                checker(names["candidate"])
            passed.append(True)
        except (EOFError, BrokenPipeError):
            break
        except Exception:
            passed.append(False)
    passed += [False] * (len(order["tests"]) - len(passed))
    report = json.dumps({"nonce": order["nonce"], "passed": passed}).encode() + b"\n"
    os.write(order["report"], report)


def script(order: dict) -> None:
    exec(compile(order["program"], "solution.py", "exec"), {"__name__": "__main__"})


def main() -> None:
    control = int(sys.argv[1])
    with open(control, "rb") as file:
        order = json.loads(file.readline())
    for name, limit in order["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    os.environ.clear()  # of what bubblewrap and Python put there themselves
    {"serve": serve, "check": check, "script": script}[order["role"]](order)


if __name__ == "__main__":
    main()
