"""Settings that hold where nobody says otherwise: from the environment, else from a small TOML file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SettingsError

CONFIG = "ATTNSTORE_CONFIG"
"""The environment variable that names the file; by default `attnstore.toml` in `$XDG_CONFIG_HOME` or `~/.config`."""


@dataclass(frozen=True)
class Setting:
    """Something that can be set. What is set may be empty, which is as if it were not."""

    name: str
    default: str
    about: str

    @property
    def variable(self) -> str:
        """The environment variable, which goes before the file."""
        return f"ATTNSTORE_{self.name.upper()}"


@dataclass(frozen=True)
class Set:
    """What a setting is, and who said so."""

    value: str
    origin: str
    """"default", or the environment variable or the file that it is from."""


SETTINGS = (
    Setting("store", "", "folder of the store; by default attnstore in the Hugging Face home"),
    Setting("memory", "2GiB", "host memory for KV, such as 8GiB; auto follows what is free"),
    Setting("disk", "50GiB", "disk space for KV"),
    Setting("codec", "raw", "how KV is written: raw, lossless, or with loss fp16, int8, int8z, int4"),
    Setting("disk_codec", "", "lossless: what `codec` leaves raw is written so on disk"),
    Setting("shared_codec", "", "lossless: the same in the shared tier"),
    Setting(
        "windows_every", "", "tokens between points to go back to, where sliding layers' KV outside the window may go"
    ),
    Setting("on_device", "auto", "KV that stays where it was computed between turns; auto: some on a CPU"),
    Setting("policy", "predictive", "what goes first where there is no room: predictive, lru, hyperbolic, fifo"),
    Setting("durability", "process", "what a saved turn survives: process or power"),
    Setting("older_than", "", "days without a turn after which a conversation is deleted; by default never"),
    Setting("gate", "on", "off: always load what is known, even where computing is faster"),
    Setting("model", "", "chat model of the commands: a hub name, a folder, or smollm2"),
    Setting("models", "", "folder of models that come by pip; by default attnstore-models in ~/.cache"),
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}


def config_file() -> Path:
    """Where the file is, or would be."""
    named = os.environ.get(CONFIG)
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(named or f"{home}/attnstore.toml").expanduser()


def value_of(name: str) -> str:
    """What a setting is; empty where nothing is set and there is no default.

    Raises:
        SettingsError: the file is none, or sets something else.
    """
    return find(name).value


def find(name: str) -> Set:
    """What a setting is, and who said so.

    Raises:
        SettingsError: the file is none, or sets something else.
    """
    setting = _BY_NAME[name]
    given = os.environ.get(setting.variable)
    if given:
        return Set(given, setting.variable)
    file = config_file()
    found = _read(file).get(name)
    return Set(str(found), str(file)) if found not in (None, "") else Set(setting.default, "default")


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text()
    except OSError as error:
        if os.environ.get(CONFIG):
            raise SettingsError(f"{CONFIG} names {file}, which can't be read: {error.strerror}") from error
        return {}  # nobody asked for one
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file} is no text: {error}") from error
    import tomllib

    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f'{file} is no TOML file ({error}): a line is like memory = "8GiB"') from error
    for name, value in found.items():
        if name not in _BY_NAME:
            raise SettingsError(f"{file} sets {name!r}, which is no setting: there are {', '.join(_BY_NAME)}")
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise SettingsError(f'{file}: {name} is a text or a number, such as {name} = "8GiB", not {value!r}')
    return found
