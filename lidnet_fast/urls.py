"""URLs of stores, and what of them may be shown and kept."""

import re

# Where a URL was taken for a path, one of its slashes is left.
_SECRETS = (
    (re.compile(r"(?<=\w\w)(://?[^\s/:@]*):(?!\d+(?:[/?#:\s]|$))\S*@"), r"\1@"),  # user:password@
    (re.compile(r"(https?://?)[^\s/:@]*@", re.IGNORECASE), r"\1"),  # a token in the user's place
    (re.compile(r"(?<=\w\w)(://?[^\s?'\"]*)\?[^\s'\"]*"), r"\1"),  # a signature
)


def is_url(location: str) -> bool:
    """Whether this names a place on another file system than the local one, as ``s3://bucket/folder`` does."""
    return "://" in location


def without_secrets(text: str) -> str:
    """A URL, or text with URLs in it, without what may give access: passwords, users of http, query strings."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text
