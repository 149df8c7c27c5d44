"""JSON as Go decodes it. The texts are what dockerd 20.10 answered to the same bodies."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_bridge.docker_api import gojson
from host_bridge.docker_api.errors import DockerError
from host_bridge.docker_api.gojson import BOOL, INT, STRING, UINT16, List, Map, Optional, Struct

CONFIG = Struct("network.IPAMConfig", {"Subnet": STRING})
SHAPE = Struct(
    "types.NetworkCreateRequest",
    {
        "Name": STRING,
        "EnableIPv6": BOOL,
        "Count": INT,
        "Port": UINT16,
        "IPAM": Optional(Struct("network.IPAM", {"Config": List(CONFIG)})),
        "Labels": Map(STRING),
        "Options": Map(STRING),
    },
)
ZERO = {"Name": "", "EnableIPv6": False, "Count": 0, "Port": 0, "IPAM": None, "Labels": None, "Options": None}


def error(data: bytes) -> str:
    with pytest.raises(DockerError) as caught:
        gojson.decode_body(data, SHAPE)
    assert caught.value.status == 400
    return caught.value.message


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "got EOF while reading request body"),
        (b" \n", "got EOF while reading request body"),
        (b"{", "unexpected EOF"),
        (b'{"Name":"x', "unexpected EOF"),
        (b'{"Name":5}', "json: cannot unmarshal number into Go struct field NetworkCreateRequest.Name of type string"),
        (b"[]", "json: cannot unmarshal array into Go value of type types.NetworkCreateRequest"),
        (b'"s"', "json: cannot unmarshal string into Go value of type types.NetworkCreateRequest"),
        (
            b'{"Name":"x","IPAM":{"Config":[{"Subnet":5}]}}',
            "json: cannot unmarshal number into Go struct field IPAMConfig.IPAM.Config.Subnet of type string",
        ),
        (
            b'{"IPAM":5}',
            "json: cannot unmarshal number into Go struct field NetworkCreateRequest.IPAM of type network.IPAM",
        ),
        (
            b'{"Labels":{"a":1}}',
            "json: cannot unmarshal number into Go struct field NetworkCreateRequest.Labels of type string",
        ),
        (
            b'{"Options":[1]}',
            "json: cannot unmarshal array into Go struct field NetworkCreateRequest.Options of type map[string]string",
        ),
        (
            b'{"EnableIPv6":"true"}',
            "json: cannot unmarshal string into Go struct field NetworkCreateRequest.EnableIPv6 of type bool",
        ),
        (
            b'{"Count":1.5}',
            "json: cannot unmarshal number 1.5 into Go struct field NetworkCreateRequest.Count of type int",
        ),
        (
            b'{"Port":65536}',
            "json: cannot unmarshal number 65536 into Go struct field NetworkCreateRequest.Port of type uint16",
        ),
        (b'{"Name": tru}', "invalid character '}' in literal true (expecting 'e')"),
        (b"{Name:1}", "invalid character 'N' looking for beginning of object key string"),
        (b'{"Name":"x",}', "invalid character '}' looking for beginning of object key string"),
        (b'{"Name":"\\x"}', "invalid character 'x' in string escape code"),
        (b'{"Name":"\\u12g4"}', "invalid character 'g' in \\u hexadecimal character escape"),
        (b'{"Name":"\x01"}', "invalid character '\\x01' in string literal"),
        (b'{"Name" 1}', "invalid character '1' after object key"),
        (b'{"Name":1 2}', "invalid character '2' after object key:value pair"),
        (b"[1 2]", "invalid character '2' after array element"),
        (b'{"Count":-x}', "invalid character 'x' in numeric literal"),
        (b'{"Count":1.x}', "invalid character 'x' after decimal point in numeric literal"),
        (b'{"Count":1e+x}', "invalid character 'x' in exponent of numeric literal"),
        (b'{"Count":01}', "invalid character '1' after object key:value pair"),
        (b"'", "invalid character '\\'' looking for beginning of value"),
        (b"\xff", "invalid character '\u00ff' looking for beginning of value"),
        (b"[" * 10001, "exceeded max depth"),
    ],
)
def test_errors_in_gos_words(data: bytes, text: str) -> None:
    assert error(data) == f"invalid JSON: {text}"


@pytest.mark.parametrize("data", [b"{} x", b'{}{"Name":"y"}', b"null 1"])
def test_what_follows_is_refused(data: bytes) -> None:
    assert error(data) == "unexpected content after JSON"


@pytest.mark.parametrize("data", [b"{}", b"null", b' {"Unknown": [1, {"a": null}]} \n', b'{"Name":null,"Labels":null}'])
def test_nothing_set_is_gos_zero_value(data: bytes) -> None:
    assert gojson.decode_body(data, SHAPE) == ZERO


def test_keys_in_any_case_and_the_last_of_several() -> None:
    decoded = gojson.decode_body(b'{"NAME":"a","name":"b","labels":{"x":"1"},"LABELS":{"y":null}}', SHAPE)
    assert decoded == ZERO | {"Name": "b", "Labels": {"x": "1", "y": ""}}


def test_a_wrong_type_is_reported_though_more_follows() -> None:
    assert "Name of type string" in error(b'{"Name":[],"Labels":5}')


def test_surrogates_and_broken_utf8_become_replacement_characters() -> None:
    decoded = gojson.decode_body(b'{"Name":"\\ud83d\\ude00 \\ud800 \xff"}', SHAPE)
    assert decoded["Name"] == "\U0001f600 \ufffd \ufffd"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_any_json_is_read_as_python_reads_it(value: Any) -> None:
    text = json.dumps(value)
    # Long numbers are floats, as they are to Go.
    assert gojson.decode(text.encode(), gojson.ANY) == json.loads(
        text, parse_int=lambda digits: int(digits) if len(digits.lstrip("-")) < 16 else float(digits)
    )


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        decoded = gojson.decode_body(data, SHAPE)
    except DockerError as refusal:
        assert refusal.status == 400 and refusal.message
    else:
        assert decoded.keys() == ZERO.keys()


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "Name": st.text(),
            "EnableIPv6": st.booleans(),
            "Count": st.integers(-(2**63), 2**63 - 1),
            "Labels": st.dictionaries(st.text(), st.text()) | st.none(),
        },
    )
)
def test_right_types_come_out_as_they_went_in(value: dict[str, Any]) -> None:
    assert gojson.decode_body(json.dumps(value, ensure_ascii=False).encode(), SHAPE) == ZERO | value
