"""What a run promises, as data and in words."""

import decimal
import math
import textwrap
from typing import Any

from dpmix_jax import noise
from dpmix_jax.accounting import Mechanism, accountant_version
from dpmix_jax.factorization import INDEPENDENT
from dpmix_jax.privacy import PrivacyConfig


def privacy_report(
    config: PrivacyConfig,
    mechanism: Mechanism,
    *,
    num_records: int,
    num_parameters: int,
    images_per_record: int,
    secret_seed: bool,
    public_data: str = "none",
    sensitivity: float,
    num_groups: int | None = None,
    clipping: str = "instantiate",
    precision: str = "float32",
    kept_sets: int = 0,
) -> dict[str, Any]:
    """Collects what `statement` must say, as JSON-ready values (`privacy.json`).

    Args:
      config: the budget and the algorithm.
      mechanism: from `calibrate`; its epsilons are computed here, by both accountants,
        and for a private selection that of the validation records.
      num_records: N.
      num_parameters: of those that are trained.
      images_per_record: K.
      secret_seed: whether the randomness came from a seed that nobody knows.
      public_data: what else entered, and why it may be called public.
      sensitivity: of the clipped sum, by which the noise was scaled.
      num_groups: expected groups of a batch, for `microbatch_mixup`.
      clipping: `instantiate` or `ghost`, see `PerformanceConfig`.
      precision: of the model, see `PerformanceConfig`.
      kept_sets: M, augmentation sets of each record whose embeddings were kept while
        the run went on; 0 for none.
    """
    selection = _selection(config)
    if mechanism.selection != config.private_selection:
        raise ValueError("mechanism and config must agree on the selection")
    candidates = config.expected_candidates or 1.0
    draws = mechanism.num_updates * num_parameters * candidates
    # The accountant gets what noise on a grid leaves of delta: nearly all, for which it
    # finds hardly more epsilon, and never 1 more. Where epsilon is so large that little
    # is left, delta becomes larger instead.
    of_grid = noise.extra_delta(config.epsilon + 1, draws)
    room = config.delta > 100 * of_grid
    left, delta = config.delta - of_grid * room, config.delta + of_grid * (not room)
    by = {name: mechanism.epsilon(left, accountant=name) for name in ("pld", "rdp")}
    epsilon = max(
        by[mechanism.accountant], selection["score_epsilon"] if selection else 0.0
    )
    return {
        # One record is in the training set or among those that candidates are compared
        # by: see `selection`.
        "epsilon": epsilon,
        **{f"epsilon_{k}": v if v < float("inf") else None for k, v in by.items()},
        "selection": selection,
        "delta": min(delta, 1.0),
        "delta_of_the_grid": min(of_grid, 1.0),
        "neighboring_relation": config.neighboring_relation,
        "noise_multiplier": mechanism.noise_multiplier,
        "l2_clip_norm": config.l2_clip_norm,
        "sampling_prob": mechanism.sampling_prob,
        "expected_batch_size": config.expected_batch_size,
        "num_updates": mechanism.num_updates,
        "num_records": num_records,
        "images_per_record": images_per_record,
        "public_data": public_data,
        "sensitivity": sensitivity,
        "num_groups": num_groups,
        "clipping": clipping,
        "precision": precision,
        "secret_seed": secret_seed,
        "accountant": accountant_version(allocated=mechanism.allocated),
        **({"kept_sets": kept_sets} if kept_sets else {}),
        # Of what is as it was in the first versions nothing is said.
        **{
            name: value
            for name, value, usual in (
                ("clipping_rule", config.clipping_rule, "clip"),
                ("per_layer", config.per_layer, False),
                ("sampling", config.sampling, "poisson"),
                ("strategy", list(mechanism.strategy), list(INDEPENDENT)),
            )
            if value != usual
        },
        **({"uncovered": config.uncovered} if config.uncovered else {}),
    }


def _selection(config: PrivacyConfig) -> dict[str, Any] | None:
    """Returns what there is to say about a private selection, or None without one."""
    selection = config.private_selection
    if selection is None:
        return None
    noise = selection.score_noise(config.epsilon, config.delta, config.relation)
    return {
        "distribution": selection.distribution,
        "expected_candidates": selection.expected_candidates,
        "score_noise": noise,
        "score_epsilon": selection.score_epsilon(noise, config.delta, config.relation),
    }


