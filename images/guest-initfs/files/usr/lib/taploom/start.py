"""Starts the agent in the image: `python3 -I -S start.pyc`, with no site, no environment and one folder before all."""

import builtins
import marshal
import sys
from types import CodeType

FOLDER = "/usr/lib/taploom"


class Generated:
    """The code that dataclasses and attrs generate, and compile, for each of some 130 classes: compiled before.

    A sixth of all that the interpreter does until the agent answers. What is not there is compiled as ever.
    """

    def __init__(self, known: dict[str, CodeType]) -> None:
        self.known = known
        self._exec, self._compile = builtins.exec, builtins.compile

    def __enter__(self) -> None:
        builtins.exec = self.exec
        builtins.compile = self.compile

    def __exit__(self, *_: object) -> None:
        builtins.exec, builtins.compile = self._exec, self._compile

    def exec(self, source: str | CodeType, *spaces: dict) -> None:
        # Modules come here, too, as code.
        self._exec(self.known.get(source, source) if isinstance(source, str) else source, *spaces)

    def compile(self, source: str, *rest: object, **options: object) -> CodeType:
        return self.known.get(source) or self._compile(source, *rest, **options)


def read(path: str = f"{FOLDER}/generated.marshal") -> dict[str, CodeType]:
    """What the builder has put into the image (guest_image/generated.py), for this very interpreter."""
    try:
        with open(path, "rb") as file:
            return marshal.load(file)
    except OSError:
        return {}


if __name__ == "__main__":
    sys.path.insert(0, FOLDER)
    with Generated(read()):
        from agent_guest.__main__ import load

        run = load()
    sys.exit(run(sys.argv[1:]))
