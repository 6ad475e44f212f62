"""The folder of a run: its lock, its secret, and what comes out of it."""

import contextlib
import json
import pathlib
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from dpmix_jax.errors import UserError
from dpmix_jax.files import locked, naming, write_atomically
from dpmix_jax.run.config import (
    ExperimentConfig,
    differences,
    from_config_dict,
    to_dict,
)


class Workdir:
    """What is on disk of one run.

    `results.json` is written last of all: a run that has it is finished.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process; see `files.locked`."""
        with locked(self.path, f"workdir {self.path}"):
            try:
                yield
            except FileNotFoundError:
                if self.path.exists():
                    raise
                raise UserError(f"workdir {self.path} was deleted") from None

    def check(self, config: ExperimentConfig) -> None:
        """Raises `UserError` if the folder is of another experiment."""
        path = self.path / "config.json"
        if not path.exists():
            strange = [file.name for file in self.path.iterdir() if file.name[0] != "."]
            if strange:
                raise UserError(
                    f"workdir {self.path} holds {min(strange)} but no config.json: use"
                    " a new or empty --workdir"
                )
            return
        try:
            # A file written before a setting existed means that setting's default.
            began = from_config_dict(json.loads(path.read_text()))
        except ValueError as error:
            why = f" ({error})" if isinstance(error, UserError) else ""
            raise UserError(
                f"{path} is not a config{why}: use another --workdir"
            ) from None
        if changed := differences(to_dict(began), to_dict(config)):
            raise UserError(
                f"workdir {self.path} is of another experiment, use another --workdir;"
                f" these differ: {', '.join(changed)}"
            )

    def is_finished(self, config: ExperimentConfig) -> bool:
        """Whether this run has ended here.

        Raises:
          UserError: if the folder is of another experiment.
        """
        if self.path.exists():
            self.check(config)
        return self.results() is not None

    def kept(self) -> dict[str, Any] | None:
        """Returns what `begin` has kept, or None for a run that has not begun.

        Raises:
          UserError: if a run began here and its secret is lost.
        """
        found = self.read_json("secret.json")
        if found is None and (self.path / "checkpoints").exists():
            raise UserError(
                f"workdir {self.path} has checkpoints but no secret.json to go on from"
                " them: use another --workdir"
            )
        return found

    def begin(self, seed: int | None, *, data: str, **mechanism: Any) -> int | None:
        """Keeps what the rest of the run needs, or checks that it is the same run.

        Seed, noise and a checksum of the data stay in `secret.json` while the run is
        not finished, so that the same noise never meets other data.

        Args:
          seed: from the config; None draws 256 bits from the operating system.
          data: checksum of the training records, public images and weight files.
          **mechanism: what else the noise of the run is made with.

        Returns:
          The seed of the run, or None once `forget_secrets` has erased it.

        Raises:
          UserError: if a run began here with other data, or as `kept`.
        """
        began = self.kept()
        if began is None:
            self._drop_embeddings()  # of another seed
            self.whitening.unlink(missing_ok=True)
            drawn = secrets.randbits(256) if seed is None else seed
            content = {"seed": drawn, "data": data, **mechanism}
            self.write_json("secret.json", content, mode=0o600)
            return drawn
        if began["data"] != data:
            raise UserError(
                f"workdir {self.path} holds a run that began with other data: put those"
                " back, or use another --workdir"
            )
        return began["seed"]

    @property
    def embeddings(self) -> pathlib.Path:
        """The file of embeddings that are kept until the last update."""
        return self.path / "embeddings"

    @property
    def whitening(self) -> pathlib.Path:
        """The file of the whitening that the run began with, which is public."""
        return self.path / "whitening.safetensors"

    def _drop_embeddings(self) -> None:
        for path in self.path.glob(f"{self.embeddings.name}*"):  # whole or partial
            path.unlink()

    def forget_secrets(self) -> None:
        """Erases kept embeddings, and the seed that can draw the noise again."""
        self._drop_embeddings()
        began = self.kept()
        assert began is not None
        self.write_json("secret.json", {**began, "seed": None}, mode=0o600)

    def clean_up(self) -> None:
        """Deletes what a finished run does not need: its secret, its whitening."""
        for path in (self.path / "secret.json", self.whitening):
            path.unlink(missing_ok=True)

    def write(self, name: str, content: str | bytes, *, mode: int = 0o644) -> None:
        write_atomically(self.path / name, content, mode=mode)

    def write_json(
        self, name: str, content: Mapping[str, Any], *, mode: int = 0o644
    ) -> None:
        self.write(name, json.dumps(content, indent=2) + "\n", mode=mode)

    def results(self) -> dict[str, Any] | None:
        """Returns `results.json`, or None if the run is not finished."""
        return self.read_json("results.json")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Returns what `write_json` wrote, or None if there is no such file.

        Raises:
          UserError: if it is damaged.
        """
        path = self.path / name
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise UserError(f"{path} is damaged: use another --workdir")
        return content

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of `metrics.jsonl`, but for one that a kill cut off."""
        path, lines = self.path / "metrics.jsonl", []
        text = path.read_text(errors="replace") if path.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict) and "step" in line]

    def seconds(self) -> float:
        """Returns how long the run took up to its last line of metrics."""
        return max((line["seconds"] for line in self.metrics()), default=0.0)

    def keep_metrics(self, last_step: int) -> None:
        """Drops the lines after the update that a killed run goes on from."""
        kept = [line for line in self.metrics() if line["step"] <= last_step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        self.write("metrics.jsonl", text, mode=0o600)

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        path = self.path / "metrics.jsonl"
        with naming(path), open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
