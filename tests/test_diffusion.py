"""The diffusion generator, on a tiny random pipeline; needs the extra `diffusion`."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dpmix_jax import UserError, data
from dpmix_jax.data import images
from dpmix_jax.synthetic import Plan, diffusion, fill
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


def contents(path):
    return {f.relative_to(path): f.read_bytes() for f in path.rglob("*.png")}


def test_a_bank_is_the_same_in_other_batches_and_after_a_stop(
    model, tmp_path, monkeypatch
):
    monkeypatch.setenv("DPMIX_JAX_CACHE", str(tmp_path / "cache"))
    draw = generator(model)
    fill(tmp_path / "a", PLAN, draw, batch_size=6)
    wanted = list(PLAN.wanted())
    alone = np.stack([draw([one])[0] for one in wanted])
    bank = data.load_bank(tmp_path / "a", PLAN.class_names)
    order = np.lexsort([[one.number for one in wanted], [one.label for one in wanted]])
    np.testing.assert_allclose(
        bank.images.astype(float), alone[order].astype(float), atol=2
    )
    assert bank.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len({image.tobytes() for image in bank.images}) == 6
    whole = contents(tmp_path / "a")
    (tmp_path / "a/cat/000002.png").unlink()
    fill(tmp_path / "a", PLAN, generator(model), batch_size=6)
    again = contents(tmp_path / "a")
    assert set(again) == set(whole)
    for name, content in whole.items():
        np.testing.assert_allclose(
            *(images.decode(c).astype(float) for c in (again[name], content)), atol=2
        )


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
    assert settings["generator"] == "diffusion"
    assert settings["model"] == str(model)
    assert settings["prompt"] == "a photo of a {name}"
    assert settings["sampler"] == "DDIMScheduler"
    assert settings["steps"] == 3
    assert settings["safety_checker"] is None
    assert settings["diffusers"] == diffusers.__version__
    assert settings["revision"].startswith("sha256:")
    other = tiny_diffusion.save(tmp_path / "other", seed=1)
    shutil.copytree(other, tmp_path / "model")
    assert generator(tmp_path / "model").settings["revision"] != settings["revision"]


@pytest.mark.parametrize("refuses", [True, False])
def test_the_models_safety_checker_is_heeded(tmp_path, refuses):
    model = tiny_diffusion.save(tmp_path / "tiny", refuses=refuses)
    draw = generator(model)
    assert draw.settings["safety_checker"] == "StableDiffusionSafetyChecker"
    if refuses:
        with pytest.raises(UserError, match="refused by the safety checker for 10"):
            fill(tmp_path / "a", PLAN, draw, batch_size=6)
        assert not contents(tmp_path / "a")
        draw = generator(model, safety_checker=False)
        assert draw.settings["safety_checker"] is None
    fill(tmp_path / "b", PLAN, draw, batch_size=6)
    for file in contents(tmp_path / "b"):
        with Image.open(tmp_path / "b" / file) as image:
            assert np.asarray(image).any()


def test_models_that_cannot_be_had_are_one_line(model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no such folder, and an id on the"):
        generator(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        generator(tmp_path)
    with pytest.raises(UserError, match=r"--revision is main: .* a folder, which has"):
        generator(model, revision="main")
    with pytest.raises(UserError, match="--dtype is float16: it needs a GPU"):
        generator(model, dtype="float16")
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be loaded as a StableDiffusionPipelin"):
        generator(broken)

    def refuse(*args, **options):
        raise OSError("no network\nmore")

    monkeypatch.setattr(
        diffusion._libraries()[1].StableDiffusionPipeline, "download", refuse
    )
    with pytest.raises(UserError, match=r"cannot be had from the hub \(no network\)$"):
        generator("someone/something")
