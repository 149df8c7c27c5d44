"""Notes what a program's import compiles: generated source, and regular expressions. Run by the image's interpreter.

    python3 -s -S -B -OO -X no_debug_ranges collect.py FOLDER PROGRAM NAMES OUT [EARLIER]

FOLDER has the package PROGRAM, whose `__main__` has `load`; NAMES is a file with modules' names, one a line, that are
imported after that. OUT is for `bundle.write`: marshal, in a form without
references, of texts (generated source to its code, marshalled) and patterns (pattern and flags to the arguments of
`_sre.compile`). Some texts have a hash in them, another in each process: with EARLIER, written with another
PYTHONHASHSEED, only what is the same is kept.
"""

import builtins
import marshal
import sys
from types import CodeType
from typing import Any

from start import with_hash, without_hash  # type: ignore[import-not-found]  # it is beside this program

FORM = 2  # of marshal: whether an object is referred to by others makes no difference to the bytes
Patterns = dict[tuple[str | bytes, int], tuple[object, ...]]


def collect(folder: str, program: str, names: list[str]) -> tuple[dict[str, CodeType], Patterns]:
    """Imports the program and the modules; returns the texts that were compiled meanwhile, and regular expressions."""
    texts: dict[str, CodeType] = {}
    patterns: Patterns = {}
    plain_exec, plain_compile = builtins.exec, builtins.compile

    def exec_text(source: object, *spaces: object) -> None:
        if isinstance(source, str):
            text, number = without_hash(source)
            texts[text] = code = plain_compile(text, "<string>", "exec")
            source = with_hash(code, number)
        if not spaces:
            frame = sys._getframe(1)
            spaces = (frame.f_globals, frame.f_locals)
        plain_exec(source, *spaces)  # type: ignore[arg-type]

    def compile_text(source: object, *rest: object, **options: object) -> object:
        if not isinstance(source, str):
            return plain_compile(source, *rest, **options)  # type: ignore[call-overload]
        text, number = without_hash(source)
        code = plain_compile(text, *rest, **options)  # type: ignore[call-overload]
        if not isinstance(code, CodeType):
            return plain_compile(source, *rest, **options)  # type: ignore[call-overload]
        texts[text] = code
        return with_hash(code, number)

    class Sre:
        """In place of `_sre` in re's compiler."""

        last: Any = ()

        def __init__(self, sre: Any) -> None:
            self._sre = sre

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sre, name)

        def compile(self, *arguments: object) -> object:
            self.last = arguments
            compiled: object = self._sre.compile(*arguments)
            return compiled

    import _sre  # type: ignore[import-not-found]  # CPython's own
    import re

    compiler = re._compiler  # type: ignore[attr-defined]
    sre = compiler._sre = Sre(_sre)
    compile_pattern = compiler.compile

    def compile_expression(pattern: object, flags: int = 0) -> object:
        compiled = compile_pattern(pattern, flags)
        if isinstance(pattern, str | bytes):
            text, all_flags, code, groups, groupindex, indexgroup = sre.last
            patterns[pattern, int(flags)] = (
                text,
                int(all_flags),
                list(map(int, code)),
                groups,
                dict(groupindex),
                indexgroup,
            )
        return compiled

    compiler.compile = compile_expression
    builtins.exec, builtins.compile = exec_text, compile_text  # type: ignore[assignment]
    try:
        sys.path[0] = folder  # it was this program's
        __import__(f"{program}.__main__", fromlist=("load",)).load()
        for name in names:
            __import__(name)
    finally:
        builtins.exec, builtins.compile = plain_exec, plain_compile
    return texts, patterns


def main(folder: str, program: str, names: str, out: str, earlier: str = "") -> None:
    """The command."""
    with open(names) as file:  # noqa: PTH123 - pathlib may be what is imported
        texts, patterns = collect(folder, program, file.read().split())
    if earlier:
        with open(earlier, "rb") as file:  # noqa: PTH123 - see above
            before = marshal.load(file)  # noqa: S302 - ours
        texts = {text: texts[text] for text in before["texts"] if text in texts}
        patterns = {key: value for key, value in patterns.items() if before["patterns"].get(key) == value}
    found = {
        "texts": {text: marshal.dumps(texts[text]) for text in sorted(texts)},
        "patterns": {key: patterns[key] for key in sorted(patterns, key=repr)},
    }
    with open(out, "wb") as file:  # noqa: PTH123 - see above
        marshal.dump(found, file, FORM)


if __name__ == "__main__":
    main(*sys.argv[1:])
