"""ADE20K from a server, and archives that must not be unpacked."""

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from common.download import download
from segmenter import prepare


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def archive(members=None, pairs=(3, 2)):
    """A zip in the layout of ADE20K, with so many training and validation pairs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for split, count in zip(("training", "validation"), pairs, strict=True):
            for number in range(count):
                rng = np.random.default_rng(number)
                image = rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)
                labels = rng.integers(0, 151, (40, 30), dtype=np.uint8)
                root = "ADEChallengeData2016"
                file.writestr(f"{root}/images/{split}/{number}.jpg", png(image))
                file.writestr(f"{root}/annotations/{split}/{number}.png", png(labels))
        for name, content in (members or {}).items():
            file.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def server():
    """Serves `content` at one address. (How downloads go on: tests/common/test_download.py.)"""

    class Handler(BaseHTTPRequestHandler):
        content = b""
        requests: list[str]

        def do_GET(self):
            self.requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.content)))
            self.end_headers()
            self.wfile.write(self.content)

        def log_message(self, *arguments):
            pass

    Handler.requests = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        Handler.url = f"http://127.0.0.1:{http.server_port}/data.zip"
        yield Handler
        http.shutdown()
        thread.join()


def md5(content):
    return f"md5:{hashlib.md5(content).hexdigest()}"


def test_a_full_disk_is_noticed_first(server, tmp_path, monkeypatch):
    import shutil

    server.content = b"0123456789" * 1000
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RuntimeError, match="GB free"):
        download([server.url], tmp_path / "data.zip", digest=None)
    assert list(tmp_path.iterdir()) == []


def test_ade20k_is_downloaded_unpacked_checked_and_then_used(server, tmp_path, command, monkeypatch):
    server.content = archive()
    monkeypatch.setattr(prepare, "ADE20K_PAIRS", {"train": 3, "val": 2})
    arguments = ["prepare", "ade20k", tmp_path, "--url", server.url, "--digest"]
    outcome = command(*arguments, md5(server.content))
    assert outcome.code == 0
    assert "is complete" in outcome.out
    assert [path.name for path in tmp_path.iterdir()] == ["ADEChallengeData2016"]
    assert command(*arguments, "none").code == 0
    assert command("prepare", "ade20k", tmp_path / "ADEChallengeData2016").code == 0
    assert len(server.requests) == 1
    (tmp_path / "ADEChallengeData2016/annotations/validation/1.png").unlink()
    outcome = command(*arguments, "none")
    assert outcome.code == 2
    assert "1 of 2 val images have no annotation" in outcome.err


def test_a_partial_ade20k_says_what_is_missing(ade20k, command):
    outcome = command("prepare", "ade20k", ade20k)
    assert outcome.code == 2
    assert "the train images are missing" in outcome.err
    assert "3 of 2000 pairs in the val split" in outcome.err
    assert command("prepare", "check", ade20k).code == 0


@pytest.mark.parametrize(
    "name", ["../evil.txt", "ADEChallengeData2016/../../evil.txt", "/evil.txt", "..\\evil.txt"]
)
def test_a_zip_that_leaves_the_folder_is_refused(tmp_path, command, name):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "ADEChallengeData2016.zip").write_bytes(archive({name: "evil"}))
    outcome = command("prepare", "ade20k", folder, "--digest", "none")
    assert outcome.code == 2
    assert "is no name of a file below" in outcome.err
    assert outcome.err.count("Error") == 1
    assert [path.name for path in folder.iterdir()] == ["ADEChallengeData2016.zip"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_zip_with_a_link_is_refused(tmp_path):
    link = zipfile.ZipInfo("ADEChallengeData2016/link")
    link.external_attr = 0o120777 << 16
    (tmp_path / "a.zip").write_bytes(archive({link: "/etc"}))
    with pytest.raises(ValueError, match="is a link"):
        prepare.unpack(tmp_path / "a.zip", tmp_path, "ADEChallengeData2016")
