"""All settings: one frozen struct, read from flags, the environment and loradex.toml.

A flag wins over LORADEX_NAME in the environment, that over the file, that over the default. The
file is loradex.toml in the working folder, or the one that LORADEX_CONFIG names. A key that does
not exist, or a value of the wrong kind, is a ConfigError with one sentence.
"""

import os
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pipeline.errors import ConfigError
from pipeline.privacy import check_roots

PREFIX = "LORADEX_"
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SOURCES = ("local", "hub", "s3", "pbase", "http")  # of adapters
SECRETS = ("api_key", "admin_api_key", "watermark_key")  # settings that are shown to nobody
NOT_SETTINGS = ("LORADEX_CONFIG", "LORADEX_INCARNATION")  # in the environment, with our prefix
EXAMPLES = Path(__file__).parent.parent / "examples" / "adapters"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every setting with its default. The descriptions are what `loradex serve --help` shows."""

    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="TCP port to listen on")] = 8080
    model_id: Annotated[
        str, Meta(min_length=1, description="base model: a hub repository or a folder")
    ] = DEFAULT_MODEL
    model_revision: Annotated[str, Meta(description="hub revision of the base model")] = ""
    model_folder: Annotated[
        str, Meta(description="where the base model lies; found from model_id when empty")
    ] = ""
    adapter_root: Annotated[
        tuple[str, ...],
        Meta(description="folder that holds adapters of source local; may be repeated"),
    ] = (str(EXAMPLES),) if EXAMPLES.is_dir() else ()
    default_adapter_source: Annotated[
        Literal["auto", "local", "hub", "s3", "pbase", "http"],
        Meta(description="source of an adapter that names none; auto: local if it is there"),
    ] = "auto"
    share_hub_token: Annotated[
        bool, Meta(description="let requests without a token use the server's HF_TOKEN")
    ] = False
    s3_bucket: Annotated[
        tuple[str, ...],
        Meta(description="bucket that adapters of source s3 may come from; may be repeated"),
    ] = ()
    s3_endpoint: Annotated[
        str, Meta(description="URL of an S3 server; empty: AWS, or what its environment says")
    ] = ""
    pbase_gateway: Annotated[
        str, Meta(description="URL of the Predibase gateway; source pbase is off when empty")
    ] = ""
    pbase_bucket: Annotated[
        str, Meta(description="bucket that holds the adapters of source pbase")
    ] = ""
    http_host: Annotated[
        tuple[str, ...],
        Meta(
            description="host[:port], or http://host[:port], that adapters of source http may "
            "come from; may be repeated"
        ),
    ] = ()
    source_connect_seconds: Annotated[
        float, Meta(gt=0, description="time to connect to a source of adapters, seconds")
    ] = 10.0
    source_stall_seconds: Annotated[
        float, Meta(gt=0, description="time without a byte that ends a download, seconds")
    ] = 15.0
    source_tries: Annotated[
        int, Meta(ge=1, le=20, description="tries of what may go well when it is tried again")
    ] = 4
    failed_load_seconds: Annotated[
        float, Meta(ge=0, description="time a remote adapter's failure is remembered, seconds")
    ] = 10.0
    adapter_revalidate_seconds: Annotated[
        float,
        Meta(
            ge=0,
            description="time that a loaded adapter is served without its source being asked "
            "whether it has changed and may still be read, seconds; 0: each request asks",
        ),
    ] = 60.0
    disk_cache_bytes: Annotated[
        int, Meta(ge=0, description="disk for downloaded adapters, bytes")
    ] = 64 << 30
    cache: Annotated[
        str,
        Meta(
            description="folder for the default model and downloaded adapters; "
            "found from XDG_CACHE_HOME when empty"
        ),
    ] = ""
    load_format: Annotated[
        Literal["auto", "dummy"],
        Meta(description="dummy: random weights made from config.json, for benchmarks"),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Meta(description="compute dtype; auto is the checkpoint's"),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Meta(description="where the GPU worker runs")
    ] = "auto"
    attention: Annotated[
        Literal["auto", "flash", "triton", "sdpa"],
        Meta(description="attention backend; auto: triton on a GPU, else sdpa"),
    ] = "auto"
    lora_kernels: Annotated[
        Literal["auto", "reference", "grouped"], Meta(description="LoRA kernels of the GPU worker")
    ] = "auto"
    gpu_threads: Annotated[
        int,
        Meta(
            ge=0,
            description="CPU threads of the GPU worker; 0: all cores, less one of four or more",
        ),
    ] = 0
    gpu_memory_fraction: Annotated[
        float, Meta(gt=0, le=1, description="share of a GPU's memory that the server may fill")
    ] = 0.92
    adapter_pool_fraction: Annotated[
        float,
        Meta(gt=0, lt=1, description="share of a GPU's memory beside the weights for adapters"),
    ] = 0.2
    kv_cache_bytes: Annotated[
        int,
        Meta(
            ge=0, description="memory for the KV cache, bytes; 0: 1 GiB, on a GPU all that is left"
        ),
    ] = 0
    kv_block_tokens: Annotated[
        int,
        Meta(ge=0, le=1024, description="tokens per KV block; 0: what the attention wants, or 16"),
    ] = 0
    adapter_pool_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="memory for resident adapters, bytes; 0: 512 MiB, on a GPU the fraction",
        ),
    ] = 0
    cuda_graphs: Annotated[bool, Meta(description="run decode steps on a GPU as CUDA graphs")] = (
        True
    )
    adapter_slots: Annotated[
        int, Meta(ge=1, le=65536, description="adapters that can be resident at once")
    ] = 1024
    arena_bytes: Annotated[
        int, Meta(ge=4096, description="shared host memory for staged adapters, bytes")
    ] = 1 << 30
    max_adapter_bytes: Annotated[
        int, Meta(ge=1, description="size of an adapter's weight file at most, bytes")
    ] = 2 << 30
    loader_threads: Annotated[
        int, Meta(ge=1, le=64, description="adapters that are fetched at the same time")
    ] = 4
    packing_processes: Annotated[
        int,
        Meta(
            ge=0,
            le=64,
            description="processes that pack adapters into the arena; 0: half the cores, 8 at most",
        ),
    ] = 0
    adapter_load_seconds: Annotated[
        float, Meta(gt=0, description="time until a load has failed, seconds")
    ] = 300.0
    rows: Annotated[
        int,
        Meta(
            ge=0,
            le=4096,
            description="sequences that run at once; 0: 64, on a GPU 256 if memory allows",
        ),
    ] = 0
    step_tokens: Annotated[
        int,
        Meta(
            ge=0,
            description="tokens in one step at most, decode and prefill together; "
            "0: 512, on a GPU 4096 if memory allows",
        ),
    ] = 0
    prefill_chunk_tokens: Annotated[
        int, Meta(ge=0, description="tokens of one prompt in one step; 0: as many as step_tokens")
    ] = 0
    max_step_seconds: Annotated[
        float,
        Meta(
            ge=0,
            description="time that prompts may make a step take that others decode in, seconds; "
            "0: any",
        ),
    ] = 0.2
    prefix_cache: Annotated[bool, Meta(description="reuse the KV of equal prompt beginnings")] = (
        True
    )
    max_total_tokens: Annotated[
        int, Meta(ge=0, description="prompt and reply together, tokens; 0: as the model allows")
    ] = 0
    max_concurrent_requests: Annotated[
        int, Meta(ge=1, description="requests accepted at once; more get 429")
    ] = 256
    max_wait_seconds: Annotated[
        float, Meta(gt=0, description="time a request may wait to run, seconds")
    ] = 600.0
    max_overtaking_seconds: Annotated[
        float,
        Meta(ge=0, description="time an adapter that waits for room may be passed, seconds"),
    ] = 1.0
    max_tenant_running: Annotated[
        int, Meta(ge=0, description="sequences of one tenant that run at once; 0: no limit")
    ] = 0
    max_tenant_waiting: Annotated[
        int,
        Meta(ge=0, description="requests of one tenant that wait; more get 429; 0: no limit"),
    ] = 0
    max_choices: Annotated[
        int, Meta(ge=1, description="replies to one request, to all of its prompts together")
    ] = 128
    watermark_gamma: Annotated[
        float, Meta(gt=0, lt=1, description="share of the vocabulary that a watermark favours")
    ] = 0.5
    watermark_delta: Annotated[
        float, Meta(ge=0, description="what a watermark adds to the logits of what it favours")
    ] = 2.0
    watermark_key: Annotated[
        int,
        Meta(ge=0, lt=1 << 32, description="with this the watermark of a text is found"),
    ] = 15485863
    grammar_compile_seconds: Annotated[
        float,
        Meta(gt=0, description="time to compile a grammar, after which it is refused, seconds"),
    ] = 5.0
    tool_format: Annotated[
        Literal["auto", "hermes", "llama", "mistral"],
        Meta(description="how the model writes calls of tools; auto: as its chat template says"),
    ] = "auto"
    pooling: Annotated[
        Literal["last", "mean"],
        Meta(description="which hidden states of a text embed it, where the request does not say"),
    ] = "last"
    max_stop_sequences: Annotated[int, Meta(ge=0, description="stop strings per request")] = 4
    allow_chat_template: Annotated[
        bool, Meta(description="let requests bring a chat template of their own")
    ] = False
    adapter_chat_templates: Annotated[
        bool,
        Meta(
            description="render chats with the template that an adapter ships, and refuse adapters "
            "whose tokenizer is another than the base model's; off: neither is looked at"
        ),
    ] = True
    template_seconds: Annotated[
        float,
        Meta(
            gt=0,
            description="processor time that a template of an adapter or a request may take for "
            "one prompt, seconds",
        ),
    ] = 1.0
    template_bytes: Annotated[
        int,
        Meta(ge=128 << 20, description="memory of the process that renders these templates, bytes"),
    ] = 512 << 20
    max_body_bytes: Annotated[int, Meta(ge=1, description="size of a request body, bytes")] = (
        2 << 20
    )
    request_seconds: Annotated[
        float,
        Meta(gt=0, description="time that a client may take to send a request in full, seconds"),
    ] = 30.0
    slow_reader_seconds: Annotated[
        float,
        Meta(
            gt=0,
            description="time in which a client takes 8 KiB of what waits for it, or is cut off, "
            "seconds",
        ),
    ] = 30.0
    frontends: Annotated[int, Meta(ge=1, le=64, description="HTTP processes")] = 1
    tokenizer_workers: Annotated[int, Meta(ge=1, le=64, description="tokenizer processes")] = 1
    drain_seconds: Annotated[
        float, Meta(ge=0, description="time that running requests get after SIGTERM, seconds")
    ] = 30.0
    hang_seconds: Annotated[
        float,
        Meta(gt=0, description="time without a sign of life until a process is killed, seconds"),
    ] = 30.0
    restart_limit: Annotated[
        int,
        Meta(
            ge=0,
            description="starts of a process after its death, within restart_window_seconds, "
            "before all ends",
        ),
    ] = 10
    restart_window_seconds: Annotated[
        float, Meta(gt=0, description="time that restart_limit is about, seconds")
    ] = 300.0
    restart_backoff_seconds: Annotated[
        float,
        Meta(
            ge=0,
            description="time before the second start within restart_window_seconds; doubles with "
            "each, seconds",
        ),
    ] = 0.5
    stats_seconds: Annotated[
        float, Meta(gt=0, description="time between two reports to /metrics, seconds")
    ] = 1.0
    api_key: Annotated[
        tuple[str, ...],
        Meta(
            description="key that clients show as Bearer token; may be repeated; empty: none is "
            "needed"
        ),
    ] = ()
    protect_metrics: Annotated[
        bool, Meta(description="ask for an api_key at /metrics too, if there is one")
    ] = False
    allow_adapter_admin: Annotated[
        bool, Meta(description="let adapters be loaded, unloaded and pinned over HTTP")
    ] = False
    admin_api_key: Annotated[
        str,
        Meta(
            description="key that administrators show as Bearer token; empty: an api_key, if "
            "there is one"
        ),
    ] = ""
    preload_adapter: Annotated[
        tuple[str, ...],
        Meta(description="adapter that is loaded and pinned at the start; may be repeated"),
    ] = ()
    pinned_pool_fraction: Annotated[
        float, Meta(ge=0, le=1, description="share of the adapter pool that may be pinned")
    ] = 0.5
    adapter_labels: Annotated[
        int, Meta(ge=0, le=10_000, description="adapters that /metrics names; the rest are `other`")
    ] = 100
    otlp_endpoint: Annotated[
        str,
        Meta(
            description="URL of an OpenTelemetry collector (OTLP over HTTP) that requests are "
            "traced to; empty: OTEL_EXPORTER_OTLP_ENDPOINT, or none"
        ),
    ] = ""
    run_dir: Annotated[
        str, Meta(description="folder for sockets; a private one per user and port when empty")
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least level logged")
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        Meta(description="lines of key=value, or an object a line without honcho's prefix"),
    ] = "text"

    def __repr__(self) -> str:
        """What is not the default; of a secret, only that it is there."""
        given = {
            name: "***" if name in SECRETS else getattr(self, name)
            for name, field in FIELDS.items()
            if getattr(self, name) != field.default
        }
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def run_folder(self) -> Path:
        """Where the sockets lie. Short, since a socket's path has at most 107 bytes."""
        if self.run_dir:
            return Path(self.run_dir)
        base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
        return Path(base) / f"loradex-{os.getuid()}-{self.port}"

    def adapter_roots(self) -> tuple[Path, ...]:
        return tuple(Path(root).resolve() for root in self.adapter_root)

    def adapter_sources(self) -> tuple[str, ...]:
        """The sources that are on."""
        needed = {
            "s3": self.s3_bucket,
            "pbase": self.pbase_gateway and self.pbase_bucket,
            "http": self.http_host,
        }
        return tuple(source for source in SOURCES if needed.get(source, True))


