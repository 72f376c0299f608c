"""The doctor's bundle: what it found and what it looked at, in one archive to send to whoever helps.

Secrets are masked before anything is written: values whose names speak of tokens, keys or passwords, and tokens and
passwords within other texts.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import platform
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from echelon.cli.diagnosis.facts import Facts
from echelon.cli.diagnosis.finding import Finding
from echelon.cli.output import plain
from echelon.errors import ConfigError

MASK = "***"
PREFIXES = (
    "ECHELON_",
    "RAY_",
    "NCCL_",
    "CUDA_",
    "TORCH_",
    "PYTORCH_",
    "GLOO_",
    "HF_",
    "GRPC_",
    "OMP_",
    "LD_",
    "PYTHON",
)
NAMES = ("PATH", "TMPDIR", "XDG_CONFIG_HOME", "VIRTUAL_ENV", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY")
NOT_SECRET = ("RAY_AUTH_MODE",)
_SECRET_WORD = (
    r"token|secret|password|passwd|pwd|credentials?|api[_-]?key|access[_-]?key|private[_-]?key|auth(?:orization)?"
)
_SECRET_NAME = re.compile(rf"(?:^|[_.-])(?:{_SECRET_WORD})(?:$|[_.-])", re.IGNORECASE)
_SETTING = re.compile(r"^(\s*[\"']?)([\w.-]+)([\"']?\s*[=:]\s*)(\S.*)")
_SECRET_TEXT = (
    (re.compile(r"//[^/\s@:]*:[^/\s@]+@"), f"//{MASK}@"),
    (re.compile(r"\b(?:hf|sk|ghp|xox[abp])[_-][A-Za-z0-9_-]{8,}"), MASK),
    (re.compile(r"\b(bearer )\S+", re.IGNORECASE), rf"\g<1>{MASK}"),
)


def write_bundle(
    path: Path, facts: Facts, findings: Sequence[Finding], environment: Mapping[str, str], config: Mapping[str, str]
) -> None:
    """A .tar.gz of text files; config: the text of each configuration file. Raises ConfigError, naming --bundle."""
    served = facts.served
    files = {
        "findings.json": _json(findings),
        "facts.json": _json(facts),
        "versions.txt": _versions(),
        "system.txt": "\n".join((platform.platform(), platform.version(), " ".join(platform.libc_ver()))) + "\n",
        "environment.json": _json(masked_environment(environment)),
        "events.jsonl": "".join(json.dumps(plain(event)) + "\n" for event in (served.events if served else ())),
    } | {f"config/{name}": masked_settings(text) for name, text in config.items()}
    try:
        with tarfile.open(path, "w:gz") as archive:
            for name, text in files.items():
                content = masked(text).encode()
                entry = tarfile.TarInfo(f"echelon-doctor/{name}")
                entry.size, entry.mode = len(content), 0o600
                archive.addfile(entry, io.BytesIO(content))
    except OSError as error:
        raise ConfigError(f"--bundle {path} cannot be written: {error.strerror}", field="bundle") from None


def masked_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter to Echelon and what it uses, secrets masked."""
    wanted = {name: value for name, value in environment.items() if name.startswith(PREFIXES) or name.upper() in NAMES}
    return {name: MASK if _is_secret(name) and value else masked(value) for name, value in sorted(wanted.items())}


def masked_settings(text: str) -> str:
    """A configuration file's text with the values of secret names masked."""
    return "".join(_SETTING.sub(_mask_value, line) for line in text.splitlines(keepends=True))


def masked(text: str) -> str:
    """Any text without what looks like a token, or the password of a URL."""
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return text


def _mask_value(found: re.Match[str]) -> str:
    return f"{found[1]}{found[2]}{found[3]}{MASK}" if _is_secret(found[2]) else found[0]


def _is_secret(name: str) -> bool:
    return bool(_SECRET_NAME.search(name)) and name not in NOT_SECRET


def _versions() -> str:
    found = {f"{dist.metadata['Name']}=={dist.version}" for dist in importlib.metadata.distributions()}
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


def _json(value: object) -> str:
    return json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n"
