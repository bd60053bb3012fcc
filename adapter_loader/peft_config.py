"""adapter_config.json, as PEFT writes it: which rank and scaling each module has.

Every key is honoured, known to have no effect on the result, or refused unless it is off. PEFT
adds variants of LoRA with new keys, so an unknown key that is on is refused as well.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from adapter_loader.patterns import PatternError, first_matches
from adapter_loader.refusals import invalid, shown
from pipeline.adapter_layout import MAX_RANK
from pipeline.adapter_roots import CONFIG_FILE

HONOURED = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "task_type",
        "use_rslora",
    }
)
WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "corda_config",  # these four say how training started
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "ensure_weight_tying",  # of embeddings, which are refused by their tensors
        "exclude_modules",  # which modules are adapted is what the tensors say
        "layers_pattern",
        "layers_to_transform",
        "target_modules",
        "fan_in_fan_out",  # PEFT takes it back for nn.Linear, and all our modules are that
        "inference_mode",
        "lora_dropout",  # acts in training only
        "megatron_core",  # without megatron_config
        "peft_version",
        "qalora_group_size",  # without use_qalora
        "revision",
        "runtime_config",
    }
)
# Key -> why it is not right with an A and a B for each linear layer alone.
REFUSED = {
    "alora_invocation_tokens": "aLoRA: it acts on the tokens behind some others only",
    "arrow_config": "Arrow: it chooses among adapters for each token",
    "kasa_config": "KaSA: its update has singular values of its own",
    "layer_replication": "it makes another base model, with layers that occur twice",
    "lora_bias": "what it adds to a layer's output is more than B A x",
    "megatron_config": "its layers are those of Megatron",
    "modules_to_save": "it brings whole modules of its own, such as lm_head or embed_tokens",
    "monteclora_config": "MonteCLoRA: its update is drawn at random",
    "target_parameters": "it adapts parameters that are no linear layers",
    "trainable_token_indices": "it brings embeddings of its own",
    "use_bdlora": "BD-LoRA: its matrices are block-diagonal",
    "use_dora": "DoRA: it scales the rows of the sum of base and update, which has no low rank",
    "use_qalora": "QALoRA: its A reads averages over groups of the input",
    "velora_config": "VeLoRA: its A is trained on compressed inputs",
}
BIASES = (None, "none", "all", "lora_only")  # where a file holds one, its tensor is refused
# PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA train beside a changed base model: what they save fits
# that, unless PEFT converted it, and then the config says `true`.
INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

T = TypeVar("T")
_Rank = Annotated[int, Meta(ge=1, le=MAX_RANK)]


class LoraConfig(msgspec.Struct, frozen=True):
    """The keys that are honoured, with PEFT's defaults."""

    peft_type: str
    r: _Rank = 8
    lora_alpha: float = 8
    use_rslora: bool | None = False
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: str | None = "none"
    task_type: str | None = None
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None

    def ranks_and_scalings(self, names: Sequence[str]) -> list[tuple[int, float]]:
        """(rank, scaling) of each module, named as in the base model: model.layers.0.mlp.up_proj.

        The scaling is alpha / rank, or alpha / sqrt(rank) with rsLoRA. Raises RequestError.
        """
        ranks = _lookup("rank_pattern", self.rank_pattern or {}, names, self.r)
        alphas = _lookup("alpha_pattern", self.alpha_pattern or {}, names, self.lora_alpha)
        return [
            (rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))
            for rank, alpha in zip(ranks, alphas, strict=True)
        ]


def parse_peft_config(data: bytes) -> LoraConfig:
    """Read and check the config. Raises RequestError with a sentence that names the key."""
    try:
        values = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"{CONFIG_FILE} is not a JSON object ({_shorten(error)})") from error
    if values.get("peft_type") != "LORA":
        raise invalid(
            f"{CONFIG_FILE} has the peft_type {shown(values.get('peft_type'))}, "
            "and only LORA is supported"
        )
    for name, value in values.items():
        if name not in HONOURED | WITHOUT_EFFECT and value not in (None, False, "", [], {}):
            why = f" ({REFUSED[name]})" if name in REFUSED else ""
            raise invalid(
                f"{CONFIG_FILE} sets {shown(name)} to {shown(value)}, which is not supported{why}"
            )
    try:
        config = msgspec.convert(values, LoraConfig)
    except msgspec.ValidationError as error:
        raise invalid(f"{CONFIG_FILE} cannot be used: {_shorten(error)}") from error
    _check(config)
    return config


def _check(config: LoraConfig) -> None:
    if config.bias not in BIASES:
        raise invalid(f"{CONFIG_FILE} sets bias to {shown(config.bias)}, which is not supported")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise invalid(
            f"{CONFIG_FILE} has the task_type {shown(config.task_type)}, "
            "and only CAUSAL_LM is supported"
        )
    if config.init_lora_weights not in INITS:
        raise invalid(
            f"{CONFIG_FILE} sets init_lora_weights to {shown(config.init_lora_weights)}, which is "
            "not supported: such an adapter fits a changed base model, unless it was saved with "
            "path_initial_model_for_weight_conversion"
        )
    if not all(map(math.isfinite, (config.lora_alpha, *(config.alpha_pattern or {}).values()))):
        raise invalid(f"{CONFIG_FILE} has a lora_alpha or an alpha_pattern that is not finite")


def _lookup(table: str, values: Mapping[str, T], names: Sequence[str], default: T) -> list[T]:
    try:
        keys = first_matches(values, names)
    except PatternError as error:
        raise invalid(f"the {table} of {CONFIG_FILE} {error}") from error
    return [default if key is None else values[key] for key in keys]


def _shorten(error: Exception) -> str:
    return shown(str(error))[1:-1]
