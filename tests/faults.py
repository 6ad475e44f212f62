"""Faults that break the guarantee, planted in a copy of the package, and their tests.

    python -m tests.faults

prints which of the tests named here fail on each fault. `tests/test_faults.py` asserts
that they do. A fault that its test lets pass is a hole in the tests.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is changed in a file of the package, and the test that must fail."""

    path: str
    edits: tuple[tuple[str, str], ...]
    test: str

    def planted(self, text: str) -> str:
        """Returns the file with the fault; `ValueError` if it has no such lines."""
        for old, new in self.edits:
            if old not in text:
                raise ValueError(f"{self.path} has no {old!r}")
            text = text.replace(old, new)
        return text


FAULTS = {
    "noise four times too small": Fault(
        "privacy.py",
        (
            (
                "mechanism.noise_multiplier, of_all_bands",
                "mechanism.noise_multiplier / 4, of_all_bands",
            ),
        ),
        "test_audit.py::test_bounds_are_below_the_claim_and_above_zero",
    ),
    "noise of floats": Fault(
        "noise.py",
        (
            (
                "        low, high = _draw(table, words)\n",
                "        return part + jnp.float32(on.stddev) * jax.random.normal("
                "jax.random.wrap_key_data(key[:2]), part.shape)\n",
            ),
        ),
        "test_noise.py::test_nobody_can_tell_by_the_last_bits_which_sum_was_released",
    ),
    "a noise key used twice": Fault(
        "privacy.py",
        (("next_key = noise.next_key(state.key)", "next_key = state.key"),),
        "test_privacy.py::test_noise_is_independent_between_updates_and_coordinates",
    ),
    "a key from which the noise before can be drawn": Fault(
        "noise.py",
        (("_NEXT_KEY)[:8, 0]", "_NEXT_KEY)[:8, 0] * 0 + key + jnp.uint32(1)"),),
        "test_noise.py::test_the_next_key_is_none_of_the_noise",
    ),
    "the noise key from the augmentation stream": Fault(
        "run/build.py",
        (
            (
                "key=sampling.noise_key(seed)",
                "key=jnp.tile(jax.random.key_data("
                'sampling.stream_key(seed, "augmentation")), 4)',
            ),
        ),
        "test_experiment.py"
        "::test_killed_a_run_keeps_its_secret_seed_and_then_forgets_it",
    ),
    "the seed is there until everything has come out": Fault(
        "run/experiment.py",
        (("    workdir.forget_secrets()\n    release(", "    release("),),
        "test_experiment.py"
        "::test_killed_a_run_keeps_its_secret_seed_and_then_forgets_it",
    ),
    "no clip": Fault(
        "gradients.py",
        (
            (
                "        l2_clip_norm=l2_clip_norm,\n        batch",
                "        l2_clip_norm=1e9,\n        batch",
            ),
            ("inner.l2_norm_bound, has_aux", "l2_clip_norm, has_aux"),
        ),
        "test_audit.py::test_every_method_keeps_its_sensitivity[dp_sgd-formed]",
    ),
    "ghost norms too small": Fault(
        "ghost.py",
        (
            (
                "return norms + _rounding(rounded) * lengths, short",
                "return 0.9 * norms, short",
            ),
        ),
        "test_ghost.py::test_a_changed_record_moves_the_sum_of_a_head_by_its_term",
    ),
    "mixing across records": Fault(
        "training.py",
        (
            (
                "        return Sets(images, labels, present",
                "        images = 0.5 * (images + jnp.roll(images, 1, axis=0))\n"
                "        return Sets(images, labels, present",
            ),
        ),
        "test_training.py::test_a_term_is_of_its_record_alone",
    ),
    "a clip for each view": Fault(
        "training.py",
        (
            (
                "            images,\n            labels,\n            constants",
                "            images.reshape(-1, 1, *images.shape[2:]),\n"
                "            labels.reshape(-1, 1, labels.shape[-1]),\n"
                "            constants",
            ),
            (
                "is_padding_example=records == 0",
                "is_padding_example=jnp.repeat(records == 0, images.shape[1])",
            ),
            (
                "        nonprivate = {",
                "        by_set = labels.shape[:2]\n"
                "        aux = clipping.AuxiliaryOutput(\n"
                "            aux.values.reshape(by_set).mean(1),\n"
                "            aux.grad_norms.reshape(by_set).mean(1),\n"
                "            None,\n"
                "        )\n"
                "        nonprivate = {",
            ),
        ),
        "test_training.py::test_updates_equal_their_definition",
    ),
    "division by the drawn batch": Fault(
        "training.py",
        (
            (
                "apply_update(state, sums.gradients)",
                "apply_update(state, jax.tree.map(lambda g: g * 8 /"
                ' jnp.maximum(sums.nonprivate["records"], 1), sums.gradients))',
            ),
        ),
        "test_training.py::test_updates_equal_their_definition",
    ),
    "sensitivity summed over devices": Fault(
        "devices.py",
        (("check_vma=False", "check_vma=True"),),
        "test_neighbours.py::test_a_changed_record_moves_the_sum_by_the_sensitivity",
    ),
    "shuffling under Poisson accounting": Fault(
        "sampling.py",
        (
            (
                "    return there[next(iter(drawn))].astype(np.int32)",
                '    rng = generator(seed, "sampling", step)\n'
                "    size = round(sampling_prob * num_records)\n"
                "    return rng.permutation(num_records)[:size].astype(np.int32)",
            ),
        ),
        "test_sampling.py::test_inclusion_is_independent_with_the_right_probability",
    ),
    "one update fewer accounted for": Fault(
        "accounting.py",
        (
            (
                "            self.num_turns,",
                "            max(self.num_turns - 1, 1),",
            ),
        ),
        "test_privacy.py::test_epsilon_is_that_of_independent_accountants",
    ),
    "sensitivity of another relation": Fault(
        "privacy.py",
        (
            (
                "gradient_fn.sensitivity(mechanism.neighboring_relation)",
                "gradient_fn.sensitivity(NeighboringRelation.ADD_OR_REMOVE_ONE)",
            ),
        ),
        "test_privacy.py::test_noise_has_the_promised_scale",
    ),
    "a private record in the public pool": Fault(
        "data/public.py",
        (
            (
                "if not images.isdisjoint(image_checksums(records.images)):",
                "if False:",
            ),
        ),
        "test_public.py::test_copies_of_private_images_are_refused",
    ),
    "kept embeddings of another record": Fault(
        "models/kept.py",
        (
            (
                "embed(jnp.int32(j), put(indices), inputs)",
                "embed(jnp.int32(j), put(indices[::-1]), inputs)",
            ),
        ),
        "test_kept.py::test_rows_are_the_sets_of_the_first_updates_embedded",
    ),
    "averaged weights evaluated on the encoder of the last": Fault(
        "run/evaluate.py",
        (
            (
                "finetune.is_head(*config.finetune.split(model.shapes))",
                "True",
            ),
        ),
        "test_evaluate.py::test_weights_share_an_encoder_only_where_it_is_frozen",
    ),
    "a turn in every update": Fault(
        "sampling.py",
        (("turns == step % bands", "turns >= 0"),),
        "test_factorization.py::test_a_record_takes_part_in_its_turn_alone",
    ),
    "correlated noise that forgets the norm of its strategy": Fault(
        "privacy.py",
        (("sensitivity * math.hypot(*mechanism.strategy) / first", "sensitivity"),),
        "test_factorization.py::test_weighted_by_the_strategy_the_noise_is_independent",
    ),
    "sums without noise left behind": Fault(
        "privacy.py",
        (("part._replace(sums=jnp.zeros_like(part.sums))", "part"),),
        "test_factorization.py::test_what_is_left_has_no_sum_without_noise",
    ),
    "padding counted": Fault(
        "gradients.py",
        (
            (
                "            is_padding_example=is_padding_example,\n        )\n"
                "        norms",
                "            is_padding_example=jnp.zeros((size,), bool),\n        )\n"
                "        norms",
            ),
        ),
        "test_gradients.py::test_padding_counts_exactly_nothing",
    ),
    "scores that know the coins": Fault(
        "audit.py",
        (
            (
                "return bound(train(included),",
                "return bound(included + train(included),",
            ),
        ),
        "test_audit.py::test_scores_without_signal_bound_nothing",
    ),
}


def copy(folder: pathlib.Path) -> pathlib.Path:
    """Copies what tests need into a folder."""
    for name in ("dpmix_jax", "tests", "experiments", "configs", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def is_caught(fault: Fault, folder: pathlib.Path) -> bool:
    """Plants a fault in a copy, runs its test there, and takes the fault out again.

    Raises:
      ValueError: if the package has no such lines, or the test did not run.
    """
    path = folder / "dpmix_jax" / fault.path
    whole = path.read_text()
    path.write_text(fault.planted(whole))
    try:
        all_cases = ["-x", "-m", "slow or not slow", f"tests/{fault.test}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "0", *all_cases],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(whole)
    if done.returncode not in (0, 1):
        raise ValueError(f"{fault.test}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def main() -> int:
    lines = ["| fault | caught by |", "| --- | --- |"]
    caught = True
    with tempfile.TemporaryDirectory() as name:
        folder = copy(pathlib.Path(name))
        for title, fault in FAULTS.items():
            caught &= (found := is_caught(fault, folder))
            by = f"`{fault.test}`" if found else "**nothing**"
            lines.append(f"| {title} | {by} |")
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    return 0 if caught else 1


if __name__ == "__main__":
    sys.exit(main())
