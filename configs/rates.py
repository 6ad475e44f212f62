"""Search for the learning rate of a config, on validation records.

python experiments/sweep.py --config=configs/rates.py:vit_b16:caltech256-2 \
    --set=finetune.encoder=open_clip_model.safetensors

The argument is a config, by name or as a file of one's own (`rates:photos.py`), and
that config's own argument. Self-Aug and DP-Mix_self, or DP-SGD if that is the config's
method, try each rate with 3 seeds; the table shows accuracy on the config's validation
records, or on a tenth of the training set, that no run trains on. The rates are a
quarter, a half, one, two and four times the config's, or those of the table below.

All runs look at the same private records. The epsilon of a model trained with the rate
that comes out, `choice.json`, covers its own run and not this search, as its privacy
statement says. For a search that epsilon covers, at the price of more noise, add

    --set=privacy.selection=geometric --set=privacy.expected_candidates=10

which trains a random number of candidates, 10 on average, and leaves the best.

Hardware, Hours: those of the config, 30 times. Accuracy: there. The paper searched too
and gives no row of it.
"""

import pathlib

import ml_collections

from configs._base import sweep
from dpmix_jax import data
from dpmix_jax.run import cli

RATES = {
    "vit_b16": (0.5, 1.0, 2.0, 4.0, 8.0),
    "convnext_base": (0.5, 1.0, 2.0, 4.0, 8.0),
    "wrn28_10": (0.25, 0.5, 1.0, 2.0, 4.0),
}
ROWS = (
    ("Self-Aug", {"method.name": "self_aug", "method.k_self": 0}),
    ("DP-Mix_self", {"method.name": "dp_mix_self"}),
)


def get_config(base: str = "vit_b16:cifar10-1") -> ml_collections.ConfigDict:
    config = cli.read_config(base)
    rate = config.optimizer.learning_rate
    around = tuple(rate * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0))
    rates = RATES.get(pathlib.Path(base.partition(":")[0]).stem, around)
    held_out = config.data.get("validation_size", 0)
    if not held_out:
        held_out = len(data.blank(data.DataConfig(**config.data.to_dict()))) // 10
    return sweep(
        title=f"Learning rates, {base}",
        base=base,
        rows=(("DP-SGD", {}),) if config.method.name == "dp_sgd" else ROWS,
        columns={"optimizer": {"learning_rate": rates}},
        common={"data": {"validation_size": held_out}},
        seeds=3,
        metric="nonprivate/validation/accuracy_ema",
    )
