import contextlib
import functools
import json
import os
import shutil
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpmix_jax import (
    Mechanism,
    UserError,
    clipped_gradient,
    conv,
    data,
    fast_convolutions,
    ghost_clipped_gradient,
    tuning,
)
from dpmix_jax.run import build, convolutions, embeddings
from dpmix_jax.run.performance import PerformanceConfig
from dpmix_jax.run.workdir import Workdir
from tests import runs
from tests.test_conv import CASES, NCHW, Case, assert_close, lowered

PADDED = CASES["padded"]


def per_record(case, formulation):
    gradient = fast_convolutions(jax.grad(case.loss), formulation=formulation)
    return jax.vmap(gradient, (None, 0))


def find(case, operands=None):
    make = functools.partial(per_record, case)
    return tuning.find(make, operands or case.operands())


def timer_of(seconds, calls=None):
    """A clock that says what it is told to, and raises where that is None."""

    def timer(found, name):
        if calls is not None:
            calls.append((tuning.key(found), name))
        if seconds[name] is None:
            raise MemoryError
        return seconds[name]

    return timer


# --- Choices, and the programs that they make ---------------------------------------


@pytest.mark.sampled("padded-rows")
@pytest.mark.parametrize("name", conv.FORMULATIONS)
@pytest.mark.parametrize("case", ["padded", "dilated", "depthwise"])
def test_a_choice_makes_the_program_of_the_formulation_of_that_name(case, name):
    """Which equals the definition (`test_conv`), fallbacks of the name included."""
    case = CASES[case]
    chosen = tuning.chooser(dict.fromkeys(find(case), name))
    for platform in ("cpu", "cuda"):
        assert lowered(case, chosen, platform) == lowered(case, name, platform)


def test_a_convolution_without_a_choice_is_computed_by_auto():
    other = tuning.chooser(dict.fromkeys(find(CASES["dilated"]), "plain"))
    for platform in ("cpu", "cuda"):
        auto = lowered(PADDED, "auto", platform)
        assert lowered(PADDED, other, platform) == auto
        assert auto != lowered(PADDED, "plain", platform)


def _two(kernels, images):
    """Two convolutions, of 3x3 and of 5x5, one after the other."""
    for kernel in kernels:
        images = jnp.tanh(
            jax.lax.conv_general_dilated(
                images, kernel, (1, 1), "SAME", dimension_numbers=NCHW
            )
        )
    return jnp.square(images).sum()


@pytest.mark.sampled
def test_each_convolution_is_computed_by_its_own_choice():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((3, 2, 2, 6, 6)), jnp.float32)
    kernels = [
        jnp.asarray(rng.standard_normal((2, 2, n, n)), jnp.float32) for n in (3, 5)
    ]

    def make(formulation):
        gradient = fast_convolutions(jax.grad(_two), formulation=formulation)
        return jax.vmap(gradient, (None, 0))

    keys = list(tuning.find(make, (kernels, images)))
    assert len(keys) == 2
    each = [jax.grad(_two)(kernels, image) for image in images]  # record after record
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    texts = set()
    for names in [("rows", "plain"), ("plain", "batch_group"), ("shifted", "rows")]:
        function = jax.jit(make(tuning.chooser(dict(zip(keys, names, strict=True)))))
        assert_close(function(kernels, images), expected, message=str(names))
        texts.add(function.lower(kernels, images).as_text())
    assert len(texts) == 3


@pytest.mark.parametrize("transform", [clipped_gradient, ghost_clipped_gradient])
def test_clipped_sums_take_choices(transform):
    kernel, images = PADDED.operands()

    def make(formulation):
        return transform(PADDED.loss, l2_clip_norm=1.0, convolutions=formulation)

    found = tuning.find(make, (kernel, images))
    assert len(found) == 1
    texts = [
        str(jax.make_jaxpr(make(formulation))(kernel, images))
        for formulation in (tuning.chooser(dict.fromkeys(found, "plain")), "plain")
    ]
    named = str(jax.make_jaxpr(make("auto"))(kernel, images))
    assert texts[0].count("\n") == texts[1].count("\n") != named.count("\n")


def test_refuses_a_name_that_there_is_not():
    with pytest.raises(UserError, match="formulation is 'fft': it must be one of auto"):
        lowered(PADDED, lambda _: "fft", "cpu")


