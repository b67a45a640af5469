"""Reading, downloading and making the data of the CIFAR-10 example."""

import hashlib
import http.server
import io
import os
import tarfile
import threading
from pathlib import Path

import data
import numpy as np
import pytest

RECORDS = 20


@pytest.fixture
def files(monkeypatch) -> dict[str, bytes]:
    """The six official files with 20 records each in place of 10,000."""
    monkeypatch.setattr(data, "RECORDS", RECORDS)
    random = np.random.default_rng(0)
    labels = random.integers(10, size=(6, RECORDS, 1))
    records = np.concatenate([labels, random.integers(256, size=(6, RECORDS, data.PIXELS))], -1).astype(np.uint8)
    return {name: part.tobytes() for name, part in zip((*data.TRAIN_FILES, data.TEST_FILE), records, strict=True)}


@pytest.fixture
def folder(files, tmp_path) -> Path:
    inner = tmp_path / "given" / data.FOLDER
    inner.mkdir(parents=True)
    for name, content in files.items():
        (inner / name).write_bytes(content)
    return inner


def archive_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def serve():
    """Serve bytes over HTTP on loopback; `cut` of them are announced and not sent."""
    servers = []

    def start(content: bytes, cut: int = 0) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) - cut])

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/archive"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("given", ["inner", "outer"])
def test_the_official_layout_is_read_as_it_is(folder, files, given):
    found = data.read(folder if given == "inner" else folder.parent)
    assert found.train_images.shape == (5 * RECORDS, 32, 32, 3) and found.test_images.shape == (RECORDS, 32, 32, 3)
    record = np.frombuffer(files["data_batch_2.bin"], np.uint8).reshape(RECORDS, -1)[3]
    assert found.train_labels[RECORDS + 3] == record[0]
    for channel in range(3):  # a record is the label, then the three colour planes, each row by row
        plane = record[1 + 1024 * channel : 1 + 1024 * (channel + 1)].reshape(32, 32)
        np.testing.assert_array_equal(found.train_images[RECORDS + 3, :, :, channel], plane)


def test_a_truncated_file_is_named_with_its_size_and_the_one_expected(folder):
    path = folder / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"data_batch_3.bin has 61,455 bytes. Expected .* of 61,460 bytes"):
        data.read(folder)


def test_a_missing_file_is_named(folder):
    (folder / data.TEST_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"is not all of CIFAR-10: test_batch.bin missing\. Expected"):
        data.read(folder)


def test_a_file_of_something_else_is_refused(folder):
    path = folder / "data_batch_1.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"data_batch_1.bin holds the label 255; expected 0 to 9"):
        data.read(folder)


def test_a_download_is_checked_unpacked_and_kept(files, serve, tmp_path):
    archive = archive_of({f"{data.FOLDER}/{name}": content for name, content in files.items()})
    url, md5 = serve(archive), hashlib.md5(archive).hexdigest()
    found = data.download(tmp_path / "cache", url, md5)
    assert {path.name: path.read_bytes() for path in found.iterdir()} == files
    assert data.download(tmp_path / "cache", "http://127.0.0.1:1/gone", md5) == found
    assert list((tmp_path / "cache").iterdir()) == [found]


def test_a_download_that_breaks_off_leaves_nothing(files, serve, tmp_path):
    archive = archive_of({f"{data.FOLDER}/{name}": content for name, content in files.items()})
    with pytest.raises(data.NoNetworkError, match=r"broke off|IncompleteRead"):
        data.download(tmp_path / "cache", serve(archive, cut=1000), hashlib.md5(archive).hexdigest())
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_archive_is_refused_and_not_kept(serve, tmp_path):
    with pytest.raises(ValueError, match=f"expected {data.MD5}"):
        data.download(tmp_path / "cache", serve(b"something else"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_path_in_an_archive_leaves_the_folder(files, serve, tmp_path):
    entries = {f"{data.FOLDER}/{name}": content for name, content in files.items()}
    archive = archive_of({"../escaped": b"x", f"{data.FOLDER}/../../escaped": b"x", **entries})
    found = data.download(tmp_path / "cache", serve(archive), hashlib.md5(archive).hexdigest())
    assert sorted(path.name for path in found.iterdir()) == sorted(files)
    assert not list(tmp_path.rglob("escaped"))


def test_without_network_one_line_says_so_and_the_embedded_set_serves(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise data.urllib.error.URLError("no route")

    monkeypatch.setattr(data.urllib.request, "urlopen", no_network)
    lines = []
    found = data.load(None, tmp_path, lines.append)
    assert found.name.startswith("embedded shapes") and len(lines) == 1 and "no route" in lines[0]


def test_the_embedded_set_is_the_same_every_time_and_not_for_linear_models():
    found, again = data.embedded(), data.embedded(train=64)
    assert found.train_images.shape == (4096, 32, 32, 3) and found.train_images.dtype == np.uint8
    assert data.shapes.make(64, 5)[0].tobytes() == data.shapes.make(64, 5)[0].tobytes()
    np.testing.assert_array_equal(again.test_images, found.test_images)
    assert np.bincount(found.train_labels).min() > 350
    inputs, held_out = (
        images.reshape(len(images), -1) / 255 - 0.5 for images in (found.train_images, found.test_images)
    )
    targets = np.eye(10)[found.train_labels] - 0.1
    for ridge in (10, 1000):
        solution = np.linalg.solve(inputs.T @ inputs + ridge * np.eye(inputs.shape[1]), inputs.T @ targets)
        assert np.mean((held_out @ solution).argmax(1) == found.test_labels) < 0.25


def test_real_cifar10():
    folder = os.environ.get("JBN_CIFAR10")
    if folder is None:
        pytest.skip("set JBN_CIFAR10 to a folder with CIFAR-10 in the official binary layout")
    found = data.read(Path(folder))
    assert np.bincount(found.train_labels).tolist() == [5000] * 10
    assert np.bincount(found.test_labels).tolist() == [1000] * 10
