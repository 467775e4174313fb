"""Clean text that people see or that leaves the machine: no logins, no keys, no control characters, no local paths.

Every error of this package passes its message through `safe`; so do warnings and tables of the command line. Files that
are published pass through `without_paths`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
ELSEWHERE = "(elsewhere)"  # in place of the folders above a file or folder of the machine that wrote a recipe

# queries of public share links; every other value may be a key, a signature or a login
HARMLESS = frozenset({"dl", "download", "export", "format", "id", "raw", "ref", "revision", "usp", "version"})
_AUTHORITY = re.compile(r"(?<=://)[^\s/?#]+@")
_SLASH_IN_PASSWORD = re.compile(r"(?<=://)[^\s/?#:@]+:(?!\d+(?:[/?#'\"\s]|$))\S*@")
_END = r"[^\s&#'\"<>)\]}]*[^\s&#'\"<>)\]}.,;:]"
_PAIR = re.compile(rf"(?<=[?&])([\w.%\[\]-]+)=({_END})")
_BARE = re.compile(rf"(://[^\s?#'\"<>]+\?)(?![\w.%\[\]-]+=)({_END})")
# what follows the path of an address: query, fragment, and parameters of the path; a page or a log may have escaped "&"
_TAIL = re.compile(r"(://[^\s?#;'\"<>]*)([?#;][^\s'\"<>]*[^\s'\"<>)\]}.,;:])")
_SEPARATOR = re.compile(r"([?&;#](?:amp;)?|\\u0026)")
_TOKENS = re.compile(r"\b(hf_|gh[pousr]_|github_pat_|glpat-|AKIA)[A-Za-z0-9_]{10,}")
# logins in an address that is escaped as part of another one
_ESCAPED = re.compile(r"(?i)(?<=%3A%2F%2F)(?:(?!%2F|%40)[^\s/?#&'\"])+%40")
_VARIABLE = re.compile(r"(?i)(\b[a-z0-9_]*(?:token|secret|passwd|password|api_?key|access_?key)=)(?=[^\s=])" + _END)
_HEADER = re.compile(
    r"(?i)(\b(?:authorization|x-[\w-]*(?:token|key)|(?:set-)?cookie)['\"]?\s*[:=]\s*['\"]?"
    r"(?:(?:bearer|basic|token|digest|negotiate)\s+)?)[^\s'\"]+"
)
# C0 but tab and newline, DEL, C1, marks that turn the direction of writing, line separators, undecodable bytes of names
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# an absolute path at the beginning of a value or after a separator, as in "clouds:/data/scans"; no address
_PATH = re.compile(
    r"(?:(?:(?<=^)|(?<=[\s=,;('\"\[`{|>@!]))(?:file://[\w.-]*|[/\\]+(?=[/\\][^\s/\\]))?|(?<=[^:/]:)(?:file://[\w.-]*)?)"
    r"(?:~[\w.-]*|[A-Za-z]:)?[/\\](?![/\\])[^\s'\",;)\]`}|]*"
)
_HOMES = ("home", "Users", "root", "~")


def safe(text: str) -> str:
    """Hide logins and keys, and escape control characters: what may be shown in a terminal or written to a log."""
    return printable(redacted(text))


def redacted(text: str) -> str:
    """Replace user info, query values that may be keys, and access tokens by "***"; applying it twice changes nothing.

    >>> redacted("http://me:secret@host/x?X-Amz-Signature=1a2b&dl=1")
    'http://***@host/x?X-Amz-Signature=***&dl=1'
    """
    if "://" in text:
        text = _AUTHORITY.sub(f"{HIDDEN}@", text)
        text = _SLASH_IN_PASSWORD.sub(f"{HIDDEN}@", text)
        text = _BARE.sub(rf"\g<1>{HIDDEN}", text)
        text = _TAIL.sub(lambda match: match[1] + _hidden_values(match[2]), text)
    text = _PAIR.sub(lambda m: m[0] if m[1].lower() in HARMLESS else f"{m[1]}={HIDDEN}", text)
    text = _ESCAPED.sub(f"{HIDDEN}%40", text)
    text = _VARIABLE.sub(rf"\g<1>{HIDDEN}", text)
    text = _TOKENS.sub(rf"\g<1>{HIDDEN}", text)
    return _HEADER.sub(rf"\g<1>{HIDDEN}", text)


def _hidden_values(tail: str) -> str:
    """The tail of an address with each value hidden that may be a key; in its query also values without a name."""
    parts, query = _SEPARATOR.split(tail), False
    for number in range(2, len(parts), 2):  # before each lies its separator
        separator, (name, equals, value) = parts[number - 1], parts[number].partition("=")
        query = separator != "#" and (query or separator == "?")
        if equals and value and name.lower() not in HARMLESS:
            parts[number] = f"{name}={HIDDEN}"
        elif not equals and query and name and name.lower() not in HARMLESS:
            parts[number] = HIDDEN
    return "".join(parts)


def printable(text: str) -> str:
    r"""Write control characters as escapes; newlines and tabs stay.

    >>> print(printable("\x1b[2Jname"))
    \x1b[2Jname
    """
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def without_paths(value: Any) -> Any:
    """A copy of parsed JSON or YAML whose texts hold no absolute path, login or key.

    Of a path its last name stays, unless that is the name of a home folder.

    >>> without_paths({"path": "/data/scans/scannet", "init": "moco_v2"})
    {'path': '(elsewhere)/scannet', 'init': 'moco_v2'}
    """
    if isinstance(value, str):
        whole = _PATH.match(value) and "\n" not in value  # names of folders may hold spaces and commas
        return redacted(_last_name(value) if whole else _PATH.sub(lambda match: _last_name(match[0]), value))
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_paths(item) for item in value)
    return value


def _last_name(path: str) -> str:
    names = [name for name in re.split(r"[/\\]+", path.removeprefix("file://")) if name]
    private = len(names) < 2 or names[-2] in _HOMES or names[-2].startswith("~")
    return ELSEWHERE if private else f"{ELSEWHERE}/{names[-1]}"
