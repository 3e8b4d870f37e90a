"""The texts that evaluation and planning read."""

from pathlib import Path
from typing import Any


def load_ids(tokenizer: Any, text: str, offset: int, count: int) -> list[int]:
    """`count` token ids of a text from its token `offset` on.

    Args:
        tokenizer: of the model.
        text: 'pydoc' (Python's own help, which ships with CPython), 'wikitext' (the test part of wikitext-2, fetched
            through huggingface_hub), or the path of a UTF-8 file.
        offset, count: in tokens.

    Raises:
        ValueError: if the text is too short.
        OSError: if it cannot be read or fetched.
    """
    if text == "pydoc":
        import pydoc_data.topics

        topics = pydoc_data.topics.topics
        words = "\n\n".join(topics[key] for key in sorted(topics))
    elif text == "wikitext":
        words = _wikitext()
    else:
        path = Path(text)
        if not path.is_file():
            raise FileNotFoundError(f"[--text] {text!r} is neither 'pydoc', 'wikitext' nor a file.")
        try:
            words = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"[--text] {text} is not UTF-8 text: {error}") from error
    ids = tokenizer.encode(words)
    if len(ids) < offset + count:
        raise ValueError(
            f"[--text] {text} has {len(ids):,} tokens, {offset + count:,} are needed ({count:,} from {offset:,} on). "
            "Ask for fewer with --tokens, --prompt-tokens or --offset."
        )
    return list(ids[offset : offset + count])


def _wikitext() -> str:
    import zipfile

    from huggingface_hub import hf_hub_download

    try:
        archive = hf_hub_download("ggml-org/ci", "wikitext-2-raw-v1.zip", repo_type="dataset")
    except Exception as error:  # the hub's client raises a dozen kinds
        raise OSError(f"[--text] wikitext could not be fetched ({error}). Offline, use --text pydoc.") from error
    with zipfile.ZipFile(archive) as files:
        return files.read("wikitext-2-raw/wiki.test.raw").decode("utf-8")
