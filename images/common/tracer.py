"""Runs a program and notes every file that the interpreter imports, as it imports it.

    python3 -I tracer.py --report FILE [--path DIR]… [--import NAME]… PROGRAM [ARGUMENT]…

PROGRAM is a script's path (.py or .pyc), or a module's name as for `python -m`. Runs inside the image's own root, so it
needs nothing but the interpreter, and imports nothing that is not frozen into it (but for a module's name). The report
has one absolute path per line: the module's file (source, sourceless .pyc or extension) that was opened; modules frozen
into the interpreter open none. `--import` imports declared modules at the end, those that a normal run does not reach.
Written line by line: a program that is killed has reported too. For builders: see images.common.python.
"""

# No `from __future__ import annotations`: it would be one of the files that the program imports.
import io
import marshal
import os
import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def trace(report: str) -> None:
    """Begins to note imported files in ``report``; for the rest of the process, threads included."""
    descriptor = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    # What the interpreter imported before it came here; `os` and the like have no file when they are frozen in.
    for module in list(sys.modules.values()):
        spec = getattr(module, "__spec__", None)
        if spec is not None and spec.has_location and spec.origin and module.__name__ != "__main__":
            os.write(descriptor, f"{spec.origin}\n".encode())

    def hook(event: str, arguments: "tuple[object, ...]") -> None:
        # https://docs.python.org/3/library/audit_events.html: importlib reads code by io.open_code, which is "open"
        # with mode "rb"; extension modules come as "import" with their file's name.
        # "taploom.bundle" is images/common/start.py's.
        name = arguments[0] if event in ("open", "taploom.bundle") else arguments[1] if event == "import" else None
        if isinstance(name, str) and name.endswith((".py", ".pyc", ".so")):
            os.write(descriptor, f"{name}\n".encode())

    sys.addaudithook(hook)


def run(program: str) -> None:
    """Runs a script or module as __main__."""
    if "/" not in program:
        import runpy

        runpy._run_module_as_main(program)  # type: ignore[attr-defined]  # what `python -m` itself calls
        return
    with io.open_code(program) as file:
        data = file.read()
    code = marshal.loads(data[16:]) if program.endswith(".pyc") else compile(data, program, "exec")  # noqa: S302
    namespace = sys.modules["__main__"].__dict__
    namespace.update(__file__=program, __doc__=None)
    exec(code, namespace)  # noqa: S102 - what the interpreter does with a script


def main(argv: "list[str]") -> None:
    """The command."""
    report, names = "", []
    while argv and argv[0].startswith("--"):
        option, value, *argv = argv
        if option == "--report":
            report = value
        elif option == "--path":
            sys.path.insert(0, value)
        elif option == "--import":
            names.append(value)
        else:
            raise SystemExit(f"tracer.py: unknown option {option}")
    if not report or not argv:
        raise SystemExit("tracer.py: give --report FILE and a program")
    trace(report)
    sys.argv[:] = argv
    end = posix._exit

    def leave(status: int) -> "NoReturn":
        import_all(names)
        end(status)

    posix._exit = leave  # how start.py ends
    try:
        run(argv[0])
    finally:
        import_all(names)


def import_all(names: "list[str]") -> None:
    """Imports modules, even those that something stands for."""
    for name in names:
        if getattr(sys.modules.get(name), "__spec__", None) is None:  # only stands for it (taploom.lean)
            sys.modules.pop(name, None)
        __import__(name)


if __name__ == "__main__":
    main(sys.argv[1:])
