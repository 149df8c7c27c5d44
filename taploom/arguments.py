"""Command lines as the images have them, read without argparse: to import it and to make a parser takes a tenth of an
agent's start in a VM without hardware acceleration."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def plain_options(argv: Sequence[str], known: Collection[str]) -> dict[str, str] | None:
    """Options by their names, when there is nothing but `--NAME VALUE` pairs of ``known`` names, each once.

    None for everything else, which is argparse's to understand, to refuse or to explain.
    """
    names, values = argv[::2], argv[1::2]
    found = dict(zip(names, values, strict=False))
    if len(names) != len(values) or len(found) != len(names) or not found.keys() <= set(known):
        return None
    if any(not value or value.startswith("-") for value in values):
        return None
    return found
