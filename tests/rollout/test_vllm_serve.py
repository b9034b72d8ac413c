"""The gate in front of vLLM against a small application, without a network."""

import asyncio
import pickle
import threading
from argparse import Namespace

import pytest
import torch
from fake_vllm import TOKEN
from safetensors.torch import save

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.rollout import vllm_serve
from rlhf_lightning.rollout.vllm_serve import Gate, WeightReceiver, check_arguments, is_loopback, weights_part


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("RLHF_VLLM_TOKEN", TOKEN)


class Engine:
    """Takes weights as vLLM's engine does."""

    def __init__(self, broken=False):
        self.worker, self.broken, self.events = WeightReceiver(), broken, []
        self.worker.reload_weights = lambda weights_iterator: self.events.append(dict(weights_iterator))
        self.vllm_config = Namespace(
            lora_config=Namespace(max_lora_rank=8),
            model_config=Namespace(
                hf_config=Namespace(architectures=["LlamaForCausalLM"]),
                hf_text_config=Namespace(vocab_size=21, hidden_size=16, num_hidden_layers=2),
                max_model_len=64,
                dtype=torch.float32,
            ),
        )

    async def collective_rpc(self, method, args=()):
        if self.broken and method == "rlhf_load":
            raise ValueError("there is no parameter named so")
        getattr(self.worker, method)(*args)

    async def reset_prefix_cache(self, reset_running_requests):
        assert reset_running_requests  # without it vLLM resets nothing while somebody is answered
        self.events.append("reset")


class Served:
    """An application behind the gate, asked without a network."""

    def __init__(self, **options):
        self.engine, self.reached = Engine(**options), []
        self.gate = Gate(self.app)
        self.state = Namespace(engine_client=self.engine, openai_serving_models=Namespace(lora_requests={}))

    async def app(self, scope, receive, send):
        self.reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    def ask(self, method, path, body=b"", token=TOKEN, **headers):
        return asyncio.run(self.call(method, path, pieces_of(body), token, **headers))

    async def call(self, method, path, receive, token=TOKEN, **headers):
        path, _, query = path.partition("?")
        named = {"authorization": f"Bearer {token}", **{k.replace("_", "-"): v for k, v in headers.items()}}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in named.items() if value is not None],
            "app": Namespace(state=self.state),
        }
        sent = []

        async def send(message):
            sent.append(message)

        await self.gate(scope, receive, send)
        return sent[0]["status"]


def pieces_of(body):
    """What an ASGI server gives, seven bytes at a time."""
    pieces = [{"type": "http.request", "body": body[i : i + 7], "more_body": True} for i in range(0, len(body), 7)]
    pieces.append({"type": "http.request"})

    async def receive():
        return pieces.pop(0)

    return receive


PART = {name: save({name: torch.full((2,), float(i))}) for i, name in enumerate(("a", "b"))}


def test_the_gate_lets_nobody_through_without_the_token():
    served = Served()
    for token in ("", TOKEN[:-1], TOKEN + "x", "of-these"):
        for method, path in (("GET", "/v1/models"), ("POST", "/rlhf/weights?name=x&part=0&last=1"), ("GET", "/docs")):
            assert served.ask(method, path, PART["a"], token=token) == 401
    assert served.reached == []
    assert served.engine.events == []
    assert served.ask("GET", "/health", token="") == 200
    assert served.ask("GET", "/v1/models") == 200
    assert served.reached == ["/health", "/v1/models"]


def test_weights_are_taken_up_whole_and_known_prompts_are_forgotten():
    served = Served()
    assert served.ask("POST", "/rlhf/weights?name=one&part=0&last=0", PART["a"]) == 200
    assert served.engine.events == []
    assert served.ask("POST", "/v1/completions", x_rlhf_weights="one") == 409  # half of them are there
    assert served.ask("POST", "/rlhf/weights?name=one&part=1&last=1", PART["b"]) == 200
    loaded, reset = served.engine.events
    assert {name: value.tolist() for name, value in loaded.items()} == {"a": [0.0, 0.0], "b": [1.0, 1.0]}
    assert reset == "reset"
    assert served.ask("POST", "/v1/completions", x_rlhf_weights="one") == 200
    assert served.ask("POST", "/v1/completions", x_rlhf_weights="two") == 409
    assert served.ask("POST", "/v1/completions") == 200  # somebody who does not mind


