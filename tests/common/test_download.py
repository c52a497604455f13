"""The downloader, against a server that drops connections."""

import hashlib
import http.server
import threading

import pytest

from common import download as module
from common.download import download

CONTENT = bytes(range(256)) * 4000
DIGEST = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, with ranges; sends `server.most_bytes` per connection, then hangs up."""

    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        if self.path == "/missing":
            self.send_error(404)
            return
        start = 0
        if self.headers.get("Range") and self.server.knows_ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(CONTENT):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : start + self.server.most_bytes])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.001)
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.ranges, running.knows_ranges, running.most_bytes = [], True, len(CONTENT)
    running.url = f"http://127.0.0.1:{running.server_port}/file.pth"
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.mark.parametrize(
    ("part", "server_has", "ranges"),
    [
        (None, {}, [None]),
        (None, {"most_bytes": 300_000}, [None, *(f"bytes={n}00000-" for n in (3, 6, 9))]),
        (CONTENT[:1234], {}, ["bytes=1234-"]),  # of an earlier call
        (CONTENT, {}, [f"bytes={len(CONTENT)}-"]),  # which is only checked
        (b"something", {"knows_ranges": False}, ["bytes=9-"]),
    ],
)
def test_a_download_goes_on_where_it_ended(server, tmp_path, part, server_has, ranges):
    vars(server).update(server_has)
    if part is not None:
        (tmp_path / "out.pth.segmae-part").write_bytes(part)
    download([server.url], tmp_path / "out.pth", digest=DIGEST)
    assert (tmp_path / "out.pth").read_bytes() == CONTENT
    assert server.ranges == ranges
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]


@pytest.mark.parametrize("length", ["many", "-5", ""])
def test_a_server_that_says_no_length_is_read_to_the_end(server, tmp_path, length, monkeypatch):
    send = Handler.send_header
    monkeypatch.setattr(
        Handler,
        "send_header",
        lambda self, name, value: send(self, name, length if name == "Content-Length" else value),
    )
    download([server.url], tmp_path / "out.pth", digest=DIGEST)
    assert (tmp_path / "out.pth").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "url",
    ["garbage", "", "http://", "ftp://a/b", "file:///etc/hosts", "http://a b", "http://[x/", "http://a:b/"],
)
def test_what_is_no_address_is_refused_before_a_folder_is_made(tmp_path, url):
    with pytest.raises(ValueError, match="is no address; give one that begins with http"):
        download([url, "http://127.0.0.1:9/"], tmp_path / "new/out.pth", digest=None)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_stops_fails_and_keeps_the_part(server, tmp_path):
    (tmp_path / "out.pth.segmae-part").write_bytes(CONTENT[:1000])
    server.most_bytes = 0
    with pytest.raises(RuntimeError, match="run again to go on"):
        download([server.url], tmp_path / "out.pth", digest=DIGEST)
    assert (tmp_path / "out.pth.segmae-part").read_bytes() == CONTENT[:1000]
    assert len(server.ranges) == module.ATTEMPTS_WITHOUT_PROGRESS
    assert not (tmp_path / "out.pth").exists()


def test_the_first_digits_of_a_digest_are_enough(server, tmp_path):
    download([server.url], tmp_path / "out.pth", digest=DIGEST[:10])
    assert (tmp_path / "out.pth").read_bytes() == CONTENT


def test_a_wrong_digest_is_refused_and_nothing_is_kept(server, tmp_path):
    with pytest.raises(RuntimeError, match="digest"):
        download([server.url], tmp_path / "out.pth", digest="md5:8cad7c")
    assert list(tmp_path.iterdir()) == []


def test_the_next_address_is_tried_when_one_has_no_such_file(server, tmp_path):
    missing = server.url.replace("file.pth", "missing")
    download([missing, server.url], tmp_path / "out.pth", digest=DIGEST)
    assert (tmp_path / "out.pth").read_bytes() == CONTENT


def test_a_missing_file_is_said_at_once(server, tmp_path):
    with pytest.raises(RuntimeError, match="404"):
        download([server.url.replace("file.pth", "missing")], tmp_path / "out.pth", digest=None)
    assert len(server.ranges) == 1
