"""The ROI perceptual loss inside MONAI, in 3-D: its transforms, networks and boxes."""

import numpy as np
import torch
from monai.apps.detection.transforms.dictionary import RandCropBoxByPosNegLabeld, RandFlipBoxd
from monai.data import DataLoader, Dataset
from monai.data.utils import no_collation
from monai.networks.nets import UNet, resnet10
from monai.transforms import Compose, EnsureChannelFirstd, ScaleIntensityRanged, ToTensord

from lidnet_fast import ROIPerceptualLoss
from lidnet_fast.data.phantoms.chest import ChestPhantom

IMAGES = ["low", "normal"]
transforms = Compose(
    [
        EnsureChannelFirstd(IMAGES, channel_dim="no_channel"),
        ScaleIntensityRanged(IMAGES, a_min=-1000, a_max=400, b_min=0, b_max=1),
        RandCropBoxByPosNegLabeld(IMAGES, "boxes", "labels", spatial_size=(96, 96, 16), pos=1, neg=0, num_samples=1),
        RandFlipBoxd(IMAGES, "boxes", "normal", prob=0.5, spatial_axis=0),
        ToTensord([*IMAGES, "boxes"]),
    ]
)


def study(seed):
    """Yours: volumes [x, y, z] in HU as MONAI's LoadImaged gives them, and boxes (x1, y1, z1, x2, y2, z2) in voxels."""
    rng = np.random.default_rng(seed)
    patient = ChestPhantom(image_size=192, slices=24).make_patient(rng)
    normal, (z, x1, y1, x2, y2) = patient.volume.T, patient.boxes.T
    low = normal + rng.normal(0, 60, normal.shape).astype(np.float32)
    return {"low": low, "normal": normal, "boxes": np.stack([x1, y1, z, x2, y2, z + 1], 1), "labels": np.ones(len(z))}


loader = DataLoader(Dataset([study(0), study(1)], transforms), batch_size=1, shuffle=True, collate_fn=no_collation)
network = UNet(spatial_dims=3, in_channels=1, out_channels=1, channels=(8, 16, 32), strides=(2, 2), norm=None)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
# pretrained=True downloads MedicalNet's weights, of CT and MR.
extractor = resnet10(n_input_channels=1, feed_forward=False, bias_downsample=False, pretrained=False)
some_normal_dose = torch.as_tensor(transforms(study(2))[0]["normal"])[None]
perceptual = ROIPerceptualLoss(extractor, "layer1", normalise_by=some_normal_dose)

for epoch in range(4):
    for ((sample,),) in loader:  # of one study, one crop
        low, normal = (sample[name].as_tensor()[None] for name in IMAGES)
        # A volume's last axis is x here, and z in MONAI: turn (x1, y1, z1, x2, y2, z2) around.
        boxes = sample["boxes"][:, [2, 1, 0, 5, 4, 3]]
        denoised = low + network(low)
        pixels = torch.nn.functional.l1_loss(denoised, normal)
        lesions = perceptual(denoised, normal, [boxes])
        optimizer.zero_grad()
        (pixels + 0.02 * lesions).backward()
        optimizer.step()
    print(f"epoch {epoch}: l1 {pixels:.4f}, lesions {lesions:.4f}")
