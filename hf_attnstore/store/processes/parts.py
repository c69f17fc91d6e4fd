"""Sessions of which several processes keep a part each, because they compute one model together.

The first one's part is the session: it has its name, and is listed. The others' have names made of it.
"""

_SEPARATOR = "\x1f"
"""The unit separator: nobody types it, and the names that users give may not have it (`OpenStore.check_name`)."""
MOST = 256
"""Parts that are looked for."""


def part_name(session: str, number: int) -> str:
    """The name under which process `number` keeps its part of a session."""
    return session if number == 0 else f"{session}{_SEPARATOR}{number}"


def is_part(name: str) -> bool:
    """Whether a session is a part of one that has another name."""
    return _SEPARATOR in name


def whole_name(name: str) -> str:
    """The name of the session that `name` is a part of; a session's own name as it is."""
    return name.partition(_SEPARATOR)[0]
