"""The diffusion generator, on a tiny random pipeline; needs the extra `diffusion`."""

import json
import shutil

import numpy as np
import pytest

from dpmix_jax import UserError
from dpmix_jax.data import images
from dpmix_jax.synthetic import Plan, fill
from dpmix_jax.synthetic.diffusion import Diffusion, DiffusionConfig

pytest.importorskip("torch")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

from tests import tiny_diffusion  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries
PLAN = Plan(class_names=("cat", "maple_tree"), count=6, seed=0, image_shape=(8, 8, 3))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_diffusion.save(tmp_path_factory.mktemp("models") / "tiny")


def generator(model, shape=(8, 8, 3), **options):
    config = DiffusionConfig(model=str(model), steps=3, **options)
    return Diffusion(config, image_shape=shape)


def pixels(path):
    """Of every image, as float64."""
    found = {f.relative_to(path): f.read_bytes() for f in sorted(path.rglob("*.png"))}
    return {name: images.decode(found[name]).astype(float) for name in found}


def test_a_bank_is_the_same_in_other_batches_and_after_a_stop(model, tmp_path):
    draw = generator(model)
    fill(tmp_path / "a", PLAN, draw, batch_size=6)
    whole = pixels(tmp_path / "a")
    assert len({image.tobytes() for image in whole.values()}) == 6
    fill(tmp_path / "b", PLAN, draw, batch_size=1)
    (tmp_path / "b/cat/000002.png").unlink()
    fill(tmp_path / "b", PLAN, generator(model), batch_size=6)
    again = pixels(tmp_path / "b")
    assert set(again) == set(whole)
    for name in whole:
        np.testing.assert_allclose(again[name], whole[name], atol=2)


def test_prompt_noise_and_size_are_those_asked_for(model, monkeypatch):
    asked = {}
    draw = generator(model, shape=(8, 8, 1), prompt="one {name}!", guidance=2.0)
    plain = draw._pipeline

    def pipeline(prompts, **options):
        asked.update(options, prompts=prompts)
        return plain(prompts, **options)

    monkeypatch.setattr(draw, "_pipeline", pipeline)
    wanted = list(PLAN.wanted())[:2]
    made = draw(wanted)
    assert [image.shape for image in made] == [(8, 8, 1)] * 2
    assert asked["prompts"] == ["one cat!", "one maple tree!"]
    assert asked["guidance_scale"] == 2.0
    assert asked["num_inference_steps"] == 3
    assert [g.initial_seed() for g in asked["generator"]] == [w.seed for w in wanted]


def test_the_manifest_names_model_sampler_and_safety(model, tmp_path):
    fill(tmp_path / "a", PLAN, generator(model, sampler="ddim"), batch_size=6)
    settings = json.loads((tmp_path / "a/manifest.json").read_text())["settings"]
    revision = settings["revision"]
    expected = {
        "generator": "diffusion",
        "model": str(model),
        "prompt": "a photo of a {name}",
        "sampler": "DDIMScheduler",
        "steps": 3,
        "safety_checker": None,
        "diffusers": diffusers.__version__,
    }
    assert settings | expected == settings
    assert revision.startswith("sha256:")
    other = tiny_diffusion.save(tmp_path / "other", seed=1)
    assert generator(other).settings["revision"] != revision


@pytest.mark.parametrize("refuses", [True, False])
def test_the_models_safety_checker_is_heeded(tmp_path, refuses):
    model = tiny_diffusion.save(tmp_path / "tiny", refuses=refuses)
    draw = generator(model)
    assert draw.settings["safety_checker"] == "StableDiffusionSafetyChecker"
    if refuses:
        with pytest.raises(UserError, match="refused by the safety checker for 10"):
            fill(tmp_path / "a", PLAN, draw, batch_size=1)
        assert not pixels(tmp_path / "a")
        draw = generator(model, safety_checker=False)
        assert draw.settings["safety_checker"] is None
    fill(tmp_path / "b", PLAN, draw, batch_size=6)
    assert all(image.any() for image in pixels(tmp_path / "b").values())


def test_models_that_cannot_be_had_are_one_line(model, tmp_path, monkeypatch):
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x")
    for wrong in (tmp_path / "nowhere", tmp_path, broken):
        with pytest.raises(UserError, match=rf"--model is {wrong}: it must be .*\)$"):
            generator(wrong)
    with pytest.raises(UserError, match=r"--revision is main: .* a folder, which has"):
        generator(model, revision="main")
    with pytest.raises(UserError, match="--dtype is float16: it needs a GPU"):
        generator(model, dtype="float16")

    def refuse(*args, **options):
        raise OSError("no network\nmore")

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "download", refuse)
    with pytest.raises(UserError, match=r"the id of one on the hub \(no network\)$"):
        generator("someone/something")