def round_up(value: float, digits: int = 4) -> str:
    """Writes a positive number to some digits, never smaller than it is."""
    with decimal.localcontext(prec=digits, rounding=decimal.ROUND_CEILING):
        return f"{float(+decimal.Decimal(repr(float(value)))):.{digits}g}"


_RELATIONS = {
    "add_or_remove_one": "one record is added or removed",
    "replace_one": "one record is replaced by another",
    "replace_special": "one record is replaced by an empty one",
}

CLIPPINGS = {
    "instantiate": "what is clipped is the gradient whose norm was measured",
    "ghost": (
        "norms are bounded from the factors of gradients, rounding included, and the"
        " terms made of the same factors (mixed ghost clipping with book-keeping)"
    ),
}

RULES = {
    "clip": "",
    "automatic": ", divided by their norms (automatic clipping) and",
}

# What is released and covered, without and with a private selection.
_RELEASED = {
    False: (
        "the final weights, raw and EMA (`model.safetensors`), and what is computed"
        " from them. The accountant covers the weights after every update, so"
        " intermediate ones too"
    ),
    True: (
        "of the selected candidate the weights, raw and EMA (`model.safetensors`),"
        " its settings and its `score`, and what is computed from them. The accountant"
        " covers its weights after every update, so intermediate ones too. Of other"
        " candidates nothing is released"
    ),
}

_COVERED = {
    False: (
        "every access of this one run to the training records. Not covered: other"
        " runs on these records, hyperparameters chosen by looking at them, values"
        " named `nonprivate/...`, logs, timings, checkpoints and the rest of the"
        " workdir. Test and validation records, from which accuracies and pictures"
        " come, are not protected at all"
    ),
    True: (
        "every access of all candidates to the training records, and that of the"
        " choice among them to the validation records, so that tuning is covered."
        " Not covered: how many candidates there were, how long they took, what they"
        " left; another selection, such as one begun because few candidates were"
        " drawn; the grid itself where it was made by looking at these records; other"
        " runs, values named `nonprivate/...`, logs, checkpoints and the rest of the"
        " workdir. Test"
        " records, from which accuracies and pictures come, are not protected at all"
    ),
}

_SEEDS = {
    True: (
        "256 secret bits of the operating system, deleted after the last update, gave"
        " each stream a key by SHA-256: the noise is from ChaCha20 (256 bits), the"
        " batches are from Philox (128 bits), and the guarantee holds for whatever the"
        " other streams draw. From the checkpoint that is left no noise can"
        " be drawn again"
    ),
    False: (
        "all randomness follows from a seed in the configuration. Whoever knows it can"
        " draw the noise again, and two runs with it share their noise: the guarantee"
        " holds only where the seed stays secret and no other run with it is released."
        " For a release, train without a fixed seed"
    ),
}


