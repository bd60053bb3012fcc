"""Where the base model lies on disk. Fetching and converting it is adapter_loader's work."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline.config import Settings
from pipeline.errors import ConfigError


def model_folder(settings: Settings) -> Path:
    """The folder of the base model, fetched first if it is not there. Raises ConfigError.

    Runs `python -m adapter_loader.base_model`, since what fetches needs libraries that this
    process may not import. Its progress goes to stderr; any number of processes may ask at once.
    """
    if settings.model_folder:
        return Path(settings.model_folder)
    command = [sys.executable, "-m", "adapter_loader.base_model", "--model-id", settings.model_id]
    if settings.model_revision:
        command += ["--revision", settings.model_revision]
    if settings.load_format == "dummy":
        command.append("--without-weights")
    environment = dict(os.environ)
    if settings.cache:
        environment["LORADEX_CACHE"] = settings.cache
    result = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True)
    if result.returncode:
        raise ConfigError(f"model_id: {settings.model_id} cannot be had, see above")
    return Path(result.stdout.strip())
