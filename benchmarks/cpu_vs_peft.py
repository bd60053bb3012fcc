"""The server through HTTP against transformers + PEFT, on the CPU, in one run.

    python -m benchmarks.cpu_vs_peft [--json FILE]

16 concurrent requests over 8 random adapters of rank 8 on all seven linear layers of the default
model, 64 tokens in, 64 out, greedy, ends ignored; the same dtype and number of threads for both.
PEFT generates for the same 16 prompts in one batch with `adapter_names`. The two take turns, and
each figure is the median of its turns; tokens per second count produced tokens.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.machine import commit, machine

ADAPTERS, REQUESTS, TOKENS_IN, TOKENS_OUT, RANK = 8, 16, 64, 64, 8
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def make_adapters(model: Path, root: Path) -> list[str]:
    names = [f"adapter{number}" for number in range(ADAPTERS)]
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        adapted = get_peft_model(
            base, LoraConfig(r=RANK, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM")
        )
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.01)
        adapted.save_pretrained(str(root / name))
    return names


def prompts(turn: int) -> list[list[int]]:
    """Other tokens each turn, so that no prefix cache can answer."""
    generator = torch.Generator().manual_seed(1000 + turn)
    return torch.randint(100, 40000, (REQUESTS, TOKENS_IN), generator=generator).tolist()


class Peft:
    def __init__(self, model: Path, root: Path, names: list[str], dtype: torch.dtype) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self._model = PeftModel.from_pretrained(base, root / names[0], adapter_name=names[0])
        for name in names[1:]:
            self._model.load_adapter(root / name, adapter_name=name)
        self._model.to(dtype).eval()
        self._rows = [names[row % len(names)] for row in range(REQUESTS)]

    @torch.inference_mode()
    def turn(self, turn: int) -> float:
        """Tokens per second."""
        ids = torch.tensor(prompts(turn))
        start = time.perf_counter()
        out = self._model.generate(  # type: ignore[no-untyped-call]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=self._rows,
            do_sample=False,
            min_new_tokens=TOKENS_OUT,
            max_new_tokens=TOKENS_OUT,
            pad_token_id=2,
        )
        seconds = time.perf_counter() - start
        assert out.shape == (REQUESTS, TOKENS_IN + TOKENS_OUT)
        return REQUESTS * TOKENS_OUT / seconds


class Loradex:
    """The whole server, as `loradex serve` starts it, paused while PEFT has its turn."""

    def __init__(self, model: Path, root: Path, names: list[str], dtype: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._names = names
        self._url = f"http://127.0.0.1:{port}/v1/completions"
        command = [sys.executable, "-m", "pipeline.launch", "serve", f"--port={port}"]
        command += [f"--model-folder={model}", f"--adapter-root={root}", f"--dtype={dtype}"]
        command += [f"--run-dir={folder / dtype}", f"--arena-bytes={256 << 20}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "curl" in line:
                break
        else:
            raise SystemExit("the server did not start")
        self._drain = ThreadPoolExecutor(1).submit(self._process.stdout.read)
        self._client = httpx.Client(timeout=600)

    def turn(self, turn: int) -> float:
        def ask(request: tuple[int, list[int]]) -> int:
            row, tokens = request
            body = {
                "model": self._names[row % len(self._names)],
                "adapter_source": "local",
                "prompt": tokens,
                "max_tokens": TOKENS_OUT,
                "temperature": 0,
                "ignore_eos": True,
            }
            reply = self._client.post(self._url, json=body)
            assert reply.status_code == 200, reply.text
            usage = reply.json()["usage"]
            assert usage["prompt_tokens"] == TOKENS_IN
            return int(usage["completion_tokens"])

        requests = list(enumerate(prompts(turn)))
        with ThreadPoolExecutor(REQUESTS) as threads:
            start = time.perf_counter()
            produced = sum(threads.map(ask, requests))
            seconds = time.perf_counter() - start
        assert produced == REQUESTS * TOKENS_OUT
        return produced / seconds

    def stop(self) -> None:
        self._client.close()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


def compare(dtype: str, turns: int, model: Path, folder: Path) -> dict[str, Any]:
    root = folder / "adapters"
    names = sorted(path.name for path in root.iterdir())
    peft = Peft(model, root, names, getattr(torch, dtype))
    server = Loradex(model, root, names, dtype, folder)
    try:
        peft.turn(0), server.turn(0)  # warm up: adapters get loaded
        ours, theirs = [], []
        for turn in range(1, turns + 1):
            theirs.append(peft.turn(turn))
            ours.append(server.turn(turn))
    finally:
        server.stop()
    row = {"loradex": statistics.median(ours), "peft": statistics.median(theirs)}
    return {"dtype": dtype, **row, "ratio": row["loradex"] / row["peft"], "turns": [ours, theirs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "adapter_loader.base_model", "--model-id", MODEL]
    model = Path(subprocess.check_output(command, text=True).strip())
    with tempfile.TemporaryDirectory() as name:
        make_adapters(model, Path(name) / "adapters")
        rows = [compare(dtype, arguments.turns, model, Path(name)) for dtype in arguments.dtypes]
    print("| dtype | Loradex, tokens/s | PEFT, tokens/s | ratio |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['dtype']} | {row['loradex']:.0f} | {row['peft']:.0f} | {row['ratio']:.2f} |")
    if arguments.json:
        result = {"machine": machine(), "commit": commit(), "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
