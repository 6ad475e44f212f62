import dataclasses
import importlib.util
import json

import pytest

from dpmix_jax import UserError
from dpmix_jax.run.config import (
    check_path,
    differences,
    from_config_dict,
    to_dict,
)
from tests.conftest import ROOT


def load(name="digits"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().unlock()


def changed(path, value):
    config = load()
    config.update_from_flattened_dict({path: value})
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("method.k_bse", 3, "unknown key method.k_bse: did you mean method.k_base?"),
        ("privcy", 3, "unknown key privcy: did you mean privacy?"),
        ("model.feature", 3, "unknown key model.feature: did you mean model.features?"),
        ("zzz", 3, "unknown key zzz: valid are seed, data, model"),
        ("model.name", "vgg", "model.name is 'vgg': it must be one of cnn"),
        ("method.k_base", 2.5, "method.k_base is 2.5: it must be of type int"),
        ("method.name", 3, "method.name is 3: it must be of type str"),
        ("augmentation.flip", 1, "augmentation.flip is 1: it must be of type bool"),
        ("privacy.epsilon", True, "privacy.epsilon is True: it must be of type float"),
        ("privacy.epsilon", None, "privacy.epsilon is None: it must be of type float"),
        ("seed", "x", "seed is 'x': it must be of type int or None"),
        ("seed", -1, "seed is -1: it must be at least 0"),
        ("method", 3, "method is 3: it must be a group of settings"),
        ("logging.log_every", 0, "logging.log_every is 0: it must be at least 1"),
        ("optimizer.learning_rate", 0.0, "optimizer.learning_rate is 0.0: it must be"),
        ("optimizer.momentum", 1.0, "optimizer.momentum is 1.0: it must be in [0, 1)"),
        ("optimizer.ema_decay", -0.1, "optimizer.ema_decay is -0.1: it must be in"),
        ("optimizer.weight_decay", -1.0, "optimizer.weight_decay is -1.0: it must be"),
    ],
)
def test_refuses(path, value, message):
    config = to_dict(from_config_dict(load()))
    group, _, name = path.partition(".")
    if name:
        config[group][name] = value
    else:
        config[group] = value
    with pytest.raises(UserError) as error:
        from_config_dict(config)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named():
    config = to_dict(from_config_dict(load()))
    del config["privacy"]["epsilon"]
    with pytest.raises(UserError, match=r"privacy.epsilon is missing"):
        from_config_dict(config)


def test_integers_do_for_floats():
    assert from_config_dict(changed("privacy.epsilon", 3)).privacy.epsilon == 3.0


@pytest.mark.parametrize("path", ["method.a.b", "method.name.b", "metod.name"])
def test_flags_of_unknown_groups(path):
    with pytest.raises(UserError, match="unknown key"):
        check_path(path)


def test_differences_name_what_changes_the_outcome():
    config = from_config_dict(load())
    old = json.loads(json.dumps(to_dict(config)))
    assert differences(old, to_dict(config)) == []
    faster = dataclasses.replace(
        config,
        performance=dataclasses.replace(config.performance, microbatch_size=7),
        logging=dataclasses.replace(config.logging, log_every=1),
        data=dataclasses.replace(config.data, download=True),
    )
    assert differences(old, to_dict(faster)) == []
    other = dataclasses.replace(
        config,
        seed=5,
        privacy=dataclasses.replace(config.privacy, epsilon=8.0),
    )
    assert differences(old, to_dict(other)) == [
        "privacy.epsilon (3.0 there, 8.0 here)",
        "seed (None there, 5 here)",
    ]
