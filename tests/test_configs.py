"""Every config at every epsilon: it loads, and spends its budget and no more."""

import importlib.util
import json
import re

import pytest

from dpmix_jax import UserError
from dpmix_jax.command_line import default_workdir, load_experiment
from dpmix_jax.config import check_flags, choose, from_config_dict, to_dict
from dpmix_jax.data.sources import blank
from dpmix_jax.mixup import METHODS
from dpmix_jax.privacy import Mechanism
from dpmix_jax.sweep import from_config_dict as sweep_config
from tests.conftest import ROOT

NUM_RECORDS = {
    "cifar10": 50_000,
    "cifar100": 50_000,
    "eurosat": 21_600,
    "fashion_mnist": 60_000,
    "digits": 1_437,
}
CIFAR = {"1": 9.1192, "2": 5.5674, "3": 4.6360, "4": 3.7372, "6": 2.8022, "8": 2.6225}
# What `privacy.calibrate` found (dp_accounting 0.6.0, PLD), rounded up. Searching takes
# up to half a minute a point, checking one evaluation.
NOISE_MULTIPLIERS = {
    "wrn16_4_cifar10": CIFAR,
    "wrn16_4_cifar100": CIFAR,
    "wrn16_4_eurosat": {
        "1": 10.538,
        "2": 6.4230,
        "3": 5.3440,
        "4": 4.3005,
        "6": 3.2130,
        "8": 3.0047,
    },
    "wrn40_4_cifar10": {
        "1": 36.840,
        "2": 22.256,
        "3": 17.452,
        "4": 14.923,
        "6": 10.897,
        "8": 8.8385,
    },
    "digits": {
        "1": 5.3666,
        "2": 3.3931,
        "3": 2.6903,
        "4": 2.3200,
        "6": 1.8267,
        "8": 1.5728,
    },
    "fashion_mnist": {
        "1": 1.3353,
        "2": 1.04479,
        "3": 0.90866,
        "4": 0.82931,
        "6": 0.72881,
        "8": 0.66964,
    },
}


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


# A sweep's config has no rows of its own: tests/test_sweep.py loads it.
CONFIGS = {
    path.stem: loaded.ROWS
    for path in sorted((ROOT / "configs").glob("*.py"))
    if hasattr(loaded := module(path), "ROWS")
}
# The same for the fine-tuning configs, at epsilon 1, 2, 4 and 8.
OF_TOWERS = {
    "cifar10": (1.8786, 1.1854, 0.85104, 0.65513),
    "eurosat": (2.7388, 1.6206, 1.0686, 0.77341),
    "caltech256": (2.5852, 1.5417, 1.0292, 0.75262),
    "sun397": (1.4943, 0.99738, 0.75494, 0.59863),
    "oxford_iiit_pet": (6.3973, 3.5453, 2.0562, 1.271),
}
OF_TOWERS["cifar100"] = OF_TOWERS["cifar10"]
POINTS = [(name, epsilon) for name, rows in CONFIGS.items() for epsilon in rows]


def load(name, epsilon):
    return load_experiment([f"--config={ROOT}/configs/{name}.py:{epsilon}"])


@pytest.mark.parametrize("name", CONFIGS)
def test_has_every_epsilon_and_a_header(name):
    assert list(CONFIGS[name]) == ["1", "2", "3", "4", "6", "8"]
    path = ROOT / f"configs/{name}.py"
    for words in (
        f"--config=configs/{name}.py",
        "Hardware",
        "Hours",
        "Accuracy",
        "row",
    ):
        assert words in module(path).__doc__
    default = load_experiment([f"--config={path}"])
    assert default == load(name, f"{default.privacy.epsilon:g}")
    stated = re.search(r"\((\d) if none is given\)", module(path).__doc__)
    assert float(stated[1]) == default.privacy.epsilon


@pytest.mark.parametrize(("name", "epsilon"), POINTS)
def test_round_trips_and_keeps_its_budget(name, epsilon):
    config = load(name, epsilon)
    again = from_config_dict(json.loads(json.dumps(to_dict(config))))
    assert to_dict(again) == to_dict(config)
    target, delta = config.privacy.epsilon, config.privacy.delta
    assert (target, delta) == (float(epsilon), 1e-5)
    num_records = NUM_RECORDS[config.data.name]
    mechanism = Mechanism(
        sampling_prob=config.privacy.sampling_prob(num_records),
        num_updates=config.privacy.num_updates,
        noise_multiplier=NOISE_MULTIPLIERS[name][epsilon],
        neighboring_relation=config.privacy.relation,
    )
    assert 0.99 * target < mechanism.epsilon(delta) <= target
    assert delta < 1 / num_records


@pytest.mark.parametrize("name", ["vit_b16", "convnext_base"])
def test_fine_tuning_has_every_dataset_and_epsilon(name):
    found = module(ROOT / f"configs/{name}.py")
    assert set(found.POINTS) == {
        f"{data}-{epsilon}" for data in OF_TOWERS for epsilon in (1, 2, 4, 8)
    }
    for words in (f"--config=configs/{name}.py", "Hardware", "Hours", "Accuracy"):
        assert words in found.__doc__
    for point, (data, epsilon) in found.POINTS.items():
        config = load(name, point)
        assert to_dict(from_config_dict(to_dict(config))) == to_dict(config)
        assert (config.data.name, config.privacy.epsilon) == (data, epsilon)
        assert max(config.data.image_size, config.data.resize) == found.SIZE
        assert config.privacy.expected_batch_size == 1000
        records = blank(config.data.name, found.SIZE)
        epochs = config.privacy.num_updates * 1000 / len(records)
        assert 10 <= epochs < 10.5
        assert config.finetune.trainable == "head"


