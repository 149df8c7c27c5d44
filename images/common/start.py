"""Starts an image's agent: `python3 -I -S -B /usr/lib/taploom/start.pyc PACKAGE ARGUMENT…`, with no site and no
environment. PACKAGE has in its `__main__` a function `load` that imports it and returns what runs it; so has a module
in place of a package, by its name with a dot, for another process of an agent.

Beside it is what the builder has put together for this very interpreter (images/common/bundle.py), so that the
interpreter has less to do until the agent answers:

- the modules' code in one file, in place of a search in every folder and four system calls for each of them;
- the code that dataclasses, attrs and others generate, and compile, for each class;
- regular expressions, which `re` would parse and compile.

While the program is imported there is one thread, so that modules need no locks.

What is not in there is searched, compiled or parsed as ever; so is all without that file.
"""

# Only what is built into the interpreter: all other modules come from the bundle. What it replaces has no types to fit.
# mypy: disable-error-code="arg-type,assignment,attr-defined,import-not-found,no-any-return,type-arg,call-overload"
import builtins
import gc
import marshal
import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, ModuleType

FOLDER = "/usr/lib/taploom"
BUNDLE = f"{FOLDER}/modules.bundle"
_ModuleSpec = type(sys.__spec__)
_HASH = "return hash((\n"
_STAND_IN = 0x7461706C6F6F6D  # for a hash


def without_hash(source: str) -> "tuple[str, int]":
    """Text that attrs generates has a hash in it, another in each process: takes it out, and returns it (or 0)."""
    before, hashes, rest = source.partition(_HASH)
    number, comma, rest = rest.partition(",")
    return (f"{before}{hashes}{_STAND_IN}{comma}{rest}", int(number)) if comma else (source, 0)


def with_hash(code: "CodeType", number: int) -> "CodeType":
    """The text's code with the hash in it again."""
    if not number:
        return code
    consts = [
        number if const == _STAND_IN else with_hash(const, number) if isinstance(const, type(code)) else const
        for const in code.co_consts
    ]
    return code.replace(co_consts=tuple(consts))


class Bundle:
    """The builder's file: an index, and behind it the code of modules and generated texts, read when it is wanted.

    The file begins with the index's size (8 bytes, little endian) and the index (marshal), a dict: `modules` has for a
    name the file's path, whether it is a package, offset and size; `texts` for generated source offset and size;
    `patterns` for pattern and flags the arguments of `_sre.compile`.
    """

    def __init__(self, path: str = BUNDLE) -> None:
        self._file = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
        size = int.from_bytes(posix.pread(self._file, 8, 0), "little")
        index = marshal.loads(posix.pread(self._file, size, 8))  # noqa: S302 - ours
        self._begin = 8 + size
        self.modules = index["modules"]
        self._texts = index["texts"]
        self._patterns = index["patterns"]

    def code(self, offset: int, size: int) -> "CodeType":
        """The code at this place."""
        return marshal.loads(posix.pread(self._file, size, self._begin + offset))  # noqa: S302 - ours

    # -- modules: an importer (https://docs.python.org/3/reference/import.html#the-meta-path) ----------------------

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """Says whether the module is here; called by the import system."""
        found = self.modules.get(name)
        if found is None:
            return None
        file, package = found[0], found[1]
        spec = _ModuleSpec(name, self, origin=file)
        if package:
            spec.submodule_search_locations = [file.rpartition("/")[0]]
        return spec

    def create_module(self, spec: object) -> None:
        """An ordinary module will do."""

    def exec_module(self, module: "ModuleType") -> None:
        """Runs the module's code in it."""
        file, _, offset, size = self.modules[module.__name__]
        sys.audit("taploom.bundle", file)  # for images/common/tracer.py
        module.__file__ = file
        _exec(self.code(offset, size), module.__dict__)

    # -- generated code ---------------------------------------------------------------------------------------------

    def exec(self, source: "str | CodeType", *spaces: dict) -> None:
        """In place of the builtin: generated text runs without being compiled."""
        if not spaces:  # the caller's, which for the builtin would be this method's
            frame = sys._getframe(1)
            spaces = (frame.f_globals, frame.f_locals)
        _exec((self._compiled(source) if isinstance(source, str) else None) or source, *spaces)

    def compile(self, source: object, *rest: object, **options: object) -> "CodeType":
        """In place of the builtin."""
        known = self._compiled(source) if isinstance(source, str) else None
        return known or _compile(source, *rest, **options)

    def _compiled(self, source: str) -> "CodeType | None":
        text, number = without_hash(source)
        place = self._texts.get(text)
        return None if place is None else with_hash(self.code(*place), number)

    def use_patterns(self) -> None:
        """Has `re` take what it would compile from here."""
        import _sre
        import re

        compiler = re._compiler
        compile_pattern = compiler.compile

        def compile(pattern: object, flags: int = 0) -> object:
            known = self._patterns.get((pattern, int(flags))) if isinstance(pattern, (str, bytes)) else None
            return compile_pattern(pattern, flags) if known is None else _sre.compile(*known)

        compiler.compile = compile

    def install(self) -> None:
        """Has the interpreter look here first, from now on."""
        sys.meta_path.insert(0, self)
        builtins.exec, builtins.compile = self.exec, self.compile
        self.use_patterns()


_exec, _compile = builtins.exec, builtins.compile


class _Unlocked:
    """In place of a module's lock, for as long as there is one thread."""

    def __init__(self, name: str) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def load(name: str) -> "Callable[[list[str]], int]":
    """Imports the program's module of that name, and what its `load` does; returns what that returns."""
    imports = sys.modules["_frozen_importlib"]
    kept = imports._ModuleLockManager, imports._lock_unlock_module
    imports._ModuleLockManager, imports._lock_unlock_module = _Unlocked, _Unlocked
    try:
        return __import__(name, fromlist=("load",)).load()
    finally:
        imports._ModuleLockManager, imports._lock_unlock_module = kept


if __name__ == "__main__":
    gc.disable()  # the program enables it when all is imported: collections would find nothing till then
    sys.path.insert(0, FOLDER)
    try:  # noqa: SIM105 - contextlib would be imported for it
        Bundle().install()
    except FileNotFoundError:
        pass
    name = sys.argv[1] if "." in sys.argv[1] else f"{sys.argv[1]}.__main__"
    status = load(name)(sys.argv[2:])
    sys.stdout.flush()
    # Not sys.exit: idle threads that wake while the interpreter is taken down end by pthread_exit, and for that the C
    # library loads libgcc_s, which is not in the image, and aborts.
    posix._exit(status)
