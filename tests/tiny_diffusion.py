"""A Stable Diffusion pipeline of random weights, built and saved without a network."""

import json

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import (
    StableDiffusionSafetyChecker,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode


def save(folder, seed=0, refuses=None):
    """Writes 0.5 MB; it draws noise of 16x16 pixels, another for each seed.

    Args:
      folder: is made.
      seed: of the weights.
      refuses: of its safety checker, everything or nothing; None leaves it out.
    """
    torch.manual_seed(seed)
    checked = refuses is not None
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        ),
        text_encoder=_text_encoder(),
        tokenizer=_tokenizer(folder.parent / f"{folder.name}-tokenizer"),
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
        ),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=_safety_checker(refuses) if checked else None,
        feature_extractor=_feature_extractor() if checked else None,
        requires_safety_checker=checked,
    )
    pipeline.save_pretrained(folder)
    return folder


def _tokenizer(folder):
    """Knows single bytes, as the start or the end of a word, and two special tokens."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )


_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def _text_encoder():
    tokens = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = transformers.CLIPTextConfig(vocab_size=514, **_SMALL, **tokens)
    return transformers.CLIPTextModel(config)


def _feature_extractor():
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    )


def _safety_checker(refuses):
    """Refuses what is nearer to a concept than its threshold, which all or none are."""
    small = {**_SMALL, "projection_dim": 16}
    vision = {**small, "image_size": 8, "patch_size": 4}
    checker = StableDiffusionSafetyChecker(
        transformers.CLIPConfig(
            text_config=small, vision_config=vision, projection_dim=16
        )
    )
    for weights in (
        checker.concept_embeds_weights,
        checker.special_care_embeds_weights,
    ):
        weights.data.fill_(-2.0 if refuses else 2.0)
    return checker
