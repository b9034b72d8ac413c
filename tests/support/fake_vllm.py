"""A small HTTP server that answers as a vLLM behind our gate does, by a policy that it holds; or misbehaves."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors.torch import load

from rlhf_lightning.data.collate import collate_prompts
from rlhf_lightning.rollout.generate import HFGenerate
from rlhf_lightning.rollout.spec import GenerationSpec
from rlhf_lightning.rollout.vllm_serve import tied_in

TOKEN = "of-these-tests-only-0123456789"


class FakeVLLM(ThreadingHTTPServer):
    """Holds `policy`, a copy that nobody trains.

    Args:
        failures: status to answer so many requests with first, by path: {"/v1/completions": [503, 503]}; 0 = none.
        hangs: paths that are never answered.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, policy, tokenizer, failures=None, hangs=()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.policy, self.tokenizer = policy, tokenizer
        self.failures, self.hangs = failures or {}, hangs
        self.weights, self.base, self.received, self.parts = None, None, {}, 0
        self.sizes = []
        """Bytes of every part, and whether it is an adapter's."""
        self.changes = {}
        """Entries of the model's description that are told otherwise."""
        self.asked = []
        self.lock = threading.Lock()
        self.ended = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(b"")

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body):
        server, path = self.server, urlsplit(self.path)
        if path.path in server.hangs:
            server.ended.wait(60)
            return
        with server.lock:
            server.asked.append(path.path)
            failing = server.failures.get(path.path)
            if failing and (status := failing.pop(0)):
                self.reply(status, {"error": "on purpose"})
            elif path.path == "/health":
                self.reply(200, {})
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.reply(401, {})
            elif path.path == "/rlhf/model":
                config = server.policy.config
                names = ("vocab_size", "hidden_size", "num_hidden_layers")
                told = {"architecture": type(server.policy.causal_lm).__name__, "max_lora_rank": 16}
                self.reply(200, told | {name: getattr(config, name) for name in names} | server.changes)
            elif path.path == "/rlhf/weights":
                self.take(body, {name: value[0] for name, value in parse_qs(path.query).items()})
            elif self.headers.get("X-RLHF-Weights") != server.weights:
                self.reply(409, {})
            elif server.weights != server.base and json.loads(body).get("model") != server.weights:
                self.reply(404, {"error": "the adapter was not asked for"})
            else:
                self.reply(200, {"choices": complete(server.policy, server.tokenizer, json.loads(body))})

    def take(self, body, query):
        server = self.server
        over = query.get("over")
        if over is not None and over != server.base:
            self.reply(409, {"error": "another base"})
            return
        server.received |= load(body)
        server.tied = tied_in(body)
        server.parts += 1
        server.sizes.append((len(body), over is not None))
        if query["last"] == "1":
            server.received |= {name: server.received[first] for name, first in server.tied.items()}
            if over is None:
                server.policy.causal_lm.load_state_dict(server.received)
                server.held = {name: weight.clone() for name, weight in server.received.items()}
            else:
                server.policy.causal_lm.load_state_dict(server.held | added(server.held, server.received))
            server.weights, server.base, server.received = query["name"], over or query["name"], {}
        self.reply(200, {})


def added(base, adapter):
    """The weights that an adapter changes."""
    layers = {name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")}
    return {
        f"{layer}.weight": base[f"{layer}.weight"]
        + adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
        for layer in layers
    }


def complete(policy, tokenizer, asked):
    """Choices of the completions API."""
    spec = GenerationSpec(
        max_new_tokens=asked["max_tokens"],
        temperature=asked["temperature"],
        num_samples=asked["n"],
        keep_logprobs=asked["temperature"] > 0,
    )
    prompts = collate_prompts([asked["prompt"]], [""], [{}], range(1), tokenizer.pad_token_id)
    answers = HFGenerate(spec, tokenizer).generate(policy, prompts, seed=asked["seed"])
    said = torch.zeros(answers.tokens.shape) if answers.sampler_logprobs is None else answers.sampler_logprobs
    return [
        {
            "index": row,
            "token_ids": answers.tokens[row][mask].tolist(),
            "logprobs": {"token_logprobs": said[row][mask].tolist()},
            "finish_reason": "stop" if answers.finished[row] else "length",
        }
        for row, mask in enumerate(answers.mask)
    ]


@contextmanager
def serving(server):
    """While inside, the server answers."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
