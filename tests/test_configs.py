"""Every config at every argument: it loads, and spends its budget and no more."""

import importlib
import json
import pathlib
import re
import sys

import pytest

from dpmix_jax import UserError, sweeps
from dpmix_jax.accounting import Mechanism
from dpmix_jax.data import blank
from dpmix_jax.mixup import METHODS
from dpmix_jax.run.cli import default_workdir, load_experiment, parse, read_config
from dpmix_jax.run.config import (
    check_flags,
    differences,
    flatten,
    from_config_dict,
    to_dict,
)
from tests.conftest import ROOT

EPSILONS = ("1", "2", "3", "4", "6", "8")
DATASETS = ("cifar10", "eurosat", "caltech256", "sun397", "oxford_iiit_pet")
# By config and argument what `accounting.calibrate` found (dp_accounting 0.6.0, PLD),
# rounded up: searching takes up to half a minute a point, checking one evaluation.
NOISE_MULTIPLIERS = {
    name: dict(zip(EPSILONS, noise, strict=True))
    for name, noise in {
        "wrn16_4_cifar10": (9.1192, 5.5674, 4.6360, 3.7372, 2.8022, 2.6225),
        "wrn16_4_cifar100": (9.1192, 5.5674, 4.6360, 3.7372, 2.8022, 2.6225),
        "wrn16_4_eurosat": (10.538, 6.4230, 5.3440, 4.3005, 3.2130, 3.0047),
        "wrn40_4_cifar10": (36.840, 22.256, 17.452, 14.923, 10.897, 8.8385),
        "digits": (5.3666, 3.3931, 2.6903, 2.3200, 1.8267, 1.5728),
        "fashion_mnist": (1.26504, 0.89260, 0.76961, 0.69963, 0.61505, 0.56260),
    }.items()
}
LADDER = ("1", "2", "3", "4", "8")
NOISE_MULTIPLIERS |= {
    name: dict(zip(LADDER, noise, strict=True))
    for name, noise in {
        "scattering_fashion_mnist": (8.6372, 4.6904, 3.3298, 3.0944, 2.0968),
        "scattering_cnn_fashion_mnist": (2.041, 1.2803, 1.0322, 0.9039, 0.6807),
        "scattering_cifar10": (10.3342, 5.5900, 3.9505, 3.6698, 2.4653),
    }.items()
}
NOISE_MULTIPLIERS["wrn_digits"] = NOISE_MULTIPLIERS["digits"]
NOISE_MULTIPLIERS["scattering_digits"] = {
    epsilon: NOISE_MULTIPLIERS["digits"][epsilon] for epsilon in ("1", "2", "4", "8")
}
FROM_SCRATCH = tuple(NOISE_MULTIPLIERS)
# Heads: batch and updates of a dataset are the same at each epsilon, so one tells.
HEADS = (1.8786, 2.7388, 2.5852, 1.4943, 6.3973)
NOISE_MULTIPLIERS["vit_b16"] = {
    f"{data}-1": noise for data, noise in zip(DATASETS, HEADS, strict=True)
}
NOISE_MULTIPLIERS["wrn28_10"] = {
    **{"cifar10-1": 19.411, "cifar10-2": 14.673},
    **{"cifar100-4": 11.255, "cifar100-8": 8.8385},
}
RUNS = (*NOISE_MULTIPLIERS, "convnext_base")
SWEEPS = (
    "baselines",
    "cifar10_ladder",
    "figure2",
    "fine_tuned",
    "from_scratch",
    "rates",
    "same_epsilon",
    "scattering_ablation",
    "fashion_mnist_ladder",
    "table10",
    "table11",
    "table12",
    "trainable_digits",
)


def module(name):
    return importlib.import_module(f"configs.{name}")


def arguments(name):
    found = module(name)
    return list(found.ROWS if name in FROM_SCRATCH else found.POINTS)


def load(name, argument):
    weights = ["--config.finetune.weights=w"] if name == "wrn28_10" else []
    return load_experiment([f"--config={ROOT}/configs/{name}.py:{argument}", *weights])


def grid(name, *argument, settings=()):
    return sweeps.from_config_dict(module(name).get_config(*argument), settings)


