"""Docker's filters: `filters={"driver": ["bridge"]}` of lists, prunes and events, with Docker's ways of matching."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping

from host_bridge.docker_api import gojson
from host_bridge.docker_api.errors import DockerError, bad_request

_MODERN = gojson.Map(gojson.Map(gojson.BOOL))
_LEGACY = gojson.Map(gojson.List(gojson.STRING))


class Filters:
    """What must hold, by key; several values of a key are alternatives unless a method says otherwise.

    Args:
        values: the values of each key; a key without values is known but filters nothing.
    """

    def __init__(self, values: Mapping[str, Iterable[str] | Mapping[str, bool]] | None = None) -> None:
        self._values = {
            key: dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, True)
            for key, given in (values or {}).items()
        }

    @classmethod
    def parse(cls, text: str) -> Filters:
        """Filters of a query; both of Docker's forms, {"k": {"v": true}} and {"k": ["v"]}. Raises DockerError 400."""
        if not text:
            return cls()
        data = text.encode("utf-8", "replace")
        for shape in (_MODERN, _LEGACY):
            try:
                decoded = gojson.decode(data, shape)
            except gojson.GoJsonError:
                continue
            return cls({key: values or () for key, values in (decoded or {}).items()})
        raise bad_request("invalid filter")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __bool__(self) -> bool:
        return bool(self._values)

    def get(self, key: str) -> tuple[str, ...]:
        """The values of a key."""
        return tuple(self._values.get(key, ()))

    def check_keys(self, known: Collection[str]) -> None:
        """Raises DockerError 400 when there is another key."""
        for key in self._values:
            if key not in known:
                raise bad_request(f"invalid filter '{key}'")

    def invalid(self, key: str) -> DockerError:
        """The error for values that a key cannot have."""
        return bad_request(f"invalid filter '{key}=[{' '.join(self.get(key))}]'")

    def boolean(self, key: str, default: bool = False) -> bool:
        """A key that is true or false; raises DockerError 400 when it is neither or both."""
        if key not in self._values:
            return default
        values = set(self.get(key))
        false, true = bool(values & {"0", "false"}), bool(values & {"1", "true"})
        if false == true:
            raise self.invalid(key)
        return true

    def exact(self, key: str, source: str) -> bool:
        """True when a value is `source`, or when there is none."""
        values = self._values.get(key)
        # {"v": false} is a value that nothing equals: Docker looks the source up and takes what it finds.
        return not values or values.get(source, False)

    def match(self, key: str, source: str) -> bool:
        """True when a value is `source`, or a regular expression that is found in it; or when there is none."""
        if self.exact(key, source):
            return True
        return any(
            expression.search(source) is not None
            for expression in map(_expression, self.get(key))
            if expression is not None
        )

    def fuzzy(self, key: str, source: str) -> bool:
        """True when `source` starts with a value; or when there is none."""
        return self.exact(key, source) or any(source.startswith(value) for value in self.get(key))

    def labels(self, key: str, labels: Mapping[str, str]) -> bool:
        """True when all values, `name` or `name=value`, are among the labels."""
        for wanted in self.get(key):
            name, equals, value = wanted.partition("=")
            if name not in labels or (equals and labels[name] != value):
                return False
        return True

    def prunes(self, labels: Mapping[str, str]) -> bool:
        """Whether `label` and `label!` let what has these labels be pruned."""
        return self.labels("label", labels) and not ("label!" in self and self.labels("label!", labels))


# Python's expressions can take exponential time where Go's take linear: a group that repeats must repeat nothing and
# have no alternatives inside, and few things may repeat at all. Names and ids have at most 64 characters.
_MAX_EXPRESSION = 256
_MAX_REPEATS = 4
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_SIMPLE_GROUP = re.compile(r"\((?:\?:)?[^()*+?{|]*\)[*+{]")
_REPEAT = re.compile(r"[*+{]")
# Go has neither backreferences nor look-around.
_FOREIGN = re.compile(r"\\[1-9]|\(\?[=!<P(#]")


@functools.lru_cache(maxsize=256)
def _expression(text: str) -> re.Pattern[str] | None:
    """A value as a regular expression; None: it is none, or too expensive, and matches nothing."""
    if len(text) > _MAX_EXPRESSION or _FOREIGN.search(text) or len(_REPEAT.findall(text)) > _MAX_REPEATS:
        return None
    if len(_REPEATED_GROUP.findall(text)) > len(_SIMPLE_GROUP.findall(text)):
        return None
    try:
        return re.compile(text, re.ASCII)
    except (re.error, OverflowError, RecursionError):
        return None
