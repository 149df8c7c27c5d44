import logging

import pytest

from taploom.log import setup_logging


def test_one_line_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        setup_logging("agent_guest", "info")
        logging.getLogger("taploom.link").warning("peer sent %s", "a\nFORGED\x1b[31m")
        logging.getLogger("taploom.link").debug("not shown")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("WARNING agent_guest link: peer sent a\\x0aFORGED\\x1b[31m")
