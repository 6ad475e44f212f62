"""The network of `dpmix_jax.models.wrn` in PyTorch, and its clipped gradients there.

What `benchmark.py` compares with; nothing else imports it. Of Opacus's modes, none can
average over the K images of a record, so there each image is a record of its own. Its
ghost mode has norms without gradients for linear layers only, of those in this network:
the gradients of its convolutions are formed image by image there too.
"""

import functools
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from opacus import GradSampleModule
from opacus.grad_sample import (
    GradSampleModuleFastGradientClipping,
    register_grad_sampler,
)
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from opacus.utils.tensor_utils import unfold2d
from torch import nn
from torch.func import functional_call, grad, vjp, vmap

Call = Callable[[], list[torch.Tensor]]

# Images need no gradient: Opacus's hooks on the first layer are right all the same.
warnings.filterwarnings("ignore", "Full backward hook is firing")


class WSConv(nn.Conv2d):
    """Convolution with scaled weight standardisation, a gain and a bias."""

    def __init__(self, inputs: int, features: int, size: int = 3, stride: int = 1):
        super().__init__(inputs, features, size, stride, padding=size // 2)
        self.gain = nn.Parameter(torch.ones(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = standardize(self.weight, self.gain)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def standardize(weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Brings filters [O, I, h, w] to mean 0 and variance gain [O] / fan-in."""
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    variance = centred.square().mean((1, 2, 3))
    scale = gain * torch.rsqrt((variance * weight[0].numel()).clamp(min=1e-4))
    return centred * scale[:, None, None, None]


@register_grad_sampler(WSConv)
def _per_image_gradients(layer, activations, backprops):
    """Opacus's own way for convolutions, then back through the standardisation.

    Without it Opacus falls back on functorch for this layer, which is slower.
    """
    columns = unfold2d(
        activations[0],
        kernel_size=layer.kernel_size,
        padding=layer.padding,
        stride=layer.stride,
        dilation=layer.dilation,
    )
    backprops = backprops.flatten(2)
    columns = columns.to(backprops.dtype)  # they differ under autocast
    product = torch.einsum("nol,ncl->noc", backprops, columns)
    _, pullback = vjp(standardize, layer.weight.detach(), layer.gain.detach())
    weight, gain = vmap(pullback)(product.unflatten(2, layer.weight.shape[1:]))
    return {layer.weight: weight, layer.gain: gain, layer.bias: backprops.sum(2)}


class _Norm(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(nn.ReLU(), nn.GroupNorm(16, channels, eps=1e-5))


class _Block(nn.Module):
    def __init__(self, inputs: int, channels: int, stride: int, reshape: bool):
        super().__init__()
        self.shortcut = nn.Sequential()
        if reshape:
            conv = WSConv(inputs, channels, 1, stride)
            self.shortcut = nn.Sequential(_Norm(inputs), conv)
        first, second = WSConv(inputs, channels, 3, stride), WSConv(channels, channels)
        self.residual = nn.Sequential(_Norm(inputs), first, _Norm(channels), second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.residual(x) + self.shortcut(x)


def wide_resnet(num_classes: int, depth: int, width: int) -> nn.Sequential:
    """Returns WRN-depth-width; images are [N, 3, H, W].

    It pads symmetrically where the JAX model pads as `SAME` does, at the cost of the
    same number of products.
    """
    layers: list[nn.Module] = [WSConv(3, 16)]
    inputs = 16
    for stage, channels in enumerate((16 * width, 32 * width, 64 * width)):
        for block in range((depth - 4) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(_Block(inputs, channels, stride, block == 0))
            inputs = channels
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))
    return nn.Sequential(*layers, _Norm(inputs), *head)


class Gradients:
    """One workload in PyTorch, on the GPU if PyTorch sees one.

    Args:
      options: `depth` and `width`.
      images: [B, K, H, W, 3].
      labels: [B, K, O].
      l2_clip_norm: C.
      precision: as `performance.precision`.
    """

    def __init__(
        self,
        options: dict[str, int],
        images: np.ndarray,
        labels: np.ndarray,
        l2_clip_norm: float,
        precision: str,
    ):
        torch.backends.cudnn.allow_tf32 = precision == "tensorfloat32"
        torch.backends.cuda.matmul.allow_tf32 = precision == "tensorfloat32"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._bfloat16 = precision == "bfloat16"
        self._options, self._clip_norm = options, l2_clip_norm
        images_first = torch.tensor(images).movedim(-1, 2).contiguous()
        self.images = images_first.to(self.device)  # [B, K, 3, H, W]
        self.labels = torch.tensor(labels).to(self.device)
        self._flat = self.images.flatten(0, 1), self.labels.flatten(0, 1)

    def methods(self) -> dict[str, Callable[[], Call]]:
        """Returns what builds the function to be timed, for each row of the table."""
        hooks = functools.partial(self.per_image, functorch=False)
        rows: dict[str, Callable[[], Call]] = {
            "torch non-private": self.nonprivate,
            "torch.func vmap(grad)": self.vmapped,
            "Opacus hooks": hooks,
            "Opacus functorch": functools.partial(self.per_image, functorch=True),
            "Opacus ghost": self.ghost,
            "K-averaged hooks": functools.partial(hooks, averaged=True),
        }
        return {name: functools.partial(self._whole, rows[name]) for name in rows}

    def nonprivate(self) -> Call:
        """Gradient of the mean loss of all images."""
        model, (images, labels) = self._model(), self._flat
        params = list(model.parameters())
        return lambda: torch.autograd.grad(
            F.cross_entropy(model(images), labels), params
        )

    def vmapped(self) -> Call:
        """Gradients of each record's mean loss, clipped and summed."""
        model = self._model()
        params = {name: p.detach() for name, p in model.named_parameters()}

        def loss_fn(params, images, labels):
            return F.cross_entropy(functional_call(model, params, images), labels)

        per_record = vmap(grad(loss_fn), (None, 0, 0))
        return lambda: self._clipped_sum(
            list(per_record(params, self.images, self.labels).values())
        )

    def per_image(self, *, functorch: bool, averaged: bool = False) -> Call:
        """Opacus's per-image gradients, clipped and summed.

        Args:
          functorch: for every layer, instead of hooks.
          averaged: over the K images of a record, before the clip.
        """
        model = GradSampleModule(
            self._model(), loss_reduction="sum", force_functorch=functorch
        )
        images, labels = self._flat

        def call():
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), labels, reduction="sum").backward()
            found = [p.grad_sample for p in model.parameters()]
            if averaged:
                found = [g.unflatten(0, self.images.shape[:2]).mean(1) for g in found]
            return self._clipped_sum(found)

        return call

    def ghost(self) -> Call:
        """Opacus's ghost clipping: norms, then the gradient of weighted losses."""
        options = {"loss_reduction": "sum", "max_grad_norm": self._clip_norm}
        model = GradSampleModuleFastGradientClipping(self._model(), **options)
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(model.parameters(), lr=0.0),
            noise_multiplier=0.0,
            expected_batch_size=None,
            **options,
        )
        criterion = DPLossFastGradientClipping(
            model, optimizer, nn.CrossEntropyLoss(reduction="sum"), "sum"
        )
        images, labels = self._flat

        def call():
            model.zero_grad(set_to_none=True)
            criterion(model(images), labels).backward()
            return [p.grad for p in model.parameters()]

        return call

    def _model(self) -> nn.Module:
        torch.manual_seed(0)
        return wide_resnet(self.labels.shape[-1], **self._options).to(self.device)

    def _clipped_sum(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        factors = (self._clip_norm / norms).clamp(max=1.0)
        return [torch.tensordot(factors, g, dims=1) for g in gradients]

    def _whole(self, make: Callable[[], Call]) -> Call:
        """Calls in this precision, to the end of the GPU's work."""
        call = make()

        def whole():
            with torch.autocast(self.device, torch.bfloat16, self._bfloat16):
                found = call()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return found

        return whole