def statement(report: dict[str, Any]) -> str:
    """Writes the privacy statement of a run in Markdown from its `privacy_report`."""
    epsilon, delta = report["epsilon"], report["delta"]
    relation, selection = report["neighboring_relation"], report["selection"]
    terms, brings = "per-record gradients", "that stand for it in an update"
    if report["num_groups"]:
        batch, groups = report["expected_batch_size"], report["num_groups"]
        terms = (
            f"gradients of groups of records ({batch / groups:.3g} expected in each,"
            " the group of a record drawn for it alone)"
        )
        brings = "that it brings into its group, mixed or not"
    found = (
        f"epsilon = {round_up(report[f'epsilon_{name}'], 7)} by {name.upper()}"
        if report[f"epsilon_{name}"]
        else f"{name.upper()} bounds nothing here"
        for name in ("pld", "rdp")
    )
    rule = RULES[report.get("clipping_rule", "clip")]
    if report.get("per_layer"):
        rule += ", layer by layer and then as a whole,"
    correlated, sampling, turns = "", "Poisson sampling", ""
    how = "each record is drawn independently with that probability"
    if report.get("sampling") == "allocation":
        sampling = "random allocation"
        how = (
            f"in an epoch of {round(1 / report['sampling_prob'])} updates each record"
            " is in one batch, which it draws uniformly and independently"
        )
    if bands := len(report.get("strategy", ())):
        correlated = (
            f", and of the norm of a strategy of {bands} bands"
            f" ({math.hypot(*report['strategy']):.4g}), by which it is correlated"
            " between updates (DP-BandMF)"
        )
        sampling = "cyclic Poisson sampling"
        turns = (
            f". Records take turns: each has a first update among the first {bands},"
            f" drawn for it alone, and one in {bands} after that. In its turn it is"
            f" drawn with {bands} times the probability q, otherwise not, so that the"
            f" accountant counts {-(-report['num_updates'] // bands)} updates"
        )
    record, sets = "training", "training sets"
    if selection:
        record, sets = "training or validation", "pairs of training and validation set"
    items = {
        "Unit of privacy": (
            f"one {record} record: an image with its label, and all of the"
            f" {report['images_per_record']} image(s) {brings}"
        ),
        "Neighbouring relation": (
            f"{relation}: two {sets} are neighbours if {_RELATIONS[relation]}."
            " How records were divided into halves, training, validation and test set"
            " is taken as given: where one random split was made of all of them,"
            " another record would have changed it"
        ),
        "What is released": _RELEASED[selection is not None],
        "What is covered": _COVERED[selection is not None],
        "Chosen by looking at private records": (
            f"{report['uncovered']}. No epsilon covers that"
            if report.get("uncovered")
            else ""
        ),
        "Selection": (
            selection
            and (
                "this is one of a random number of candidate runs"
                f" ({selection['distribution']} distribution, mean"
                f" {selection['expected_candidates']:g}), each with hyperparameters"
                " drawn for it alone. Released is the one with the highest score: its"
                " number of correctly classified validation records plus Gaussian"
                f" noise of standard deviation {selection['score_noise']:.6g}, rounded"
                " to a whole number. The guarantee holds for that one only, and only"
                " if the candidates were drawn and compared so (Papernot and Steinke,"
                " 2022), which is what `experiments/sweep.py` does, from seeds of the"
                " operating system;"
                f" epsilon = {round_up(selection['score_epsilon'], 7)} for a validation"
                " record, at the same delta"
            )
        ),
        "Mechanism": (
            f"Gaussian noise on the sum of {terms}{rule} clipped to C ="
            f" {report['l2_clip_norm']:g}; its standard deviation is sigma ="
            f" {report['noise_multiplier']:.6g} times the sensitivity of that sum,"
            f" {report['sensitivity']:g}{correlated}; T = {report['num_updates']}"
            " updates"
        ),
        "Sampling": (
            f"the accountant assumes {sampling} with q ="
            f" {report['sampling_prob']:.6g} (expected batch"
            f" {report['expected_batch_size']}, N = {report['num_records']}), and so"
            f" does the sampler: {how}, nothing is truncated. q and N are treated as"
            f" public{turns}"
        ),
        "Accountant": (
            f"{report['accountant']}: {', '.join(found)}, at delta ="
            f" {round_up(delta, 7)}"
        ),
        "Kept embeddings": (
            f"{report['kept_sets']} augmentation set(s) of each record were embedded"
            " once, from that record, public data and a key; each update drew one of"
            " them for each of its records. The embeddings were kept in half precision"
            " and deleted after the last update"
            if report.get("kept_sets")
            else ""
        ),
        "Public data used": report["public_data"],
        "Seed": _SEEDS[report["secret_seed"]],
        "Arithmetic": (
            "the sum is rounded to a grid, and the noise is a discrete Gaussian on it,"
            " larger by what rounding adds to the sensitivity; noisy sums are exact"
            " before they are rounded to float32, so that their last bits tell no more"
            " than the guarantee allows. That the noise is no real number is counted"
            f" in delta, as at most {round_up(report['delta_of_the_grid'], 2)}. The"
            f" model computes in {report['precision']}, the sum of clipped gradients in"
            f" float32; {CLIPPINGS[report['clipping']]}. Not proven: that generators"
            " are as good as coins, and what clipped gradients and their sum lose by"
            " rounding"
        ),
    }
    headline = (
        f"The released weights are ({round_up(epsilon)}, {round_up(delta)})-"
        "differentially private"
        + ", tuning included, if `experiments/sweep.py` has selected this run"
        * bool(selection)
        + "."
    )
    return "\n".join(
        ["# Privacy statement", "", headline, ""]
        + [
            textwrap.fill(
                f"- **{title}:** {text}.",
                width=88,
                subsequent_indent="  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            for title, text in items.items()
            if text
        ]
        + [""]
    )
