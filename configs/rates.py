"""Search for the learning rate of a config, on validation records.

python experiments/sweep.py --config=configs/rates.py:vit_b16:caltech256-2 \
    --set=finetune.encoder=open_clip_model.safetensors

The argument is a config of this folder (vit_b16, convnext_base, wrn28_10, digits or
scattering_fashion_mnist), and that config's own argument. Self-Aug and DP-Mix_self, or
DP-SGD if that is the config's method, try each rate with 3 seeds; the table shows
accuracy on validation records, a tenth of the training set, that no run trains on.

All runs look at the same private records. The epsilon of a model trained with the rate
that comes out, `choice.json`, covers its own run and not this search, as its privacy
statement says. For a search that epsilon covers, at the price of more noise, add

    --set=privacy.selection=geometric --set=privacy.expected_candidates=10

which trains a random number of candidates, 10 on average, and leaves the best.

Hardware, Hours: those of the config, 30 times. Accuracy: there. The paper searched too
and gives no row of it.
"""

import importlib

import ml_collections

from configs._base import sweep
from dpmix_jax import data
from dpmix_jax.run.config import choose

RATES = {
    "vit_b16": (0.5, 1.0, 2.0, 4.0, 8.0),
    "convnext_base": (0.5, 1.0, 2.0, 4.0, 8.0),
    "wrn28_10": (0.25, 0.5, 1.0, 2.0, 4.0),
    "digits": (0.25, 0.5, 1.0, 2.0, 4.0),
    "scattering_fashion_mnist": (2.0, 4.0, 8.0, 16.0),
}
ROWS = (
    ("Self-Aug", {"method.name": "self_aug", "method.k_self": 0}),
    ("DP-Mix_self", {"method.name": "dp_mix_self"}),
)


def get_config(base: str = "vit_b16:cifar10-1") -> ml_collections.ConfigDict:
    name, _, argument = base.partition(":")
    rates = choose(RATES, name, "config")
    file = importlib.import_module(f"configs.{name}")
    config = file.get_config(*filter(None, [argument]))
    records = len(data.blank(data.DataConfig(**config.data.to_dict())))
    return sweep(
        title=f"Learning rates, {base}",
        base=f"configs/{name}.py" + (f":{argument}" if argument else ""),
        rows=(("DP-SGD", {}),) if config.method.name == "dp_sgd" else ROWS,
        columns={"optimizer": {"learning_rate": rates}},
        common={"data": {"validation_size": records // 10}},
        seeds=3,
        metric="nonprivate/validation/accuracy_ema",
    )
