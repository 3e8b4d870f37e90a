"""The server's models: what cannot be served together is refused before anything is loaded or dropped."""

import argparse
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from mlx_lm import server
from mlx_lm.utils import load_tokenizer


class SchemeModelProvider(server.ModelProvider):
    """Loads models, after what can be refused was refused: the model being served stays loaded then."""

    def __init__(self, cli_args: argparse.Namespace):
        super().__init__(cli_args)
        self.load_error: Exception | None = None  # of the default model, in the thread that generates
        if cli_args.model is not None:
            check_models(cli_args.model, cli_args.draft_model, self._tokenizer_config)

    def load_default(self) -> None:
        """Load the model of --model; an error is kept, for the server to end with."""
        try:
            super().load_default()
        except Exception as error:
            self.load_error = error
            raise

    def _load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> None:
        check_models(model_path, draft_model_path, self._tokenizer_config)
        super()._load(model_path, adapter_path, draft_model_path)
        if not self.is_batchable:
            made = server.make_prompt_cache(self.model)
            kinds = sorted({type(layer).__name__ for layer in made if not hasattr(layer, "merge")})
            reason = f"{', '.join(kinds)} cannot be batched" if kinds else "a draft model is in use"
            logging.info(f"Requests are served one at a time: {reason}.")


def check_models(model: str | None, draft: str | None, tokenizer_config: dict[str, Any]) -> None:
    """Refuse a model that is not there, or a draft model with another tokenizer, before anything is loaded.

    Raises:
        ValueError: if no model is named, or the two have different tokens.
        OSError: naming the model that is neither a folder nor can be fetched.
    """
    if model is None:
        raise ValueError("[server] No model: start the server with --model, or name one in the request.")
    for name in (model,) if draft is None else (model, draft):
        if Path(name).exists():
            if not (Path(name) / "config.json").exists():
                raise FileNotFoundError(f"[server] {name} is not a model: it has no config.json.")
            continue
        try:
            hf_hub_download(name, "config.json")
        except Exception as error:  # the hub's client raises a dozen kinds
            raise OSError(f"[server] Model {name!r} is neither a folder nor can be fetched: {error}") from error
    if draft is None:
        return
    ours, theirs = (_ordinary_tokens(name, tokenizer_config) for name in (model, draft))
    if ours != theirs:
        token, i = min(set(ours.items()) ^ set(theirs.items()), key=lambda pair: pair[1])
        raise ValueError(
            f"[server] The draft model {draft} has another tokenizer than {model}: {len(theirs):,} tokens and "
            f"{len(ours):,}, and number {i} ({token!r}) stands in one of them only. Choose one with the same tokens."
        )


def _ordinary_tokens(model: str, config: dict[str, Any]) -> dict[str, int]:
    """Each token that stands for text, and its number; families rename special tokens between versions."""
    tokenizer = load_tokenizer(model, dict(config))
    special = set(tokenizer.get_added_vocab())
    return {token: i for token, i in tokenizer.get_vocab().items() if token not in special}


def positions(model: Any) -> int | None:
    """How many positions the model's config says it has, stretched by its rope scaling; None if it does not say."""
    args = getattr(model, "args", None)
    stated = getattr(args, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:
        return None
    scaling = getattr(args, "rope_scaling", None) or {}
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    return max(stated, int(factor * original)) if factor and original else stated