def test_each_file_is_tested_and_has_a_header():
    files = {path.stem for path in (ROOT / "configs").glob("[!_]*.py")}
    assert files == {*RUNS, *SWEEPS}
    for name in files:
        header = module(name).__doc__
        for words in (f"--config=configs/{name}.py", "Hardware", "Hours", "Accuracy"):
            assert words in header, (name, words)
        for page in re.findall(r"docs/[\w/]+\.md", header):
            assert (ROOT / page).exists(), (name, page)
        assert name not in FROM_SCRATCH or "row" in header


@pytest.mark.parametrize("name", RUNS)
def test_every_argument_round_trips_and_is_what_it_says(name):
    for argument in arguments(name):
        config = load(name, argument)
        again = from_config_dict(json.loads(json.dumps(to_dict(config))))
        assert to_dict(again) == to_dict(config)
        data, _, epsilon = argument.rpartition("-")
        assert config.privacy.epsilon == float(epsilon)
        assert config.privacy.delta == 1e-5 < 1 / len(blank(config.data))
        if data:
            assert config.data.name == data
    if name in FROM_SCRATCH:
        assert arguments(name) == list(NOISE_MULTIPLIERS[name])
        stated = re.search(r"\((\d) if none is given\)", module(name).__doc__)
        default = module(name).get_config().to_dict()
        assert to_dict(from_config_dict(default)) == to_dict(load(name, stated[1]))


@pytest.mark.sampled("wrn16_4_cifar10")
@pytest.mark.parametrize("name", NOISE_MULTIPLIERS)
def test_a_config_keeps_its_budget(name):
    for argument, noise_multiplier in NOISE_MULTIPLIERS[name].items():
        config = load(name, argument)
        mechanism = Mechanism(
            sampling_prob=config.privacy.sampling_prob(len(blank(config.data))),
            num_updates=config.privacy.num_updates,
            noise_multiplier=noise_multiplier,
            neighboring_relation=config.privacy.relation,
        )
        target = config.privacy.epsilon
        assert 0.99 * target < mechanism.epsilon(1e-5) <= target, argument


@pytest.mark.parametrize("name", ["vit_b16", "convnext_base"])
def test_a_linear_head_sees_what_its_encoder_wants(name):
    assert len(arguments(name)) == 6 * 4
    for argument in arguments(name):
        config = load(name, argument)
        assert max(config.data.image_size, config.data.resize) == module(name).SIZE
        epochs = config.privacy.num_updates * 1000 / len(blank(config.data))
        assert 10 <= epochs < 10.5
        assert config.finetune.trainable == "head"
    assert load(name, "sun397-4").privacy == load("vit_b16", "sun397-4").privacy


@pytest.mark.sampled("digits:1-143")
@pytest.mark.parametrize(
    ("base", "validation_size"),
    [("vit_b16:eurosat-4", 2160), ("wrn28_10:cifar100-8", 5000), ("digits:1", 143)],
)
def test_rates_are_searched_on_a_tenth_of_the_records(base, validation_size):
    weights = ["finetune.weights=w"] if base.startswith("wrn28_10") else []
    search = grid("rates", base, settings=weights)
    runs = search.runs()
    assert len(runs) == 2 * 5 * 3
    assert {run.config.data.validation_size for run in runs} == {validation_size}
    rates = {run.config.optimizer.learning_rate for run in runs}
    assert load(*base.split(":")).optimizer.learning_rate in rates
    assert {run.config.method.name for run in runs} == {"self_aug", "dp_mix_self"}
    assert search.chooses


@pytest.mark.parametrize("held_out", [0, 40])
def test_rates_of_a_file_are_around_its_own_on_its_own_validation_records(
    tmp_path, held_out
):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import digits\n\n\ndef get_config(rate):\n"
        "    config = digits.get_config()\n"
        "    config.optimizer.learning_rate = float(rate)\n"
        "    config.method = {'name': 'dp_sgd'}\n"
        f"    config.data.validation_size = {held_out}\n    return config\n"
    )
    runs = grid("rates", f"{path}:3").runs()
    assert {run.row for run in runs} == {"dp_sgd"}
    rates = [run.config.optimizer.learning_rate for run in runs if run.seed == 0]
    assert rates == [0.75, 1.5, 3.0, 6.0, 12.0]
    assert {run.config.data.validation_size for run in runs} == {held_out or 143}