# --- Keys ---------------------------------------------------------------------------


def keys_of(case, operands=None, precision=None):
    """The keys of all convolutions of a gradient, those without a choice too."""
    keys = []
    function = per_record(case, lambda found: keys.append(tuning.key(found)) or "auto")
    with jax.default_matmul_precision(precision):
        jax.eval_shape(function, *(operands or case.operands()))
    return keys


@pytest.mark.sampled
def test_keys_differ_by_everything_that_matters():
    base = Case((7, 8), (3, 3))
    kernel, images = base.operands()
    found = [
        keys_of(base),
        keys_of(base, (kernel, jnp.concatenate([images, images]))),  # records
        keys_of(base, (kernel, jnp.concatenate([images, images], axis=1))),  # images
        keys_of(base, precision="float32"),
        *(
            keys_of(base._replace(**change))
            for change in (
                {"space": (8, 7)},
                {"kernel": (3, 2)},
                {"strides": (1, 2)},
                {"padding": ((1, 1), (0, 2))},
                {"rhs_dilation": (2, 1)},
                {"lhs_dilation": (1, 2)},
                {"groups": 2},
                {"channels": (4, 3)},
                {"layout": NCHW},
                {"dtype": jnp.bfloat16},
            )
        ),
    ]
    assert [len(keys) for keys in found] == [1] * len(found)
    assert len({keys[0] for keys in found}) == len(found)
    assert keys_of(base) == found[0]


def test_a_key_is_readable_and_the_same_in_every_version():
    found = conv.Batched(
        {
            "window_strides": (1, 2),
            "precision": None,
            "dimension_numbers": jax.lax.ConvDimensionNumbers((0, 2, 1), (1, 2, 0), ()),
        },
        jax.ShapeDtypeStruct((4, 2, 9), jnp.float32),
        jax.ShapeDtypeStruct((4, 2, 3), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 3), jnp.float32),
    )
    assert tuning.key(found) == (
        "4 records of float32[2,9] and bfloat16[2,3]:"
        " dimension_numbers=((0,2,1),(1,2,0),()) window_strides=(1,2)"
    )


# --- Timing -------------------------------------------------------------------------


def fastest(**seconds):
    found = find(PADDED)
    with timing(seconds):
        return set(tuning.measure(found).values())


def test_the_fastest_wins_and_what_fails_never():
    assert fastest(rows=3.0, shifted=2.0, plain=1.0) == {"plain"}
    assert fastest(rows=3.0, shifted=2.0, plain=None) == {"shifted"}
    assert fastest(rows=None, shifted=2.0, plain=2.5) == {"shifted"}
    assert fastest(rows=2.0, shifted=1.0, plain=1.0) == {"shifted"}
    # The table's choice, where two take the same time, and where all fail.
    assert fastest(rows=1.0, shifted=1.0, plain=1.0) == {"rows"}
    assert fastest(rows=None, shifted=None, plain=None) == {"rows"}


def test_accelerators_are_asked_for_all_formulations(monkeypatch):
    (found,) = find(PADDED).values()
    assert tuning.timed_on() == "cpu"
    assert tuning.applicable(found) == ("rows", "shifted", "plain")
    monkeypatch.setattr(tuning, "timed_on", lambda: "gpu")
    assert tuning.applicable(found) == ("batch_group", "rows", "shifted", "plain")


def test_where_there_is_no_choice_nothing_is_timed():
    assert find(CASES["patches"]) == {}  # 81 taps: plain alone applies
    assert find(CASES["transposed"]) == {}


@pytest.mark.sampled
def test_the_clock_calls_what_it_times_and_tells_the_median(monkeypatch):
    monkeypatch.setattr(tuning, "_SECONDS", 0.0)  # one call beside the first
    (found,) = find(PADDED).values()
    ticks = iter([0.0, 10.0, 13.5, 20.0])
    with mock.patch("time.perf_counter", side_effect=ticks):
        assert tuning.seconds_of(found, "shifted") == 3.5
    assert set(tuning.measure(find(PADDED)).values()) <= {"rows", "shifted", "plain"}


