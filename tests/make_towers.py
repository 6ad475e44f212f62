"""Makes the fixtures of image towers, with the library that the towers come from.

    pip install -e ".[towers]" && python -m tests.make_towers

writes into `tests/fixtures/`. They were made with open_clip_torch 3.3.0, timm 1.0.31
and torch 2.13.0 on a CPU. All weights are random; nothing is downloaded. No code of
`dpmix_jax` is used.

- `vit.safetensors` and `convnext.safetensors` have the state dict of a tiny tower,
  below `visual.`, and what `results` returns for it.
- `towers.json` has keys and shapes of the towers at full size, by tower.
"""

import functools
import json
import pathlib
import unittest.mock

import safetensors.numpy
import torch

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # as open_clip's, OPENAI_DATASET_MEAN
STDDEV = (0.26862954, 0.26130258, 0.27577711)
FULL = {"vit": ("ViT-B-16", 224), "convnext": ("convnext_base_w", 256)}


def libraries():
    """Returns open_clip and timm.

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

    return open_clip, timm


def full(tower):
    """Returns open_clip's whole model of random weights, and its image size."""
    name, size = FULL[tower]
    torch.manual_seed(0)
    return libraries()[0].create_model(name, pretrained=None).eval(), size


def tiny():
    """Yields the name, the module and the image size of each tiny tower."""
    open_clip, timm = libraries()
    vit = open_clip.transformer.VisionTransformer(
        image_size=(12, 8),
        patch_size=4,
        width=16,
        layers=2,
        heads=2,
        mlp_ratio=4.0,
        output_dim=8,
    )
    yield "vit", vit, (12, 8)
    # 48x40 is 5x5, then 2x2 pixels: what is left over at the edges must be dropped.
    sizes = {"depths": (1, 1, 2, 1), "dims": (4, 8, 8, 12)}
    create = functools.partial(timm.create_model, **sizes)
    with unittest.mock.patch.object(timm, "create_model", create):
        convnext = open_clip.timm_model.TimmModel(
            "convnext_base", embed_dim=8, image_size=48, pool="", proj="linear"
        )
    yield "convnext", convnext, (48, 40)


def results(visual, size, seed):
    """Draws weights and images for a tower, and computes what comes out.

    No weight is left at 0 or 1, so that each matters.

    Args:
      visual: the tower, whose weights are changed.
      size: of the images, in pixels.
      seed: of all that is drawn.

    Returns:
      Arrays by name: `images`, uint8 [B, H, W, 3]; `embedding` [B, E]; `direction` [B,
      E]; and `gradient`, that of the sum of embedding times direction, with respect to
      the kernel [O, 3, h, w] that reads the images.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in visual.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1 and "pos" not in name:
            noise = noise * weight[0].numel() ** -0.5
        elif weight.ndim == 1 and name.endswith(("weight", "gamma")):
            noise = 1.0 + 0.3 * noise
        else:
            noise = 0.3 * noise
        weight.data = noise
    images = torch.randint(256, (2, *size, 3), generator=generator, dtype=torch.uint8)
    pixels = (images / 255.0 - torch.tensor(MEAN)) / torch.tensor(STDDEV)
    embedding = visual.eval()(pixels.permute(0, 3, 1, 2))
    direction = torch.randn(embedding.shape, generator=generator)
    (embedding * direction).sum().backward()
    return {
        "images": images.numpy(),
        "embedding": embedding.detach().numpy(),
        "direction": direction.numpy(),
        "gradient": next(p for p in visual.parameters() if p.ndim == 4).grad.numpy(),
    }


def main():
    shapes = {}
    for seed, (tower, visual, size) in enumerate(tiny()):
        arrays = results(visual, size, seed)
        for key, value in visual.state_dict().items():
            arrays[f"visual.{key}"] = value.numpy()
        safetensors.numpy.save_file(arrays, FIXTURES / f"{tower}.safetensors")
        state = full(tower)[0].state_dict()
        visual = {key: v for key, v in state.items() if key.startswith("visual.")}
        shapes[tower] = {key: list(value.shape) for key, value in visual.items()}
    text = json.dumps(shapes, separators=(",", ":"))
    (FIXTURES / "towers.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
