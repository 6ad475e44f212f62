import json

import pytest

from configs import digits
from dpmix_jax import UserError
from dpmix_jax.run.config import check_flags, differences, from_config_dict, to_dict
from tests import runs


def load():
    """The config of digits as a mapping, that settings can be added to."""
    return digits.get_config().unlock()


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
    config = to_dict(runs.config())
    *groups, name = path.split(".")
    (config[groups[0]] if groups else config)[name] = value
    with pytest.raises(UserError) as error:
        from_config_dict(config)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named():
    config = to_dict(runs.config())
    del config["privacy"]["epsilon"]
    with pytest.raises(UserError, match=r"privacy.epsilon is missing"):
        from_config_dict(config)


def test_integers_do_for_floats():
    config = to_dict(runs.config())
    config["privacy"]["epsilon"] = 3
    assert type(from_config_dict(config).privacy.epsilon) is float


@pytest.mark.parametrize("path", ["method.a.b", "method.name.b", "metod.name"])
def test_flags_of_unknown_groups(path):
    with pytest.raises(UserError, match="unknown key"):
        check_flags(["run.py", f"--config.{path}=3"])


def test_differences_name_what_changes_the_outcome():
    config = runs.config()
    old = json.loads(json.dumps(to_dict(config)))
    assert differences(old, to_dict(config)) == []
    faster = runs.config(
        performance__microbatch_size=7, logging__log_every=1, data__download=True
    )
    assert differences(old, to_dict(faster)) == []
    for key, there, here in (
        ("privacy.epsilon", 0.5, 8.0),
        ("seed", 3, None),
        ("performance.precision", "float32", "bfloat16"),
        ("performance.convolutions", "auto", "plain"),
    ):
        other = to_dict(runs.config(**{key.replace(".", "__"): here}))
        assert differences(old, other) == [f"{key} ({there} there, {here} here)"]
