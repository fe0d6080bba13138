"""Whether a model of the hub can be had: asked once and briefly, before transformers asks for file after file."""

import os
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

PATIENCE_S = 5.0
"""Seconds within which the hub has to answer, unless HF_HUB_ETAG_TIMEOUT says otherwise."""


def require_hub_model(name: str) -> None:
    """Raise FileNotFoundError unless the hub, or its cache here, has a model of that name.

    Without the network transformers tries each file six times over 24 seconds. A model that is in the cache is then
    loaded from it without asking again: this process works offline from there on.
    """
    here = f"no model folder {name!r} in {str(Path.cwd())!r}"
    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_patience())
    except HFValidationError:
        raise FileNotFoundError(f"{here}; give a folder written by save_pretrained or a hub name") from None
    except EntryNotFoundError:  # transformers says what else it takes
        return
    except GatedRepoError:
        raise FileNotFoundError(
            f"{here}; the hub has {name!r} for those alone whom its authors let in: ask there, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{here}, and no model {name!r} on the hub; correct the name, or set HF_TOKEN if the model is private"
        ) from None
    except OfflineModeIsEnabled:
        if not cached:
            raise FileNotFoundError(
                f"{here}, and none of that name in the hub's cache; HF_HUB_OFFLINE is set, so the hub was not asked"
            ) from None
    except Exception as error:  # whatever a network, a proxy or the hub has to say; the client's classes have changed
        if not cached:
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise FileNotFoundError(
                f"{here}, none in the hub's cache, and the hub cannot be reached at {constants.ENDPOINT} "
                f"({said}); give a folder written by save_pretrained, or fetch the model where there is a "
                "network; HF_HUB_OFFLINE=1 keeps from asking"
            ) from None
        constants.HF_HUB_OFFLINE = True


def _patience() -> float:
    return float(constants.HF_HUB_ETAG_TIMEOUT) if os.environ.get("HF_HUB_ETAG_TIMEOUT") else PATIENCE_S
