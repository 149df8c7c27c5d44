"""Collects the code that dataclasses and attrs generate while the agent is imported: run by the image's interpreter.

    python3 -s -S -B -OO -X no_debug_ranges generated.py FOLDER OUT [EARLIER]

FOLDER has the agent's modules and start.py, which reads OUT in the image. Some texts have a hash in them, another in
each process: with EARLIER, written with another PYTHONHASHSEED, only what is the same is kept.
"""

import builtins
import marshal
import sys
from types import CodeType


def collect(folder: str) -> dict[str, CodeType]:
    """Imports the agent and returns what was compiled from text meanwhile: the text and its code."""
    sys.path.insert(0, folder)
    from start import Generated  # type: ignore[import-not-found]  # FOLDER is on the path only now

    class Collector(Generated):  # type: ignore[misc]  # see above
        def exec(self, source: str, *spaces: dict[str, object]) -> None:
            if isinstance(source, str):
                self.known[source] = builtins.compile(source, "<string>", "exec")
            super().exec(source, *spaces)

        def compile(self, source: str, *rest: object, **options: object) -> CodeType:
            code: CodeType = super().compile(source, *rest, **options)
            if isinstance(source, str) and isinstance(code, CodeType):
                self.known[source] = code
            return code

    collector = Collector({})
    with collector:
        from agent_guest.__main__ import load

        load()
    known: dict[str, CodeType] = collector.known
    return known


def main(folder: str, out: str, earlier: str = "") -> None:
    """The command."""
    found = collect(folder)
    if earlier:
        with open(earlier, "rb") as file:  # noqa: PTH123 - pathlib may be what is imported
            found = {source: found[source] for source in marshal.load(file) if source in found}  # noqa: S302 - ours
    with open(out, "wb") as file:  # noqa: PTH123 - pathlib may be what is imported
        marshal.dump({source: found[source] for source in sorted(found)}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
