"""The downloader, against a server that drops connections."""

import hashlib
import http.server
import threading

import pytest

from mae import download
from mae.download import OFFICIAL_FILES, fetch, fetch_official

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


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
    monkeypatch.setattr(download, "SECONDS_BETWEEN_TRIES", 0.01)
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.ranges, running.knows_ranges, running.most_bytes = [], True, len(CONTENT)
    running.url = f"http://127.0.0.1:{running.server_port}/file.pth"
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def test_a_whole_file_is_downloaded_once(server, tmp_path):
    out = tmp_path / "out.pth"
    fetch(server.url, out, md5_start=MD5[:6])
    fetch(server.url, out, md5_start=MD5[:6])
    assert out.read_bytes() == CONTENT
    assert len(server.ranges) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]


def test_a_dropped_connection_is_taken_up_where_it_ended(server, tmp_path):
    server.most_bytes = 300_000
    fetch(server.url, tmp_path / "out.pth", md5_start=MD5[:6])
    assert (tmp_path / "out.pth").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_later_call_goes_on_from_the_part(server, tmp_path):
    (tmp_path / "out.pth.part").write_bytes(CONTENT[:1234])
    fetch(server.url, tmp_path / "out.pth", md5_start=MD5[:6])
    assert (tmp_path / "out.pth").read_bytes() == CONTENT
    assert server.ranges == ["bytes=1234-"]


def test_a_complete_part_is_only_checked(server, tmp_path):
    (tmp_path / "out.pth.part").write_bytes(CONTENT)
    fetch(server.url, tmp_path / "out.pth", md5_start=MD5[:6])
    assert (tmp_path / "out.pth").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_everything_again(server, tmp_path):
    server.knows_ranges = False
    (tmp_path / "out.pth.part").write_bytes(b"something")
    fetch(server.url, tmp_path / "out.pth", md5_start=MD5[:6])
    assert (tmp_path / "out.pth").read_bytes() == CONTENT


def test_too_many_drops_fail_and_keep_the_part(server, tmp_path):
    server.most_bytes = 1000
    with pytest.raises(RuntimeError, match="run again"):
        fetch(server.url, tmp_path / "out.pth", md5_start=MD5[:6])
    assert (tmp_path / "out.pth.part").stat().st_size == 1000 * download.TRIES
    assert not (tmp_path / "out.pth").exists()


def test_a_wrong_digest_is_refused_and_nothing_is_kept(server, tmp_path):
    with pytest.raises(RuntimeError, match="MD5"):
        fetch_official("vit_base", tmp_path / "out.pth", url=server.url)
    assert list(tmp_path.iterdir()) == []


def test_another_file_of_that_name_is_not_overwritten(server, tmp_path):
    (tmp_path / "out.pth").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        fetch(server.url, tmp_path / "out.pth", md5_start=MD5[:6])
    assert (tmp_path / "out.pth").read_text() == "mine"
    assert server.ranges == []


def test_a_missing_file_is_said_at_once(server, tmp_path):
    with pytest.raises(RuntimeError, match="404"):
        fetch(server.url.replace("file.pth", "missing"), tmp_path / "out.pth", md5_start="ab")
    assert len(server.ranges) == 1


def test_the_three_published_sizes_are_known():
    starts = {model: official.md5_start for model, official in OFFICIAL_FILES.items()}
    assert starts == {"vit_base": "8cad7c", "vit_large": "b8b06e", "vit_huge": "9bdbb0"}
