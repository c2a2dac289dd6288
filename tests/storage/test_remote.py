"""Objects at URLs: what a URL may be, what is tried again, and that no secret comes out."""

import http.server
import logging
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import remote, remote_retry
from storage.backends import backend_for
from storage.errors import DamageError, OutOfSpaceError, PathError, RemoteError
from storage.remote import LostObjectError, Place, is_url, open_place, split_url
from storage.remote_environment import named_variables
from tests.s3 import SECRET, S3Server


@pytest.fixture
def place(s3: S3Server) -> Place:
    return open_place(s3.url("a b/ü"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGITSTORE_RETRY_S", "0.3")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", r"ftp://host/x: expected one of s3://, .*, got 'ftp://'"),
        ("file:///x", "expected a path on this machine, got a file URL; give the path itself"),
        ("s3:///x", "expected a bucket, got none"),
        ("https:///x", "expected a host, got none"),
        (
            "s3://key:hidden@bucket/x",
            r"s3://...@bucket/x: expected a URL without a user, got one; put credentials into",
        ),
        ("abfs://a:hidden@account/x", "expected a URL without a user"),
        (
            "https://host/x?X-Amz-Signature=hidden",
            r"https://host/x: expected a URL without \? and #, got one with them",
        ),
        ("s3://bucket/x#hidden", r"expected a URL without \? and #"),
        ("s3://bucket/a/../x", r"expected a key without empty, '.' and '..' parts, got 'a/../x'"),
        ("s3://bucket/a//x", "expected a key without empty"),
        ("http://host:99999/x", "expected a URL, got one that can't be"),
    ],
)
def test_a_url_that_can_not_be_used_is_refused_without_its_secrets(url: str, message: str) -> None:
    with pytest.raises(PathError, match=message) as caught:
        open_place(url)
    assert "hidden" not in str(caught.value)


def test_urls_are_told_from_paths_and_split() -> None:
    assert [is_url(it) for it in ("s3://b/x", "HTTPS://h/x", "x.zarr", "/a://b", Path("s3://b/x"))] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert split_url("s3://bucket/a/b/") == ("s3://bucket/a", "b")
    assert split_url("https://host/x") == ("https://host", "x")
    assert split_url("gs://bucket") == ("gs://bucket", "")
    assert open_place("S3://bucket/x/").url == "s3://bucket/x"


def test_objects_are_written_read_listed_copied_and_removed(place: Place, s3: S3Server) -> None:
    assert (place.get("k"), place.size("k"), place.state("k"), list(place.list())) == (None, None, None, [])
    place.put("k", b"0123456789")
    place.put("d/e f", b"x")
    assert place.get("k") == b"0123456789"
    assert place.get_range("k", 2, 5) == b"234"
    assert place.get_range("k", 3, 3) == b""
    assert place.get_ranges("k", [(8, 10), (0, 2), (1, 3)]) == [b"89", b"01", b"12"]
    assert [(entry.key, entry.num_bytes) for entry in place.list()] == [("d/e f", 1), ("k", 10)]
    assert [entry.key for entry in place.list("d")] == ["d/e f"]
    before = {entry.key: entry.version for entry in place.list()}
    place.copy("k", "d/k")
    place.put("k", b"other")
    assert {entry.key: entry.version for entry in place.list()}["k"] != before["k"]
    assert place.get("d/k") == b"0123456789"
    place.delete("k")
    place.delete("k")
    place.delete_all(["d/k", "no such"])
    assert [entry.key for entry in place.list()] == ["d/e f"]
    assert open_place(place.url + "/d/e f").get("") == b"x"


def test_an_object_is_created_or_replaced_only_as_it_was_seen(place: Place) -> None:
    assert place.put_new("k", b"one")
    assert place.put_new("k", b"one")  # as after an answer that was lost
    assert not place.put_new("k", b"two")
    seen = place.state("k")
    assert seen is not None
    assert place.put_over("k", b"two", seen)
    assert not place.put_over("k", b"three", seen)
    assert place.put_over("k", b"two", seen)
    place.delete("k")
    assert not place.put_over("k", b"three", seen)
    assert place.get("k") is None


