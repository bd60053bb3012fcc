"""How near the GPU worker's bf16 is to fp32, against transformers + PEFT in bf16.

    python -m benchmarks.gpu_exactness [--model FOLDER] [--json FILE] [--device cuda]

The default model and its sample adapters. Texts are prompts of each adapter and of the base model,
continued greedily by transformers in fp32. The worker decodes them all in one batch, with every
token forced, and so does transformers in bf16, each text by itself. For each token, KL(p, q): p is
the distribution of transformers in fp32, q that of the other. Ours may be 1.1 times theirs at most.

Then sampling with seeds: requests alone, and the same in a batch with all others. Random numbers do
not depend on the batch; rounding may, where kernels or splits are chosen by the number of rows.
"""

import argparse
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from prometheus_client import CollectorRegistry
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter_loader.bundled_model import bundled_model
from adapter_loader.checkpoint import BaseModel, check
from adapter_loader.packing import pack, plan
from adapter_loader.peft_config import parse_peft_config
from benchmarks.machine import commit, machine
from gpu_worker.batch import make_batch
from gpu_worker.build import build_worker
from gpu_worker.figures import Figures
from gpu_worker.worker import Worker
from pipeline.config import Settings
from pipeline.messages import AdapterCopy, NewRow, PlaceAdapter, Sampling, Step
from pipeline.model_config import ModelConfig, read_model_config

ADAPTERS = Path(__file__).parent.parent / "examples" / "adapters"
PROMPTS = (
    "My name is Emma, I am 29 years old, and I love living in Lisbon!",
    "What is the capital of France?",
    "The food was cold and the waiter was rude.",
    "List three things that one should know about the sea.",
    "Tom, 41, moved from Oslo to Madrid last year.",
    "Explain in one sentence why the sky is blue.",
    "I have never enjoyed a film as much as this one.",
    "Which customers are older than 30?",
)
TOKENS = 48
MOST_TOKENS = 512
SHARE_WANTED = 1.1


class Text(NamedTuple):
    adapter: str | None
    tokens: list[int]
    prompt: int  # tokens


class Reference:
    """transformers + PEFT."""

    def __init__(self, model: Path, dtype: torch.dtype, device: str) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        names = adapter_names()
        self._model = PeftModel.from_pretrained(base, ADAPTERS / names[0], adapter_name=names[0])
        for name in names[1:]:
            self._model.load_adapter(ADAPTERS / name, adapter_name=name)
        self._model.to(device=device, dtype=dtype).eval()
        self._device = device

    def continued(self, adapter: str | None, prompt: list[int]) -> Text:
        """Greedily."""
        inputs = torch.tensor([prompt], device=self._device)
        generated = self._with(
            adapter,
            lambda: self._model.generate(  # type: ignore[no-untyped-call]
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                min_new_tokens=TOKENS,
                max_new_tokens=TOKENS,
            ),
        )
        return Text(adapter, generated[0].tolist(), len(prompt))

    def logits(self, text: Text) -> Tensor:
        """fp32[TOKENS, vocabulary], before each token that follows the prompt."""
        inputs = torch.tensor([text.tokens], device=self._device)
        logits: Tensor = self._with(text.adapter, lambda: self._model(input_ids=inputs).logits)
        return logits[0, text.prompt - 1 : -1].float()

    def _with(self, adapter: str | None, run: Any) -> Any:
        if adapter is None:
            with self._model.disable_adapter():
                return run()
        self._model.set_adapter(adapter)
        return run()