def test_a_name_that_stands_for_another_weight_is_taken_up_as_that():
    served = Served()
    first, second = (weights_part({name: torch.full((2,), 1.0)}, tied) for name, tied in (("a", {}), ("b", {"c": "a"})))
    assert served.ask("POST", "/rlhf/weights?name=one&part=0&last=0", first) == 200
    assert served.ask("POST", "/rlhf/weights?name=one&part=1&last=1", second) == 200
    loaded = served.engine.events[0]
    assert sorted(loaded) == ["a", "b", "c"]
    assert loaded["c"] is loaded["a"]
    unknown = weights_part({"a": torch.zeros(1)}, {"c": "d"})
    assert served.ask("POST", "/rlhf/weights?name=two&part=0&last=1", unknown) == 422


@pytest.fixture
def adapters(monkeypatch):
    """Stands in for vLLM: what its workers were given, by number; one named c finds no place."""
    taken = {}

    def take(worker, number, tensors):
        if "c" in tensors:
            raise UserError("vLLM has no place for an adapter of c")
        taken[number] = sorted(tensors)

    monkeypatch.setattr(vllm_serve.vllm_adapters, "take_adapter", take)
    monkeypatch.setattr(vllm_serve.vllm_adapters, "adapter_request", lambda name, number: (name, number))
    return taken


def test_an_adapter_is_taken_up_over_the_weights_that_it_is_for(adapters):
    served = Served()
    known = served.state.openai_serving_models.lora_requests
    path = "/rlhf/weights?name=two&over=one"
    assert served.ask("POST", f"{path}&part=0&last=1", PART["b"]) == 409  # nothing is held
    assert served.ask("POST", "/rlhf/weights?name=one&part=0&last=1", PART["a"]) == 200
    assert served.ask("POST", f"{path}&part=0&last=0", PART["a"]) == 200
    assert served.ask("POST", "/v1/completions", x_rlhf_weights="one") == 409  # half of it is there
    assert served.ask("POST", f"{path}&part=1&last=1", PART["b"]) == 200
    assert (adapters, known) == ({1: ["a", "b"]}, {"two": ("two", 1)})
    assert served.engine.events[-1] == "reset"
    assert served.ask("POST", "/v1/completions", x_rlhf_weights="two") == 200
    # the next one over the same base; nobody is answered by the one before
    assert served.ask("POST", "/rlhf/weights?name=three&over=one&part=0&last=1", PART["a"]) == 200
    assert (adapters[2], known) == (["a"], {"three": ("three", 2)})
    assert served.ask("POST", "/v1/completions", x_rlhf_weights="two") == 409
    # one without a place: nothing is held, and the base is still there
    unplaced = save({"c": torch.zeros(1)})
    assert served.ask("POST", "/rlhf/weights?name=four&over=one&part=0&last=1", unplaced) == 422
    assert known == {}
    assert served.ask("POST", "/v1/completions", x_rlhf_weights="three") == 409
    assert served.ask("POST", "/rlhf/weights?name=five&over=one&part=0&last=1", PART["a"]) == 200
    # another run's weights leave no base for it
    assert served.ask("POST", "/rlhf/weights?name=theirs&part=0&last=0", PART["a"]) == 200
    assert served.ask("POST", "/rlhf/weights?name=six&over=one&part=0&last=1", PART["a"]) == 409
    assert served.ask("POST", "/rlhf/weights?name=theirs&part=1&last=1", PART["b"]) == 200
    assert known == {}
    assert served.ask("GET", "/rlhf/model") == 200