@pytest.mark.proves("tuning.measure", 1)
def test_what_is_timed_is_of_no_record(monkeypatch):
    """`find` keeps shapes and types alone, and operands are drawn for these."""
    kernel, images = PADDED.operands()
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (kernel, images)]
    found = find(PADDED, types)
    assert len(found) == 1
    for records in (images, 0 * images, jnp.nan * images):
        assert find(PADDED, (kernel, records)) == found
    for leaf in jax.tree.leaves(list(found.values())):
        assert not isinstance(leaf, (jax.Array, np.ndarray))

    seen = []

    def batched(params, name, *operands):
        seen.append(operands)
        return jnp.zeros(())

    monkeypatch.setattr(tuning, "_SECONDS", 0.0)
    monkeypatch.setattr(conv, "batched", batched)
    monkeypatch.setattr(jax, "jit", lambda function: function)
    tuning.measure(found)
    assert len(seen) == 6  # of three formulations two calls each
    for one, other in seen:
        np.testing.assert_array_equal(one, seen[0][0])
        np.testing.assert_array_equal(other, seen[0][1])
        assert 0.5 < np.std(one) < 2


# --- A run --------------------------------------------------------------------------

SHIFTED = {"rows": 2.0, "shifted": 1.0, "plain": 3.0}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(convolutions, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "convolutions"


@contextlib.contextmanager
def timing(seconds, calls=None):
    with mock.patch.object(tuning, "seconds_of", timer_of(seconds, calls)):
        yield


@functools.cache
def parts_of(formulation):
    return build_parts(runs.config(performance__convolutions=formulation))[0]


def build_parts(config):
    model = build.classifier(config, digits())
    mechanism = Mechanism(sampling_prob=0.1, num_updates=1, noise_multiplier=1.0)
    parts = build.build(
        config, model, model.shapes, digits(), mechanism=mechanism, seed=0
    )
    return parts, model


@functools.cache
def digits():
    return data.load(data.DataConfig()).train


def text(parts):
    return parts.accumulate.lower(*parts.arguments(8)).as_text()


@functools.cache
def text_by(formulation):
    return text(parts_of(formulation))


def measured(path, *, goes_on=False, size=8, budget=0.0):
    path.mkdir(exist_ok=True)
    config = PerformanceConfig(microbatch_size=size, memory_gib=budget)
    parts = parts_of("measured")
    return convolutions.measured(parts, config, 8, Workdir(path), goes_on=goes_on)


@pytest.mark.sampled
def test_parts_compute_by_what_was_measured_kept_or_found_in_the_cache(
    tmp_path, cache, capsys
):
    calls = []
    with timing(SHIFTED, calls):
        parts = measured(tmp_path / "first")
    assert len(calls) == 2 * 3  # of two convolutions
    shifted, plain = text_by("shifted"), text_by("plain")
    assert text(parts) == shifted != plain
    assert "2 of 2 shapes measured" in (said := capsys.readouterr().err)
    assert ", shifted 2" in said
    content = json.loads((tmp_path / "first/convolutions.json").read_text())
    assert content["device"] == jax.devices()[0].device_kind
    assert content["jax"] == jax.__version__
    assert [*content["choices"].values()] == ["shifted"] * 2
    assert "harding" not in str(content)

    with timing({}):  # another run: a clock that is asked would raise
        parts = measured(tmp_path / "second")
    assert text(parts) == shifted
    assert "0 of 2 shapes measured" in capsys.readouterr().err
    assert os.listdir(cache) != []

    # Of its own file, whatever machine it is of, a run goes on.
    plainly = {key: "plain" for key in content["choices"]}
    other = {**content, "device": "H100", "choices": plainly}
    Workdir(tmp_path / "first").write_json("convolutions.json", other)
    with timing({}):
        assert text(measured(tmp_path / "first", goes_on=True)) == plain
    assert "as chosen on H100, where the run began" in capsys.readouterr().err

    # New shapes alone are measured, and a damaged cache is as none.
    (file,) = cache.glob("*.json")
    key, _ = content["choices"]
    file.write_text(json.dumps({**content, "choices": {key: "rows"}}))
    calls.clear()
    with timing(SHIFTED, calls):
        measured(tmp_path / "third")
    assert len(calls) == 3
    assert key not in dict(calls)
    assert json.loads(file.read_text())["choices"] == {
        **content["choices"],
        key: "rows",
    }
    file.write_text('{"choices"')
    with timing(SHIFTED, calls):
        measured(tmp_path / "fourth")
    assert len(calls) == 3 + 6
    assert json.loads(file.read_text()) == content


@pytest.mark.sampled
def test_convolutions_of_a_head_are_found_too():
    """Of embeddings, made anew or kept; a frozen encoder needs no gradients."""
    config = runs.config(
        model__name="scattering_cnn",
        model__features="4",
        model__scales=1,
        finetune__trainable="head",
        performance__clipping="instantiate",
    )
    parts, model = build_parts(config)
    rows = embeddings.blank_rows(parts, config, model, 8)
    kept = embeddings.on_kept(parts, config, model, rows, seed=0)
    # The noise was scaled by the first.
    assert kept.gradient_fn.l2_norm_bound == parts.gradient_fn.l2_norm_bound == 1.0
    for each in (parts, kept):
        (key,) = tuning.find(each.accumulate_by, each.arguments(8))
        assert key.startswith("8 records of float32[3,4,4,")


@pytest.mark.sampled
def test_what_needs_more_memory_than_there_is_is_not_chosen(tmp_path, cache, capsys):
    needed = mock.patch.object(build.Parts, "bytes_needed", return_value=2**30)
    with timing(SHIFTED), needed:
        measured(tmp_path / "fits", size="auto", budget=1.0)
        chosen = Workdir(tmp_path / "fits").read_json("convolutions.json")["choices"]
        assert [*chosen.values()] == ["shifted"] * 2
        parts = measured(tmp_path / "not", size="auto", budget=0.99)
    assert "the fastest need more memory than there is" in capsys.readouterr().err
    assert text(parts) == text_by("auto")
    assert Workdir(tmp_path / "not").read_json("convolutions.json")["choices"] == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no convolutions.json, which a run with performance.convolutions"),
        ("{", r"convolutions.json is damaged: use another --workdir"),
        ('{"device": "cpu"}', r"convolutions.json is damaged"),
        ('{"device": "cpu", "choices": {"a": "fft"}}', r"convolutions.json is damaged"),
        ('{"device": "cpu", "choices": {"a": []}}', r"convolutions.json is damaged"),
    ],
)
def test_a_run_that_goes_on_needs_its_choice(tmp_path, cache, content, message):
    if content:
        (tmp_path / "convolutions.json").write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        measured(tmp_path, goes_on=True)
    assert "\n" not in str(raised.value)


