"""Linux kernel configurations, as Kconfig writes them (.config, /proc/config.gz, /boot/config-*), and fragments.

Source: Documentation/kbuild/kconfig-language.rst and scripts/kconfig/confdata.c of Linux 6.12.
"""

from __future__ import annotations

import re
import zlib

_SET = re.compile(r"^CONFIG_(\w+)=(.*)$")
_UNSET = re.compile(r"^# CONFIG_(\w+) is not set$")
_LIMIT = 16 << 20


class ConfigError(ValueError):
    """The bytes are no kernel configuration; the message says what they are."""


def parse(text: str) -> dict[str, str]:
    """Symbols and their values.

    Returns:
        Name without CONFIG_ -> "y", "m", "n" ("is not set"), a number, or a string with its quotes. A symbol that
        occurs twice has its last value, as for Kconfig. Symbols that are not mentioned are absent: they are off or
        unknown to that kernel.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        stripped = line.strip()
        if match := _SET.match(stripped):
            found[match[1]] = match[2].strip()
        elif match := _UNSET.match(stripped):
            found[match[1]] = "n"
    return found


def parse_bytes(data: bytes) -> dict[str, str]:
    """Like `parse`, for a file's content, which may be compressed with gzip.

    Raises:
        ConfigError: it is not text, has no symbol, or is too large.
    """
    if data[:2] == b"\x1f\x8b":
        data = _gunzip(data)
    if data[:4] in (b"\x28\xb5\x2f\xfd", b"\xfd7zX") or data[:3] == b"BZh":
        raise ConfigError("it is compressed, and not with gzip: decompress it first")
    if b"\0" in data:
        raise ConfigError(
            "it is binary, not a kernel configuration; a kernel's is in /boot/config-* or /proc/config.gz"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    found = parse(text)
    if not found:
        raise ConfigError("it has no line like CONFIG_NET=y")
    return found


def render(symbols: dict[str, str]) -> str:
    """The text that `parse` reads back, sorted by name."""
    return "".join(
        f"# CONFIG_{name} is not set\n" if value == "n" else f"CONFIG_{name}={value}\n"
        for name, value in sorted(symbols.items())
    )


def _gunzip(data: bytes) -> bytes:
    try:
        decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        text = decompressor.decompress(data, _LIMIT)
    except zlib.error as error:
        raise ConfigError(f"it starts like gzip and is damaged: {error}") from None
    if decompressor.unconsumed_tail:
        raise ConfigError(f"it is larger than {_LIMIT >> 20} MiB: not a kernel configuration")
    if not decompressor.eof:
        raise ConfigError("it is gzip, and cut short")
    return text
