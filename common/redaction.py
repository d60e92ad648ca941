"""Tokens, keys and passwords: refused on the command line, which Hydra logs and writes, and masked in a run's files.

Paths of this machine are masked in files that are meant for others.
"""

import re
from typing import Any

NAME = r"(?:\w*_)?(?:token|secret|password|(?:api|access|private|auth|secret|wandb|hf|openai)_?key)"
TOKEN = re.compile(  # of the hub, GitHub and OpenAI, and the password in a URL
    r"\bhf_[A-Za-z0-9]{20,}\b|\b(?:github_pat_|gh[opsu]_)\w{20,}|(?<![\w/-])sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}"
    r"|(?<=://)(?:[^/\s:@]+:[^/\s@]+|[^/\s:@]{20,})(?=@)"
)
MASK = "***"
# An absolute path of two parts or more, or one in a home folder: "/no_think" in a prompt is neither.
LOCAL_PATH = re.compile(r"(?<![\w./*}\])-])(?:file://)?(?:~|/[^\s/\"'`,;:|<>(){}\[\]]+)/[^\s\"'`,;:|<>(){}\[\]]+")
FOLDER = "FOLDER"


def secret_in(word: str) -> str | None:
    """What holds a secret in a word of the command line: the name of a key, or its first characters; None if there is none.

    A reference to an environment variable, ${oc.env:NAME}, is none.

    >>> secret_in("+training.hub_token=abc"), secret_in("training={hub_token:abc}"), secret_in("x=${oc.env:HF_TOKEN}")
    ('training.hub_token', 'hub_token', None)
    """
    named = re.match(rf"[+~]*((?:[\w@/]+\.)*{NAME})=(?!\$\{{|null$|$)", word, re.IGNORECASE)
    named = named or re.search(rf"[{{,]\s*['\"]?({NAME})['\"]?\s*:(?!\s*(?:\$\{{|null\b))", word, re.IGNORECASE)
    if named:
        return named[1]
    token = TOKEN.search(word)
    if token is None:
        return None
    return "user:password@" if ":" in token[0] else f"{token[0][:3]}..."


def without_secrets(value: Any) -> Any:
    """The value with `MASK` instead of texts under secret keys and of tokens within texts, at any depth."""
    if isinstance(value, dict):
        return {
            key: MASK
            if isinstance(item, str) and re.fullmatch(NAME, str(key), re.IGNORECASE)
            else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return TOKEN.sub(MASK, value) if isinstance(value, str) else value


def without_local_paths(value: Any) -> Any:
    """The value with `FOLDER` instead of absolute paths, at any depth.

    >>> without_local_paths({"path": "/home/ann/My Data/tofu", "url": "https://a.b/c", "word": "model={path:/a/b,x:1}"})
    {'path': 'FOLDER', 'url': 'https://a.b/c', 'word': 'model={path:FOLDER,x:1}'}
    """
    if isinstance(value, dict):
        return {without_local_paths(key): without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    whole = re.match(r"(file://)?(~|/[^\s/]+)/", value) and "\n" not in value
    return FOLDER if whole else LOCAL_PATH.sub(FOLDER, value)