def test_several_processes_are_refused():
    config = runs.config(performance__convolutions="measured")
    config.check_processes(1)
    runs.config(performance__convolutions="rows").check_processes(2)
    with pytest.raises(
        UserError, match="convolutions is 'measured': it must be 'auto'"
    ):
        config.check_processes(2)


@pytest.mark.sampled
def test_a_run_that_is_stopped_ends_with_the_same_bits(tmp_path, cache, monkeypatch):
    start = functools.partial(
        runs.run,
        method__name="dp_sgd",
        method__k_base=0,
        method__k_self=0,
        model__features="4",
        performance__convolutions="measured",
        performance__microbatch_size=128,
    )
    with timing(SHIFTED):
        whole = start(tmp_path / "whole")
    assert whole.status == 0, whole.err
    assert "1 of 1 shapes measured" in whole.err

    said = Workdir.add_metrics

    def stop_after_four(self, line):
        said(self, line)
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    shutil.rmtree(cache)
    stopped = tmp_path / "stopped"
    with timing(SHIFTED), monkeypatch.context() as patch:
        patch.setattr(Workdir, "add_metrics", stop_after_four)
        assert start(stopped).status == 128 + signal.SIGTERM
    content = Workdir(stopped).read_json("convolutions.json")
    Workdir(stopped).write_json("convolutions.json", {**content, "device": "H100"})
    shutil.rmtree(cache)
    (stopped / "convolutions.json").rename(tmp_path / "aside")
    lost = start(stopped)
    assert lost.status == 2
    assert "has no convolutions.json" in lost.err.splitlines()[-1]
    (tmp_path / "aside").rename(stopped / "convolutions.json")
    with timing({}):
        done = start(stopped)
    assert done.status == 0, done.err
    assert "as chosen on H100" in done.err
    assert "measured in" not in done.err
    assert runs.outcome(stopped) == runs.outcome(tmp_path / "whole")
