"""The ROI perceptual loss with encoders of timm and segmentation-models-pytorch, and what windows save."""

import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch

from lidnet_fast import ROIPerceptualLoss
from lidnet_fast.data.phantoms.chest import ChestPhantom
from lidnet_fast.extractors import layer_names
from lidnet_fast.models import HUWindow

# Yours: normal-dose and denoised images [N, 1, H, W] in [0, 1] and, per image, boxes [L, 4] (x1, y1, x2, y2) in pixels.
patient = ChestPhantom(image_size=512, slices=2).make_patient(np.random.default_rng(0))
normal_dose = HUWindow(-1000, 400).scale(torch.from_numpy(patient.volume[:, None]))
denoised = (normal_dose + 0.05 * torch.randn_like(normal_dose)).requires_grad_()
boxes = [torch.from_numpy(patient.boxes[patient.boxes[:, 0] == z, 1:]) for z in range(2)]

# Weights of ImageNet: pretrained=True (timm), weights="imagenet" (smp).
encoders = {
    "timm resnet18": (timm.create_model("resnet18", pretrained=False), "layer1"),
    "timm convnext_atto": (timm.create_model("convnext_atto", pretrained=False), "stages.0"),
    "smp resnet34": (smp.encoders.get_encoder("resnet34", weights=None), "layer1"),
    # Squeeze-and-excitation looks at the whole image, so that no window can stand for it.
    "timm efficientnet_b0": (timm.create_model("efficientnet_b0", pretrained=False), "blocks.1"),
    # A model that you trained yourself, to segment lesions for example: its encoder.
    "smp Unet": (smp.Unet("resnet18", encoder_weights=None, in_channels=1).encoder, {"layer1": 1.0, "layer2": 0.5}),
}
for name, (encoder, layers) in encoders.items():
    assert all(layer in layer_names(encoder) for layer in ([layers] if isinstance(layers, str) else layers))
    # Encoders of three channels expect ImageNet's mean and standard deviation; yours what it was trained on.
    mean = None if name == "smp Unet" else "imagenet"
    perceptual = ROIPerceptualLoss(encoder, layers, halo="auto", mean=mean, normalise_by=normal_dose)
    loss = perceptual(denoised, normal_dose, boxes)
    (gradient,) = torch.autograd.grad(loss, denoised)
    plan = perceptual.plan((512, 512), boxes)
    print(f"{name}: loss {loss:.4f}, gradient {gradient.norm():.1e}, cost {plan.relative_cost:.2f} of whole images")
