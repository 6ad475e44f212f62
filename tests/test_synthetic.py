"""Banks of synthetic images: planning, resuming, damage, rendered digits, mistakes."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from sklearn.svm import SVC

from dpmix_jax import UserError, data
from dpmix_jax.data import bank, images
from dpmix_jax.synthetic import Plan, fill
from dpmix_jax.synthetic.diffusion import Diffusion, DiffusionConfig, spoken
from dpmix_jax.synthetic.render import Render
from tests import files
from tests.conftest import ROOT

DIGITS = tuple("0123456789")
SCRIPT = ROOT / "experiments/generate_synthetic.py"


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


def test_images_do_not_depend_on_the_batch_size(tmp_path):
    for batch_size in (1, 7, 100):
        render(tmp_path / str(batch_size), digit_plan(), batch_size)
    first = contents(tmp_path / "1")
    assert len(first) == 32  # with manifest.json and .lock
    assert contents(tmp_path / "7") == contents(tmp_path / "100") == first


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    render(tmp_path / "whole", digit_plan(count=300))
    out = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), f"--out={out}", "--data=digits"]
    command += ["--generator=render", "--count=300", "--batch_size=16"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*/*.png"))) < 50 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    left = contents(out)
    assert 50 <= len(left) < 300
    assert not json.loads(left["manifest.json"])["finished"]
    for name, content in left.items():
        if pathlib.Path(name).suffix == ".png":  # whole, and what it will be
            assert content == (tmp_path / "whole" / name).read_bytes()
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert "images kept" in shown.stderr
    assert ", ETA 0:00:" in shown.stderr
    assert shown.stdout == f"{out}: 300 images of 10 classes\n"
    assert contents(out) == contents(tmp_path / "whole")


def test_the_manifest_tells_how_a_bank_was_made(tmp_path):
    returned = render(tmp_path, digit_plan())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == returned
    assert manifest["finished"]
    assert manifest["refused_by_safety_checker"] == 0
    settings = manifest["settings"]
    assert settings["generator"] == "render"
    assert settings["seed"] == 0
    assert settings["count"] == 30
    assert settings["class_names"] == list(DIGITS)
    assert settings["image_shape"] == [8, 8, 1]
    assert {"pillow", "matplotlib"} <= set(settings)


def test_damaged_altered_and_moved_images_are_made_again(tmp_path, capsys):
    render(tmp_path, digit_plan())
    whole = contents(tmp_path)
    cut, other = tmp_path / "0/000001.png", tmp_path / "1/000001.png"
    cut.write_bytes(cut.read_bytes()[:-1])
    half = tmp_path / "0/000002.png"
    half.write_bytes(half.read_bytes()[:150])
    with Image.open(other) as image:
        pixels, text = np.array(image), dict(image.text)
    pixels[0, 0] ^= 1
    other.write_bytes(images.encode(pixels[..., None], text))
    shutil.copy(tmp_path / "2/000002.png", tmp_path / "2/000001.png")
    (tmp_path / "3/000001.png").write_bytes(files.encoded(files.picture(0)))
    (tmp_path / "4/000001.png").write_bytes(b"")
    (tmp_path / "5/000001.png").unlink()
    (tmp_path / "6/.000001.png.partial").write_bytes(b"x")  # what a kill leaves
    (tmp_path / "6/000001.png").unlink()
    capsys.readouterr()
    render(tmp_path, digit_plan())
    shown = capsys.readouterr().err
    assert "22 images kept, 6 damaged or altered to be made again" in shown
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
    with pytest.raises(
        UserError, match=r"image 1 of class 'dog' is refused .* 10 seed"
    ):
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
    with pytest.raises(UserError, match=r"manifest\.json is not of a bank"):
        render(tmp_path / "b", digit_plan())


@pytest.mark.parametrize("name", ["T-shirt/top", "..", ".x", "__MACOSX", "é b%2F", "0"])
def test_folders_of_classes_are_safe_and_reversible(name):
    folder = bank.class_folder(name)
    assert bank.class_of(folder) == name
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
        for row, name in ((0, "shoe"), (13, "T-shirt%2Ftop"), (19, "Ankle boot")):
            number = (row % 7) + 1 if row < 14 else row - 13
            content = (tmp_path / f"bank/{name}/{number:06}.png").read_bytes()
            np.testing.assert_array_equal(bank.images[row], images.decode(content))


def test_banks_that_do_not_fit_the_classes_are_refused(tmp_path):
    files.put(tmp_path, files.class_members(["cat", "dog"], 2))
    assert len(data.load_bank(tmp_path, ("cat", "dog"))) == 4
    with pytest.raises(
        UserError, match=r"folder 'dog' is of no class; .* 'cat', 'cow'"
    ):
        data.load_bank(tmp_path, ("cat", "cow"))
    with pytest.raises(UserError, match="class 'cow' has no images"):
        data.load_bank(tmp_path, ("cat", "dog", "cow"))
    with pytest.raises(UserError, match="there is no such folder or archive"):
        data.load_bank(tmp_path / "nowhere", ("cat", "dog"))


def test_rendered_digits_are_grey_and_as_bright_as_the_dataset(tmp_path):
    render(tmp_path, digit_plan())
    bank = data.load_bank(tmp_path, DIGITS, 8, channels=1)
    assert bank.images.shape == (30, 8, 8, 1)
    assert bank.images.max() == 240
    assert np.median(bank.images) < 60
    large = Render(class_names=DIGITS, image_shape=(28, 28, 3))
    drawn = np.stack(large(list(digit_plan().wanted())))
    assert drawn.shape == (30, 28, 28, 3)
    assert (drawn[..., :1] == drawn).all()
    assert drawn[:, 0].mean() < 0.1 * drawn.mean()  # with a margin, as in MNIST


def test_rendered_digits_are_digits():
    """For our own information: the digits of scikit-learn are public."""
    plan = digit_plan(count=500)
    wanted = list(plan.wanted())
    drawn = np.stack(Render(class_names=DIGITS, image_shape=(8, 8, 1))(wanted))
    model = SVC(C=3).fit(drawn.reshape(500, 64) / 240, [one.label for one in wanted])
    test = data.load(data.DataConfig(name="digits")).test
    accuracy = model.score(test.images.reshape(360, 64) / 240, test.labels)
    assert accuracy > 0.5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("maple_tree", "maple tree"),
        ("056.dog", "dog"),
        ("/a/apartment_building/outdoor", "apartment building outdoor"),
        ("HerbaceousVegetation", "herbaceous vegetation"),
        ("T-shirt/top", "T-shirt top"),
        ("airplane", "airplane"),
        ("Ankle boot", "Ankle boot"),
        ("7", "7"),
    ],
)
def test_names_are_spoken_in_prompts(name, words):
    assert spoken(name) == words


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": "a photo"}, "--prompt is 'a photo': it must contain {name}"),
        ({"steps": 0}, "--steps is 0: it must be in"),
        ({"guidance": -1.0}, "--guidance is -1.0: it must be in"),
        (
            {"sampler": "x"},
            "--sampler is 'x': it must be one of ddim, dpm, euler, pndm",
        ),
        ({"dtype": "int8"}, "--dtype is 'int8': it must be one of auto, float32"),
    ],
)
def test_bad_settings_of_diffusion_are_refused(changed, message):
    with pytest.raises(UserError, match=message):
        DiffusionConfig(model="x", **changed)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[diffusion\]"'):
        Diffusion(DiffusionConfig(model="x"), image_shape=(8, 8, 3))


# Flags, and the one line they end with. All run in one process, started once.
MISTAKES = {
    "--data=digits": "--out is missing",
    "--out=b": "--classes is missing: give it, or --data",
    "--out=b --data=cifa": "data.name is 'cifa': it must be one of digits, npz",
    "--out=b --path=x": "--path is x: it needs --data",
    "--out=b --data=sun397": "data.image_size is 0: it must be positive, for images",
    "--out=b --data=sun397 --image_size=8": "--classes is missing: the class names of",
    "--out=b --data=digits --classes=names": "--classes is names: it names 2 classes,",
    "--out=b --data=digits --classes=no": "--classes is no: cannot be read",
    "--out=b --classes=names": "--count is missing",
    "--out=b --classes=names --count=4": "--image_size is missing",
    "--out=b --classes=names --count=1 --image_size=8": "--count is 1: it must be at",
    "--out=b --classes=names --count=4 --image_size=-1": "--image_size is -1",
    "--out=b --classes=same --count=4 --image_size=8": "class '3' is named twice",
    "--out=b --data=digits": "--generator is None: it must be diffusion or render",
    "--out=b --data=digits --generator=render --seed=-1": "--seed is -1: it must be",
    "--out=b --data=digits --generator=render --batch_size=0": "--batch_size is 0",
    "--out=b --data=digits --generator=render --steps=9": "--steps is given: it is of",
    "--out=b --data=cifar10 --generator=render": "class 'airplane' is none of them",
    "--out=b --data=digits --generator=diffusion": "--model is missing",
    "--out=b --data=digits --count=x": "flag --count=x",
    "--out=names --data=digits --generator=render": "bank names is not writable",
    "--out=b --data=digits render": "unknown argument render",
}
DRIVER = f"""
import sys
from absl import flags
from dpmix_jax import command_line
sys.path.insert(0, {str(SCRIPT.parent)!r})
import generate_synthetic as script
for line in sys.stdin.read().splitlines():
    flags.FLAGS.unparse_flags()
    for flag in flags.FLAGS.flags_by_module_dict()[script.__name__]:
        flag.unparse()
    try:
        script.main(command_line.parse(["x", *line.split()]))
        print("0: no error", file=sys.stderr)
    except SystemExit as ended:
        print(f"exit {{ended.code}}", file=sys.stderr)
