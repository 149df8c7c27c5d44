"""Names for containers: which are allowed, and one for those who choose none."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from host_bridge.containers.errors import invalid

_NAME = re.compile(r"/?[a-zA-Z0-9][a-zA-Z0-9_.-]+")

_MOODS_WORDS = (
    "agile amber ample ardent balmy blithe bold brisk calm candid cheery civil clever cosy crisp dapper deft "
    "earnest eager fabled fair famed fleet fond frank gallant genial gentle giddy glad golden grand hardy hearty "
    "humble jaunty jolly keen kind limber lively loyal lucid lucky mellow merry mighty mild modest neat nimble "
    "noble patient plucky polite proud prudent quick quiet rapid ready serene sharp shrewd silent sleek snappy "
    "sober sound spry steady stout sturdy subtle sunny swift tidy upbeat valiant vivid warm wise witty worthy zesty"
)
_MOODS = _MOODS_WORDS.split()

_PEOPLE_WORDS = (
    "abel ampere arrhenius bernoulli bose braille brahe cantor carson celsius cerf chandra conway coulomb cray "
    "dalton daguerre dirac doppler edgerton erdos faraday fermat fibonacci foucault fourier fresnel gibbs goddard "
    "gutenberg haber halley hamming hertz hubble huygens ibn_sina jacquard joule kepler kirchhoff lagrange laplace "
    "leibniz lovell mach marconi maxwell mercator metcalfe morse nash nernst nightingale nobel oersted ohm pauli "
    "peano perlman planck postel ptolemy riemann roentgen rutherford sagan shannon siemens sierpinski somerville "
    "stokes tarski telford thales turing volta wegener weyl wiener young zuse"
)
_PEOPLE = _PEOPLE_WORDS.split()


def check_name(name: str, *, shown: str | None = None) -> str:
    """The name without its optional slash; raises ContainerError with Docker's text, which says `shown`."""
    if not _NAME.fullmatch(name):
        text = name if shown is None else shown
        raise invalid(f"Invalid container name ({text}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
    return name.removeprefix("/")


def random_name(taken: Callable[[str], bool]) -> str:
    """A mood and a person who moved the sciences of signals, numbers and nature along, such as brisk_hertz."""
    name = ""
    for attempt in range(64):
        # For people to tell containers apart, not for secrecy.
        name = f"{random.choice(_MOODS)}_{random.choice(_PEOPLE)}"  # noqa: S311
        if attempt >= 6:
            name += str(random.randrange(10 ** (1 + attempt // 8)))  # noqa: S311
        if not taken(name):
            break
    return name
