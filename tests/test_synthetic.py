"""Banks of synthetic images: planning, resuming, damage, rendered digits, mistakes."""

import json
import pathlib
import shutil
import subprocess
import sys
import time
import urllib.parse

import numpy as np
import pytest
from PIL import Image
from sklearn.svm import SVC

from dpmix_jax import UserError, data
from dpmix_jax.data import images
from dpmix_jax.data.clothes import CLOTHES
from dpmix_jax.data.folder import class_folder
from dpmix_jax.data.rendered import Render
from dpmix_jax.synthetic import Plan, fill
from dpmix_jax.synthetic.diffusion import Diffusion, DiffusionConfig, spoken
from tests import files
from tests.conftest import ROOT
from tests.programs import call

DIGITS = tuple("0123456789")
SCRIPT = "experiments/generate.py"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def digit_plan(count=30, seed=0, shape=(8, 8, 1)):
    return Plan(class_names=DIGITS, count=count, seed=seed, image_shape=shape)


def render(path, plan, batch_size=8):
    generator = Render(class_names=plan.class_names, image_shape=plan.image_shape)
    return fill(path, plan, generator, batch_size=batch_size)


def contents(path):
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


class Picky:
    """Draws by the seed; refuses one in three, or everything."""

    settings = {"generator": "picky"}  # noqa: RUF012

    def __init__(self, everything=False):
        self.everything, self.calls = everything, 0

    def __call__(self, wanted):
        self.calls += len(wanted)
        return [
            None
            if self.everything or one.seed % 3 == 0
            else files.picture(one.seed % 2**32)
            for one in wanted
        ]


def pet_plan(count=20):
    return Plan(class_names=("dog", "cat"), count=count, seed=0, image_shape=(8, 8, 3))


def test_a_plan_is_balanced_and_no_two_images_share_a_seed():
    wanted = list(digit_plan(count=1437).wanted())
    assert np.bincount([one.label for one in wanted]).tolist() == [144] * 7 + [143] * 3
    assert [one.label for one in wanted[:12]] == [*range(10), 0, 1]
    other = digit_plan(count=1437, seed=1)
    again = [other.attempt(one.label, one.number, 0) for one in wanted]
    again += [other.attempt(one.label, one.number, 1) for one in wanted]
    assert len({one.seed for one in [*wanted, *again]}) == 3 * 1437
    longer = list(digit_plan(count=2000).wanted())
    assert longer[:1437] == wanted


def test_images_do_not_depend_on_the_batch_size_and_the_manifest_tells_of_what(
    tmp_path,
):
    for batch_size in (1, 7, 100):
        manifest = render(tmp_path / str(batch_size), digit_plan(), batch_size)
    first = contents(tmp_path / "1")
    assert len(first) == 32  # with manifest.json and .lock
    assert contents(tmp_path / "7") == contents(tmp_path / "100") == first
    assert json.loads(first["manifest.json"]) == manifest
    assert manifest["finished"]
    assert manifest["refused_by_safety_checker"] == 0
    settings = {"generator": "render", "seed": 0, "count": 30}
    settings |= {"class_names": list(DIGITS), "image_shape": [8, 8, 1]}
    assert manifest["settings"] | settings == manifest["settings"]
    assert {"pillow", "matplotlib"} <= set(manifest["settings"])


@pytest.mark.sampled
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    render(tmp_path / "whole", digit_plan(count=300))
    out = tmp_path / "killed"
    command = [f"--out={out}", "--data=digits"]
    command += ["--generator=render", "--count=300", "--batch_size=16"]
    process = subprocess.Popen([sys.executable, ROOT / SCRIPT, *command])
    deadline = time.monotonic() + 60
    while len(list(out.glob("*/*.png"))) < 50 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    left = contents(out)
    assert 50 <= len(left) < 300
    assert not json.loads(left["manifest.json"])["finished"]
    for name, content in left.items():
        if pathlib.Path(name).suffix == ".png":  # whole, and what it will be
            assert content == (tmp_path / "whole" / name).read_bytes()
    done = call(SCRIPT, command)
    assert done.returncode == 0
    assert "images kept" in done.stderr
    assert done.stdout == f"{out}: 300 images of 10 classes\n"
    assert contents(out) == contents(tmp_path / "whole")