"""


RIGHT = [
    f"--out=bank-{classes} --classes={classes} --count=5 --generator=render"
    " --image_size=28"
    for classes in ("names", "folders")
]


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """Runs the program with each line of flags; returns where, and its lines."""
    folder = tmp_path_factory.mktemp("driven")
    (folder / "names").write_text("7\n\n3\n")
    (folder / "same").write_text("3\n3\n")
    for name in ("folders/3", "folders/7", "folders/.x"):
        (folder / name).mkdir(parents=True)
    shown = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input="\n".join([*MISTAKES, *RIGHT]),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert shown.returncode == 0, shown.stderr
    lines = shown.stderr.splitlines()
    pairs = zip(lines[: 2 * len(MISTAKES) : 2], lines[1::2], strict=False)
    return folder, dict(zip(MISTAKES, pairs, strict=True))


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(command, driven):
    folder, refusals = driven
    line, status = refusals[command]
    assert line.startswith("error: ")
    assert MISTAKES[command] in line
    assert status == "exit 2"
    assert not (folder / "b").exists()


def test_classes_from_a_file_or_from_folders(driven):
    folder, _ = driven
    for classes, names in (("names", ("7", "3")), ("folders", ("3", "7"))):
        bank = data.load_bank(folder / f"bank-{classes}", names)
        assert bank.images.shape == (5, 28, 28, 3)
        assert bank.labels.tolist() == [0, 0, 0, 1, 1]