def test_a_large_object_goes_in_parts(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PART_BYTES", 6 << 20)
    data = os.urandom(13 << 20)
    place.put("k", data)
    assert place.get("k") == data
    assert place.get_range("k", 5, len(data) - 1) == data[5:-1]
    assert place.bytes_read == 2 * len(data) - 6
    assert place.bytes_written == len(data)


def test_a_listing_that_is_cut_off_goes_on_where_it_was(
    place: Place, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(7):
        place.put(f"d/{number}", b"")
    page = Place._page
    monkeypatch.setattr(Place, "_page", lambda self, below, last: page(self, below, last)[:3])
    s3.ask(fail=2, status=500)
    assert [entry.key for entry in place.list("d")] == [f"d/{number}" for number in range(7)]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_request_that_fails_is_made_again(place: Place, s3: S3Server, status: int) -> None:
    s3.ask(fail=2, status=status)
    place.put("k", b"data")
    s3.ask(fail=2, status=status)
    assert place.get("k") == b"data"
    s3.ask(fail=1, status=status)
    assert place.get_range("k", 1, 3) == b"at"
    s3.ask(fail=1, status=status)
    assert place.put_new("n", b"data")


def test_a_connection_that_is_cut_in_the_middle_of_an_object_is_made_again(place: Place, s3: S3Server) -> None:
    place.put("k", bytes(1 << 20))
    before = s3.ask(cut=3)["cut"]
    assert place.get("k") == bytes(1 << 20)
    assert s3.ask(cut=2)["cut"] == before + 3
    assert len(open_place(s3.http(place.url)).get_range("k", 0, 1 << 19)) == 1 << 19
    assert s3.ask()["cut"] == before + 5


def test_a_server_that_stops_for_a_while_is_waited_for(place: Place, s3: S3Server) -> None:
    place.put("k", b"data")
    with s3.stopped(0.5):
        assert place.get("k") == b"data"


def test_what_can_not_pass_is_said_at_once(place: Place, s3: S3Server) -> None:
    place.put("k", b"data")
    for status, kind, message in (
        (403, RemoteError, "expected an answer, got 403 .*; check the URL and the credentials in the environment"),
        (400, RemoteError, "expected an answer, got 400 .*; check the URL and the network"),
        (507, OutOfSpaceError, "expected room in the storage, got 507 .*; free space and run the same command again"),
    ):
        s3.ask(fail=1, status=status)
        with pytest.raises(kind, match=message):
            place.put("k", b"new")
    s3.ask(fail=1, status=403)
    with pytest.raises(RemoteError, match=r"got 403 .*; check the URL and the credentials in the environment"):
        list(place.list())
    other = open_place("s3://no-such-bucket/x")
    assert other.get("k") is None
    with pytest.raises(RemoteError, match="expected a bucket, got none of that name; make it, or check the URL"):
        other.put("k", b"")
    with pytest.raises(RemoteError, match=r"got 404 Not Found .NoSuchBucket.; make the bucket, or check the URL"):
        list(other.list())


def test_patience_ends_and_is_said_before(
    place: Place, s3: S3Server, impatient: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote_retry, "QUIET_S", 0.0)
    s3.ask(fail=100, status=503)
    with caplog.at_level(logging.WARNING), pytest.raises(RemoteError, match=r"got 503 .* for 0 s; check the URL"):
        place.get("k")
    assert "503" in caplog.text
    assert "trying again for up to 0 s" in caplog.text
    assert SECRET not in caplog.text


def test_a_host_that_is_not_there_is_one_clear_line(impatient: None) -> None:
    with pytest.raises(RemoteError, match=r"http://127.0.0.1:1/x/k: expected an answer, got no connection for 0 s"):
        open_place("http://127.0.0.1:1/x").get("k")


def test_a_wrong_number_of_seconds_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("soon", "-1", "inf"):
        monkeypatch.setenv("LOGITSTORE_RETRY_S", wrong)
        with pytest.raises(RemoteError, match=f"LOGITSTORE_RETRY_S: expected a number of seconds, .*, got '{wrong}'"):
            place.get("k")


def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1/169.254.169.254")  # no look outside this machine
    with pytest.raises(RemoteError, match=r"got no credentials.*; set the environment variables of the storage"):
        open_place("s3://bucket/x").get("k")


def test_an_account_that_is_not_named_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(RemoteError, match=r"az://c: expected a URL and an environment that fit, got .*AZURE_STORAGE"):
        open_place("az://c/x")


def test_google_is_not_told_to_set_the_variables_of_amazon() -> None:
    assert named_variables("gs://bucket/x") == "GOOGLE_APPLICATION_CREDENTIALS"
    assert named_variables("az://c/x").startswith("AZURE_STORAGE_ACCOUNT_NAME")
    assert named_variables("s3://bucket/x").startswith("AWS_ACCESS_KEY_ID")


def test_half_of_an_aws_key_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hidden")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    with pytest.raises(RemoteError, match=r"s3://b: expected a URL and an environment .*AWS_SECRET_ACCESS_KEY"):
        open_place("s3://b/x")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "AWS_ENDPOINT_URL",
            "",
            "expected the address of a server, such as http://127.0.0.1:9000, got ''; set another",
        ),
        ("AWS_ENDPOINT_URL", "127.0.0.1:9000", "expected the address of a server"),
        ("AWS_ENDPOINT_URL", "HTTP://127.0.0.1:9000", "expected the address of a server"),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:99999", "expected the address of a server"),
        ("AWS_ENDPOINT", "me:hidden@127.0.0.1", r"expected the address of a server.*got '\.\.\.@127.0.0.1'"),
        ("AWS_ACCESS_KEY_ID", "hidden\n", "expected one line, got a line end or another control character"),
        ("AWS_SESSION_TOKEN", "hidden\r", "expected one line, got a line end or another control character"),
        ("AWS_REGION", "eu west", "expected a name such as us-east-1, got 'eu west'"),
    ],
)
def test_an_environment_at_which_the_library_panics_is_refused_before(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RemoteError, match=rf"^{name}: {message}") as caught:
        open_place("s3://bucket/x")
    assert "hidden" not in str(caught.value)
    open_place("https://host/x")  # which needs none of them


