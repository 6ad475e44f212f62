"""Images by Stable Diffusion through diffusers: PyTorch only, extra `diffusion`."""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpmix_jax.data import images
from dpmix_jax.errors import UserError
from dpmix_jax.synthetic.bank import Wanted

PROMPT = "a photo of a {name}"  # DP-Mix, Section 5
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "pndm": "PNDMScheduler",
}
DTYPES = ("auto", "float32", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Which model draws, and how.

    Attributes:
      model: a folder as `StableDiffusionPipeline.save_pretrained` writes it, or the id
        of one on the Hugging Face hub. Weights must be safetensors: pickles, which can
        run programs, are not read.
      revision: of a model on the hub: a commit, tag or branch.
      prompt: in which `{name}` stands for the class, as `spoken` puts it.
      steps: of the sampler.
      guidance: weight of the prompt; up to 1 it is not amplified.
      sampler: a key of `SAMPLERS`; None takes the model's own.
      dtype: auto is float16 on a GPU and float32 elsewhere.
      safety_checker: whether the model's own checker, if it has one, refuses images.
    """

    model: str
    revision: str | None = None
    prompt: str = PROMPT
    steps: int = 50
    guidance: float = 7.5
    sampler: str | None = None
    dtype: str = "auto"
    safety_checker: bool = True

    def __post_init__(self):
        if "{name}" not in self.prompt:
            raise UserError(f"--prompt is {self.prompt!r}: it must contain {{name}}")
        if not 1 <= self.steps <= 1000:
            raise UserError(f"--steps is {self.steps}: it must be in [1, 1000]")
        if not 0 <= self.guidance <= 100:
            raise UserError(f"--guidance is {self.guidance}: it must be in [0, 100]")
        for flag, value, allowed in (
            ("sampler", self.sampler, (None, *SAMPLERS)),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in allowed:
                known = ", ".join(str(name) for name in allowed if name)
                raise UserError(f"--{flag} is {value!r}: it must be one of {known}")


def spoken(class_name: str) -> str:
    """Returns the name of a class as it is put into a prompt.

    Numbers and letters that only sort (`056.dog`, `/a/abbey`) are left out; `_`, `/`
    and capitals inside of a word become spaces: `AnnualCrop` is `annual crop`.
    """
    text = re.sub(r"^(\d+\.|/\w/)", "", class_name)
    if re.fullmatch(r"([A-Z][a-z]+){2,}", text):
        text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower()
    return " ".join(re.split(r"[\s_/]+", text)).strip()


class Diffusion:
    """Draws images by a prompt for each class. A `synthetic.Generator`.

    The noise of each image comes from a generator of its own on the CPU, so that it is
    the same on all devices and in all batches. The arithmetic after it rounds as the
    device and the shape of the batch make it: a pixel may differ by a little.
    """

    def __init__(self, config: DiffusionConfig, *, image_shape: Sequence[int]):
        """Loads the model.

        Raises:
          UserError: if diffusers or the model cannot be had.
        """
        self._torch, diffusers = _libraries()
        self._config, self._shape = config, image_shape
        device = "cuda" if self._torch.cuda.is_available() else "cpu"
        dtype = config.dtype
        if dtype == "auto":
            dtype = "float16" if device == "cuda" else "float32"
        if dtype == "float16" and device == "cpu":
            raise UserError("--dtype is float16: it needs a GPU, here is none")
        folder, revision = _located(diffusers, config)
        self._pipeline = _pipeline(
            diffusers, config, folder, getattr(self._torch, dtype)
        ).to(device)
        checker = self._pipeline.safety_checker
        self.settings: dict[str, Any] = {
            "generator": "diffusion",
            **dataclasses.asdict(config),
            "revision": revision,
            "sampler": type(self._pipeline.scheduler).__name__,
            "dtype": dtype,
            "device": device,
            "safety_checker": type(checker).__name__ if checker is not None else None,
            "diffusers": diffusers.__version__,
            "torch": self._torch.__version__,
        }

    def __call__(self, wanted: Sequence[Wanted]) -> list[np.ndarray | None]:
        prompt = self._config.prompt
        made = self._pipeline(
            [prompt.replace("{name}", spoken(one.class_name)) for one in wanted],
            num_inference_steps=self._config.steps,
            guidance_scale=self._config.guidance,
            generator=[self._torch.Generator().manual_seed(w.seed) for w in wanted],
            output_type="pil",
        )
        refused = made.nsfw_content_detected or [False] * len(wanted)
        return [
            None if bad else self._fitted(image)
            for image, bad in zip(made.images, refused, strict=True)
        ]

    def _fitted(self, image: Any) -> np.ndarray:
        size, _, channels = self._shape
        pixels = images.fit(image.convert("RGB" if channels == 3 else "L"), size)
        return pixels.reshape(size, size, channels)


def _libraries() -> tuple[Any, Any]:
    try:
        import diffusers
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            "--generator is diffusion: it needs torch, diffusers and transformers,"
            f' `pip install -e ".[diffusion]"` ({error})'
        ) from None
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, diffusers


def _located(diffusers: Any, config: DiffusionConfig) -> tuple[pathlib.Path, str]:
    """Returns the folder of a model, and its commit or else a checksum of it."""
    folder = pathlib.Path(config.model).expanduser()
    if folder.is_dir():
        if config.revision is not None:
            raise UserError(
                f"--revision is {config.revision}: {folder} is a folder, which has none"
            )
        if not (folder / "model_index.json").is_file():
            raise UserError(f"--model is {folder}: it has no model_index.json")
        return folder, f"sha256:{_checksum(folder)}"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", config.model):
        raise UserError(
            f"--model is {config.model}: there is no such folder, and an id on the hub"
            " is <owner>/<name>"
        )
    try:
        found = diffusers.StableDiffusionPipeline.download(
            config.model, revision=config.revision, use_safetensors=True
        )
    except Exception as error:  # of diffusers, the hub and three layers of network
        raise UserError(
            f"--model is {config.model}: it is no folder and cannot be had from the hub"
            f" ({_first_line(error)})"
        ) from None
    return pathlib.Path(found), pathlib.Path(found).name  # a snapshot, by its commit


def _pipeline(
    diffusers: Any, config: DiffusionConfig, folder: pathlib.Path, dtype: Any
) -> Any:
    options = {} if config.safety_checker else {"safety_checker": None}
    try:
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
        if config.sampler is not None:
            kind = getattr(diffusers, SAMPLERS[config.sampler])
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    except Exception as error:  # a damaged or other model raises anything
        raise UserError(
            f"--model is {config.model}: it cannot be loaded as a"
            f" StableDiffusionPipeline ({_first_line(error)})"
        ) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _checksum(folder: pathlib.Path) -> str:
    content = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        content.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return content.hexdigest()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
