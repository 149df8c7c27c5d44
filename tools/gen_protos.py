"""Regenerates everything that is made from the .proto files.

    python tools/gen_protos.py            # writes into the source tree
    python tools/gen_protos.py --check    # writes nothing; fails with a diff when the committed code differs

Made are: the messages (betterproto2), the service stubs (protoc_gen_taploom.py), and ``descriptors.binpb``, a
FileDescriptorSet with the descriptors of all contracts and of what they import, for server reflection. The output
depends on the .proto files and the locked tool versions only.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = Path(__file__).resolve().parent / "protoc_gen_taploom.py"
DESCRIPTORS = "descriptors.binpb"


@dataclass(frozen=True)
class Target:
    """One tree of .proto files and where its code goes, both relative to the repository."""

    protos: str
    output: str
    bundled: bool = False
    """Whether the descriptors of gRPC's own health and reflection services are added."""


TARGETS = (
    Target("protos", "taploom/contracts", bundled=True),
    Target("tests/protocol/rpc_protos", "tests/protocol/rpc_testing"),
)


def _environment(scratch: Path) -> dict[str, str]:
    """PATH with this interpreter's scripts (ruff, betterproto2's plugin) and our plugin as an executable."""
    wrapper = scratch / "protoc-gen-taploom"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{PLUGIN}"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    path = os.pathsep.join([str(scratch), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path}


def _infrastructure_descriptors() -> list[FileDescriptorProto]:
    """Descriptors of grpc.health.v1 and grpc.reflection.v1alpha from gRPC's packages, and of grpc.reflection.v1.

    reflection v1 is v1alpha under another package name (https://github.com/grpc/grpc-proto).
    """
    from grpc_health.v1 import health_pb2
    from grpc_reflection.v1alpha import reflection_pb2

    health = FileDescriptorProto.FromString(health_pb2.DESCRIPTOR.serialized_pb)
    health.name = "grpc/health/v1/health.proto"
    alpha = FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    alpha.name = "grpc/reflection/v1alpha/reflection.proto"
    stable = FileDescriptorProto()
    stable.CopyFrom(alpha)
    stable.name = "grpc/reflection/v1/reflection.proto"
    stable.package = "grpc.reflection.v1"
    for message in stable.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(".v1alpha.", ".v1.")
    for service in stable.service:
        for method in service.method:
            method.input_type = method.input_type.replace(".v1alpha.", ".v1.")
            method.output_type = method.output_type.replace(".v1alpha.", ".v1.")
    return [health, stable, alpha]


def _descriptor_set(data: bytes, *, bundled: bool) -> bytes:
    """The set in a fixed order, with gRPC's own services when `bundled`."""
    descriptors = FileDescriptorSet.FromString(data)
    files = {file.name: file for file in descriptors.file}
    if bundled:
        files |= {file.name: file for file in _infrastructure_descriptors()}
    result = FileDescriptorSet()
    for name in sorted(files):
        result.file.add().CopyFrom(files[name])
    return bytes(result.SerializeToString(deterministic=True))


def generate(target: Target, output: Path) -> None:
    """Writes all of `target`'s files below `output`, a directory that is replaced as a whole."""
    protos = ROOT / target.protos
    sources = sorted(path.relative_to(protos).as_posix() for path in protos.rglob("*.proto"))
    output.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        environment = _environment(scratch)
        raw = scratch / "raw.binpb"
        # betterproto2's plugin formats with the ruff configuration of the working directory.
        (scratch / "ruff.toml").write_text('line-length = 110\ntarget-version = "py311"\n')
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{protos}"]
        command += [f"--python_betterproto2_out={output}"]
        command += ["--python_betterproto2_opt=client_generation=none,server_generation=none"]
        command += [f"--taploom_out={output}"]
        command += [f"--descriptor_set_out={raw}", "--include_imports"]
        done = subprocess.run(
            [*command, *sources], cwd=scratch, env=environment, check=False, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"protoc failed for {target.protos}:\n{done.stdout}{done.stderr}")
        format_ = ["ruff", "format", "--quiet", "--config", str(scratch / "ruff.toml"), str(output)]
        subprocess.run(format_, cwd=scratch, env=environment, check=True)
        (output / DESCRIPTORS).write_bytes(_descriptor_set(raw.read_bytes(), bundled=target.bundled))


def _files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _difference(committed: Path, fresh: Path, label: str) -> list[str]:
    """Unified diff from the committed files to the fresh ones; empty when they are the same."""
    before, after = _files(committed), _files(fresh)
    lines: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        path = f"{label}/{name}"
        if name.endswith(".binpb") or old is None or new is None:
            state = "is missing" if old is None else "is not generated any more" if new is None else "differs"
            lines.append(f"{path} {state}\n")
            continue
        lines += difflib.unified_diff(
            old.decode().splitlines(keepends=True),
            new.decode().splitlines(keepends=True),
            f"{path} (committed)",
            f"{path} (generated)",
        )
    return lines


def _replace(committed: Path, fresh: Path) -> None:
    """Makes `committed` be `fresh`; files that are the same are left alone."""
    before, after = _files(committed), _files(fresh)
    for name in before.keys() - after.keys():
        (committed / name).unlink()
    for name, content in after.items():
        path = committed / name
        if before.get(name) != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            shutil.copymode(fresh / name, path)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Generate the code of the contracts.")
    parser.add_argument("--check", action="store_true", help="fail with a diff when the committed code differs")
    arguments = parser.parse_args()
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        for number, target in enumerate(TARGETS):
            # betterproto2 emits relative imports, so the output's place does not matter, only its depth in itself.
            fresh = Path(directory) / str(number) / Path(target.output).name
            generate(target, fresh)
            if arguments.check:
                lines += _difference(ROOT / target.output, fresh, target.output)
            else:
                _replace(ROOT / target.output, fresh)
    if lines:
        sys.stdout.writelines(lines)
        sys.exit("The committed code differs from what the .proto files give: run tools/gen_protos.py and commit.")


if __name__ == "__main__":
    main()
