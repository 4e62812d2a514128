"""What an administrator may name as a destination, and what is refused before anything is connected."""

from pathlib import Path

import pytest

from appliance.audit.siem.destinations import TRANSPORTS, Destination, DestinationInvalid, transport_of

FILES = {name: Path(f"/etc/siem/{name}") for name in ("ca", "certificate", "private_key", "token_file")}
TLS = {name: FILES[name] for name in ("ca", "certificate", "private_key")}
HTTP = {name: FILES[name] for name in ("ca", "token_file")}
KEY = {"private_key": FILES["private_key"]}


def named(url: str, files: dict[str, Path], form: str = "ocsf") -> Destination:
    return Destination.read({"name": "to", "url": url, "format": form, **files})


@pytest.mark.parametrize(
    ("url", "files", "where"),
    [
        ("syslog+tls://siem.example", TLS, "siem.example, port 6514"),
        ("relp+tls://siem.example", TLS, "siem.example, port 2514 (RELP)"),
        ("splunk+https://siem.example", HTTP, "Splunk at siem.example, port 8088"),
        ("splunk+https://[2001:db8::1]:443", FILES, "Splunk at 2001:db8::1, port 443"),
        ("elasticsearch+https://siem.example/logs-a.b-c", HTTP, "Elasticsearch at siem.example, port 9200, logs-a.b-c"),
        ("file:///srv/out?bytes=4096&seconds=5", KEY, "files in /srv/out"),
        ("file:///srv/a%20b", KEY, "files in /srv/a b"),
    ],
)
def test_each_transport_is_named_by_its_url(url: str, files: dict[str, Path], where: str) -> None:
    destination = named(url, files)
    assert str(transport_of(destination)) == where
    assert Destination.read(destination.record()) == destination
    assert transport_of(destination).max_payload_bytes >= 4096
    assert url.partition(":")[0] in TRANSPORTS


@pytest.mark.parametrize(
    ("url", "files", "told"),
    [
        ("https://siem.example", FILES, "begins with none of"),
        ("file://siem.example/out", KEY, "a folder of this machine"),
        ("file:out", KEY, "a folder of this machine"),
        ("file://[", KEY, "begins with none of"),
        ("file:///srv/out", {}, "--private-key is not given"),
        ("file:///srv/out%00", KEY, "a folder of this machine"),
        ("file:///srv/out?bytes=1", KEY, "a batch has 4096"),
        ("file:///srv/out?bytes=x", KEY, "bytes=N&seconds=N"),
        ("file:///srv/out?seconds=nan", KEY, "a batch has 4096"),
        ("file:///srv/out?hours=1", KEY, "a batch has 4096"),
        ("splunk+https://siem.example", {"ca": FILES["ca"]}, "--token-file is not given"),
        ("splunk+https://siem.example", {"token_file": FILES["token_file"]}, "--ca is not given"),
        ("splunk+https://siem.example/services", HTTP, "something behind the host"),
        ("splunk+https://siem.example?token=x", HTTP, "something behind the host"),
        ("splunk+https://user:secret@siem.example", HTTP, "a secret is never part of it"),
        ("splunk+https://siem.example", HTTP | {"certificate": FILES["certificate"]}, "--private-key is not given"),
        ("elasticsearch+https://siem.example", HTTP, "the name of an index"),
        ("elasticsearch+https://siem.example/a/_bulk", HTTP, "the name of an index"),
        ("elasticsearch+https://siem.example/Logs", HTTP, "the name of an index"),
        ("elasticsearch+https://siem.example/logs?pipeline=x", HTTP, "something behind the host"),
        ("relp+tls://siem.example", HTTP, "--certificate is not given"),
        ("relp+tls://siem.example:70000", TLS, "its port is not one of"),
        ("relp+tls://", TLS, "it names no host"),
        ("syslog+tls://a..b:6514", TLS, "cannot be the name of a host"),
        (f"splunk+https://{'x' * 64}.example", HTTP, "cannot be the name of a host"),
        ("syslog+tls://siem.example/x", TLS, "something behind the host"),
    ],
)
def test_what_cannot_work_is_refused_and_told(url: str, files: dict[str, Path], told: str) -> None:
    with pytest.raises(DestinationInvalid, match=told):
        named(url, files)


def test_a_server_name_that_no_certificate_can_be_for_is_refused() -> None:
    with pytest.raises(DestinationInvalid, match="cannot be the name of a host"):
        Destination.read({"name": "to", "url": "relp+tls://siem.example", **TLS, "server_name": "a..b"})


def test_elasticsearch_takes_json_alone() -> None:
    for form in ("ecs", "ocsf"):
        named("elasticsearch+https://siem.example/logs", HTTP, form)
    for form in ("cef", "leef"):
        with pytest.raises(DestinationInvalid, match="what it takes is JSON"):
            named("elasticsearch+https://siem.example/logs", HTTP, form)


def test_the_folder_is_one_of_the_files_that_must_not_be_the_appliances() -> None:
    assert named("file:///srv/out", KEY).files == (FILES["private_key"], Path("/srv/out"))
