"""What people see and what leaves the machine: no logins, keys, control characters or folders of this machine."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geo_pretrain import errors
from geo_pretrain.errors import BadFrame, GeoPretrainError, HubError, UnknownName, first_line, shown
from geo_pretrain.redact import printable, redacted, safe, without_paths


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://me:hunter2@host:80/x", "http://***@host:80/x"),
        ("http://hunter2@host/x and https://a:b@c", "http://***@host/x and https://***@c"),
        ("http://me:hun@ter@host", "http://***@host"),
        ("http://me:hun/ter2@host/x", "http://***@host/x"),
        ("ftp://me:hunter2@host", "ftp://***@host"),
        ("http://host:8000/a@b", "http://host:8000/a@b"),
        ("https://host/x?X-Amz-Signature=1a&dl=1&Expires=2.", "https://host/x?X-Amz-Signature=***&dl=1&Expires=***."),
        ("atk?token=hunter2", "atk?token=***"),
        ("(https://host/x?hunter2)", "(https://host/x?***)"),
        ("https://www.dropbox.com/s/uz/nce.pth?dl=0", "https://www.dropbox.com/s/uz/nce.pth?dl=0"),
        ("https://drive.google.com/uc?export=download&id=1A", "https://drive.google.com/uc?export=download&id=1A"),
        ("token hf_abcdefghijklmnop is bad", "token hf_*** is bad"),
        ("ghp_abcdefghijklmnopqrst", "ghp_***"),
        ("{'Authorization': 'Bearer hunter2'}", "{'Authorization': 'Bearer ***'}"),
        ("is it rooms? lr=0.1", "is it rooms? lr=0.1"),
        ("HF_TOKEN=hunter2 geo-pretrain pull x", "HF_TOKEN=*** geo-pretrain pull x"),
        ("(password=hunter2), aws_secret_access_key=hunter2.", "(password=***), aws_secret_access_key=***."),
        ("max_tokens=5 and token = 5", "max_tokens=5 and token = 5"),
        ("http://proxy/https%3A%2F%2Fme%3Ahunter2%40host%2Fx", "http://proxy/https%3A%2F%2F***%40host%2Fx"),
        ("http://proxy/https%3a%2f%2fhost%2fa%40b", "http://proxy/https%3a%2f%2fhost%2fa%40b"),
        ("https://host/x#access_token=hunter2", "https://host/x#access_token=***"),
        ("https://host/x?dl=1#part", "https://host/x?dl=1#part"),
        ("https://host/x;jsessionid=hunter2?dl=1", "https://host/x;jsessionid=***?dl=1"),
        ("https://host/x?dl=1;token=hunter2; because: no", "https://host/x?dl=1;token=***; because: no"),
        ("<a href='https://host/x?dl=1&amp;sig=hunter2'>", "<a href='https://host/x?dl=1&amp;sig=***'>"),
        ('"https://host/x?dl=1\\u0026sig=hunter2"', '"https://host/x?dl=1\\u0026sig=***"'),
        ("https://host/x?dl=1&hunter2.", "https://host/x?dl=1&***."),
        ("https://host/x?dl=1&$key=hunter2&to~ken=hunter2", "https://host/x?dl=1&$key=***&to~ken=***"),
        ("Authorization: Token hunter2", "Authorization: Token ***"),
        ("X-Auth-Token: hunter2, set-cookie: hunter2", "X-Auth-Token: *** set-cookie: ***"),
    ],
)
def test_logins_and_keys_are_hidden(text: str, clean: str):
    assert redacted(text) == clean
    assert redacted(clean) == clean


def test_control_characters_are_escaped():
    assert printable("a\x1b[31m\x07\r\x9b\x7f\tb\nc") == "a\\x1b[31m\\x07\\r\\x9b\\x7f\tb\nc"
    assert printable("\u202egnp.exe\u2066\u2028") == "\\u202egnp.exe\\u2066\\u2028"
    assert printable(b"caf\xe9.png".decode("utf-8", "surrogateescape")) == "caf\\udce9.png"
    assert printable("Käse 東京 é") == "Käse 東京 é"


@given(st.text(alphabet=st.characters(), max_size=60))
def test_what_is_shown_can_be_encoded_and_is_stable(text: str):
    once = safe(text)
    once.encode("utf-8")
    assert safe(once) == once


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GeoPretrainError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_is_clean_also_after_a_trip_between_processes(kind: type[GeoPretrainError]):
    bad = "http://me:hunter2@host/\x1b[2J"
    error = kind(bad, bad) if issubclass(kind, BadFrame) else kind(bad)
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert type(one) is kind
        assert "hunter2" not in str(one)
        assert "\x1b" not in str(one)
        assert "\\x1b[2J" in str(one)
        assert "hunter2" not in repr(one) + repr(vars(one))


def test_messages_of_other_libraries_are_cut_and_causes_with_keys_are_not_shown():
    assert first_line(ValueError("x" * 10_000)) == "x" * 500 + "..."
    assert shown(ValueError("fine")) is not None
    assert shown(ValueError("http://a:b@c")) is None
    assert isinstance(UnknownName("a"), KeyError)
    assert str(HubError("a\nb")) == "a\nb"


@pytest.mark.parametrize(
    ("value", "clean"),
    [
        ("/data/scans/scannet", "(elsewhere)/scannet"),
        ("/data/my scans, new/part 1", "(elsewhere)/part 1"),
        ("~/scans/scannet", "(elsewhere)/scannet"),
        ("~bob/scannet", "(elsewhere)"),
        ("/home/bob", "(elsewhere)"),
        ("/scratch", "(elsewhere)"),
        ("C:\\data\\scans\\kitti", "(elsewhere)/kitti"),
        ("file:///data/scans/kitti", "(elsewhere)/kitti"),
        ("clouds:/data/scans/kitti", "clouds:(elsewhere)/kitti"),
        ("a=/data/x/y, b=/data/x/z", "a=(elsewhere)/y, b=(elsewhere)/z"),
        ("//data/scans/scannet", "(elsewhere)/scannet"),
        ("\\\\server\\scans\\kitti", "(elsewhere)/kitti"),
        ("file://server/data/scans/kitti", "(elsewhere)/kitti"),
        ("from `/data/scans/kitti` and {/data/x/y}", "from `(elsewhere)/kitti` and {(elsewhere)/y}"),
        ("+/-pi/64, and/or a // b", "+/-pi/64, and/or a // b"),
        ("https://me:word@host/a/b?key=1", "https://***@host/a/b?key=***"),
        ("hf-hub:me/x", "hf-hub:me/x"),
        ("runs/kitchen", "runs/kitchen"),
        ("../kitchen", "../kitchen"),
        ("m/s", "m/s"),
        (0.5, 0.5),
        (None, None),
        ({"/data/x/y": ["/data/x/z", 1, ("/data/x/w",)]}, {"(elsewhere)/y": ["(elsewhere)/z", 1, ("(elsewhere)/w",)]}),
    ],
)
def test_values_that_are_published_name_no_folder_of_this_machine(value: object, clean: object):
    assert without_paths(value) == clean
    assert without_paths(clean) == clean
