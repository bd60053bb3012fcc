"""Find the base model: `python -m adapter_loader.base_model --model-id X` prints its folder.

X is a folder, a hub repository, or the bundled default (see bundled_model).

stdout carries the folder and nothing else; progress and errors go to stderr. HF_TOKEN is read from
the environment only, since flags show in the process list.
"""

# Heavy imports (torch, gguf, huggingface_hub, tqdm) are deferred into the functions that need
# them: every start of the server asks for this folder, mostly to find it already there.

import argparse
import os
import sys
from pathlib import Path

from adapter_loader.bundled_model import BaseModelError, bundled_model

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_ALIASES = frozenset({"default", DEFAULT_MODEL})

HUB_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "tokenizer*"]
HUB_LEFT_OUT = ["*/*", "consolidated*"]  # the same weights again in another form
HUB_WEIGHTS = "*.safetensors"


def base_model_folder(
    model_id: str,
    revision: str | None = None,
    token: str | None = None,
    *,
    weights: bool = True,
) -> Path:
    """The folder of `model_id`, fetched and converted first where needed.

    A revision goes to the hub, also for the default model, since the bundled copy has no history.
    Without `weights`, those of a hub's repository are not fetched. Raises BaseModelError.
    """
    if model_id in DEFAULT_ALIASES and revision is None:
        return bundled_model()
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return _local_model(folder, revision)
    if model_id.startswith(("/", ".", "~")):
        raise BaseModelError(f"The base model folder {model_id} does not exist.")
    repository = DEFAULT_MODEL if model_id == "default" else model_id
    return _hub_model(repository, revision, token, weights)


def _local_model(folder: Path, revision: str | None) -> Path:
    if revision is not None:
        raise BaseModelError(f"A revision needs a hub repository, and {folder} is a folder.")
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"The folder {folder} holds no config.json, so it is no base model.")
    return folder.absolute()


def _hub_model(model_id: str, revision: str | None, token: str | None, weights: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    from pipeline.progress import progress_class

    try:
        snapshot = snapshot_download(
            model_id,
            revision=revision,
            token=token,
            allow_patterns=HUB_PATTERNS,
            ignore_patterns=HUB_LEFT_OUT if weights else [*HUB_LEFT_OUT, HUB_WEIGHTS],
            tqdm_class=progress_class(),
        )
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise BaseModelError(_hub_sentence(error, model_id, revision)) from error
    folder = Path(snapshot)
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"The hub repository {model_id} holds no config.json.")
    if weights and not any(folder.glob(HUB_WEIGHTS)):
        raise BaseModelError(
            f"The hub repository {model_id} holds no config.json with safetensors weights."
        )
    return folder


def _hub_sentence(error: Exception, model_id: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    match error:
        case errors.HFValidationError():
            return (
                f"{model_id!r} is neither a folder nor the name of a hub repository (owner/name)."
            )
        case errors.GatedRepoError():
            return (
                f"The hub repository {model_id} is gated: accept its terms on its page "
                "and set HF_TOKEN to a token that may read it."
            )
        case errors.RepositoryNotFoundError():
            return (
                f"The hub has no repository {model_id}, or it is private and HF_TOKEN "
                "is missing or may not read it."
            )
        case errors.RevisionNotFoundError():
            return f"The hub repository {model_id} has no revision {revision}."
        case errors.HfHubHTTPError():
            return f"The hub answered {error.response.status_code} when asked for {model_id}."
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return f"{model_id} is not in the local cache, and HF_HUB_OFFLINE forbids the hub."
    reason = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
    return f"{model_id} could not be fetched from the hub ({reason}) and is not in the local cache."


def main() -> int:
    """Exit code 2 and one sentence on stderr where the operator can do something about it."""
    parser = argparse.ArgumentParser(prog="python -m adapter_loader.base_model")
    parser.add_argument("--model-id", default=DEFAULT_MODEL, help="a folder or a hub repository")
    parser.add_argument("--revision", help="branch, tag or commit of the hub repository")
    parser.add_argument(
        "--without-weights", action="store_true", help="leave the weights of a repository there"
    )
    options = parser.parse_args()
    try:
        token = os.environ.get("HF_TOKEN") or None
        weights = not options.without_weights
        folder = base_model_folder(options.model_id, options.revision, token, weights=weights)
    except BaseModelError as error:
        print(error, file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