FIELDS = {field.name: field for field in msgspec.structs.fields(Settings)}


def load_settings(
    flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
) -> Settings:
    """The settings of this process. Raises ConfigError.

    flags        name -> text, or a list of texts for what may be repeated; None means not given
    environment  os.environ unless given
    """
    environment = os.environ if environment is None else environment
    values = _from_file(environment)
    values.update(_from_environment(environment))
    values.update({name: value for name, value in (flags or {}).items() if value is not None})
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(_sentence(error)) from error
    _check(settings)
    check_roots(settings.adapter_roots(), settings.cache, environment)
    return settings


def _check(settings: Settings) -> None:
    """What no field says alone. Raises ConfigError."""
    if 0 < settings.step_tokens < settings.rows:
        raise ConfigError(
            f"step_tokens: {settings.step_tokens} is less than rows ({settings.rows}), "
            "so that not every sequence could run in a step"
        )
    for key in settings.api_key:
        if not key or "," in key or " " in key or not (key.isascii() and key.isprintable()):
            raise ConfigError(
                "api_key: a key has printable ASCII characters, no space and no comma"
            )
    source = settings.default_adapter_source
    if source not in ("auto", *settings.adapter_sources()):
        raise ConfigError(f"default_adapter_source: source {source} is off")


def to_environment(settings: Settings) -> dict[str, str]:
    """The settings as variables, for child processes that read them with load_settings."""
    variables = {}
    for name, field in FIELDS.items():
        value = getattr(settings, name)
        if value != field.default:
            text = _separator(name).join(value) if isinstance(value, tuple) else str(value)
            variables[PREFIX + name.upper()] = text
    return variables


def _from_file(environment: Mapping[str, str]) -> dict[str, Any]:
    named = environment.get("LORADEX_CONFIG")
    path = Path(named or "loradex.toml")
    if not named and not path.exists():
        return {}
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"LORADEX_CONFIG: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for name in values:
        if name not in FIELDS:
            raise ConfigError(f"{path}: there is no setting `{name}`")
    return values


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or variable in NOT_SETTINGS:
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in FIELDS:
            raise ConfigError(f"{variable}: there is no setting `{name}`")
        if isinstance(FIELDS[name].default, tuple):
            values[name] = [part for part in text.split(_separator(name)) if part]
        else:
            values[name] = text
    return values


def _separator(name: str) -> str:
    """What separates several values in one variable: folders are written as in PATH."""
    return os.pathsep if name == "adapter_root" else ","


def _sentence(error: msgspec.ValidationError) -> str:
    """`Expected ... - at `$.port`` becomes `port: Expected ...`."""
    reason, _, place = str(error).partition(" - at `$.")
    return f"{place.rstrip('`')}: {reason}" if place else reason