@pytest.mark.parametrize("name", ["baselines", "table10"])
@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_every_run_of_the_tables_has_a_config(name, data):
    built = [run.config for run in grid(name, data).runs()]
    methods = {config.method.name for config in built}
    sizes = {config.method.set_size for config in built}
    if name == "table10":
        assert methods == {"self_aug", "dp_mix_self", "dp_mix_diff"}
        assert {config.data.half for config in built} == {1}
        assert {c.public and c.public.half for c in built} == {None, 2}
        assert {c.privacy.epsilon for c in built} == {2.0}
        assert sizes == {34, 36}
    else:
        assert methods == {*METHODS, "microbatch_mixup"}
        assert sizes == {1, 16, 20, 34, 36}
        assert len(built) == 10 * 2 * 5


def test_a_ladder_compares_methods_on_as_many_images():
    plain = [run.config for run in grid("fashion_mnist_ladder").runs()]
    assert len(plain) == len(LADDER) * 5
    built = [run.config for run in grid("fashion_mnist_ladder", "methods").runs()]
    sizes = {(b.method.name, b.method.set_size) for b in built}
    assert sizes == {
        *(("dp_sgd", 1), ("self_aug", 2), ("self_aug", 4)),
        *(("dp_mix_self", 4), ("dp_mix_diff", 4)),
    }
    assert {b.finetune.embeddings for b in plain + built} == {"kept"}
    others = [run.config for run in grid("fashion_mnist_ladder", "epsilons").runs()]
    assert len(others) == 4 * len(built)
    rates = {(c.privacy.epsilon, c.optimizer.learning_rate) for c in plain + others}
    assert rates == {(1, 4), (2, 6), (3, 8), (4, 12), (8, 16)}
    cnn = [run.config for run in grid("fashion_mnist_ladder", "cnn").runs()]
    by_method = {(c.method.name, c.method.set_size): [] for c in cnn}
    for c in cnn:
        images = c.method.set_size * c.privacy.expected_batch_size
        by_method[c.method.name, c.method.set_size].append(images)
    assert {*by_method["dp_sgd", 1]} == {2048, 8192}
    assert {*by_method["dp_mix_self", 4], *by_method["self_aug", 4]} == {8192}
    assert {c.finetune.whitening for c in cnn} == {None}
    pixels = [run.config for run in grid("fashion_mnist_ladder", "pixels").runs()]
    assert [p.method for p in pixels] == [c.method for c in cnn]
    costs = {p.method.set_size * p.privacy.expected_batch_size for p in pixels}
    assert costs == {512, 1024, 2048}
    assert {p.privacy.num_updates for p in pixels} == {1000}
    for run in (*cnn, *pixels):
        assert run.privacy.epsilon in {1, 2, 3, 4, 8}
    assert len(cnn) == len(pixels) == 5 * 6 * 5


def test_halves_mix_what_is_not_private():
    for run in grid("cifar10_ladder", "halves").runs():
        config = run.config
        assert (config.data.name, config.data.half) == ("cifar10", 1)
        assert (config.public.name, config.public.half) == ("cifar10", 2)


@pytest.mark.parametrize("base", ["digits", "fashion_mnist"])
def test_noise_and_steps_are_compared_at_the_same_epsilon(base):
    built = grid("same_epsilon", base)
    first, *others = built.runs()[: len(built.rows)]
    assert first.row == "DP-SGD"
    for run in others:
        changed = differences(to_dict(first.config), to_dict(run.config))
        keys = {text.split(" ")[0] for text in changed}
        assert keys
        assert {key for key in keys if not key.startswith("optimizer.")} <= {
            *("privacy.clipping_rule", "privacy.per_layer", "privacy.sampling"),
            *("privacy.mechanism", "privacy.bands"),
            *("privacy.expected_batch_size", "privacy.num_updates"),
        }
        images = (
            each.config.privacy.num_updates * each.config.privacy.expected_batch_size
            for each in (first, run)
        )
        assert next(images) == pytest.approx(next(images), rel=0.05)
    assert {run.config.method.name for run in (first, *others)} == {"dp_sgd"}


