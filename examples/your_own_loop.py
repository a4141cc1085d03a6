"""The losses in a training loop of your own: put your scans, boxes and network in the places marked "yours"."""

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image

import lidnet_fast
from lidnet_fast.data.phantoms.chest import ChestPhantom
from lidnet_fast.extractors import load_network
from lidnet_fast.inference import HUDenoiser, SliceDenoiser, save_denoiser
from lidnet_fast.models import HUWindow, NetworkConfig, build_denoiser

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
window = HUWindow(-1000, 400)  # HU that become 0 and 1
augment = v2.Compose(
    [v2.RandomCrop(128), v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes(min_size=2, labels_getter=None)]
)


class Slices(Dataset):
    def __init__(self, low_dose, normal_dose, boxes):
        self.pairs, self.boxes = np.stack([low_dose, normal_dose], axis=1), boxes

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        pair = Image(window.scale(torch.from_numpy(self.pairs[index])))  # two channels: cropped and flipped alike
        return augment(pair, BoundingBoxes(self.boxes[index], format="XYXY", canvas_size=pair.shape[-2:]))


def collate(samples):
    return torch.stack([pair for pair, _ in samples]), [boxes for _, boxes in samples]


# Yours: float32 slices [N, H, W] in HU and, per slice, a float Tensor [L, 4] of lesion boxes (x1, y1, x2, y2) in
# pixels; torch.zeros(0, 4) where there are none.
rng = np.random.default_rng(0)
patient = ChestPhantom(image_size=192, slices=8).make_patient(rng)
normal_dose, boxes = patient.volume, [patient.boxes[patient.boxes[:, 0] == z, 1:] for z in range(8)]
low_dose = normal_dose + rng.normal(0, 60, normal_dose.shape).astype(np.float32)

loader = DataLoader(Slices(low_dose, normal_dose, boxes), batch_size=4, shuffle=True, collate_fn=collate)
network = build_denoiser("unet", channels=16).to(device)  # yours: [N, 1, H, W] to [N, 1, H, W]
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)
vgg19 = load_network("vgg19", weights=None)  # weights="DEFAULT" downloads ImageNet's
some_normal_dose = window.scale(torch.from_numpy(normal_dose[:4, None]))
perceptual = lidnet_fast.ROIPerceptualLoss(vgg19, "relu3_4", mean="imagenet", normalise_by=some_normal_dose).to(device)

for epoch in range(4):
    history = []
    for pairs, boxes in loader:
        low, normal = pairs.to(device).split(1, dim=1)
        with torch.autocast(device.type, torch.bfloat16):
            denoised = network(low)
            pixels = lidnet_fast.multi_loss(denoised, normal, {"l1": 1.0, "ssim": 0.05})
            lesions = perceptual(denoised, normal, boxes)
            loss = pixels.total + 0.02 * lesions
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(torch.stack([*pixels.terms.values(), lesions]).detach())
    l1, ssim, lesions = torch.stack(history).mean(0).tolist()
    print(f"epoch {epoch}: l1 {l1:.4f}, 1 - SSIM {ssim:.3f}, lesions {lesions:.4f}")

denoiser = HUDenoiser(network.eval(), window)
# Yours: NetworkConfig("my_package.RedCNN"). `load_denoiser` and `lidnet-fast denoise --model` read the file.
save_denoiser("denoiser.pt", denoiser, NetworkConfig("unet", {"channels": 16}))
denoised_volume = SliceDenoiser(denoiser, device)(low_dose)  # NumPy to NumPy, HU
