"""Images by Stable Diffusion through diffusers: PyTorch only, extra `diffusion`."""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpmix_jax.data import images
from dpmix_jax.errors import UserError, needing, require, require_one_of
from dpmix_jax.models.pretrained import checksum
from dpmix_jax.synthetic.plan import Wanted

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
        text = "a text with {name}"
        require("{name}" in self.prompt, "--prompt", self.prompt, text)
        require(1 <= self.steps <= 1000, "--steps", self.steps, "in [1, 1000]")
        require(0 <= self.guidance <= 100, "--guidance", self.guidance, "in [0, 100]")
        if self.sampler is not None:
            require_one_of("--sampler", self.sampler, SAMPLERS)
        require_one_of("--dtype", self.dtype, DTYPES)


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
        pipeline, revision = _load(diffusers, config, getattr(self._torch, dtype))
        self._pipeline = pipeline.to(device)
        checker = pipeline.safety_checker
        self.settings: dict[str, Any] = {
            "generator": "diffusion",
            **dataclasses.asdict(config),
            "revision": revision,
            "sampler": type(pipeline.scheduler).__name__,
            "dtype": dtype,
            "device": device,
            "safety_checker": None if checker is None else type(checker).__name__,
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
    with needing("diffusion", "--generator is diffusion: it needs"):
        import diffusers
        import torch
        import transformers
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, diffusers


def _load(diffusers: Any, config: DiffusionConfig, dtype: Any) -> tuple[Any, str]:
    """Returns the pipeline, and the commit of its model or else a checksum of it."""
    kind = diffusers.StableDiffusionPipeline
    folder = pathlib.Path(config.model).expanduser()
    on_hub = not folder.is_dir()
    if config.revision is not None and not on_hub:
        raise UserError(
            f"--revision is {config.revision}: {folder} is a folder, which has none"
        )
    unchecked = {} if config.safety_checker else {"safety_checker": None}
    safe = {"use_safetensors": True}
    try:
        if on_hub:
            folder = pathlib.Path(
                kind.download(config.model, revision=config.revision, **safe)
            )
        pipeline = kind.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, **safe, **unchecked
        )
        if config.sampler is not None:
            sampler = getattr(diffusers, SAMPLERS[config.sampler])
            pipeline.scheduler = sampler.from_config(pipeline.scheduler.config)
    except Exception as error:  # of diffusers, damaged files, the hub and its network
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"--model is {config.model}: it must be a folder with a"
            f" StableDiffusionPipeline, or the id of one on the hub ({reason})"
        ) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder.name if on_hub else f"sha256:{_checksum(folder)}"


def _checksum(folder: pathlib.Path) -> str:
    content = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        content.update(f"{name}\0{checksum(path)}\n".encode())
    return content.hexdigest()
