"""Models by name: a download from the Hugging Face Hub into its usual cache.

`huggingface_hub` does the work and reads HF_HOME, HF_TOKEN and HF_HUB_OFFLINE itself; it is imported only here and
only when a name is really fetched. Only what a model needs is downloaded, and no pickled file.
"""

from __future__ import annotations

import re
from pathlib import Path

from snello.errors import SnelloError

PATTERNS = [
    "model.safetensors",
    "model-*-of-*.safetensors",
    "0_Transformer/model.safetensors",
    "*.json",
    "*.txt",
    "*.jinja",
]
NOT_NEEDED = ["onnx/*", "openvino/*", "original/*"]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def fetch(name: str) -> Path:
    """The local folder of a Hub model, downloaded if it is not in the cache."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=PATTERNS, ignore_patterns=NOT_NEEDED))
    except errors.GatedRepoError:
        hint = f"accept its terms at https://huggingface.co/{name}, then set HF_TOKEN or run `hf auth login`"
        raise SnelloError(f"the Hub model {name} is gated", hint) from None
    except errors.RepositoryNotFoundError:
        hint = "check the name; a private model needs HF_TOKEN"
        raise SnelloError(f"{name} is neither a local folder nor a model on the Hub", hint) from None
    except errors.LocalEntryNotFoundError:
        hint = "unset HF_HUB_OFFLINE and connect, or give the path of a local folder"
        raise SnelloError(
            f"{name} is not a local folder, not in the Hub cache, and the Hub cannot be reached", hint
        ) from None
    except errors.HFValidationError as error:
        message = f"{name} is neither a local folder nor a Hub name: {_line(error)}"
        raise SnelloError(message, "give a model folder, or a Hub name such as Qwen/Qwen3-0.6B") from None
    except (errors.HfHubHTTPError, OSError) as error:
        hint = "try again, or give the path of a local folder"
        raise SnelloError(f"downloading {name} failed: {_line(error)}", hint) from None


def _line(error: Exception) -> str:
    """The first line of a message that may have many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
