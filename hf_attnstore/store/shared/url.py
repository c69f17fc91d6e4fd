"""The URL of a shared tier, and the secrets in it, which no text made of it ever shows."""

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from ...errors import AttentionStoreError, SharedTierError
from ...sizes import parse_bytes

VARIABLE = "ATTNSTORE_SHARED"
"""The environment variable that the URL is taken from where none is given."""
PASSWORD_VARIABLE = "ATTNSTORE_SHARED_PASSWORD"

_SECRET_OPTIONS = ("password", "secret_key", "token")
_EXAMPLE = "valkey://host:6379/0?prefix=team"


class SharedURL:
    """A URL, read. Its text and its repr are without the password, which only `secret` has.

    Args:
        text: such as `valkey://user:password@host:6379/0?prefix=team&timeout=1`. The password may be in the URL, in
            the file that `password_file=` names, or in the environment (`ATTNSTORE_SHARED_PASSWORD`).

    Raises:
        SharedTierError: it is no such URL. What is said of it has no secret in it.
    """

    def __init__(self, text: str) -> None:
        try:
            parts = urlsplit(text)
            self.host, self.port = parts.hostname or "", parts.port
            query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        except ValueError:  # what it says may quote the URL
            raise SharedTierError(f"the URL of the shared tier can't be read; one looks like {_EXAMPLE}") from None
        if not parts.scheme or not self.host:
            raise SharedTierError(f"the URL of the shared tier has no scheme or no host; one looks like {_EXAMPLE}")
        if parts.fragment or "@" in parts.path or "@" in parts.query:  # then what comes before it is part of a secret
            raise SharedTierError(
                "the URL of the shared tier has a character in its password that has to be written "
                "as % and two digits, as in a%40b for a@b"
            )
        self.scheme, self.path = parts.scheme.lower(), parts.path.strip("/")
        self.user = unquote(parts.username or "")
        secrets = [query.pop(name, "") for name in _SECRET_OPTIONS]
        file = query.get("password_file", "")
        read = _read(file) if file else ""
        self._secret = unquote(parts.password or "") or next(filter(None, secrets), "") or read
        self._secret = self._secret or os.environ.get(PASSWORD_VARIABLE, "")
        self.options: Mapping[str, str] = query
        self._used = {"password_file"}

    @property
    def secret(self) -> str:
        """The password; empty if there is none."""
        return self._secret

    def option(self, name: str, default: str = "") -> str:
        """What the URL says of an option."""
        self._used.add(name)
        return self.options.get(name) or default

    def number(self, name: str, default: float, parse: str = "") -> float:
        """An option that is a number, of at least 0: seconds, or bytes where `parse` says so.

        Raises:
            SharedTierError: it is none.
        """
        text = self.option(name)
        try:
            value = float(parse_bytes(text) if parse == "bytes" else text) if text else default
            if not 0 <= value < float("inf"):
                raise ValueError
        except (ValueError, AttentionStoreError):
            raise SharedTierError(f"{self}: {name}= is a number, not {text!r}") from None
        return value

    def check_options(self) -> None:
        """Raises:
        SharedTierError: there is an option that nobody asked for, such as a misspelt one.
        """
        unknown = sorted(self.options.keys() - self._used)
        if unknown:
            raise SharedTierError(f"{self} has options that are not known: {', '.join(unknown)}")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port is not None else ""
        user = f"{self.user}@" if self.user else ""
        path = f"/{self.path}" if self.path else ""
        # an option that nobody asked for may be a misspelt secret
        shown = {name: value for name, value in self.options.items() if name in self._used}
        query = "?" + urlencode(shown, safe="/:") if shown else ""
        return f"{self.scheme}://{user}{host}{port}{path}{query}"

    def __repr__(self) -> str:
        return f"SharedURL({str(self)!r})"

    def __reduce__(self) -> str:
        raise SharedTierError("the URL of a shared tier is not pickled: it may have a password in it")


def _read(file: str) -> str:
    try:
        return Path(file).expanduser().read_text().strip()
    except OSError as error:
        raise SharedTierError(f"the password file of the shared tier, {file}: {error.strerror}") from error