@pytest.mark.parametrize("path", ["s3:/bucket/x.zarr", "gs:bucket/x.zarr"])
def test_a_url_that_lacks_a_slash_makes_no_folder(path: str) -> None:
    with pytest.raises(PathError, match="expected :// behind the first word of a URL, got something else; write it"):
        backend_for(path)


def test_a_missing_library_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    remote._connect.cache_clear()
    with pytest.raises(
        RemoteError, match=r"expected obstore, got none; install it: pip install 'logitstore\[remote\]'"
    ):
        open_place("s3://bucket/x")
    remote._connect.cache_clear()


def test_an_object_that_is_shorter_or_gone_is_damage_and_not_tried_again(place: Place) -> None:
    place.put("k", b"data")
    with pytest.raises(LostObjectError, match="expected bytes 2 to 9, got 2 of them; the object is shorter"):
        place.get_range("k", 2, 10)
    with pytest.raises(LostObjectError, match="expected an object, got none; check the URL"):
        place.get_range("no", 0, 1)
    with pytest.raises(RemoteError, match="expected an object, got none; check the URL"):
        place.copy("no", "k")
    with pytest.raises(DamageError, match="k: expected at most 3 bytes, got 4; this is not what it should be"):
        place.get("k", max_bytes=3)
    with pytest.raises(ValueError, match="start, stop: expected 0 <= start <= stop, got 2, 1"):
        place.get_range("k", 2, 1)


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/x", "a//b", "a\\..\\b", "a\nb", "a/."])
def test_a_key_never_leaves_the_place(place: Place, key: str) -> None:
    for do in (
        lambda: place.get(key),
        lambda: place.get_range(key, 0, 1),
        lambda: place.put(key, b""),
        lambda: place.put_new(key, b""),
        lambda: place.delete(key),
        lambda: place.delete_all([key]),
        lambda: place.copy("k", key),
        lambda: place.size(key),
        lambda: list(place.list(key)),
    ):
        with pytest.raises(PathError, match=r"expected a key without empty, '.' and '..' parts"):
            do()


def test_http_is_for_reading(place: Place, s3: S3Server) -> None:
    place.put("k", b"data")
    there = open_place(s3.http(place.url).replace(" ", "%20"))
    assert there.is_read_only
    assert (there.get("k"), there.get("no"), there.size("k")) == (b"data", None, 4)
    with pytest.raises(RemoteError, match="expected a storage that can list objects, got HTTP; name each object"):
        list(there.list())
    for do in (lambda: there.put("k", b""), lambda: there.put_new("k", b""), lambda: there.delete("k")):
        with pytest.raises(RemoteError, match="expected a storage that can be written, got HTTP, which is for reading"):
            do()


class PlainFiles(http.server.SimpleHTTPRequestHandler):
    """A server that knows no ranges."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def plain_server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "k").write_bytes(b"0123456789")
    handler = lambda *args: PlainFiles(*args, directory=str(tmp_path))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_without_ranges_is_named(plain_server: str) -> None:
    place = open_place(plain_server)
    assert place.get("k") == b"0123456789"
    with pytest.raises(
        RemoteError, match="got a server that knows no ranges of bytes; use a server that answers range"
    ):
        place.get_range("k", 1, 3)


def test_no_credential_is_in_a_pickle_or_a_message(place: Place, s3: S3Server) -> None:
    place.put("k", b"data")
    said = [pickle.dumps(place).decode("latin-1"), repr(place), repr(vars(place))]
    again = pickle.loads(pickle.dumps(place))
    assert again == place
    assert hash(again) == hash(place)
    assert again.get("k") == b"data"
    for status in (403, 400, 404, 507):
        s3.ask(fail=1, status=status)
        with pytest.raises((RemoteError, OutOfSpaceError)) as caught:
            place.put("k", b"")
        said += [str(caught.value), repr(caught.value.__cause__), repr(caught.value.__context__)]
    for text in said:
        assert SECRET not in text
        assert "KeyThatIsNowhere" not in text
        assert "Signature" not in text


def test_what_a_message_quotes_of_an_address_holds_no_query_and_no_user() -> None:
    line = remote_retry._first_line("error for https://u:secret@host/x?sig=secret) more\nsecret")
    assert line == "error for https://...@host/x?...) more"
