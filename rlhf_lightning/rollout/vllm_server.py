"""A vLLM in another process or on another machine, asked over HTTP: it is given weights, and answers come as tokens."""

import copy
import http.client
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.core.batches import Generated, PromptBatch
from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import RolloutEngine
from rlhf_lightning.core.seeding import counter_seed
from rlhf_lightning.models.handover import (
    GivenBase,
    adapter_rank,
    adapter_weights,
    checkpoint_weights,
    tied_weights,
)
from rlhf_lightning.rollout.answers import check_context, end_ids
from rlhf_lightning.rollout.engines import (
    Answer,
    assemble_answers,
    prompt_ids,
    refuse_options_of_batches,
    vllm_sampling,
)
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.rollout.vllm_adapters import AdapterOption, check_adapter_option, room_for
from rlhf_lightning.rollout.vllm_serve import (
    TOKEN,
    WEIGHTS_HEADER,
    is_loopback,
    token_from_environment,
    weights_part,
)

HOSTS = "RLHF_VLLM_HOSTS"
"""Environment variable: hosts other than this machine that may be sent weights, prompts and the token."""
PING_SECONDS = 5.0
"""How long a server may take to say that it lives."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Limits:
    patience_s: float
    answer_timeout_s: float
    retries: int
    in_flight: int
    part_mib: int


class VLLMServer(RolloutEngine):
    """Answers from a vLLM server (`make vllm-server`), which is given the policy's weights before a rollout.

    Several processes that train on the same weights (ddp) share one server: the first gives it weights, all ask. The
    token comes from the environment variable RLHF_VLLM_TOKEN. A server that stops answering is an error, not a wait.

    Args:
        spec: how to sample.
        tokenizer: for its pad and end ids.
        adapter: of a policy with `lora`. merged: added into the weights, all of which are sent before every rollout;
            sent: the weights under it are sent once, then the adapter alone; the server is started with --enable-lora.
        url: of the server; one that is not on this machine must be named in the environment variable RLHF_VLLM_HOSTS.
        patience_s: seconds without a sign of life after which the server is given up.
        answer_timeout_s: longest time for the answers to one prompt, in seconds.
        retries: how often a request that broke, or that the server failed at, is sent again.
        in_flight: prompts that are asked at a time.
        part_mib: weights are sent in parts of this size.
    """

    def __init__(
        self,
        spec: GenerationSpec,
        tokenizer: PreTrainedTokenizerBase,
        adapter: AdapterOption = "merged",
        url: str = "http://127.0.0.1:8000",
        patience_s: float = 20.0,
        answer_timeout_s: float = 600.0,
        retries: int = 3,
        in_flight: int = 128,
        part_mib: int = 256,
    ) -> None:
        refuse_options_of_batches(spec, type(self).__name__)
        vllm_sampling(spec, ())
        check_adapter_option(adapter)
        for name, value, least in (
            ("patience_s", patience_s, 0),
            ("answer_timeout_s", answer_timeout_s, 0),
            ("retries", retries + 1, 0),
            ("in_flight", in_flight, 0),
            ("part_mib", part_mib, 0),
        ):
            if not value > least:
                raise UserError(f"engine.{name}={value}: give a positive number")
        self.spec = spec
        self.tokenizer = tokenizer
        self._server = _Server(url, adapter, _Limits(patience_s, answer_timeout_s, retries, in_flight, part_mib))

    def with_spec(self, spec: GenerationSpec) -> "VLLMServer":
        other = copy.copy(self)
        other.spec = spec
        return other

    def ahead(self) -> "VLLMServer":
        return self

    def take_weights(self, policy: Any) -> None:
        self._server.give_weights(policy)

    @torch.no_grad()
    def generate(self, policy: Any, prompts: PromptBatch, *, seed: int) -> Generated:
        check_context(self.spec, policy, prompts)
        ends = end_ids(policy, self.tokenizer)
        options = vllm_sampling(self.spec, ends)
        asked = [
            {
                **options,
                **self._server.answers_from,
                "prompt": ids,
                "n": self.spec.num_samples,
                "logprobs": 0,
                "return_token_ids": True,
                # vLLM counts on from it for the further answers
                "seed": counter_seed(seed, row) >> 1,
            }
            for row, ids in enumerate(prompt_ids(prompts))
        ]
        answers = [answer for of_prompt in self._server.complete(asked) for answer in of_prompt]
        return assemble_answers(
            self.spec,
            prompts,
            answers,
            pad_id=self.tokenizer.pad_token_id,
            ends=ends,
            vocab=policy.head().weight.shape[0],
        )


class _BrokenError(Exception):
    """A request that got no answer, or one that another try may mend."""


class _Server:
    """One server as one run knows it: where it is, what it holds."""

    def __init__(self, url: str, adapter: AdapterOption, limits: _Limits) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise UserError(f"engine.url={url!r} is no server's address: give http://127.0.0.1:8000 or the like")
        allowed = [host.strip() for host in os.environ.get(HOSTS, "").split(",")]
        if not is_loopback(parts.hostname) and parts.hostname not in allowed:
            raise UserError(
                f"engine.url={url!r} is not this machine, and a config does not decide where weights and prompts go: "
                f"export {HOSTS}={parts.hostname} if it is yours"
            )
        self.url = url
        self.adapter = adapter
        self.limits = limits
        self._address = parts
        self._run = secrets.token_hex(8)
        self._updates = 0
        self._weights = ""
        """Name of the weights that it was given last."""
        self._base = GivenBase()
        self._base_name = ""
        """Name of the weights under the adapter that it was given last."""

    # ---- weights ---------------------------------------------------------------------------------------------------

    def give_weights(self, policy: Any) -> None:
        """Weights from the first rank; the others hear whether it went well."""
        group = torch.distributed
        several = group.is_initialized() and group.get_world_size() > 1
        # a name for every try: one whose end was not heard may have left other weights under it
        self._updates += 1
        name, problem = f"{self._run}-{self._updates}", ""
        if not several or group.get_rank() == 0:
            try:
                self._send_weights(policy, name)
            except UserError as error:
                if not several:
                    raise
                problem = str(error)
        if several:
            told = [name, problem]
            group.broadcast_object_list(told, src=0)
            name, problem = told
            if problem:
                raise UserError(problem)
        self._weights = name

    def _send_weights(self, policy: Any, name: str) -> None:
        adapter = adapter_weights(policy) if self.adapter == "sent" else {}
        weights, tied = checkpoint_weights(policy, with_adapter=not adapter), tied_weights(policy)
        # each time: another server may have taken the place of the one before
        self._check_model(policy, adapter_rank(adapter) if adapter else 0)
        if not adapter:
            self._upload(weights, tied, f"name={name}")
            return
        if not self._base.is_of(policy):
            self._base.forget()
            self._base_name = f"{name}-base"
            self._upload(weights, tied, f"name={self._base_name}")
            self._base.give(policy)
        self._upload(iter(adapter.items()), {}, f"name={name}&over={self._base_name}")

    def _upload(self, weights: Iterator[tuple[str, Tensor]], tied: Mapping[str, str], query: str) -> None:
        left_out: dict[str, str] = {}
        parts = _parts(_once(weights, tied, left_out), self.limits.part_mib * 2**20)
        index, part = 0, next(parts, None)
        while part is not None:
            # two parts at a time are held, of weights that were made for this
            following = next(parts, None)
            on_cpu = {key: weight.detach().to("cpu", copy=True).contiguous() for key, weight in part}
            body = weights_part(on_cpu, left_out)
            path = f"/rlhf/weights?{query}&part={index}&last={int(following is None)}"
            self._watched([lambda body=body, path=path: self._request("POST", path, body)])  # type: ignore[misc]
            index, part = index + 1, following

    def _check_model(self, policy: Any, rank: int) -> None:
        config = policy.config.get_text_config()
        [served] = self._watched([lambda: self._request("GET", "/rlhf/model")])
        ours = {
            "architecture": type(policy.causal_lm).__name__,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
        }
        for what, value in ours.items():
            if served.get(what) != value:
                raise UserError(
                    f"the server at {self.url} serves a model whose {what} is {served.get(what)}, and the policy's is "
                    f"{value}: start it with the model that the policy was started from"
                )
        room = served.get("max_lora_rank", 0)
        if rank > room:
            raise UserError(
                f"the server at {self.url} takes adapters up to rank {room}, and lora.r={rank}: start it with "
                f"--enable-lora --max-lora-rank {room_for(rank)} (make vllm-server OPTIONS='...'), or set "
                "engine.adapter: merged"
            )

    # ---- answers ---------------------------------------------------------------------------------------------------

    @property
    def answers_from(self) -> dict[str, str]:
        """What a request says besides, for answers from the adapter that was sent."""
        return {"model": self._weights} if self.adapter == "sent" else {}

    def complete(self, asked: Sequence[dict[str, Any]]) -> list[list[Answer]]:
        """Answers to each of some requests of the API's /v1/completions."""
        return self._watched([lambda body=body: self._complete(body) for body in asked])  # type: ignore[misc]

    def _complete(self, body: dict[str, Any]) -> list[Answer]:
        content = self._request("POST", "/v1/completions", json.dumps(body).encode())
        choices = sorted(content.get("choices", ()), key=lambda choice: choice["index"])
        answers = []
        for choice in choices:
            tokens, said = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
            if tokens is None or said is None or len(tokens) != len(said):
                raise UserError(
                    f"the server at {self.url} gives no token ids with their log-probabilities: start it with "
                    "make vllm-server"
                )
            if choice["finish_reason"] not in ("stop", "length"):
                raise UserError(f"the server at {self.url} ended an answer with {choice['finish_reason']!r}")
            answers.append(Answer(tokens, said, choice["finish_reason"] == "stop"))
        if len(answers) != body["n"]:
            raise UserError(f"the server at {self.url} gave {len(answers)} answers where {body['n']} were asked for")
        return answers

    # ---- requests --------------------------------------------------------------------------------------------------

    def _watched(self, calls: Sequence[Callable[[], Result]]) -> list[Result]:
        """What the calls give, many at a time, while the server is asked again and again whether it lives."""
        done: queue.Queue[tuple[int, Result | BaseException]] = queue.Queue()
        waiting = iter(list(enumerate(calls)))
        lock, stop = threading.Lock(), threading.Event()

        def work() -> None:
            while not stop.is_set():
                with lock:
                    index, call = next(waiting, (-1, None))
                if call is None:
                    return
                try:
                    done.put((index, self._tried(call, stop)))
                except BaseException as error:
                    done.put((index, error))
                    return

        # daemons: one that waits for a dead server keeps nobody from leaving
        for _ in range(min(self.limits.in_flight, len(calls))):
            threading.Thread(target=work, daemon=True).start()
        results: dict[int, Result] = {}
        pulse = _Pulse(self)
        try:
            while len(results) < len(calls):
                try:
                    index, result = done.get(timeout=0.5)
                except queue.Empty:
                    silent = pulse.silent_for()
                    if silent > self.limits.patience_s:
                        raise UserError(self._gone(f"{silent:.0f} s")) from None
                    continue
                if isinstance(result, BaseException):
                    raise result
                results[index] = result
        finally:
            stop.set()
            pulse.stop()
        return [results[index] for index in range(len(calls))]

    def _gone(self, tried: str) -> str:
        return (
            f"no vLLM server answers at {self.url} ({tried}): start one with make vllm-server and go on with --resume "
            "auto; if there was one, its own output says why it stopped"
        )

    def _tried(self, call: Callable[[], Result], stop: threading.Event) -> Result:
        pause = 0.5
        for attempt in range(self.limits.retries + 1):
            try:
                return call()
            except _BrokenError as error:
                if attempt == self.limits.retries:
                    raise UserError(self._gone(f"{attempt + 1} tries: {error}")) from error
                stop.wait(pause)
                pause = min(2 * pause, 5.0)
        raise AssertionError("unreachable")

    def _request(self, method: str, path: str, body: bytes | None = None) -> Any:
        headers = {"Authorization": f"Bearer {token_from_environment()}", "Content-Type": "application/octet-stream"}
        if path.startswith("/v1/"):
            headers |= {"Content-Type": "application/json", WEIGHTS_HEADER: self._weights}
        try:
            status, content = self._exchange(method, path, body, headers, self.limits.answer_timeout_s)
        except TimeoutError as error:
            if path.startswith("/v1/"):
                raise UserError(
                    f"the server at {self.url} gave no answer within engine.answer_timeout_s="
                    f"{self.limits.answer_timeout_s}: raise it, or lower in_flight or generation.max_new_tokens"
                ) from error
            raise _BrokenError(str(error)) from error
        except (OSError, http.client.HTTPException) as error:
            raise _BrokenError(f"{type(error).__name__}: {error}") from error
        if status == 200:
            return json.loads(content)
        said = content[:500].decode(errors="replace")
        if status >= 500:
            raise _BrokenError(f"status {status}, {said}")
        if status == 401:
            raise UserError(f"the server at {self.url} was started with another {TOKEN} than this run's")
        if status == 404:
            raise UserError(
                f"the server at {self.url} does not know {path.split('?')[0]}: start it with make vllm-server"
            )
        if status == 409:
            raise UserError(
                f"the server at {self.url} holds other weights than this run gave it: it was started anew, or another "
                f"run uses it; one run per server, and --resume auto goes on from the last checkpoint ({said})"
            )
        raise UserError(f"the server at {self.url} refuses {path.split('?')[0]} (status {status}): {said}")

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout: float
    ) -> tuple[int, bytes]:
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._address.hostname or "", self._address.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def lives(self) -> bool:
        """Whether the server says so, within a few seconds."""
        try:
            return self._exchange("GET", "/health", None, {}, PING_SECONDS)[0] == 200
        except (OSError, http.client.HTTPException):
            return False


class _Pulse:
    """Asks a server every second whether it lives."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._last = time.monotonic()
        self._stop = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while not self._stop.is_set():
            asked = time.monotonic()
            if self._server.lives():
                self._last = asked
            self._stop.wait(1.0)

    def silent_for(self) -> float:
        """Seconds since it was last known to live."""
        return time.monotonic() - self._last

    def stop(self) -> None:
        self._stop.set()


def _once(
    weights: Iterator[tuple[str, Tensor]], tied: Mapping[str, str], left_out: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """The weights without those that have come under another name, which are noted in `left_out`."""
    seen = set()
    for name, weight in weights:
        if tied.get(name) in seen:
            left_out[name] = tied[name]
        else:
            seen.add(name)
            yield name, weight


def _parts(weights: Iterator[tuple[str, Tensor]], size: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Weights in pieces of about `size` bytes; one that is larger goes alone."""
    part: list[tuple[str, Tensor]] = []
    held = 0
    for name, weight in weights:
        bytes_of_it = weight.numel() * weight.element_size()
        if part and held + bytes_of_it > size:
            yield part
            part, held = [], 0
        part.append((name, weight))
        held += bytes_of_it
    if part:
        yield part
