"""Writes the Python stubs (.py, .pyi, and _grpc.py where there is a service) of every .proto beside this file.

Run by `make proto`, which writes into the repository, and by the test that compares a fresh copy with it. The
folder to write into is the only argument. Knows nothing but grpcio-tools, whose version constraints.txt pins.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from google.rpc import status_pb2
from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
# Ours, google.protobuf's and google.rpc's.
INCLUDES = (PROTOS, files("grpc_tools") / "_proto", Path(status_pb2.__file__).parents[2])


def generate(target: Path) -> None:
    """Writes all stubs under target, which exists. Raises RuntimeError when protoc refuses a file."""
    for proto in sorted(PROTOS.rglob("*.proto")):
        outputs = [f"--python_out={target}", f"--pyi_out={target}"]
        if "\nservice " in proto.read_text():
            outputs.append(f"--grpc_python_out={target}")
        includes = [f"-I{folder}" for folder in INCLUDES]
        if protoc.main(["protoc", *includes, *outputs, str(proto)]) != 0:
            raise RuntimeError(f"protoc refused {proto}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
