"""Kept embeddings: what is in the file, which row an update takes, and whole runs."""

import itertools
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpmix_jax import UserError, devices, training
from dpmix_jax.augment import AugmentationConfig
from dpmix_jax.data import Records
from dpmix_jax.mixup import augmentation_set
from dpmix_jax.models import kept
from dpmix_jax.run import experiment
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.sampling import poisson_batch, record_keys, stream_key
from tests import toy
from tests.test_finetune import SHORT, load

N, M = 7, 3
MESH = devices.make_mesh()
KEY = stream_key(5, "augmentation")
METHOD = toy.method("dp_mix_self")
RECORD_SET = augmentation_set(METHOD, AugmentationConfig(max_shift=1.0))


def encode(frozen, images):
    return jnp.tanh(images.mean((1, 3))) * frozen["scale"][None]


def kept_of(path, records: Records, stop=lambda: False, sets_of=RECORD_SET):
    sets = training.make_sets(
        sets_of, normalize=records.normalize, num_classes=toy.NUM_CLASSES
    )
    frozen = {"scale": jnp.arange(6.0)}
    inputs = training.put_inputs(
        KEY, MESH, records=(records.images, records.labels), constants=(frozen,)
    )
    return kept.keep(
        path,
        kept.make_embed(sets, encode, MESH),
        lambda indices: training.put_batch(indices, MESH),
        inputs,
        num_records=len(records),
        num_sets=M,
        microbatch_size=3,
        stop=stop,
    )


@pytest.mark.sampled
def test_rows_are_the_sets_of_the_first_updates_embedded(tmp_path):
    """By a plain loop over sets and records; the file is its owner's alone."""
    records = toy.records(N)
    rows = kept_of(tmp_path / "embeddings", records)
    assert rows.shape == (M * N,)
    assert rows["embeddings"].dtype == np.float16
    assert rows["embeddings"].shape == (M * N, METHOD.set_size * 6)
    for j, i in itertools.product(range(M), range(N)):
        (key,) = record_keys(KEY, jnp.int32(j), jnp.array([i]))
        label = jax.nn.one_hot(records.labels[i], toy.NUM_CLASSES)
        image = records.normalize(jnp.asarray(records.images[i]))
        images, labels = RECORD_SET(key, image, label)
        expected = encode({"scale": jnp.arange(6.0)}, images)
        row = rows[j * N + i]
        found = row["embeddings"].reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(row["labels"], labels, atol=1e-6)
    assert stat.S_IMODE((tmp_path / "embeddings").stat().st_mode) == 0o600


@pytest.mark.sampled("4-17")
@pytest.mark.parametrize("cut", [0, 17])
@pytest.mark.parametrize("after", range(1, 9, 3))
def test_stopped_or_killed_it_goes_on_to_the_same_bytes(tmp_path, after, cut):
    records, asked = toy.records(N), itertools.count()
    kept_of(tmp_path / "whole", records)
    partial = tmp_path / "embeddings.partial"
    assert (
        kept_of(tmp_path / "embeddings", records, lambda: next(asked) == after) is None
    )
    assert not (tmp_path / "embeddings").exists()
    assert stat.S_IMODE(partial.stat().st_mode) == 0o600
    partial.write_bytes(partial.read_bytes()[: partial.stat().st_size - cut])
    asked = itertools.count()
    kept_of(tmp_path / "embeddings", records, lambda: next(asked) < 0)
    assert next(asked) == 9 - after + (cut > 0)  # no more is embedded than is missing
    assert (tmp_path / "embeddings").read_bytes() == (tmp_path / "whole").read_bytes()
    kept_of(tmp_path / "embeddings", records, lambda: pytest.fail("done before"))


def test_files_of_another_run_are_not_believed(tmp_path):
    """Of another size, or readable by others; and a link is not followed."""
    records, path = toy.records(N), tmp_path / "embeddings"
    kept_of(tmp_path / "whole", records)
    whole = (tmp_path / "whole").read_bytes()
    for name, content in (("", whole[:-1]), (".partial", 2 * whole)):
        stale = tmp_path / f"embeddings{name}"
        stale.write_bytes(content)
        stale.chmod(0o644)
        kept_of(path, records)
        assert path.read_bytes() == whole
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.unlink()
    (tmp_path / "embeddings.partial").symlink_to(tmp_path / "whole")
    with pytest.raises(OSError, match="symbolic links"):
        kept_of(path, records)


def test_another_seed_never_meets_embeddings_of_the_first(tmp_path):
    workdir = Workdir(tmp_path)
    for name in ("embeddings", "embeddings.partial"):
        (tmp_path / name).write_text("of a seed that is lost")
    workdir.begin(None, data="x", noise_multiplier=1.0)
    assert not list(tmp_path.glob("embeddings*"))


@pytest.mark.sampled("0")
@pytest.mark.proves("models.kept.make_embed", 1)
@pytest.mark.parametrize("value", [0, 255])
def test_a_row_is_of_its_record_alone(tmp_path, value):
    """Bit for bit: only the rows of a record that is another differ."""
    records, changed = toy.records(N), 4
    base = kept_of(tmp_path / "base", records)
    records.images[changed] = value
    records.labels[changed] = (records.labels[changed] + 1) % toy.NUM_CLASSES
    found = kept_of(tmp_path / "found", records)
    same = np.array(
        [a.tobytes() == b.tobytes() for a, b in zip(base, found, strict=True)]
    )
    np.testing.assert_array_equal(same, np.arange(M * N) % N != changed)


