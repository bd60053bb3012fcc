"""`loradex serve`: check what would fail later in a worse place, then become honcho.

Flags become environment variables, which is how the processes that honcho starts read them.
"""

import argparse
import os
import shutil
import socket
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

import msgspec

from pipeline.arena import SHARED_MEMORY, known_arena
from pipeline.config import FIELDS, PREFIX, Settings, load_settings, to_environment
from pipeline.errors import ConfigError
from pipeline.model_config import read_model_config
from pipeline.model_folder import model_folder
from pipeline.privacy import keep_private
from pipeline.process import EXIT_CONFIG, run_folder

ROOT = Path(__file__).parent.parent  # where the procfile lies


def main(arguments: Sequence[str] | None = None) -> None:
    """The `loradex` command. Does not return when it serves."""
    flags = vars(_parser().parse_args(arguments))
    flags.pop("command")
    try:
        settings = load_settings(flags)
        settings = check(settings)
    except ConfigError as error:
        print(f"loradex: {error}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(PREFIX)  # all that they say is in settings by now
    }
    environment.update(to_environment(settings))
    environment["LORADEX_CONFIG"] = os.devnull
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    honcho = [sys.executable, "-m", "honcho", "-d", str(ROOT), "-f", "procfile", "start"]
    if settings.log_format == "json":
        honcho.append("--no-prefix")
    sys.stdout.flush()
    keep_private()
    os.execve(sys.executable, honcho, environment)


def check(settings: Settings) -> Settings:
    """The settings with the model's folder filled in. Raises ConfigError for what cannot work."""
    for root in settings.adapter_roots():
        if not root.is_dir():
            raise ConfigError(f"adapter_root: {root} is not a folder")
    _check_port(settings)
    _check_shared_memory(settings)
    folder = model_folder(settings)
    read_model_config(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"model_id: {folder} has no tokenizer.json")
    return msgspec.structs.replace(settings, model_folder=str(folder))


def _check_port(settings: Settings) -> None:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"port: cannot listen on {settings.host}:{settings.port}: {reason}"
        ) from (error)


def _check_shared_memory(settings: Settings) -> None:
    stale = known_arena(run_folder(settings))
    reclaimed = stale.stat().st_blocks * 512 if stale is not None and stale.exists() else 0
    room = shutil.disk_usage(SHARED_MEMORY).free + reclaimed
    if room < settings.arena_bytes:
        raise ConfigError(
            f"arena_bytes: {settings.arena_bytes} bytes are asked for, "
            f"but {SHARED_MEMORY} has room for {room}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loradex", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a base model and its adapters",
        description="Each flag is also an environment variable, LORADEX_NAME, and a key of "
        "loradex.toml. A flag wins over the variable, that over the file.",
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(Settings, include_extras=True)
    for name, field in FIELDS.items():
        _add_flag(serve, name, hints[name], field.default)
    return parser


def _add_flag(
    parser: argparse.ArgumentParser, name: str, hint: typing.Any, default: object
) -> None:
    kind, meta = typing.get_args(hint)[:2]
    flag = "--" + name.replace("_", "-")
    shown = " ".join(default) if isinstance(default, tuple) else default
    text = f"{meta.description} (default: {'empty' if shown == '' else shown})".replace("%", "%%")
    if kind is bool:
        parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=text)
    elif typing.get_origin(kind) is tuple:
        parser.add_argument(
            flag,
            dest=name,
            action="append",
            metavar="DIR" if name == "adapter_root" else "NAME",
            help=text,
        )
    elif typing.get_origin(kind) is typing.Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        parser.add_argument(flag, dest=name, choices=choices, help=text)
    else:
        parser.add_argument(flag, dest=name, metavar=kind.__name__.upper(), help=text)


if __name__ == "__main__":
    main()
