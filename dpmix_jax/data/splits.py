"""Training and test sets where a dataset comes without: the splits of the paper.

They are those of DP-Mix's script: scikit-learn's `train_test_split`, random_state 42.
Records of either side stay in the order that they had.
"""

import numpy as np
from sklearn.model_selection import train_test_split

from dpmix_jax.errors import UserError

Indices = np.ndarray


def stratified(labels: np.ndarray) -> tuple[Indices, Indices]:
    """Returns 80 % and 20 % of the records, with every class in proportion.

    EuroSAT's 27,000 become 21,600 and 5,400.

    Raises:
      UserError: if there are too few of a class.
    """
    try:
        train, test = train_test_split(
            np.arange(len(labels)),
            test_size=len(labels) // 5,
            random_state=42,
            stratify=labels,
        )
    except ValueError as error:
        raise UserError(
            f"{len(labels)} images cannot be split by class into 80 % for training and"
            f" 20 % for test: {error}"
        ) from None
    return np.sort(train), np.sort(test)


def uniform(labels: np.ndarray) -> tuple[Indices, Indices]:
    """Returns 80 % and 20 % of the records, both rounded down, whatever their class.

    So one record may be in neither: Caltech256's 30,607 become 24,485 and 6,121, and
    SUN397's 108,754 become 87,003 and 21,750.

    Raises:
      UserError: if there are fewer than 5.
    """
    if len(labels) < 5:
        raise UserError(f"{len(labels)} images are too few to be split 80 % to 20 %")
    train, test = train_test_split(
        np.arange(len(labels)),
        train_size=4 * len(labels) // 5,
        test_size=len(labels) // 5,
        random_state=42,
    )
    return np.sort(train), np.sort(test)
