"""The secrets that policies name: in variables of the environment, and in files.

A file is meant to be rotated: whoever reads the policies reads it again, and the policies are read when it has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gateway.language import signing_key
from gateway.snapshot import Snapshot
from gateway.wire import trusting

# By the name of its variable, or by the path of its file, which begins with a slash.
Secrets = Mapping[str, str]

_MOST = 64 * 1024  # bytes of a file: whatever is longer is no secret


def files_named(snapshot: Snapshot) -> frozenset[str]:
    """The files beside the documents that the policies are made of: secrets and certificates."""
    secrets = [source for _, source, _ in _sources(snapshot) if source.startswith("/")]
    certificates = [file for pool in snapshot.pools.values() if pool.tls is not None for file in pool.tls.files]
    return frozenset((*secrets, *certificates))


def secrets_of(snapshot: Snapshot, environment: Mapping[str, str]) -> tuple[Secrets, list[str]]:
    """Every secret that the policies name, and what is wrong with them; the text of a mistake never has one in it.

    The variable of an upstream may be empty: it may not ask for anything. A file that is named has to hold something.
    """
    secrets: dict[str, str] = {}
    mistakes: list[str] = []
    for path, source, check in _sources(snapshot):
        try:
            secret = secret_at(source, environment)
            check(secret)
            secrets[source] = secret
        except OSError as unread:
            mistakes.append(f"{path}: {source} {_unread(unread)}, expected a secret")
        except ValueError as wrong:
            mistakes.append(f"{path}: {source} {wrong}")
    return secrets, mistakes


def wrong_certificates(snapshot: Snapshot) -> list[str]:
    """What is wrong with the certificates that the policies name."""
    mistakes = []
    for name, pool in snapshot.pools.items():
        if pool.tls is not None and pool.tls.files:
            try:
                trusting(pool.tls.ca, pool.tls.certificate, pool.tls.key)
            except OSError as wrong:  # ssl's have no file name, but one of ours in their text
                told = f"{wrong.filename} {_unread(wrong)}" if wrong.filename else wrong.args[0]
                mistakes.append(f"pools.{name}.tls: {told}")
    return mistakes


def _sources(snapshot: Snapshot) -> Iterator[tuple[str, str, Callable[[str], object]]]:
    """Where each secret is named, the variable or file that holds it, and what raises ValueError for a wrong one."""
    for name, pool in snapshot.pools.items():
        for i, own in enumerate(pool.upstreams):
            if own.key is not None:
                yield f"pools.{name}.upstreams[{i}].{'key_file' if own.key_file else 'key_env'}", own.key, _printable
    hook = snapshot.gateway.webhook
    if hook is not None:
        yield f"gateway.webhook.{'secret_file' if hook.secret_file else 'secret_env'}", hook.secret, signing_key


def secret_at(source: str, environment: Mapping[str, str]) -> str:
    """The secret in a variable, "" where there is none, or in a file; without the blanks around it: one that is mounted
    ends with a line's end. Raises OSError, and ValueError for a file that is empty."""
    if not source.startswith("/"):
        return environment.get(source, "").strip()
    with Path(source).open("rb") as file:
        secret = file.read(_MOST).decode("latin-1").strip()
    if not secret:
        raise ValueError("holds nothing, expected a secret")
    return secret


def _unread(error: OSError) -> str:
    return f"cannot be read ({error.strerror})"


def _printable(secret: str) -> None:
    if not (secret.isascii() and secret.isprintable()):
        raise ValueError("holds no credential, expected printable ASCII")
