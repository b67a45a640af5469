"""CIFAR-10 from a folder, a cache or the network, and a set of the same shape that needs none of them."""

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapes

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"
RECORDS, PIXELS = 10_000, 3 * 32 * 32


class Dataset(NamedTuple):
    name: str
    train_images: np.ndarray  # [train, 32, 32, 3], uint8
    train_labels: np.ndarray  # [train], int32
    test_images: np.ndarray  # [test, 32, 32, 3], uint8
    test_labels: np.ndarray  # [test], int32

    def first(self, count: int | None) -> "Dataset":
        """The same with only the first `count` training images."""
        if count is None or count >= len(self.train_labels):
            return self
        return self._replace(
            name=f"{self.name}, first {count:,}",
            train_images=self.train_images[:count],
            train_labels=self.train_labels[:count],
        )


class NoNetworkError(Exception):
    """The archive cannot be had now; nothing is wrong with what is here."""


def load(folder: Path | None, cache: Path, report=print) -> Dataset:
    """The folder if one is given; else the cache, the network, or the embedded set, whichever is there first."""
    if folder is not None:
        return read(folder)
    try:
        return read(download(cache))
    except NoNetworkError as error:
        report(f"CIFAR-10 is not in {cache} and cannot be downloaded ({error}): training on the embedded set instead.")
        return embedded()


def read(folder: Path) -> Dataset:
    """CIFAR-10 from a folder in the official binary layout, or from the folder that holds such a folder.

    Raises:
      FileNotFoundError: files are missing.
      ValueError: files have the wrong size, or a label that is no label.
    """
    inner = folder / FOLDER
    folder = inner if inner.is_dir() else folder
    _check_whole(folder)
    images, labels = zip(*(_read_file(folder / name) for name in (*TRAIN_FILES, TEST_FILE)), strict=True)
    content = hashlib.md5()
    for part in (*images, *labels):
        content.update(part)
    name = f"CIFAR-10 (MD5 of all {content.hexdigest()[:8]})"
    return Dataset(name, np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1])


def _check_whole(folder: Path) -> None:
    """All files are there, and each is as long as it must be; else one error names all that is wrong."""
    names, expected = (*TRAIN_FILES, TEST_FILE), RECORDS * (1 + PIXELS)
    missing = [name for name in names if not (folder / name).is_file()]
    sizes = {name: (folder / name).stat().st_size for name in names if name not in missing}
    wrong = [f"{name} has {size:,} bytes" for name, size in sizes.items() if size != expected]
    found = [f"{', '.join(missing)} missing"] * bool(missing) + wrong
    if found:
        message = (
            f"{folder} is not all of CIFAR-10: {'; '.join(found)}. Expected the official binary layout, "
            f"{', '.join(names)} of {expected:,} bytes each. Fetch it again, or name the folder that holds them."
        )
        raise FileNotFoundError(message) if missing else ValueError(message)


def _read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    records = np.fromfile(path, np.uint8).reshape(RECORDS, 1 + PIXELS)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path} holds the label {records[:, 0].max()}; expected 0 to 9. It is not a CIFAR-10 file.")
    images = records[:, 1:].reshape(RECORDS, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int32)


def download(cache: Path, url: str = URL, md5: str = MD5) -> Path:
    """The folder of CIFAR-10 in the cache, downloaded if it is not there. It appears whole or not at all.

    Raises:
      NoNetworkError: the archive could not be fetched to its end.
      ValueError: the archive is not the one expected.
    """
    folder = cache / FOLDER
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as scratch:
        archive, unpacked = Path(scratch) / "archive", Path(scratch) / FOLDER
        _fetch(url, archive)
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            raise ValueError(f"{url} has the MD5 {found}; expected {md5}. Nothing was kept; try again.")
        unpacked.mkdir()
        with tarfile.open(archive) as tar:
            # Only the files looked for, each under a name made here: no path in the archive is ever used.
            for name in (*TRAIN_FILES, TEST_FILE):
                source = tar.extractfile(f"{FOLDER}/{name}")
                if source is None:
                    raise ValueError(f"{FOLDER}/{name} in {url} is not a regular file.")
                with (unpacked / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        try:
            unpacked.replace(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been quicker
                raise
    return folder


def _fetch(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=20) as response, path.open("wb") as file:
            shutil.copyfileobj(response, file)
            expected = int(response.headers.get("Content-Length", file.tell()))
            if file.tell() != expected:
                raise NoNetworkError(f"{url} broke off after {file.tell():,} of {expected:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        raise NoNetworkError(f"{url}: {getattr(error, 'reason', error)}") from error


def embedded(train: int = 4096, test: int = 2000, seed: int = 0) -> Dataset:
    """The embedded set of shapes; train and test images are drawn from different seeds."""
    return Dataset(
        f"embedded shapes (seed {seed}, {train:,} + {test:,} images)",
        *shapes.make(train, 2 * seed),
        *shapes.make(test, 2 * seed + 1),
    )
