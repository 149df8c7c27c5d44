"""Single-use secrets."""

from __future__ import annotations

from taploom.link.authorization import SECRET_LIFETIME, Authorizations, new_secret


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_secret_opens_one_link() -> None:
    authorizations = Authorizations(Clock())
    secret = new_secret()
    authorizations.put("e", secret)
    assert authorizations.take("e", secret)
    assert not authorizations.take("e", secret)


def test_newer_secret_replaces_the_older() -> None:
    authorizations = Authorizations(Clock())
    old, new = new_secret(), new_secret()
    authorizations.put("e", old)
    authorizations.put("e", new)
    assert not authorizations.take("e", old)
    assert authorizations.take("e", new)


def test_wrong_secret_does_not_use_up_the_right_one() -> None:
    authorizations = Authorizations(Clock())
    secret = new_secret()
    authorizations.put("e", secret)
    for wrong in (new_secret(), b"", secret[:-1], secret + b"x"):
        assert not authorizations.take("e", wrong)
    assert not authorizations.take("other", secret)
    assert authorizations.take("e", secret)


def test_secret_expires() -> None:
    clock = Clock()
    authorizations = Authorizations(clock)
    secret = new_secret()
    authorizations.put("e", secret)
    clock.now += SECRET_LIFETIME - 0.1
    authorizations.put("f", secret)
    assert authorizations.take("e", secret)
    clock.now += SECRET_LIFETIME
    assert not authorizations.take("f", secret)


def test_dropped_secret_is_void() -> None:
    authorizations = Authorizations(Clock())
    secret = new_secret()
    authorizations.put("e", secret)
    authorizations.drop("e")
    authorizations.drop("e")
    assert not authorizations.take("e", secret)


def test_secrets_are_long_and_differ() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(16 <= len(secret) <= 64 for secret in secrets)
