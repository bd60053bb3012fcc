"""The weights of a base model, out of its folder's safetensors files, or random ones.

All names and shapes are checked against the headers before the first byte is read, so that a
wrong folder is one sentence at once.
"""

import zlib
from pathlib import Path
from types import TracebackType

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.adapter_layout import MODULES
from pipeline.errors import ConfigError
from pipeline.model_config import ModelConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
NORM = "model.norm.weight"
DUMMY_STD = 0.02  # as models are initialised: logits stay finite at any depth
IGNORED_ENDING = ".rotary_emb.inv_freq"  # old checkpoints keep what can be computed


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]  # tensor -> file


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, by its Hugging Face name."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocabulary, config.hidden),
        NORM: (config.hidden,),
    }
    if not config.tied_embeddings:
        shapes[LM_HEAD] = (config.vocabulary, config.hidden)
    for layer in range(config.layers):
        shapes.update(_layer_shapes(config, f"model.layers.{layer}."))
    return shapes


def _layer_shapes(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    biased = {
        "q_proj": config.qkv_bias,
        "k_proj": config.qkv_bias,
        "v_proj": config.qkv_bias,
        "o_proj": config.out_bias,
        "gate_proj": config.mlp_bias,
        "up_proj": config.mlp_bias,
        "down_proj": config.mlp_bias,
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}input_layernorm.weight": (config.hidden,),
        f"{prefix}post_attention_layernorm.weight": (config.hidden,),
    }
    for module, shape in zip(MODULES, config.module_shapes(), strict=True):
        name = module_name(prefix, module)
        shapes[f"{name}.weight"] = (shape.out_features, shape.in_features)
        if biased[module]:
            shapes[f"{name}.bias"] = (shape.out_features,)
    if config.qk_norm:
        shapes[f"{prefix}self_attn.q_norm.weight"] = (config.head_dim,)
        shapes[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def module_name(prefix: str, module: str) -> str:
    """Where a linear layer stands below its decoder layer."""
    part = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"{prefix}{part}.{module}"


class Checkpoint:
    """The open files of a model folder. A context manager; raises ConfigError when it is entered
    and does not hold exactly what the configuration says."""

    def __init__(
        self, folder: Path, config: ModelConfig, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._folder = folder
        self._config = config
        self._dtype = dtype
        self._device = device
        self._file_of: dict[str, safe_open] = {}

    def __enter__(self) -> "Checkpoint":
        for path in self._files():
            file = self._open(self._folder / path)
            names: list[str] = file.keys()  # type: ignore[no-untyped-call]
            self._file_of.update(dict.fromkeys(names, file))
        self._check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file_of.clear()  # a file is unmapped with its last reference

    def read(self, name: str) -> Tensor:
        """A tensor in the compute dtype, on the device; the caller's."""
        tensor: Tensor = self._file_of[name].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor.to(device=self._device, dtype=self._dtype)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def _files(self) -> list[str]:
        index = self._folder / INDEX
        if not index.exists():
            return [SINGLE]
        try:
            files = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()
        except msgspec.DecodeError as error:
            raise ConfigError(f"model_id: {index} cannot be used: {error}") from error
        for name in files:
            if Path(name).name != name:
                raise ConfigError(f"model_id: {index} names a file outside its folder: {name}")
        return sorted(set(files))

    def _open(self, path: Path) -> safe_open:
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"model_id: cannot read {path}: {error}") from error

    def _check(self) -> None:
        expected = expected_shapes(self._config)
        for name in self._file_of:
            tied_copy = name == LM_HEAD and self._config.tied_embeddings
            if name not in expected and not tied_copy and not name.endswith(IGNORED_ENDING):
                raise ConfigError(f"model_id: {self._folder} has an unexpected tensor {name}")
        for name, shape in expected.items():
            if name not in self._file_of:
                raise ConfigError(f"model_id: {self._folder} lacks the tensor {name}")
            header = self._file_of[name].get_slice(name)  # type: ignore[no-untyped-call]
            if tuple(header.get_shape()) != shape:
                raise ConfigError(
                    f"model_id: {name} has the shape {header.get_shape()}; "
                    f"config.json says {list(shape)}"
                )
            if header.get_dtype() not in DTYPES:
                raise ConfigError(f"model_id: {name} is stored as {header.get_dtype()}")


class DummyCheckpoint(Checkpoint):
    """Random weights in the shapes that the configuration asks for; no file is opened.

    Made on the device, and the same at each start: a tensor depends on its name alone.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(Path(), config, dtype=dtype, device=device)
        self._shape_of = expected_shapes(config)

    def __enter__(self) -> "DummyCheckpoint":
        return self

    def read(self, name: str) -> Tensor:
        """Normal, with a mean of 0 and DUMMY_STD; the weights of norms are 1."""
        tensor = torch.empty(self._shape_of[name], dtype=self._dtype, device=self._device)
        if name.endswith("norm.weight"):
            return tensor.fill_(1)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return tensor.normal_(std=DUMMY_STD, generator=generator)

    def __contains__(self, name: str) -> bool:
        return name in self._shape_of
