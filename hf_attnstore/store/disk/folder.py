"""A store's folder and its `store.json`: made, read, and checked before anything else is."""

import json
import logging
import os
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...errors import AttentionStoreError, EncryptionKeyError, StoreFormatError
from ..blocks.vault import Vault, common_salt, new_settings, open_vault
from ..records.files import make_private_directory, network_filesystem, open_to_others

logger = logging.getLogger("hf_attnstore")

FORMAT = 3
FILE = "store.json"
_TEMPORARY = ".attnstore-tmp"


@dataclass(frozen=True)
class Folder:
    """A store's folder, opened."""

    path: Path
    settings: dict[str, Any]
    vault: Vault

    @property
    def block_size(self) -> int:
        return int(self.settings["block_size"])

    @property
    def identity(self) -> str:
        """Tells the store from others."""
        return str(self.settings["id"])

    def make_again(self) -> None:
        """Makes the store anew where the folder was deleted, under the same settings.

        Raises:
            StoreFormatError: another store took its place.
            OSError: from the file system.
        """
        make_private_directory(self.path)
        file = self.path / FILE
        if not file.exists():
            _write(file, self.settings)
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise StoreFormatError(f"{file} is damaged ({error}); restore or delete it") from error
        if any(found.get(name) != self.settings.get(name) for name in ("format", "block_size", "encryption")):
            raise StoreFormatError(f"another store took the place of {self.path}; open that one anew")


def open_folder(
    path: Path, block_size: int | None, key: bytes | None, *, create: bool = True, common: bool = False
) -> Folder:
    """Opens the folder of a store, or makes one where there is nothing.

    Args:
        block_size: the one that the store must have; None takes what it has, or 256 for a new one.
        key: for a store that is encrypted, or is to be.
        create: whether to make a store where there is none.
        common: whether it shares blocks with other stores, so that their names have to be the same in all.

    Raises:
        StoreFormatError: it holds something else, or a store of another format or block size.
        EncryptionKeyError: the key is missing, wrong, or not wanted.
        AttentionStoreError: the folder can't be used, or there is no store.
    """
    try:
        existed = path.exists()
        file = path / FILE
        if not file.exists():
            if not create:
                raise AttentionStoreError(f"there is no store in {path}")
            make_private_directory(path)
            strangers = [entry for entry in path.iterdir() if entry.suffix != _TEMPORARY]
            if strangers and not file.exists():  # another process may be making it at this moment
                raise StoreFormatError(f"{path} is not empty and not a store; choose another folder")
            _create(file, block_size or 256, key, common=common)
        settings = json.loads(file.read_text())
        found, size, encryption = settings["format"], int(settings["block_size"]), settings.get("encryption")
        if found == FORMAT:
            settings["id"]
        open_to_all = existed and open_to_others(path)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreFormatError(f"{path}/{FILE} is damaged ({error}); restore or delete it") from error
    except OSError as error:
        raise AttentionStoreError(f"can't use {path} as a store: {error}") from error
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        todo = (
            f"a newer hf-attnstore than {__version__} wrote it: pip install --upgrade hf-attnstore"
            if newer
            else "choose another folder, or delete this one"
        )
        raise StoreFormatError(f"{path} has store format {found}; this version reads {FORMAT}: {todo}")
    if block_size not in (None, size):
        raise StoreFormatError(f"{path} was made with block_size={size}: open it with that, or choose another folder")
    vault = _vault(key, encryption, path)
    if common and key is not None and encryption["salt"] != common_salt(key).hex():
        raise EncryptionKeyError(
            f"the encrypted store {path} was made without a shared tier, so the names of its blocks are its own: "
            'choose another folder, or open it with shared=""'
        )
    if open_to_all:
        logger.warning("others than you can look into %s, where conversations are kept: chmod 700 %s", path, path)
    network = network_filesystem(path)
    if network is not None:
        logger.warning(
            "%s is on a network file system (%s): use it from one machine at a time, or better, choose a local disk",
            path,
            network,
        )
    return Folder(path, settings, vault)


def _vault(key: bytes | None, encryption: Any, path: Path) -> Vault:
    try:
        return open_vault(key, encryption, path)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreFormatError(f"{path}/{FILE} is damaged ({error}); restore or delete it") from error


def _create(file: Path, block_size: int, key: bytes | None, *, common: bool) -> None:
    settings: dict[str, Any] = {
        "format": FORMAT,
        "id": secrets.token_hex(16),
        "block_size": block_size,
        "created_by": f"hf-attnstore {__version__}",
    }
    encryption = new_settings(key, common=common)
    if encryption is not None:
        settings["encryption"] = encryption
    _write(file, settings)


def _write(file: Path, settings: dict[str, Any]) -> None:
    temporary = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}{_TEMPORARY}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as stream:
        stream.write(json.dumps(settings))
        stream.flush()
        os.fsync(stream.fileno())
    try:
        os.link(temporary, file)  # of several who make a store at once, one does
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
