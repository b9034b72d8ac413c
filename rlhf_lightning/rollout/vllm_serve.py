"""A vLLM server that a training run may give weights: vLLM's own OpenAI-compatible one behind a gate.

    RLHF_VLLM_TOKEN=... python -m rlhf_lightning.rollout.vllm_serve --model FOLDER [what `vllm serve` takes]

    GET  /health        whether it lives; the only request that needs no token
    GET  /rlhf/model    what it serves, and which weights
    POST /rlhf/weights  a part of new weights, or of an adapter over the weights that it holds, safetensors; with the
                        last part they are taken up
    POST /v1/...        vLLM's own; with the header X-RLHF-Weights only while it holds those weights

Nothing that is sent is unpickled. It listens on this machine alone unless told otherwise, and never without a token.
"""

import asyncio
import hmac
import ipaddress
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from safetensors.torch import load, save
from torch import Tensor

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.rollout import vllm_adapters

TOKEN = "RLHF_VLLM_TOKEN"
"""Environment variable that holds the token, of server and client alike."""
SHORTEST_TOKEN = 16
"""Characters."""
WEIGHTS_HEADER = "X-RLHF-Weights"
"""Names the weights that a request is meant for."""
TIED = "tied"
"""In a part's metadata: names that stand for weights sent under another name, as JSON."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def token_from_environment() -> str:
    """The token that server and client share.

    Raises:
        UserError: there is none, or it could be guessed.
    """
    token = os.environ.get(TOKEN, "")
    if len(token) < SHORTEST_TOKEN:
        what = "is not set" if not token else f"has fewer than {SHORTEST_TOKEN} characters"
        raise UserError(
            f"the environment variable {TOKEN} {what}: whoever has it may change the server's weights; export "
            f"{TOKEN}=$(openssl rand -hex 16), the same for server and training"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine, to be reached from nowhere else."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class _Upload:
    name: str
    """Of the weights."""
    part: int
    last: bool
    """Whether this part is the last one."""
    over: str | None
    """Name of the weights that an adapter is for; None: this is no adapter."""


class Gate:
    """ASGI middleware in front of vLLM's server: asks for the token, takes weights, guards their version.

    Args:
        app: vLLM's own application.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app
        self.token = token_from_environment()
        self.weights: str | None = None
        """Name of the weights that are held; None: none that a run has given, or some are on their way."""
        self.base: str | None = None
        """Name of the weights under the adapter that is held; without one, the same."""
        self._adapters = 0
        self._arriving: tuple[str, int] | None = None
        """Name of the weights on their way, and how many parts have come."""
        self._answering = 0
        """Requests for these weights that are being answered: they are not changed meanwhile."""
        self._one_at_a_time = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] == "/health"):
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket, which nobody of ours opens
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            await _reply(send, 401, {"error": f"the token is missing or not the server's {TOKEN}"})
        elif scope["path"] == "/rlhf/model" and scope["method"] == "GET":
            await _reply(send, 200, self._model(scope))
        elif scope["path"] == "/rlhf/weights" and scope["method"] == "POST":
            await self._take(scope, receive, send)
        elif (wanted := headers.get(WEIGHTS_HEADER.lower())) is None:
            await self.app(scope, receive, send)
        elif wanted != self.weights:
            await _reply(send, 409, {"error": "the server holds other weights", "weights": self.weights})
        else:
            self._answering += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self._answering -= 1

    def _model(self, scope: Scope) -> dict[str, Any]:
        config = scope["app"].state.engine_client.vllm_config
        model, lora = config.model_config, config.lora_config
        text = model.hf_text_config
        return {
            "architecture": model.hf_config.architectures[0],
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "max_model_len": model.max_model_len,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_lora_rank": 0 if lora is None else lora.max_lora_rank,
            "weights": self.weights,
        }

    async def _take(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One part of new weights; from the first to the last of them none are held."""
        query = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
        try:
            upload = _Upload(query["name"], int(query["part"]), bool(int(query["last"])), query.get("over"))
        except (KeyError, ValueError):
            upload = None
        if upload is None or upload.part < 0:
            await _reply(send, 400, {"error": "name, part and last say what is sent"})
            return
        # not one at a time: a run that was stopped while it sends keeps nobody else from sending
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        async with self._one_at_a_time:
            error = await self._put(scope["app"].state, upload, bytes(body))
        await _reply(send, *((200, {"weights": self.weights}) if error is None else error))

    async def _put(self, state: Any, upload: _Upload, body: bytes) -> tuple[int, dict[str, Any]] | None:
        """Status and message if the part is not taken."""
        if upload.name == self.weights:  # the answer to the last part was lost
            return None
        if upload.over is not None and upload.over != self.base:
            return 409, {"error": f"an adapter over {upload.over}, and the server holds {self.base}"}
        come = self._arriving[1] if self._arriving is not None and self._arriving[0] == upload.name else 0
        if upload.part not in (0, come - 1, come):  # a part may come twice
            return 409, {"error": f"part {upload.part} of {upload.name} is not the next one"}
        if self._answering:
            return 409, {"error": f"{self._answering} requests for {self.weights} are being answered"}
        self.weights, self._arriving = None, (upload.name, upload.part + 1)
        if upload.over is None:
            self.base = None
        engine = state.engine_client
        try:
            await engine.collective_rpc("rlhf_receive", args=(body, upload.part == 0))
            if upload.last:
                await self._take_up(state, upload)
        except Exception as error:  # whatever the worker says: the sender has to hear it
            self._arriving = None
            return 422, {"error": f"{type(error).__name__}: {error}"}
        return None

    async def _take_up(self, state: Any, upload: _Upload) -> None:
        engine, adapters = state.engine_client, state.openai_serving_models.lora_requests
        adapters.clear()
        if upload.over is None:
            await engine.collective_rpc("rlhf_load")
        else:
            self._adapters += 1
            await engine.collective_rpc("rlhf_load_adapter", args=(self._adapters,))
            adapters[upload.name] = vllm_adapters.adapter_request(upload.name, self._adapters)
        # or prompts known from before are answered by the old weights. Somebody who does not mind which may be being
        # answered: without the option vLLM would then reset nothing
        await engine.reset_prefix_cache(reset_running_requests=True)
        self.weights, self._arriving = upload.name, None
        self.base = upload.over or upload.name


async def _reply(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def weights_part(weights: Mapping[str, Tensor], tied: Mapping[str, str]) -> bytes:
    """A part of an upload, as safetensors.

    Args:
        weights: on the CPU, contiguous.
        tied: names that stand for weights sent under another name, up to and with this part.
    """
    return save(dict(weights), metadata={TIED: json.dumps(dict(tied))})


def tied_in(part: bytes) -> dict[str, str]:
    """The names that a part says stand for others."""
    length = int.from_bytes(part[:8], "little")
    said: dict[str, str] = json.loads(part[8 : 8 + length]).get("__metadata__", {})
    return dict(json.loads(said.get(TIED, "{}")))


class WeightReceiver:
    """What vLLM's workers can do besides (`--worker-extension-cls`)."""

    _rlhf_received: dict[str, Tensor]
    _rlhf_tied: dict[str, str]

    def rlhf_receive(self, payload: bytes, first: bool) -> None:
        """Keep a part of new weights.

        Args:
            payload: safetensors.
            first: forget what came before.
        """
        if first:
            self._rlhf_received = {}
        self._rlhf_received.update(load(payload))
        self._rlhf_tied = tied_in(payload)

    def rlhf_load(self) -> None:
        """Take up what was received."""
        received, self._rlhf_received = self._rlhf_received, {}
        received.update({name: received[first] for name, first in self._rlhf_tied.items()})
        self.reload_weights(weights_iterator=iter(received.items()))  # type: ignore[attr-defined]

    def rlhf_load_adapter(self, number: int) -> None:
        """Take up what was received as an adapter."""
        received, self._rlhf_received = self._rlhf_received, {}
        vllm_adapters.take_adapter(self, number, received)


def check_arguments(args: Any) -> None:
    """Refuse to listen where anybody could come, and what a gate in one process cannot guard."""
    token_from_environment()
    if not args.host:
        raise UserError("--host '' would listen everywhere: give 127.0.0.1, or the address that the trainer reaches")
    for option, allowed in (("data_parallel_size", 1), ("api_server_count", 1), ("uds", None), ("grpc", False)):
        value = getattr(args, option, allowed)
        if value not in (allowed, None):
            raise UserError(
                f"--{option.replace('_', '-')} {value}: weights are given to one server process; leave it out"
            )


def main(arguments: Iterable[str] | None = None) -> int:
    """Start the server; exits with 2 on a user's mistake."""
    try:
        token_from_environment()
        try:
            import uvloop
            from vllm.entrypoints.launchers.api_server.entry import run_server
            from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
            from vllm.utils.argparse_utils import FlexibleArgumentParser
        except ImportError as error:
            raise UserError(
                f"vLLM 0.32 is needed, and {error}: docs/engines.md has the commands, for CUDA and for the CPU"
            ) from error
        parser = make_arg_parser(FlexibleArgumentParser(prog="rlhf_lightning.rollout.vllm_serve"))
        parser.set_defaults(host="127.0.0.1", api_server_count=1)
        args = parser.parse_args(None if arguments is None else list(arguments))
        validate_parsed_serve_args(args)
        check_arguments(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.middleware = [*args.middleware, f"{Gate.__module__}.{Gate.__qualname__}"]
    args.worker_extension_cls = f"{WeightReceiver.__module__}.{WeightReceiver.__qualname__}"
    args.logprobs_mode = "processed_logprobs"  # at the temperature, over what is left to draw from
    args.generation_config = "vllm"  # no sampling default of the model leaks in
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    uvloop.run(run_server(args))
    return 0


if __name__ == "__main__":
    # under its own name, which vLLM imports it by
    from rlhf_lightning.rollout import vllm_serve

    raise SystemExit(vllm_serve.main())
