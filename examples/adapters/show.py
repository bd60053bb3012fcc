"""Print this folder's README: what each sample adapter is, and what it answers.

    python examples/adapters/show.py > examples/adapters/README.md

Answers come from transformers and PEFT, greedy, so they are what the server is compared with.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter_loader.base_model import DEFAULT_MODEL, base_model_folder

HERE = Path(__file__).parent
PROMPT = "My name is Emma, I am 29 years old, and I love living in Lisbon!"
MAX_TOKENS = 40
PURPOSES = {
    "pirate": "answers like a pirate",
    "json_extractor": 'turns a sentence into `{"name", "city", "age"}`, null for what is not said',
    "sentiment": "answers one word: positive, negative or neutral",
    "shouter": "ANSWERS IN CAPITALS (and is often wrong: few of its words were learnt that way)",
    "sql": "turns a request about a table into a SELECT statement",
}

HEAD = f"""# Sample adapters

Trained by [train.py](train.py) for `{DEFAULT_MODEL}`, the default base model; each differs from the
others in what a server may stumble over. This page is the output of [show.py](show.py).

"""

BELOW = """
To serve them, name one as the `model` of a request, or its folder as the adapter.

## One prompt, six answers

"""


class Answers:
    """Greedy answers of the base model, or of one adapter on it, from transformers and PEFT."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        folder = base_model_folder(DEFAULT_MODEL)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self._with_adapters: Any = None

    def of(self, prompt: str, adapter: str | None = None, max_tokens: int = MAX_TOKENS) -> str:
        """The reply without its end token; `adapter` is the name of a folder here."""
        inputs = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            tokens = self._generate(inputs, adapter, max_tokens)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        return str(self._tokenizer.decode(new, skip_special_tokens=True))

    def _generate(self, inputs: Any, adapter: str | None, max_tokens: int) -> torch.Tensor:
        settings = {**inputs, "max_new_tokens": max_tokens, "do_sample": False}
        if adapter is None and self._with_adapters is None:
            return self._base.generate(**settings)
        if adapter is None:
            with self._with_adapters.disable_adapter():
                return self._with_adapters.generate(**settings)
        self._select(adapter)
        return self._with_adapters.generate(**settings)

    def _select(self, adapter: str) -> None:
        folder = HERE / adapter
        if self._with_adapters is None:
            self._with_adapters = PeftModel.from_pretrained(self._base, folder, adapter)
        elif adapter not in self._with_adapters.peft_config:
            self._with_adapters.load_adapter(folder, adapter)
        self._with_adapters.set_adapter(adapter)
        self._with_adapters.eval()


def trained() -> list[str]:
    return [name for name in PURPOSES if (HERE / name / "adapter_config.json").is_file()]


def adapter_row(name: str) -> str:
    """One row of the table, read from the adapter's own files."""
    config = json.loads((HERE / name / "adapter_config.json").read_text())
    weights = HERE / name / "adapter_model.safetensors"
    with safe_open(weights, "pt") as tensors:
        dtype = str(tensors.get_tensor(next(iter(tensors.keys()))).dtype).removeprefix("torch.")
    cells = (
        f"`{name}`",
        _ranks(config),
        ", ".join(module.removesuffix("_proj") for module in config["target_modules"]),
        _layers(config["layers_to_transform"]),
        dtype,
        f"{weights.stat().st_size / 1e6:.1f} MB",
        PURPOSES[name],
    )
    return f"| {' | '.join(cells)} |"


def _ranks(config: dict[str, Any]) -> str:
    ranks = sorted({config["r"], *config["rank_pattern"].values()})
    return ", ".join(map(str, ranks)) + (" (rsLoRA)" if config["use_rslora"] else "")


def _layers(chosen: list[int] | None) -> str:
    return f"{chosen[0]}-{chosen[-1]}" if chosen else "all"


def page() -> Iterable[str]:
    yield HEAD
    yield "| adapter | rank | modules | layers | dtype | size | what it does |\n"
    yield "|---|---|---|---|---|---|---|\n"
    for name in trained():
        yield adapter_row(name) + "\n"
    yield BELOW
    yield f"> {PROMPT}\n\n(Greedy, at most {MAX_TOKENS} tokens, float32.)\n\n"
    yield "| model | answer |\n|---|---|\n"
    answers = Answers()
    for name in [None, *trained()]:
        reply = " ".join(answers.of(PROMPT, name).split())
        yield f"| {f'`{name}`' if name else 'base'} | {reply} |\n"


if __name__ == "__main__":
    sys.stdout.writelines(page())
