"""Handwritten digits that ship with scikit-learn (UCI; Alpaydin and Kaynak, 1998)."""

import numpy as np
import sklearn.datasets
from sklearn.model_selection import train_test_split

from dpmix_jax.data.records import Records


def load_digits() -> tuple[Records, Records]:
    """Returns 1,437 training and 360 test images of 8x8, one fixed stratified split.

    Pixels are counts from 0 to 16, stored here as multiples of 15 to fit uint8 (so the
    largest is 240); the constants put them between -1 and 0.88.
    """
    digits = sklearn.datasets.load_digits()
    images = (digits.images[..., None] * 15).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=labels
    )
    records = Records(
        images=images,
        labels=labels,
        class_names=tuple(str(name) for name in digits.target_names),
        mean=(0.5,),
        stddev=(0.5,),
    )
    return records.subset(train), records.subset(test)
