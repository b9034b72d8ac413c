"""What handing weights to vLLM costs: make bench-vllm

A policy with an adapter (rank 16, every linear layer, float32) goes to vLLM in process and to a server on the same
machine, merged and sent alone. Bytes are those of the tensors that are handed over; milliseconds by the clock, least of
five, of an update after the first; sampling is 8 answers of 32 tokens, least of three. Results:
benchmarks/results/handover.json. Needs what `make test-vllm` installs.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench_common import about

from rlhf_lightning.core.batches import PromptBatch
from rlhf_lightning.data.collate import collate_prompts
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.handover import adapter_weights, checkpoint_weights
from rlhf_lightning.models.loading import load_policy, load_tokenizer
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.spec import LoraSpec, ModelSpec
from rlhf_lightning.pipelines.files import write_json
from rlhf_lightning.quickstart.material import train_tokenizer
from rlhf_lightning.rollout import GenerationSpec, VLLMEngine, VLLMServer

RESULT = Path(__file__).parent / "results" / "handover.json"
RANK = 16
COMMON = {"model_type": "llama", "max_position_embeddings": 256}
MODELS = {
    # the sizes of stories260k, whose heads of 8 numbers vLLM's attention refuses on the CPU
    "small": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "large": {
        "vocab_size": 16384,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}


@contextmanager
def server(model: str, scratch: Path) -> Iterator[str]:
    """Address of a server of ours that takes adapters."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--load-format", "dummy", "--dtype", "float32", "--enforce-eager", "--port", str(port)]
    options += ["--enable-lora", "--max-lora-rank", str(RANK)]
    command = [sys.executable, "-m", "rlhf_lightning.rollout.vllm_serve", "--model", model, *options]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with (scratch / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, f"the server ended: {scratch / 'server.log'}"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def least_ms(repeats: int, work: Callable[[], Any]) -> float:
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return 1e3 * min(took)


def move(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))


def measured(engine: Any, policy: Policy, prompts: PromptBatch, adapter: str) -> dict[str, float]:
    began = time.perf_counter()
    engine.take_weights(policy)
    first = 1e3 * (time.perf_counter() - began)
    took = []
    for _ in range(5):
        move(policy)
        took.append(least_ms(1, lambda: engine.take_weights(policy)))
    sampling = least_ms(3, lambda: engine.generate(policy, prompts, seed=0))
    told = adapter_weights(policy) if adapter == "sent" else dict(checkpoint_weights(policy))
    return {
        "MB of an update": sum(tensor.nbytes for tensor in told.values()) / 1e6,
        "ms of an update": min(took),
        "ms of the first": first,
        "ms of sampling": sampling,
    }


def rows(name: str, scratch: Path) -> list[dict[str, Any]]:
    folder = scratch / name
    train_tokenizer(["a few words"]).save_pretrained(folder / "tokenizer")
    spec = ModelSpec(config=COMMON | MODELS[name], tokenizer=str(folder / "tokenizer"))
    path = str(export_policy(load_policy(spec), load_tokenizer(spec), folder / "model"))
    tokenizer = load_tokenizer(ModelSpec(path=path))
    prompts = collate_prompts([[1, 2, 3, 4]], [""], [{}], range(1), tokenizer.pad_token_id)
    generation = GenerationSpec(max_new_tokens=32, min_new_tokens=32, num_samples=8)
    found = []

    def note(place: str, adapter: str, engine: Any) -> None:
        policy = load_policy(ModelSpec(path=path, lora=LoraSpec(r=RANK)))
        move(policy)
        size = sum(p.numel() for p in policy.parameters() if not p.requires_grad)
        figures = measured(engine, policy, prompts, adapter)
        found.append({"parameters": size, "engine": place, "adapter": adapter} | figures)
        print(found[-1], flush=True)

    for adapter in ("merged", "sent"):
        engine = VLLMEngine(generation, tokenizer, adapter=adapter)
        engine.take_weights(load_policy(ModelSpec(path=path, lora=LoraSpec(r=RANK))))  # starts it, which is not counted
        try:
            note("VLLMEngine", adapter, engine)
        finally:
            engine.close()
    with server(path, folder) as url:
        for adapter in ("merged", "sent"):
            note("VLLMServer", adapter, VLLMServer(generation, tokenizer, adapter=adapter, url=url))
    return found


def main() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("RLHF_VLLM_TOKEN", secrets.token_hex(16))
    scratch = Path("runs/bench_handover")
    scratch.mkdir(parents=True, exist_ok=True)
    found = [row for name in MODELS for row in rows(name, scratch)]
    measured_with = about()
    measured_with["versions"]["vllm"] = version("vllm-cpu")
    load = f"load average of {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores over the last quarter of an hour"
    write_json(RESULT, {"about": measured_with, "conditions": load, "rank": RANK, "rows": found})


if __name__ == "__main__":
    main()
