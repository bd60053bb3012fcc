"""Random PEFT adapters by the thousand, written as fast as the disk takes them.

All weights come out of one block of noise. Each file starts at another place in it, so that no two
adapters are equal, and no file costs more than its write.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch

from pipeline.adapter_layout import MODULES, layout
from pipeline.model_config import ModelConfig

NOISE_ELEMENTS = 4 << 20
NOISE_STD = 0.02
STRIDE_ELEMENTS = 7919  # from one adapter's place in the noise to the next one's
ELEMENT_BYTES = 2  # bfloat16
THREADS = 8
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class AdapterKind(msgspec.Struct, frozen=True):
    """What the adapters of a set have in common."""

    rank: int = 16
    modules: tuple[str, ...] = MODULES

    def nbytes(self, config: ModelConfig, element_bytes: int = ELEMENT_BYTES) -> int:
        """Of one adapter, packed."""
        ranks = [self.rank if module in self.modules else 0 for module in MODULES]
        return layout(ranks * config.layers, config.module_shapes(), element_bytes).nbytes


def write_adapters(
    root: Path, config: ModelConfig, kinds: Sequence[tuple[str, AdapterKind]], distinct: int = 0
) -> None:
    """Write adapters below `root`, in bfloat16.

    kinds     (name, kind) of each; the name is that of its folder
    distinct  weight files of each kind that are written; the other adapters are hard links to
              them, which the loader takes for adapters of their own. 0: as many as adapters
    """
    noise = torch.randn(NOISE_ELEMENTS, generator=torch.Generator().manual_seed(0))
    block = noise.mul_(NOISE_STD).to(torch.bfloat16).view(torch.uint8).numpy().data
    written: dict[AdapterKind, list[Path]] = {}
    links: list[tuple[Path, Path]] = []
    with ThreadPoolExecutor(THREADS) as threads:
        writes = []
        for number, (name, kind) in enumerate(kinds):
            folder = root / name
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text(json.dumps(_config(kind)))
            path = folder / "adapter_model.safetensors"
            files = written.setdefault(kind, [])
            if distinct and len(files) >= distinct:
                links.append((files[number % distinct], path))
                continue
            files.append(path)
            start = number * STRIDE_ELEMENTS * ELEMENT_BYTES % len(block)
            writes.append(threads.submit(_write, path, _header(config, kind), block, start))
        for write in writes:
            write.result()
    for source, path in links:
        os.link(source, path)


def _config(kind: AdapterKind) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": kind.rank,
        "lora_alpha": 2 * kind.rank,
        "target_modules": list(kind.modules),
        "bias": "none",
    }


def _header(config: ModelConfig, kind: AdapterKind) -> tuple[bytes, int]:
    """The head of a safetensors file, and how many bytes of tensors follow it."""
    tensors: dict[str, dict[str, object]] = {}
    end = 0
    for layer in range(config.layers):
        for module, shape in zip(MODULES, config.module_shapes(), strict=True):
            if module not in kind.modules:
                continue
            part = "self_attn" if module in ATTENTION else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{part}.{module}"
            for side, tensor_shape in (
                ("A", [kind.rank, shape.in_features]),
                ("B", [shape.out_features, kind.rank]),
            ):
                start, end = end, end + tensor_shape[0] * tensor_shape[1] * ELEMENT_BYTES
                tensors[f"{prefix}.lora_{side}.weight"] = {
                    "dtype": "BF16",
                    "shape": tensor_shape,
                    "data_offsets": [start, end],
                }
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _write(path: Path, header: tuple[bytes, int], block: memoryview, start: int) -> None:
    head, left = header
    with path.open("wb") as file:
        file.write(head)
        while left:
            piece = block[start : start + left]
            file.write(piece)
            left -= len(piece)
            start = 0