def test_damaged_altered_and_moved_images_are_made_again(tmp_path, capsys):
    render(tmp_path / "other", digit_plan(count=31))
    of_other = (tmp_path / "other/7/000001.png").read_bytes()
    tmp_path /= "bank"
    render(tmp_path, digit_plan())
    whole = contents(tmp_path)
    for name, size in (("0/000001.png", -1), ("0/000002.png", 150)):
        (tmp_path / name).write_bytes(whole[name][:size])
    other = tmp_path / "1/000001.png"
    with Image.open(other) as image:
        pixels, text = np.array(image), dict(image.text)
    pixels[0, 0] ^= 1
    other.write_bytes(images.encode(pixels[..., None], text))
    shutil.copy(tmp_path / "2/000002.png", tmp_path / "2/000001.png")
    (tmp_path / "3/000001.png").write_bytes(files.encoded(files.picture(0)))
    (tmp_path / "4/000001.png").write_bytes(b"")
    (tmp_path / "7/000001.png").write_bytes(of_other)
    (tmp_path / "5/000001.png").unlink()
    (tmp_path / "6/.000001.png.partial").write_bytes(b"x")  # what a kill leaves
    (tmp_path / "6/000001.png").unlink()
    capsys.readouterr()
    render(tmp_path, digit_plan())
    assert "21 images kept" in capsys.readouterr().err
    assert contents(tmp_path) == whole


def test_refused_images_get_the_seed_of_the_next_try_and_are_counted(tmp_path):
    generator = Picky()
    manifest = fill(tmp_path / "a", pet_plan(), generator, batch_size=3)
    refused = manifest["refused_by_safety_checker"]
    assert refused == generator.calls - 20 > 0
    fill(tmp_path / "b", pet_plan(), Picky(), batch_size=20)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for file in (tmp_path / "a/dog").iterdir():
        file.unlink()
    again = fill(tmp_path / "a", pet_plan(), Picky(), batch_size=1)
    assert again["refused_by_safety_checker"] == refused
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(UserError, match=r"image 1 of class 'dog' is refused .* 10"):
        fill(tmp_path / "c", pet_plan(), Picky(everything=True), batch_size=3)
    assert not list((tmp_path / "c").glob("*/*"))


def test_another_bank_is_not_continued(tmp_path):
    render(tmp_path / "a", digit_plan())
    with pytest.raises(UserError, match=r"other settings.*: seed was 0, is 1$"):
        render(tmp_path / "a", digit_plan(seed=1))
    (tmp_path / "a/0/cat.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 0/cat\.png, which is not of it"):
        render(tmp_path / "a", digit_plan())
    files.put(tmp_path / "b", [("0/000001.png", b"")])
    with pytest.raises(UserError, match="holds 0, which is not of it"):
        render(tmp_path / "b", digit_plan())
    assert sorted(contents(tmp_path / "b")) == [".lock", "0/000001.png"]
    (tmp_path / "b/manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        render(tmp_path / "b", digit_plan())


@pytest.mark.parametrize("name", ["T-shirt/top", "..", ".x", "__MACOSX", "é b%2F", "0"])
def test_folders_of_classes_are_safe_and_reversible(name):
    folder = class_folder(name)
    assert urllib.parse.unquote(folder) == name
    assert "/" not in folder
    assert not folder.startswith((".", "__MACOSX"))


def test_a_bank_is_read_with_the_labels_of_the_dataset(tmp_path):
    names = ("shoe", "T-shirt/top", "Ankle boot")  # not in the order of the alphabet
    plan = Plan(class_names=names, count=20, seed=0, image_shape=(8, 8, 3))
    fill(tmp_path / "bank", plan, Picky(), batch_size=4)
    shutil.make_archive(str(tmp_path / "bank"), "zip", tmp_path / "bank")
    for path in (tmp_path / "bank", tmp_path / "bank.zip"):
        bank = data.load_bank(path, names, 8, mean=(0.1, 0.2, 0.3))
        assert bank.class_names == names
        assert bank.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 6
        assert bank.images.shape == (20, 8, 8, 3)
        assert (bank.mean, bank.stddev) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
        for row, file in ((13, "T-shirt%2Ftop/000007"), (19, "Ankle boot/000006")):
            content = (tmp_path / f"bank/{file}.png").read_bytes()
            np.testing.assert_array_equal(bank.images[row], images.decode(content))
    for path, classes, message in (
        (
            tmp_path / "bank",
            names[:2],
            r"folder 'Ankle boot' is of no class; .* 'shoe'",
        ),
        (tmp_path / "bank", (*names, "cow"), "class 'cow' has no images"),
        (tmp_path / "nowhere", names, "nowhere: cannot be read .*No such file"),
    ):
        with pytest.raises(UserError, match=message):
            data.load_bank(path, classes)


@pytest.mark.sampled
def test_rendered_digits_are_digits():
    """For our own information: the digits of scikit-learn are public."""
    plan = digit_plan(count=500)
    wanted = list(plan.wanted())
    drawn = np.stack(Render(class_names=DIGITS, image_shape=(8, 8, 1))(wanted))
    model = SVC(C=3).fit(drawn.reshape(500, 64) / 240, [one.label for one in wanted])
    test = data.load(data.DataConfig(name="digits")).test
    accuracy = model.score(test.images.reshape(360, 64) / 240, test.labels)
    assert accuracy > 0.5
    assert drawn.max() == 240
    large = Render(class_names=DIGITS, image_shape=(28, 28, 3))(wanted[:30])
    assert (large[0][..., :1] == large[0]).all()
    assert np.stack(large)[:, 0].mean() < 0.1 * np.stack(large).mean()  # a margin


@pytest.mark.sampled
def test_rendered_clothes_are_of_ten_kinds(tmp_path):
    """Drawings of one seed tell those of another apart: no photograph is looked at."""
    command = [f"--out={tmp_path}/bank", "--data=fashion_mnist", "--count=20"]
    assert call(SCRIPT, [*command, "--generator=render"]).returncode == 0
    bank = data.load_bank(tmp_path / "bank", CLOTHES, channels=1)
    assert (bank.images.shape, bank.images.dtype) == ((20, 28, 28, 1), np.uint8)
    assert bank.labels.tolist() == [label for label in range(10) for _ in range(2)]
    render, seen = Render(class_names=CLOTHES, image_shape=(28, 28, 1)), []
    for seed in (0, 1):
        plan = Plan(class_names=CLOTHES, count=150, seed=seed, image_shape=(28, 28, 1))
        wanted = list(plan.wanted())
        seen.append((np.stack(render(wanted)), [one.label for one in wanted]))
    (drawn, labels), (others, theirs) = seen
    order = np.argsort(labels[:20], kind="stable")
    np.testing.assert_array_equal(bank.images, drawn[:20][order])
    assert len({image.tobytes() for image in (*drawn, *others)}) == 300
    assert (drawn[:, 0, 0] == 0).mean() > 0.95  # on black
    extent = [np.ptp(np.nonzero(image[..., 0] > 20), axis=1).max() for image in drawn]
    assert min(extent) > 14
    model = SVC(C=3).fit(drawn.reshape(150, -1) / 255, labels)
    assert model.score(others.reshape(150, -1) / 255, theirs) > 0.7


def test_names_are_spoken_in_prompts():
    for name, words in {
        "maple_tree": "maple tree",
        "056.dog": "dog",
        "/a/apartment_building/outdoor": "apartment building outdoor",
        "HerbaceousVegetation": "herbaceous vegetation",
        "T-shirt/top": "T-shirt top",
        "Ankle boot": "Ankle boot",
        "7": "7",
    }.items():
        assert spoken(name) == words


def test_bad_settings_of_diffusion_are_refused():
    for message, changed in {
        "--prompt is 'a photo': it must be a text with {name}": {"prompt": "a photo"},
        "--steps is 0: it must be in": {"steps": 0},
        "--guidance is -1.0: it must be in": {"guidance": -1.0},
        "--sampler is 'x': it must be one of ddim, dpm, euler, pndm": {"sampler": "x"},
        "--dtype is 'int8': it must be one of auto, float32, float16": {
            "dtype": "int8"
        },
    }.items():
        with pytest.raises(UserError, match=message):
            DiffusionConfig(model="x", **changed)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r'pip install "dpmix_jax\[diffusion\]"'):
        Diffusion(DiffusionConfig(model="x"), image_shape=(8, 8, 3))


