"""Makes the fixtures of image towers, with the libraries that the towers come from.

    pip install -e ".[towers]" && python -m tests.make_towers

writes `tests/fixtures/towers.npz`, `towers.json` and `tensors.pt`. They were made with
open_clip_torch 3.3.0, timm 1.0.31, transformers 5.23.0 and torch 2.13.0 on a CPU. All
weights are random; nothing is downloaded. No code of `dpmix_jax` is used.

- `towers.npz` has, for each tiny tower, below `<tower>/<library>/`: its state dict,
  `state/<key>`; `images` (uint8); a linear head, `head/weight` and `head/bias`;
  `labels`; and what comes out: `embedding`, `logits`, and the gradients of the mean
  cross-entropy, `gradient/<key>`, for the head and the kernel that reads the images.
- `towers.json` has keys and shapes of the towers at full size, by tower and library.
- `tensors.pt` is written by `torch.save`; `towers.npz` has its arrays as `tensors/`.
"""

import collections
import functools
import json
import pathlib
import unittest.mock

import numpy as np
import torch

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # as open_clip's, OPENAI_DATASET_MEAN
STDDEV = (0.26862954, 0.26130258, 0.27577711)
FULL = {"vit": ("ViT-B-16", 224), "convnext": ("convnext_base_w", 256)}


def libraries():
    """Returns open_clip, timm and transformers.

    torchvision 0.28.0 beside a CPU build of PyTorch 2.13.0 lacks operators that it
    expects; nothing here uses them.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        operator = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define("torchvision::nms", operator)
        torch.library.define("torchvision::qnms", operator)
    import open_clip
    import timm
    import transformers

    return open_clip, timm, transformers


def full(tower):
    """Returns open_clip's whole model of random weights, and its image size."""
    name, size = FULL[tower]
    torch.manual_seed(0)
    return libraries()[0].create_model(name, pretrained=None).eval(), size


def randomize(module, seed):
    """Draws all weights anew, so that none is 0 or 1 and each matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1 and "pos" not in name and "cls" not in name:
            noise = noise * weight[0].numel() ** -0.5
        elif weight.ndim == 1 and name.endswith(("weight", "gamma")):
            noise = 1.0 + 0.3 * noise
        else:
            noise = 0.3 * noise
        weight.data = noise.half().float()  # half as long when they are compressed


def expected(module, embed, images, num_classes, seed):
    """Computes what comes out of a tower with a random linear head.

    Args:
      module: the tower.
      embed: maps images [B, 3, H, W] to embeddings [B, E].
      images: uint8 [B, H, W, 3].
      num_classes: O.
      seed: of the head and the labels.

    Returns:
      A dictionary of arrays, see above.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = (torch.tensor(images) / 255.0 - torch.tensor(MEAN)) / torch.tensor(STDDEV)
    embedding = embed(pixels.permute(0, 3, 1, 2))
    head = torch.nn.Linear(embedding.shape[-1], num_classes)
    for weight in head.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    labels = torch.randint(num_classes, images.shape[:1], generator=generator)
    logits = head(embedding)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    first = next(p for p in module.parameters() if p.ndim == 4)
    found = {
        "images": images,
        "labels": labels,
        "head/weight": head.weight,
        "head/bias": head.bias,
        "embedding": embedding,
        "logits": logits,
        "gradient/head/weight": head.weight.grad,
        "gradient/head/bias": head.bias.grad,
        "gradient/first": first.grad,
    }
    return {key: np.asarray(torch.as_tensor(v).detach()) for key, v in found.items()}


def tiny():
    """Yields tower, library, module, function and image shape, of tiny towers."""
    open_clip, timm, transformers = libraries()
    vit = open_clip.transformer.VisionTransformer(
        image_size=(12, 8),
        patch_size=4,
        width=16,
        layers=2,
        heads=2,
        mlp_ratio=4.0,
        output_dim=8,
    )
    yield "vit", "open_clip", vit, vit, (12, 8)
    vit = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=64,
            projection_dim=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            hidden_act="gelu",
        )
    )
    yield "vit", "transformers", vit, lambda x: vit(x).image_embeds, (8, 8)
    timm_vit = timm.create_model(
        "vit_base_patch16_clip_224",
        num_classes=8,
        img_size=(12, 8),
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
    )
    yield "vit", "timm", timm_vit, timm_vit, (12, 8)
    # 48x40 is 5x5, then 2x2 pixels: what is left over at the edges must be dropped.
    sizes = {"depths": (1, 1, 2, 1), "dims": (4, 8, 8, 12)}
    create = functools.partial(timm.create_model, **sizes)
    with unittest.mock.patch.object(timm, "create_model", create):
        convnext = open_clip.timm_model.TimmModel(
            "convnext_base", embed_dim=8, image_size=48, pool="", proj="linear"
        )
    yield "convnext", "open_clip", convnext, convnext, (48, 40)
    convnext = create("convnext_base", num_classes=8)
    yield "convnext", "timm", convnext, convnext, (48, 40)


def make_tiny():
    """Returns the arrays of `towers.npz`."""
    arrays = {}
    rng = np.random.default_rng(0)
    for seed, (tower, library, module, embed, size) in enumerate(tiny()):
        randomize(module, seed)
        if library == "timm":  # as timm converts CLIP's projection
            (module.head if tower == "vit" else module.head.fc).bias.data.zero_()
        module.eval()
        images = rng.integers(0, 256, (2, *size, 3), np.uint8)
        prefix = "visual." if library == "open_clip" else ""
        found = {
            f"state/{prefix}{key}": value.numpy()
            for key, value in module.state_dict().items()
        }
        found.update(expected(module, embed, images, 5, seed))
        arrays.update({f"{tower}/{library}/{k}": v for k, v in found.items()})
    return arrays


def make_shapes():
    """Returns the content of `towers.json`."""
    _, timm, transformers = libraries()
    config = transformers.CLIPVisionConfig(hidden_act="gelu", patch_size=16)
    with torch.device("meta"):
        convnext = timm.create_model("convnext_base", num_classes=0)
        vit = timm.create_model("vit_base_patch16_clip_224", num_classes=0)
        clip = transformers.CLIPVisionModelWithProjection(config)
    models = {
        "vit": {"open_clip": full("vit")[0], "transformers": clip, "timm": vit},
        "convnext": {"open_clip": full("convnext")[0], "timm": convnext},
    }
    return {
        tower: {
            library: {key: list(v.shape) for key, v in model.state_dict().items()}
            for library, model in libraries.items()
        }
        for tower, libraries in models.items()
    }


def make_tensors():
    """Returns the content of `tensors.pt`, and its arrays by key."""
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    content = collections.OrderedDict(
        plain=base,
        transposed=base.t(),
        part=base[1:3, ::2],
        half=base.half(),
        brain=base.bfloat16(),
        double=base.double(),
        integers=torch.arange(5),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 3),
    )
    content._metadata = collections.OrderedDict(version=1)  # as state_dict has
    return content, {k: np.asarray(v.double()) for k, v in content.items()}


def main():
    FIXTURES.mkdir(exist_ok=True)
    content, arrays = make_tensors()
    torch.save(content, FIXTURES / "tensors.pt")
    arrays = {f"tensors/{key}": value for key, value in arrays.items()}
    np.savez_compressed(FIXTURES / "towers.npz", **arrays, **make_tiny())
    shapes = json.dumps(make_shapes(), separators=(",", ":"))
    (FIXTURES / "towers.json").write_text(shapes + "\n")


if __name__ == "__main__":
    main()