@pytest.mark.proves("models.kept.rows_of", 1)
def test_each_update_draws_one_set_of_each_record_and_for_it_alone():
    options = {"seed": 3, "num_records": 40, "num_sets": M}
    part, padded = np.arange(40), np.array([7, 39, -1])
    drawn = []
    for step in range(300):
        (rows,) = kept.rows_of([part], step=step, **options)
        np.testing.assert_array_equal(rows % 40, part)
        few = kept.rows_of([padded[:0], padded], step=step, **options)
        np.testing.assert_array_equal(few[1], [rows[7], rows[39], -1])
        drawn.append(rows // 40)
    counts = np.stack([(np.array(drawn) == m).sum(0) for m in range(M)])
    assert counts.sum() == 300 * 40
    assert (np.abs(counts - 100) < 5 * np.sqrt(300 * 2 / 9)).all()
    assert len({tuple(rows) for rows in drawn}) == 300


@pytest.mark.proves("models.kept.sets", 1)
@pytest.mark.parametrize("on_device", [True, False])
def test_a_kept_set_is_the_row_that_was_drawn(tmp_path, on_device):
    rows = kept_of(tmp_path / "embeddings", toy.records(N))
    columns = (rows["embeddings"], rows["labels"])
    batch = training.put_batch(
        np.array([9, -1, 20]), MESH, () if on_device else columns
    )
    inputs = training.put_inputs(KEY, MESH, records=columns if on_device else ())
    found = kept.sets(jnp.int32(0), batch, inputs)
    np.testing.assert_array_equal(found.records, [1, 0, 1])
    assert found.images.dtype == np.float32
    for place, row in ((0, 9), (2, 20)):
        np.testing.assert_array_equal(np.ravel(found.images[place]), columns[0][row])
        np.testing.assert_array_equal(found.labels[place], columns[1][row])


TINY_VIT = SHORT | {
    "data.name": "digits",
    "data.image_size": 16,
    "data.resize": 0,
    "model.patch_size": 8,
    "model.width": 8,
    "model.depth": 1,
    "model.heads": 2,
    "model.embedding_size": 8,
    "privacy.expected_batch_size": 40,
    "privacy.num_updates": 4,
    "privacy.epsilon": 3.0,
    "performance.microbatch_size": 64,
    "logging.eval_every": 4,
}
PLAIN = {
    "method.name": "dp_sgd",
    "method.k_base": 0,
    "method.k_self": 0,
    "method.k_diff": 0,
}


def weights_of(path, flags):
    config = load("configs/vit_b16.py", TINY_VIT | flags)
    assert experiment.run(config, Workdir(path)) == 0
    assert not list(path.glob("embeddings*"))
    return safetensors.numpy.load_file(path / "model.safetensors")


@pytest.mark.slow
def test_without_augmentation_kept_is_fresh(tmp_path):
    """But for half precision; sampling and noise are the same."""
    flags = {"finetune.embeddings": "kept"}
    kept, fresh = (weights_of(tmp_path / str(f), PLAIN | f) for f in (flags, {}))
    assert set(kept) == set(fresh)
    for name, value in fresh.items():
        np.testing.assert_allclose(kept[name], value, atol=2e-3)
    assert np.abs(fresh["params/params/head/kernel"]).max() > 0.1


@pytest.mark.sampled
@pytest.mark.parametrize(
    "place", ["device", pytest.param("host", marks=pytest.mark.slow)]
)
def test_a_run_on_kept_sets_says_so_and_erases_them(tmp_path, monkeypatch, place):
    """Embedded once; the statement and the accuracy over views are there."""
    calls, keep = [], kept.keep
    monkeypatch.setattr(kept, "keep", lambda *a, **k: calls.append(k) or keep(*a, **k))
    flags = {"finetune.embeddings": "kept", "finetune.sets": M, "evaluate.views": 2}
    weights_of(tmp_path / "run", flags | {"performance.dataset_on": place})
    assert [call["num_sets"] for call in calls] == [M]
    text = " ".join((tmp_path / "run" / "PRIVACY.md").read_text().split())
    assert f"{M} augmentation set(s) of each record were embedded once, from" in text
    results = Workdir(tmp_path / "run").results()
    assert 0 <= results["test_accuracy_ema_views"] <= 1
    assert "test_views/accuracy" in Workdir(tmp_path / "run").metrics()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"finetune.embeddings": "no"}, "finetune.embeddings is 'no': it must be one"),
        ({"finetune.sets": 0}, "finetune.sets is 0: it must be at least 1"),
        ({"finetune.sets": 2}, "finetune.sets is 2: it must be 1 unless"),
        (
            {"finetune.embeddings": "kept", "finetune.trainable": "all"},
            "finetune.embeddings is 'kept': it must be 'fresh' where more is",
        ),
        (
            {
                "finetune.embeddings": "kept",
                "method.name": "microbatch_mixup",
                "method.group_size": 2,
                "method.k_base": 1,
                "method.k_self": 0,
            },
            "finetune.embeddings is 'kept': it must be 'fresh' for method.name",
        ),
        ({"evaluate.views": 0}, "evaluate.views is 0: it must be at least 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        experiment.run(
            load("configs/vit_b16.py", TINY_VIT | flags),
            Workdir(tmp_path / "run"),
        )
    assert not list((tmp_path / "run").glob("[!.]*"))


def test_an_update_draws_from_poisson_batches_of_records():
    """Rows change which set stands for a record, never which records are drawn."""
    batch = poisson_batch(1, 2, num_records=90, sampling_prob=0.3)
    (rows,) = kept.rows_of([batch], seed=1, step=2, num_records=90, num_sets=M)
    np.testing.assert_array_equal(rows % 90, batch)