# Flags beside --out and --generator=render, and the one line they end with.
MISTAKES = {
    "--seed=0": "--classes is missing: give it, or a --data that tells it",
    "--path=x": "--path is x: it needs --data",
    "--data=sun397 --image_size=8": "--classes is missing: give it, or a --data",
    "--data=digits --classes=names": "--classes is names: it names 2 classes",
    "--data=digits --classes=no": "--classes is no: cannot be read",
    "--classes=names": "--count is missing",
    "--classes=names --count=1 --image_size=8": "--count is 1: it must be at least",
    "--classes=names --count=4 --image_size=-1": "--image_size makes images (-1",
    "--classes=same --count=4 --image_size=8": "class '3' is named twice",
    "--data=digits --seed=-1": "--seed is -1: it must be",
    "--data=digits --steps=9": "--steps is given: it is of --generator=diffusion",
    "--data=cifar10": "the digits 0 to 9 and the clothes T-shirt/top, Trouser,"
    " Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot; class 'airplane'"
    " is none of them",
    "--generator=diffusion --data=digits": "--model is missing",
    "--data=digits --out=names": "bank names is a file: it must be a folder",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    (folder / "names").write_text("7\n\n3\n")
    (folder / "same").write_text("3\n3\n")
    return folder


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(folder, flags):
    given = ["--out=b", "--generator=render", *flags.split()]
    done = call(SCRIPT, given, folder=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert MISTAKES[flags] in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "b").exists()


def test_classes_from_a_file(folder, tmp_path):
    given = [f"--out={tmp_path}/bank", "--classes=names", "--count=5"]
    given += ["--generator=render", "--image_size=28"]
    done = call(SCRIPT, given, folder=folder)
    assert done.stdout == f"{tmp_path}/bank: 5 images of 2 classes\n"
    bank = data.load_bank(tmp_path / "bank", ("7", "3"))
    assert bank.images.shape == (5, 28, 28, 3)
    assert bank.labels.tolist() == [0, 0, 0, 1, 1]
