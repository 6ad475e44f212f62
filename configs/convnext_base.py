"""DP-Mix_self with a linear head on CLIP's ConvNeXt-Base: fine-tuning at 256 pixels.

python experiments/run.py --config=configs/convnext_base.py:cifar10-2 \
    --config.finetune.encoder=open_clip_model.safetensors

All but the encoder is as in configs/vit_b16.py, which says where the values come from;
so is the argument. The file is open_clip's convnext_base_w trained on LAION-2B, which
`hf download laion/CLIP-convnext_base_w-laion2B-s13B-b82K open_clip_model.safetensors`
fetches. The paper also trains the whole model from scratch:
--config.finetune.trainable=all without an encoder.

Hardware: one GPU; `auto` takes as many records at a time as fit. Hours: not measured.
Accuracy: not measured here. The paper's Table 10 has ConvNeXt at epsilon 2, on half of
the training records: DP-Mix_self 96.2 on CIFAR-10, 76.7 on CIFAR-100, 93.8 on EuroSAT,
76.4 on Caltech256, 70.1 on SUN397, 64.6 on Oxford Pet.
"""

import ml_collections

from configs import vit_b16

POINTS, SIZE = vit_b16.POINTS, 256


def get_config(point: str = "cifar10-1") -> ml_collections.ConfigDict:
    config = vit_b16.get_config(point)
    for key in ("image_size", "resize"):
        if config.data[key]:
            config.data[key] = SIZE
    config.model = ml_collections.ConfigDict({"name": "convnext"})
    return config
