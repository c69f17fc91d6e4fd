"""Where a server listens."""

import ipaddress
import socket

from .errors import AttentionStoreError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has an address, and does not listen yet.

    Raises:
        AttentionStoreError: the address can't be had.
    """
    opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
    except OSError as error:
        opened.close()
        raise AttentionStoreError(f"can't listen on {host}:{port} ({error}); choose another with --port") from error
    return opened
