"""Official files: where they are looked for, fetched from, and how they are checked."""

import dataclasses
import functools
import gc
import hashlib
import http.server
import threading

import numpy as np
import pytest

from dpmix_jax import UserError, data
from dpmix_jax.data import DataConfig, datasets, download
from tests import files

TRAIN, TEST = files.learnable(50, 10, seed=0), files.learnable(20, 10, seed=1)
CIFAR = "cifar-10-binary.tar.gz"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DPMIX_JAX_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files; half of what it announces where the name begins with `cut`."""

    def log_message(self, *args):
        pass

    def copyfile(self, source, outputfile):
        content = source.read()
        keep = len(content) // 2 if "/cut" in self.path else len(content)
        outputfile.write(content[:keep])


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Returns a function that publishes a file under a checksum, by default its own."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "served")
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def function(served=CIFAR, checksum=None):
        top = tmp_path / "served"
        top.mkdir(exist_ok=True)
        archive = files.cifar(top, train=TRAIN, test=TEST)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if served is None:
            archive.unlink()
        else:
            archive.rename(top / served)
        url = f"http://127.0.0.1:{server.server_port}/{served}"
        registry = tmp_path / "official.txt"
        registry.write_text(f"cifar10/{CIFAR} {checksum or f'sha256:{digest}'} {url}\n")
        monkeypatch.setattr(download, "REGISTRY", registry)
        return archive

    yield function
    server.shutdown()
    server.server_close()
    thread.join()


def cifar10(**options):
    return data.load(DataConfig(name="cifar10", **options))


def test_a_file_is_fetched_once_and_only_if_asked_for(folder, publish, capsys):
    served = publish()
    with pytest.raises(UserError, match=r"data.download=True fetches it"):
        cifar10()
    assert not folder.exists()
    dataset = cifar10(download=True)
    np.testing.assert_array_equal(dataset.train.images, TRAIN[0])
    assert f"fetching {CIFAR} (sha256:" in capsys.readouterr().err
    assert (folder / "cifar10" / CIFAR).read_bytes() == served.read_bytes()
    served.unlink()
    for allowed in (True, False):
        np.testing.assert_array_equal(cifar10(download=allowed).test.images, TEST[0])
    assert "fetching" not in capsys.readouterr().err


@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checksum": "sha256:" + "0" * 64}, "does not match the known hash"),
        ({"served": "cut.tar.gz"}, "IncompleteRead"),
        ({"served": None}, "404"),
    ],
)
def test_what_cannot_be_fetched_is_named(folder, publish, options, message):
    publish(**options)
    with pytest.raises(
        UserError, match=rf"^{CIFAR} cannot be fetched \(.*{message}"
    ) as error:
        cifar10(download=True)
    assert f"put {CIFAR} (sha256:" in str(error.value)
    assert str(error.value).endswith(f"into {folder / 'cifar10'}")
    assert "\n" not in str(error.value)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [".lock"]
    del error
    gc.collect()  # pooch leaves the socket of a failed answer to it


def test_where_nothing_can_be_written_the_file_is_named(folder, publish):
    publish()
    folder.write_bytes(b"")  # a file, where the folder should be
    with pytest.raises(UserError, match=rf"^{CIFAR} cannot be fetched \(data folder"):
        cifar10(download=True)


def test_a_damaged_official_file_is_told_by_its_checksum(folder, publish):
    served = publish()
    whole = served.read_bytes()
    path = folder / "cifar10" / CIFAR
    path.parent.mkdir(parents=True)
    for content in (b"", whole[: len(whole) // 2], whole[::-1]):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=f"cannot be read .* not the official file, .* {CIFAR}"
        ):
            cifar10()
    assert download.advice("cifar10", [served]) == ""


@pytest.mark.parametrize(
    "name", [name for name in datasets.NAMES if name not in ("digits", "npz", "folder")]
)
def test_what_is_missing_is_named_with_checksum_and_address(folder, name):
    with pytest.raises(UserError) as error:
        data.load(DataConfig(name=name))
    text = str(error.value)
    assert text.startswith(f"data.path is None: {name} is not in {folder / name}")
    parts = datasets.SOURCES[name].parts
    assert text.count(" from http") == len(parts)
    assert text.count("sha256:") + text.count("md5:") == len(parts)
    with pytest.raises(
        UserError, match=f"data.path is absent: {name} is not in absent"
    ):
        data.load(DataConfig(name=name, path="absent"))


def test_checksums_are_whole():
    official = download.official()
    assert len(official.registry) == 18
    for name, checksum in official.registry.items():
        kind, digits = checksum.split(":")
        assert len(digits) == {"sha256": 64, "md5": 32}[kind]
        assert official.get_url(name).endswith(name.split("/")[1])


def test_folders_of_an_operating_system(folder, tmp_path, monkeypatch):
    grey = [(images[..., 0], labels) for images, labels in (TRAIN, TEST)]
    system = files.idx(tmp_path / "system", *grey)
    source = dataclasses.replace(
        datasets.SOURCES["fashion_mnist"], elsewhere=(str(system),)
    )
    monkeypatch.setitem(datasets.SOURCES, "fashion_mnist", source)
    assert datasets.location("fashion_mnist", None) == system
    files.idx(folder, *grey)  # perhaps MNIST's, whose files have the same names
    assert datasets.location("fashion_mnist", None) == system
    files.idx(folder / "fashion_mnist", *grey)
    assert datasets.location("fashion_mnist", None) == folder / "fashion_mnist"
    (system / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"fashion_mnist is not in .*; put t10k-labels"):
        data.load(DataConfig(name="fashion_mnist", path=str(system)))