class Ours:
    """The worker, with every adapter resident."""

    def __init__(self, model: Path, rows: int, device: str) -> None:
        settings = Settings(
            device=device,  # type: ignore[arg-type]
            dtype="bfloat16",
            rows=rows,
            step_tokens=4096,
            max_total_tokens=MOST_TOKENS,
            kv_cache_bytes=1 << 30,
            adapter_pool_bytes=256 << 20,
        )
        built = build_worker(settings, model, Figures(CollectorRegistry()))
        self.worker: Worker = built.worker
        self.attention = built.facts["attention"]
        self._row_blocks = -(-MOST_TOKENS // built.ready.block_tokens)
        self.slots = load_adapters(self.worker, read_model_config(model))

    def start(self, texts: Sequence[Text], sampling: Sequence[Sampling], given: int) -> None:
        """Text i takes row i; `given` of its tokens after the prompt are known, all are fed but the
        last that is known."""
        new_rows = tuple(
            NewRow(
                row=row,
                slot=-1 if text.adapter is None else self.slots[text.adapter],
                token_ids=ints(text.tokens[: text.prompt + given]),
                prompt_tokens=text.prompt,
                cached_tokens=0,
                blocks=ints(range(row * self._row_blocks, (row + 1) * self._row_blocks)),
                sampling=sampling[row],
                logprobs=None,
            )
            for row, text in enumerate(texts)
        )
        self.worker.run(Step(1, new_rows=new_rows))
        table = self.worker.rows
        for first in range(0, len(texts), 16):
            some = range(first, min(first + 16, len(texts)))
            fed = [texts[row].prompt - 1 for row in some]
            chunks = [[row, 0, count] for row, count in zip(some, fed, strict=True)]
            for row, text in zip(some, texts[first:], strict=False):
                table.length[row] = text.prompt
            self.worker.run(Step(2, prefill=ints(chunks)))

    def logits(self, texts: Sequence[Text]) -> Iterator[Tensor]:
        """For each token after the prompts, fp32[texts, vocabulary] before it."""
        self.start(texts, [Sampling(temperature=0)] * len(texts), TOKENS)
        everyone = np.arange(len(texts))
        for _ in range(TOKENS):
            host = make_batch(Step(3, decode_rows=ints(everyone)), self.worker.rows)
            logits = self.worker.logits(host).float()
            if logits.is_cuda:
                torch.cuda.synchronize()  # no more steps in flight than the worker has buffers for
            yield logits
            self.worker.rows.advance(everyone)
        self.worker.run(Step(4, free_rows=ints(everyone)))

    def sampled(self, texts: Sequence[Text], sampling: Sequence[Sampling]) -> list[list[int]]:
        """TOKENS tokens of each."""
        self.start(texts, sampling, 0)
        everyone = ints(range(len(texts)))
        steps = [self.worker.run(Step(3, decode_rows=everyone)) for _ in range(TOKENS)]
        self.worker.run(Step(4, free_rows=everyone))
        produced = np.array([np.frombuffer(step.token_ids, np.int32) for step in steps])
        return [column.tolist() for column in produced.T]


def adapter_names() -> list[str]:
    return sorted(path.parent.name for path in ADAPTERS.glob("*/adapter_config.json"))


def load_adapters(worker: Worker, config: ModelConfig) -> dict[str, int]:
    """The slot of each sample adapter."""
    base = BaseModel(config.layers, config.module_shapes(), "bfloat16")
    packed = []
    for name in adapter_names():
        peft_config = parse_peft_config((ADAPTERS / name / "adapter_config.json").read_bytes())
        with (ADAPTERS / name / "adapter_model.safetensors").open("rb") as file:
            modules = check(file.fileno(), os.fstat(file.fileno()).st_size, peft_config, base)
            planned = plan(modules, base)
            extent = bytearray(planned.placed.nbytes)
            pack(file.fileno(), planned, memoryview(extent))
        packed.append((extent, planned.ranks))
    arena = mmap.mmap(-1, sum(-(-len(extent) // 256) * 256 for extent, _ in packed))
    copies, offset = [], 0
    for slot, (extent, ranks) in enumerate(packed):
        arena[offset : offset + len(extent)] = bytes(extent)
        copies.append(AdapterCopy(slot, offset, offset, len(extent), ranks))
        offset += -(-len(extent) // 256) * 256
    worker.attach_arena(arena)
    for copy in copies:
        worker.place(PlaceAdapter(copy))
    return {name: slot for slot, name in enumerate(adapter_names())}


def ints(values: Any) -> bytes:
    return np.asarray(list(values), np.int32).tobytes()


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL of each row, in nats."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def compare(model: Path, device: str) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    exact = Reference(model, torch.float32, device)
    prompts = [tokenize(tokenizer, prompt) for prompt in PROMPTS]
    texts = [
        exact.continued(adapter, prompt)
        for adapter in [None, *adapter_names()]
        for prompt in prompts
    ]
    rounded = Reference(model, torch.bfloat16, device)
    expected = torch.stack([exact.logits(text) for text in texts], 1)  # [TOKENS, texts, vocabulary]
    theirs = torch.stack([rounded.logits(text) for text in texts], 1)
    ours_is = Ours(model, len(texts), device)
    ours = torch.stack([logits[:, : expected.shape[2]] for logits in ours_is.logits(texts)])
    rows = {}
    for index, adapter in enumerate(["base", *adapter_names()]):
        some = slice(index * len(PROMPTS), (index + 1) * len(PROMPTS))
        rows[adapter] = figures(expected[:, some], theirs[:, some], ours[:, some])
    rows["all"] = figures(expected, theirs, ours)
    return {"attention": ours_is.attention, "kl": rows, "seeds": seeds(ours_is, texts)}


def tokenize(tokenizer: Any, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return [int(token) for token in tokens]


def figures(expected: Tensor, theirs: Tensor, ours: Tensor) -> dict[str, float]:
    their_kl, our_kl = (float(divergence(expected, other).mean()) for other in (theirs, ours))
    best = expected.argmax(-1)
    return {
        "kl_transformers": their_kl,
        "kl_ours": our_kl,
        "ratio": our_kl / their_kl,
        "agreement_transformers": float((theirs.argmax(-1) == best).double().mean()),
        "agreement_ours": float((ours.argmax(-1) == best).double().mean()),
    }


def seeds(ours: Ours, texts: Sequence[Text]) -> dict[str, Any]:
    """Requests with seeds alone, and among others."""
    sampling = [Sampling(temperature=0.8, top_p=0.95, seed=seed) for seed in range(len(texts))]
    together = ours.sampled(texts, sampling)
    again = ours.sampled(texts, sampling)
    others = list(reversed(range(len(texts))))
    turned = ours.sampled([texts[i] for i in others], [sampling[i] for i in others])
    turned = [turned[i] for i in others]  # the same requests, in other rows
    alone = [ours.sampled([texts[i]], [sampling[i]])[0] for i in range(0, len(texts), 3)]
    return {
        "again": equal_share(again, together),
        "in other rows": equal_share(turned, together),
        "alone": equal_share(alone, together[::3]),
    }


def equal_share(some: Sequence[list[int]], others: Sequence[list[int]]) -> dict[str, float]:
    same = [one == other for one, other in zip(some, others, strict=True)]
    prefix = [
        next(
            (i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), TOKENS
        )
        for one, other in zip(some, others, strict=True)
    ]
    return {"requests": sum(same) / len(same), "tokens_until": sum(prefix) / TOKENS / len(prefix)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="in place of the default model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.inference_mode():
        found = compare(arguments.model or bundled_model(), arguments.device)
    print(f"{machine()}, commit {commit()}, attention {found['attention']}\n")
    print("| adapter | KL of transformers | KL of ours | ratio | same token, theirs | ours |")
    print("|---|---|---|---|---|---|")
    for name, row in found["kl"].items():
        print(
            f"| {name} | {row['kl_transformers']:.2e} | {row['kl_ours']:.2e} | {row['ratio']:.3f} "
            f"| {row['agreement_transformers']:.4f} | {row['agreement_ours']:.4f} |"
        )
    for name, row in found["seeds"].items():
        print(
            f"sampled with seeds, {name}: {row['requests']:.3f} of the requests equal, "
            f"{row['tokens_until']:.3f} of the tokens before the first difference"
        )
    if arguments.json:
        result = {"machine": machine(), "commit": commit(), **found}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if found["kl"]["all"]["ratio"] > SHARE_WANTED:
        raise SystemExit(f"more than {SHARE_WANTED} times the divergence of transformers")


if __name__ == "__main__":
    main()