@pytest.mark.parametrize("data", [name for name in OF_TOWERS if name != "cifar100"])
def test_fine_tuning_keeps_its_budget(data):
    for epsilon, noise_multiplier in zip((1, 2, 4, 8), OF_TOWERS[data], strict=True):
        config = load("vit_b16", f"{data}-{epsilon}")
        num_records = len(blank(data, 224))
        mechanism = Mechanism(
            sampling_prob=config.privacy.sampling_prob(num_records),
            num_updates=config.privacy.num_updates,
            noise_multiplier=noise_multiplier,
        )
        assert 0.99 * epsilon < mechanism.epsilon(1e-5) <= epsilon


def test_fine_tuning_of_de_et_al_keeps_its_budget():
    found, file = module(ROOT / "configs/wrn28_10.py"), "--config.finetune.weights=w"
    noise = {1: 19.411, 2: 14.673, 4: 11.255, 8: 8.8385}
    assert len(found.POINTS) == 8
    for words in ("--config=configs/wrn28_10.py", "Hardware", "Hours", "Accuracy"):
        assert words in found.__doc__
    for point, (data, epsilon, updates) in found.POINTS.items():
        flags = [f"--config={ROOT}/configs/wrn28_10.py:{point}"]
        config = load_experiment([*flags, file])
        assert to_dict(from_config_dict(to_dict(config))) == to_dict(config)
        assert (config.data.name, config.privacy.epsilon) == (data, epsilon)
        if data == "cifar10":
            mechanism = Mechanism(
                sampling_prob=config.privacy.sampling_prob(NUM_RECORDS[data]),
                num_updates=updates,
                noise_multiplier=noise[epsilon],
            )
            assert 0.99 * epsilon < mechanism.epsilon(1e-5) <= epsilon
        with pytest.raises(UserError) as error:
            load_experiment(flags)
        assert str(error.value) == (
            "finetune.weights is None: it must be a file for finetune.skip 'Dense_0'"
        )
    rates = module(ROOT / "configs/rates.py").get_config("wrn28_10:cifar100-8")
    grid = sweep_config(rates, ["finetune.weights=w"])
    assert len(grid.runs()) == 2 * 5 * 3
    assert load_experiment([*grid.runs()[0].flags]).data.validation_size == 5_000


def test_rates_are_those_of_the_config():
    found = module(ROOT / "configs/rates.py")
    grid = sweep_config(found.get_config("vit_b16:eurosat-4"))
    assert grid.columns == {"optimizer.learning_rate": (0.5, 1.0, 2.0, 4.0, 8.0)}
    assert len(grid.runs()) == 2 * 5 * 3
    config = load_experiment([*grid.runs()[0].flags])
    assert config.data.validation_size == 2160
    assert config.privacy.epsilon == 4.0
    assert grid.metric == "nonprivate/validation/accuracy_ema"
    digits = sweep_config(found.get_config("digits:1")).runs()[0]
    assert load_experiment([*digits.flags]).data.validation_size == 143
    with pytest.raises(UserError, match="base is 'table11': it must be a config with"):
        found.get_config("table11")


@pytest.mark.parametrize("name", ["baselines", "table10"])
def test_every_run_of_the_tables_has_a_config(name):
    found = module(ROOT / f"configs/{name}.py")
    for data in found.BASES:
        grid = sweep_config(found.get_config(data))
        built = [load_experiment([*run.flags]) for run in grid.runs()]
        methods = {config.method.name for config in built}
        assert methods >= {"self_aug", "dp_mix_self", "dp_mix_diff"}
        if name == "table10":
            assert {config.data.half for config in built} == {1}
            assert {c.public and c.public.half for c in built} == {None, 2}
            assert {c.privacy.epsilon for c in built} == {2.0}
        else:
            assert methods == set(METHODS)
            assert len(built) == 10 * 2 * 5


def test_an_epsilon_without_a_row_is_one_line():
    with pytest.raises(UserError) as error:
        load("digits", "5")
    assert str(error.value) == (
        "--config cannot be loaded: epsilon is '5': it must be one of 1, 2, 3, 4, 6, 8"
    )
    with pytest.raises(UserError, match="colour is 'red': it must be one of blue"):
        choose({"blue": 1}, "red", "colour")


def test_what_a_file_raises_is_one_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config():\n    return 1 + 'a'\n")
    with pytest.raises(UserError) as error:
        load_experiment([f"--config={path}"])
    assert str(error.value) == (
        "--config cannot be loaded: TypeError: unsupported operand type(s) for +: 'int'"
        " and 'str'"
    )
    path.write_text("def get_config():\n    return {}['a']\n")
    with pytest.raises(UserError, match="--config cannot be loaded: KeyError: 'a'"):
        load_experiment([f"--config={path}"])
    with pytest.raises(UserError, match=r"--config is none.py: there is no such file"):
        load_experiment(["--config=none.py:8"])


def test_flags_are_checked_before_they_are_parsed():
    check_flags(["run.py", "--config=a.py", "--config.method.name=dp_sgd", "--x=y"])
    with pytest.raises(UserError, match="unknown key metod: did you mean method"):
        check_flags(["run.py", "--config.metod.name=dp_sgd"])


def test_default_workdir():
    path = ROOT / "configs/digits.py"
    assert str(default_workdir(path, "")) == "runs/digits"
    assert str(default_workdir(path, "8")) == "runs/digits-8"