def test_an_ablation_changes_one_part_in_each_row():
    built = grid("scattering_ablation")
    baseline, *others = built.runs()[: len(built.rows)]
    for run in others:
        changed = differences(to_dict(baseline.config), to_dict(run.config))
        assert changed
        assert {text.split(" ")[0] for text in changed} <= {*built.rows[run.row]}
    assert {run.config.data.validation_size for run in built.runs()} == {5000}
    distance = {"T = 140", "T = 560", "C = 1", "no momentum"}
    for run in (run for run in others if run.row in distance):
        config = run.config
        gone = config.optimizer.learning_rate * config.privacy.l2_clip_norm
        gone *= config.privacy.num_updates / (1 - config.optimizer.momentum)
        assert gone == pytest.approx(8 * 0.1 * 280 / 0.1)


def test_what_is_kept_is_all_that_differs():
    built = grid("scattering_ablation", "kept")
    *kept, fresh = (to_dict(run.config) for run in built.runs())
    assert [config["finetune"]["sets"] for config in kept] == [1, 4, 16]
    for config in kept:
        keys = {text.split(" ")[0] for text in differences(config, fresh)}
        assert "finetune.embeddings" in keys
        assert keys <= {"finetune.embeddings", "finetune.sets"}
    assert fresh["data"]["half"] == 1
    privacy, optimizer = fresh["privacy"], fresh["optimizer"]
    base = load("scattering_fashion_mnist", "3")
    q = base.privacy.expected_batch_size / 60_000
    assert privacy["expected_batch_size"] / 30_000 == q
    gone = optimizer["learning_rate"] * privacy["num_updates"]
    assert gone == base.optimizer.learning_rate * base.privacy.num_updates


def test_what_is_trained_is_all_that_differs():
    built = grid("trainable_digits")
    runs = {run.row: run.config for run in built.runs()[: len(built.rows)]}
    whole, scratch = runs["all"], runs["all, not pre-trained"]
    assert (whole.finetune.weights, scratch.finetune.weights) == (
        "runs/drawn_digits/model.safetensors",
        None,
    )
    trained = [row for row in runs if runs[row].finetune.trainable != "all"]
    assert len(trained) == len(runs) - 2
    for row in trained:
        changed = differences(to_dict(whole), to_dict(runs[row]))
        keys = {text.split(" ")[0] for text in changed}
        assert "finetune.trainable" in keys
        assert keys <= {
            *("finetune.trainable", "finetune.rank", "optimizer.learning_rate"),
        }
    [changed] = differences(to_dict(whole), to_dict(scratch))
    assert changed.startswith("finetune.weights ")


SIX = [
    f"{encoder}-{data}"
    for encoder in ("vit_b16", "convnext_base")
    for data in module("vit_b16").DATASETS
]


@pytest.mark.sampled(
    "figure2-digits",
    "from_scratch-cifar10",
    "table12-cifar100",
    "fine_tuned-vit_b16-cifar10",
)
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *(("figure2", data) for data in ("cifar10", "caltech256", "digits")),
        *(("fine_tuned", point) for point in (*SIX, "digits")),
        *(("from_scratch", data) for data in module("from_scratch").BASES),
        *(("table12", data) for data in ("cifar100", "digits")),
    ],
)
def test_a_grid_of_the_paper_has_its_methods_and_one_at_equal_compute(name, argument):
    found = grid(name, argument)
    built = {run.row: run.config for run in found.runs()[:: len(found.points)]}
    for row, config in built.items():
        sizes = re.findall(r"\d+", row) or ["1"]
        assert config.method.set_size == sum(map(int, sizes))
        assert (config.public is not None) == ("_diff" in row)
    data = argument.split("-")[-1]
    assert {config.data.name for config in built.values()} == {data}
    epsilons = {run.config.privacy.epsilon for run in found.runs()}
    one = name in ("figure2", "table12")
    assert epsilons == ({1.0} if one else {1.0, 2.0, 4.0, 8.0})
    (mixed,) = (c.method.set_size for row, c in built.items() if "_self" in row)
    assert [config.method.set_size for config in built.values()].count(mixed) == 2
    seen = {config.diagnostics.gradients for config in built.values()}
    assert seen == {name == "figure2"}
    cited = {cell[0] for cell in (found.paper or {"cells": ()})["cells"]}
    assert cited <= set(found.rows)


