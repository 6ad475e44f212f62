"""Magnitudes of gradients: equal to a loop, kept, drawn, and not released."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import UserError, clipped_gradient
from dpmix_jax.run import diagnostics, export
from dpmix_jax.run.workdir import Workdir
from dpmix_jax.sweeps import figure2
from dpmix_jax.training import TrainState
from tests import toy
from tests.runs import config, run
from tests.test_gradients import gradient_of_one, sets
from tests.test_sweep import config as sweep_config


def magnitudes(params, images, labels):
    """A loop over records and members: average, absolute values, sum; in float64."""
    total = np.zeros(toy.flat(params).shape)
    for of_record in zip(images, labels, strict=True):
        members = [
            toy.flat(gradient_of_one(params, image[None], label[None]))
            for image, label in zip(*of_record, strict=True)
        ]
        total += np.abs(np.mean(np.asarray(members, np.float64), axis=0))
    return total


@pytest.mark.sampled
def test_magnitudes_equal_a_loop_and_leave_the_clipped_sum_alone():
    params, (images, labels) = toy.init_params(), sets(5, 2)
    padding = jnp.arange(5) == 2
    observed = clipped_gradient(toy.loss_fn, l2_clip_norm=1e-3, magnitudes=True)
    plain = clipped_gradient(toy.loss_fn, l2_clip_norm=1e-3)
    total, aux = jax.jit(observed)(params, images, labels, is_padding_example=padding)
    drawn = np.flatnonzero(~padding)
    expected = magnitudes(params, images[drawn], labels[drawn])
    np.testing.assert_allclose(toy.flat(aux.aux), expected, rtol=1e-5, atol=1e-7)
    alone, none = jax.jit(plain)(params, images, labels, is_padding_example=padding)
    np.testing.assert_array_equal(toy.flat(total), toy.flat(alone))
    assert none.aux is None
    _, empty = observed(params, images[:0], labels[:0])
    assert not toy.flat(empty.aux).any()


def test_a_component_that_is_not_finite_counts_nothing():
    observed = clipped_gradient(
        lambda params, x: (params * x).sum(), l2_clip_norm=1.0, magnitudes=True
    )
    rows = jnp.array([[1.0, jnp.nan], [-3.0, 2.0], [jnp.inf, -1.0]])
    _, aux = observed(jnp.ones(2), rows)
    np.testing.assert_array_equal(aux.aux, [4.0, 3.0])


T = 20


def updates(first=0, last=T):
    """Magnitudes of two parameters, of as many records as the number of the update."""
    for step in range(first + 1, last + 1):
        state = TrainState(jnp.int32(step), None, None, None)
        values = {"w": jnp.array([step / 3, 1.0])}
        yield state, {"records": jnp.float32(step), "magnitudes": values}


def observe(folder, first=0, last=T):
    of_run = {"first": first, "num_updates": T, "checkpoint_every": 7}
    return list(diagnostics.observed(updates(first, last), folder, **of_run))


def test_means_are_over_the_records_of_each_stage(tmp_path):
    seen = observe(tmp_path / "seen")
    found = diagnostics.means(tmp_path / "seen", T)
    assert list(found) == ["all", "20", "40", "60", "80", "100"]
    # The second tenth of 20 updates is updates 3 and 4, the last is 19 and 20.
    stages = {"all": range(1, 21), "20": (3, 4), "100": (19, 20)}
    for name, steps in stages.items():
        sums = np.array([sum(steps) / 3, len(steps)])
        np.testing.assert_allclose(found[name], sums / sum(steps), rtol=1e-6)
    last = seen[-1][1]
    assert "magnitudes" not in last
    assert float(last["gradient_stddev"]) == pytest.approx(np.std(found["all"]))


@pytest.mark.parametrize("stopped", [7, 9])
def test_a_run_that_goes_on_keeps_the_same_bits(tmp_path, stopped):
    """Killed after a checkpoint, or stopped by a signal between two."""
    observe(tmp_path / "whole")
    observe(tmp_path / "parts", 0, stopped)
    observe(tmp_path / "parts", stopped)
    whole, parts = (
        diagnostics.means(tmp_path / name, T) for name in ("whole", "parts")
    )
    for name, values in whole.items():
        np.testing.assert_array_equal(values, parts[name])
    assert len(list((tmp_path / "parts").iterdir())) == 3
    with pytest.raises(UserError, match=r"5.safetensors is lost or damaged"):
        observe(tmp_path / "parts", 5)


@pytest.mark.sampled
def test_a_run_measures_them_and_releases_nothing_of_them(tmp_path):
    done = run(tmp_path / "run", diagnostics__gradients=True)
    assert done.status == 0
    workdir = Workdir(tmp_path / "run")
    folder = workdir.path / diagnostics.FOLDER
    found = diagnostics.means(folder, 12)
    assert workdir.metrics()[-1]["nonprivate/gradient_stddev"] == pytest.approx(
        found["all"].std(), rel=1e-5
    )
    assert (folder.stat().st_mode & 0o777) == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    assert not [key for key in workdir.results() if "gradient" in key]
    export.export(workdir.path, tmp_path / "model")
    assert not list((tmp_path / "model").glob("*nonprivate*"))
    # Under the same noise the same weights come out as without them.
    plain = run(tmp_path / "plain")
    assert plain.status == 0
    one, other = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("run", "plain")
    )
    assert one == other


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"performance__clipping": "ghost"}, "performance.clipping 'ghost'"),
        (
            {"method__name": "microbatch_mixup", "method__k_self": 0},
            "method.name 'microbatch_mixup'",
        ),
    ],
)
def test_what_forms_no_gradient_of_a_record_is_refused(wrong, why):
    message = f"diagnostics.gradients is True: it must be False for {why}, where no"
    with pytest.raises(UserError, match=message):
        config(diagnostics__gradients=True, **wrong)


def test_a_density_is_drawn_for_each_row_and_stage(tmp_path):
    grid = sweep_config(seeds=2, metric="nonprivate/gradient_stddev", paper=None)
    records = [
        {"row": row, "epsilon": "3", "seed": seed, "step": T, "workdir": f"{n}"}
        for n, (row, seed) in enumerate(itertools.product(grid.rows, (0, 1)))
    ]
    folder = Workdir(tmp_path)
    figure2.write(grid, folder, records)  # without files there is nothing to draw
    assert not list(tmp_path.glob("*figure2*"))
    for record in records[:3]:
        (tmp_path / record["workdir"]).mkdir()
        observe(tmp_path / record["workdir"] / diagnostics.FOLDER)
    figure2.write(grid, folder, records)
    assert (tmp_path / "nonprivate_figure2.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "nonprivate_figure2.pdf").read_bytes().startswith(b"%PDF")
    values = {"all": np.array([0.1, 0.2, 0.2]), "100": np.array([0.2, 0.2, 0.2])}
    figure = figure2.draw(grid, {"DP-SGD": [values, values]})
    everything, last = figure.axes[0].patches
    for drawn, expected in ((everything, (1 / 3, 2 / 3)), (last, (0, 1))):
        heights, edges, _ = drawn.get_data()
        shares = heights * np.diff(edges)
        assert shares.sum() == pytest.approx(1.0)
        halves = shares[edges[:-1] < 0.15].sum(), shares[edges[:-1] >= 0.15].sum()
        assert halves == pytest.approx(expected)
