"""transformers + PEFT, which say what is right, and one adapter of every kind that is honoured."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Every way that a PEFT LoRA may be written down, of those that are honoured.
KINDS: dict[str, dict[str, Any]] = {
    "qv": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all_linear": {"r": 8, "lora_alpha": 16, "target_modules": LINEAR},
    "rslora": {"r": 16, "lora_alpha": 4, "use_rslora": True, "target_modules": LINEAR},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 2, r"layers\.(1|2)\.mlp\.down_proj": 12},
        "alpha_pattern": {"k_proj": 24, "layers.0.self_attn.v_proj": 3},
    },
    "rslora_patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": LINEAR,
        "rank_pattern": {"o_proj": 9},
        "alpha_pattern": {"up_proj": 3},
    },
    "some_layers": {
        "r": 8,
        "lora_alpha": 32,
        "target_modules": ["o_proj", "down_proj"],
        "layers_to_transform": [1, 3, 7, 29],
    },
    "rank_one": {"r": 1, "lora_alpha": 2, "target_modules": LINEAR},
    "fan_in_fan_out": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["gate_proj", "up_proj"],
        "fan_in_fan_out": True,
    },
    "stored_fp16": {"r": 8, "lora_alpha": 16, "target_modules": LINEAR},
    "stored_bf16": {"r": 8, "lora_alpha": 16, "target_modules": LINEAR},
}
STORED = {"stored_fp16": torch.float16, "stored_bf16": torch.bfloat16}


def make_adapters(model: Path, root: Path) -> None:
    """Write one adapter of each of KINDS below root, random but of visible effect."""
    for seed, (name, config) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.to(STORED.get(name, torch.float32)).save_pretrained(str(root / name))


class Oracle:
    """transformers + PEFT in fp32, one request at a time."""

    def __init__(self, model: Path, adapters: dict[str, Path]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        names = iter(adapters.items())
        first, folder = next(names)
        self._model = PeftModel.from_pretrained(base, folder, adapter_name=first).eval()
        for name, folder in names:
            self._model.load_adapter(folder, adapter_name=name)

    def merge(self, name: str, **how: Any) -> None:
        """Add a merge of its adapters; `how` is that of PEFT's add_weighted_adapter."""
        self._model.add_weighted_adapter(adapter_name=name, **how)

    @torch.inference_mode()
    def greedy(self, inputs: str, adapter: str | None, tokens: list[int]) -> list[int]:
        """What would be chosen greedily at each place of `tokens`, after `inputs` and those before.

        Equal to `tokens` exactly if they are what a greedy generation gives, as follows by
        induction; and this takes one forward pass. The end of a text is not an end.
        """
        if adapter is None:
            with self._model.disable_adapter():
                return self._choices(inputs, tokens)
        self._model.set_adapter(adapter)
        return self._choices(inputs, tokens)

    @torch.inference_mode()
    def logprobs(self, token_ids: list[int], adapter: str | None = None) -> torch.Tensor:
        """[i] is what the first i + 1 tokens say of the next."""
        logits: torch.Tensor = self._outputs(token_ids, adapter).logits
        return logits[0].log_softmax(-1)

    @torch.inference_mode()
    def states(self, token_ids: list[int], adapter: str | None = None) -> torch.Tensor:
        """[tokens, hidden] after the final norm."""
        states: torch.Tensor = self._outputs(token_ids, adapter).hidden_states[-1]
        return states[0]

    def _outputs(self, token_ids: list[int], adapter: str | None) -> Any:
        ids = torch.tensor([token_ids])
        if adapter is None:
            with self._model.disable_adapter():
                return self._model(input_ids=ids, output_hidden_states=True)
        self._model.set_adapter(adapter)
        return self._model(input_ids=ids, output_hidden_states=True)

    def _choices(self, inputs: str, tokens: list[int]) -> list[int]:
        prompt = self.tokenizer(inputs).input_ids
        logits = self._model(input_ids=torch.tensor([prompt + tokens[:-1]])).logits
        return [int(token) for token in logits[0, len(prompt) - 1 :].argmax(-1)]