@pytest.mark.parametrize("data", ["", "cifar10", "digits", "fashion_mnist"])
def test_table11_compares_at_equal_compute(data):
    table11 = grid("table11", *filter(None, [data]))
    built = [run.config for run in table11.runs()]
    assert len(built) == 3 * 2 * 5
    assert {b.data.name for b in built} == {data or "cifar10"}
    assert [b.privacy.epsilon for b in built[:6]] == [1.0, 8.0] * 3
    names = [b.method.name for b in built[:6:2]]
    assert names == ["self_aug", "self_aug", "dp_mix_self"]
    fewer, equal, mixed = (b.method.set_size for b in built[:6:2])
    assert fewer == built[4].method.k_base < equal == mixed
    if data in ("", "cifar10"):
        assert (fewer, equal) == (16, 34)
        assert {cell[0] for cell in table11.paper["cells"]} <= set(table11.rows)


def test_an_argument_without_a_row_is_one_line():
    with pytest.raises(UserError) as error:
        load("digits", "5")
    assert str(error.value) == (
        "--config cannot be loaded: epsilon is '5': it must be one of 1, 2, 3, 4, 6, 8"
    )
    with pytest.raises(
        UserError, match="data is 'mnist': it must be one of cifar10, d"
    ):
        grid("table11", "mnist")
    with pytest.raises(UserError, match="config is table11: it must be that of one ru"):
        grid("rates", "table11")
    with pytest.raises(UserError, match=r"--config is no\.py: there is no such file"):
        grid("rates", "no.py")
    with pytest.raises(UserError, match=r"finetune.weights is None: it must be a"):
        load_experiment([f"--config={ROOT}/configs/wrn28_10.py:cifar100-1"])


def test_what_a_file_raises_is_one_line(tmp_path):
    path, other = tmp_path / "broken.py", tmp_path / "other.py"
    path.write_text("def get_config():\n    return 1 + 'a'\n")
    with pytest.raises(UserError) as error:
        load_experiment([f"--config={path}"])
    assert str(error.value) == (
        "--config cannot be loaded: TypeError: unsupported operand type(s) for +: 'int'"
        " and 'str'"
    )
    other.write_text("def get_config():\n    return {}['a']\n")
    with pytest.raises(UserError, match="--config cannot be loaded: KeyError: 'a'"):
        load_experiment([f"--config={other}"])
    with pytest.raises(UserError, match=r"--config is none.py: there is no such file"):
        load_experiment(["--config=none.py:8"])


def test_a_program_started_anywhere_finds_what_configs_share(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    elsewhere = [path for path in sys.path if pathlib.Path(path or ".") != ROOT]
    monkeypatch.setattr(sys, "path", elsewhere)
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    flags = [f"--config={ROOT}/configs/digits.py"]
    with pytest.raises(UserError, match="No module named 'configs'"):
        load_experiment(flags)
    with pytest.raises(SystemExit):
        parse([f"{ROOT}/experiments/run.py", "--no_such_flag"])
    assert load_experiment(flags).data.name == "digits"


def test_flags_reach_groups_that_a_config_leaves_empty():
    settings = {
        "method": {"name": "dp_mix_diff", "k_diff": 1, "distinct_pairs": False},
        "public": {"name": "npz", "path": "public.npz"},
        "pretrain": {"batch_size": 8, "learning_rate": 0.2},
        "finetune": {"weights": "a.safetensors", "skip": "Dense_0"},
        "data": {"half": 1},
    }
    flags = (f"--config.{key}={value}" for key, value in flatten(settings).items())
    config = to_dict(load_experiment([f"--config={ROOT}/configs/digits.py", *flags]))
    for group, values in settings.items():
        assert config[group] == config[group] | values


def test_flags_are_checked_before_they_are_parsed():
    check_flags(["run.py", "--config=a.py", "--config.method.name=dp_sgd", "--x=y"])
    with pytest.raises(UserError, match="unknown key metod: did you mean method"):
        check_flags(["run.py", "--config.metod.name=dp_sgd"])


def test_default_workdir():
    path = ROOT / "configs/digits.py"
    assert str(default_workdir(path, "")) == "runs/digits"
    assert str(default_workdir(path, "8")) == "runs/digits-8"


def test_a_run_is_a_config_whatever_its_folder_is_called(tmp_path):
    folder = default_workdir(ROOT / "configs/rates.py", "vit_b16:cifar10-1")
    path = tmp_path / folder / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(to_dict(load_experiment(["--config=digits:8"]))))
    assert load_experiment([f"--config={path}"]).privacy.epsilon == 8
    assert read_config(str(path)).privacy.epsilon == 8
