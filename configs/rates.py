"""Search for the learning rate of a config, on validation records.

python experiments/sweep.py --config=configs/rates.py:vit_b16:caltech256-2 \
    --set=finetune.encoder=open_clip_model.safetensors

The argument is a config, by name or as a file of one's own (`rates:photos.py`), and
that config's own argument. Its method, for DP-Mix_self Self-Aug too, tries a quarter, a
half, one, two and four times its rate with 3 seeds each; the table shows accuracy on
its validation records, or on a tenth of the training set, that no run trains on.

All runs look at the same private records. The epsilon of a model trained with the rate
that comes out, `choice.json`, covers its own run and not this search, as its privacy
statement says. For a search that epsilon covers, at the price of more noise, add

    --workdir=runs/selection --set=privacy.selection=geometric \
    --set=privacy.expected_candidates=10

which trains a random number of candidates, 10 on average, and leaves the best.

Hardware, Hours: those of the config, 15 times, or 30 where Self-Aug runs beside it.
Accuracy: there. The paper searched too and gives no row of it.
"""

import ml_collections

from configs._base import sweep
from dpmix_jax import UserError, data
from dpmix_jax.run import cli

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
DP_MIX_SELF = (
    ("Self-Aug", {"method.name": "self_aug", "method.k_self": 0}),
    ("DP-Mix_self", {"method.name": "dp_mix_self"}),
)


def get_config(base: str = "vit_b16:cifar10-1") -> ml_collections.ConfigDict:
    config = cli.read_config(base)
    method = config.method.get("name", "dp_mix_self")
    rate = config.optimizer.get("learning_rate")
    if rate is None:
        raise UserError(f"{base} has no optimizer.learning_rate")
    held_out = config.data.get("validation_size", 0)
    if not held_out:
        held_out = len(data.blank(data.DataConfig(**config.data.to_dict()))) // 10
    return sweep(
        title=f"Learning rates, {base}",
        base=base,
        rows=DP_MIX_SELF if method == "dp_mix_self" else ((method, {}),),
        columns={"optimizer": {"learning_rate": tuple(rate * f for f in FACTORS)}},
        common={"data": {"validation_size": held_out}},
        seeds=3,
        metric="nonprivate/validation/accuracy_ema",
    )