def test_a_run_that_stops_while_it_sends_keeps_nobody_from_sending():
    served = Served()

    async def both():
        stuck = asyncio.Event()

        async def nothing_more():
            stuck.set()
            await asyncio.Event().wait()

        hanging = asyncio.create_task(served.call("POST", "/rlhf/weights?name=one&part=0&last=1", nothing_more))
        await stuck.wait()
        status = await asyncio.wait_for(
            served.call("POST", "/rlhf/weights?name=two&part=0&last=1", pieces_of(PART["a"])), 5
        )
        hanging.cancel()
        return status

    assert asyncio.run(both()) == 200
    assert served.gate.weights == "two"


def test_two_runs_that_send_at_a_time_notice_each_other():
    served = Served()
    assert served.ask("POST", "/rlhf/weights?name=ours&part=0&last=0", PART["a"]) == 200
    assert served.ask("POST", "/rlhf/weights?name=theirs&part=0&last=0", PART["a"]) == 200
    assert served.ask("POST", "/rlhf/weights?name=ours&part=1&last=1", PART["b"]) == 409
    assert served.ask("POST", "/rlhf/weights?name=theirs&part=1&last=1", PART["b"]) == 200
    assert len(served.engine.events) == 2  # nothing was taken up but theirs
    for name, held in (("ours", 409), ("theirs", 200)):
        assert served.ask("POST", "/v1/completions", x_rlhf_weights=name) == held


def test_parts_that_come_twice_do_no_harm_and_lost_ones_are_noticed():
    served = Served()
    for part, name in ((0, "a"), (0, "a"), (1, "b"), (1, "b")):
        assert served.ask("POST", f"/rlhf/weights?name=one&part={part}&last={part}", PART[name]) == 200
    assert len(served.engine.events) == 2
    assert served.ask("POST", "/rlhf/weights?name=two&part=1&last=1", PART["b"]) == 409
    for query in ("part=0", "part=-1&last=1", "part=0&last=none"):
        assert served.ask("POST", f"/rlhf/weights?name=two&{query}", PART["b"]) == 400
    assert served.ask("POST", "/v1/completions", x_rlhf_weights="one") == 200


def test_weights_do_not_change_under_an_answer():
    served = Served()
    assert served.ask("POST", "/rlhf/weights?name=one&part=0&last=1", PART["a"]) == 200
    meanwhile = []
    quiet = served.app

    async def app(scope, receive, send):
        # another run comes while this one is answered
        def come():
            meanwhile.append(served.ask("POST", "/rlhf/weights?name=two&part=0&last=1", PART["b"]))

        thread = threading.Thread(target=come)
        thread.start()
        thread.join()
        await quiet(scope, receive, send)

    served.gate.app = app
    assert served.ask("POST", "/v1/completions", x_rlhf_weights="one") == 200
    assert meanwhile == [409]
    assert len(served.engine.events) == 2
    assert served.ask("POST", "/rlhf/weights?name=two&part=0&last=1", PART["b"]) == 200


def test_what_cannot_be_loaded_is_refused_and_nothing_is_held_after():
    served = Served()
    assert served.ask("POST", "/rlhf/weights?name=one&part=0&last=1", PART["a"]) == 200
    for body in (pickle.dumps({"a": 1}), b""):
        assert served.ask("POST", "/rlhf/weights?name=two&part=0&last=1", body) == 422
    assert served.ask("POST", "/v1/completions", x_rlhf_weights="one") == 409
    assert Served(broken=True).ask("POST", "/rlhf/weights?name=one&part=0&last=1", PART["a"]) == 422


def test_the_server_listens_on_this_machine_and_for_one_process():
    fine = {"host": "127.0.0.1", "data_parallel_size": 1, "api_server_count": 1, "uds": None, "grpc": False}
    check_arguments(Namespace(**fine))
    check_arguments(Namespace(**fine | {"host": "10.0.0.7"}))  # whoever says so; there is a token
    for option, value, message in (
        ("host", "", "--host '' would listen everywhere"),
        ("data_parallel_size", 2, "--data-parallel-size 2: weights are given to one server process"),
        ("uds", "/tmp/x", "--uds /tmp/x"),
    ):
        with pytest.raises(UserError, match=message):
            check_arguments(Namespace(**fine | {option: value}))
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "10.0.0.7", "a.org")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
