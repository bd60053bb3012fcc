"""The files for tokenizers that may lie beside an adapter's weights: which, and how large."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from adapter_loader.ordinary_files import identity_of, open_file
from adapter_loader.refusals import invalid

TOKENIZER_FILE = "tokenizer.json"
# name -> bytes at most: the largest that base models ship, and as much again
TEXT_FILES = {
    "tokenizer_config.json": 4 << 20,
    "chat_template.jinja": 1 << 20,
    "special_tokens_map.json": 1 << 20,
    "added_tokens.json": 4 << 20,
    TOKENIZER_FILE: 32 << 20,
}


class Texts(msgspec.Struct, frozen=True):
    """What there is of TEXT_FILES. Two of an adapter with the same version are the same."""

    version: str
    files: Mapping[str, bytes]
    tokenizer: str = ""  # sha256 of TOKENIZER_FILE, if there is one


def texts_of(version: str, files: Mapping[str, bytes]) -> Texts:
    tokenizer = files.get(TOKENIZER_FILE)
    digest = "" if tokenizer is None else hashlib.sha256(tokenizer).hexdigest()
    return Texts(version, files, digest)


def check_text_size(name: str, nbytes: int) -> None:
    """Raises RequestError."""
    if nbytes > TEXT_FILES[name]:
        raise invalid(f"{name} has {nbytes} bytes, and {TEXT_FILES[name]} is the most")


def read_texts(folder: Path, known: str = "", roots: Sequence[Path] | None = None) -> Texts | None:
    """Those that lie in a folder; None if their version is `known`. Raises RequestError.

    roots   see open_file
    """
    opened: dict[str, int] = {}
    try:
        digest = hashlib.sha256()
        for name in TEXT_FILES:
            try:
                opened[name], status = open_file(folder / name, roots)
            except FileNotFoundError:
                continue
            check_text_size(name, status.st_size)
            digest.update(repr((name, identity_of(status))).encode())
        version = digest.hexdigest()
        if version == known:
            return None
        files = {}
        for name, descriptor in opened.items():
            with open(descriptor, "rb", closefd=False) as file:
                files[name] = file.read(TEXT_FILES[name])
        return texts_of(version, files)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
