"""Files and folders that only the user can see, written whole or not at all."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

MAX_IOVECS = min(os.sysconf("SC_IOV_MAX"), 1024) if hasattr(os, "sysconf") else 1024

_NETWORK = frozenset(
    "nfs nfs4 cifs smb smb2 smb3 smbfs afs 9p ceph fuse.ceph fuse.cephfs lustre gpfs beegfs glusterfs fuse.glusterfs "
    "fuse.sshfs fuse.s3fs fuse.gcsfuse fuse.rclone orangefs pvfs2 webdav davfs fuse.davfs2 virtiofs".split()
)


def make_private_directory(path: Path) -> None:
    """Creates a folder that only the user can enter, and missing ones above it likewise."""
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)


def open_to_others(path: Path) -> bool:
    """Whether others than the user may enter or read a folder."""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def write_file(path: Path, chunks: Sequence[memoryview | bytes], folder: Path, *, sync: bool) -> int:
    """Writes a file in `folder`, then renames it to `path`, on the same file system. Returns its bytes.

    Args:
        sync: return only when file and name will survive a loss of power.

    Raises:
        OSError: from the file system; nothing is left behind.
    """
    temporary = folder / path.name
    total = stage_file(temporary, chunks, sync=sync)
    try:
        publish_file(temporary, path, sync=sync)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return total


def stage_file(path: Path, chunks: Sequence[memoryview | bytes], *, sync: bool) -> int:
    """Writes a file, of which a part may be there until this returns. Returns its bytes.

    Raises:
        OSError: from the file system; nothing is left behind.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        try:
            total = _write_all(fd, [memoryview(chunk) for chunk in chunks])
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return total


def publish_file(staged: Path, path: Path, *, sync: bool) -> None:
    """Renames a whole file to `path`. Its folder, and the one above that, are made where they are missing.

    Raises:
        OSError: from the file system; the file is where it was.
    """
    try:
        os.rename(staged, path)
    except FileNotFoundError:
        path.parent.parent.mkdir(mode=0o700, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if sync:
            sync_folder(path.parent.parent.parent)
            sync_folder(path.parent.parent)
        os.rename(staged, path)
    if sync:
        sync_folder(path.parent)


def _write_all(fd: int, views: list[memoryview]) -> int:
    total = 0
    while views:
        count = os.writev(fd, views[:MAX_IOVECS])
        total += count
        while views and count >= views[0].nbytes:
            count -= views.pop(0).nbytes
        if count:
            views[0] = views[0][count:]
    return total


def sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def tree_bytes(path: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def network_filesystem(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """The type of the network file system that `path` is on; None if it is on none, as far as can be told."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    real = os.path.realpath(path)
    best, found = "", ""
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, found = point, fields[2]
    return found if found in _NETWORK else None
