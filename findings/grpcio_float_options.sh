#!/usr/bin/env bash
# grpcio takes a channel or server option whose value is a float, and ignores it without a word.
#
# Likely guess: ("grpc.max_receive_message_length", 64e6) allows messages of 64 MB, or raises TypeError.
# Seen: the limit stays the default of 4 MiB; keepalive and ping intervals given as `seconds * 1000` of a float are ignored too.
#
# Exits with 0 if it is still so, and with 1 if the behaviour changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q grpcio==1.85.3

cat > "$folder/look.py" <<'PYTHON'
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

MESSAGE_BYTES = 5_000_000
LIMIT_BYTES = 64_000_000


class Sizes(grpc.GenericRpcHandler):
    """Answers each call with the size of its request."""

    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: str(len(request)).encode())


def answer(limit):
    """What a server with this limit of messages says to a request of MESSAGE_BYTES."""
    server = grpc.server(ThreadPoolExecutor(2), [Sizes()], options=[("grpc.max_receive_message_length", limit)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            return channel.unary_unary("/sizes/Size")(bytes(MESSAGE_BYTES), timeout=20).decode()
    except grpc.RpcError as error:
        return f"{error.code().name}: {error.details()}"
    finally:
        server.stop(None)


as_int, as_float = answer(LIMIT_BYTES), answer(float(LIMIT_BYTES))
print(f"grpcio {grpc.__version__}, Python {sys.version.split()[0]}: a request of {MESSAGE_BYTES:,} bytes")
print(f"likely guess: a limit of {LIMIT_BYTES} and one of {float(LIMIT_BYTES)} do the same, or the latter is a TypeError")
print(f"seen: limit {LIMIT_BYTES}: {as_int}")
print(f"      limit {float(LIMIT_BYTES)}: {as_float}")
sys.exit(0 if as_int == str(MESSAGE_BYTES) and as_float.startswith("RESOURCE_EXHAUSTED") else 1)
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
