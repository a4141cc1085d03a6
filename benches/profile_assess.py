"""Where an assessment spends its time: `python -m benches.profile_assess [REALISATIONS]`.

The uniform phantom at four doses with the default denoiser, initial weights: noise, network, observers and curves, in
seconds of wall clock and of processor, with the machine's load before and after. 200 realisations are 2,400 fields.
"""

import os
import sys
import time

import torch

from lidnet_fast.assessment.arms import Arm, low_dose_arm
from lidnet_fast.assessment.options import AssessOptions
from lidnet_fast.assessment.uniform import UniformPhantom
from lidnet_fast.device import autocast, choose_precision
from lidnet_fast.models.denoisers import build_denoiser
from lidnet_fast.models.hu import HUDenoiser
from lidnet_fast.models.windowing import HUWindow
from lidnet_fast.runtime import keep_freed_memory


def main() -> None:
    options = AssessOptions(realisations=int(sys.argv[1]) if len(sys.argv) > 1 else 200)
    keep_freed_memory()
    device = torch.device("cpu")
    precision = choose_precision("auto", device)
    network = HUDenoiser(build_denoiser("unet").to(memory_format=torch.channels_last), HUWindow()).eval()
    spent = [0.0, 0.0]

    def restore(images: torch.Tensor) -> torch.Tensor:
        start = (time.perf_counter(), time.process_time())
        with autocast(device, precision):
            restored = network(images)
        for clock, (now, before) in enumerate(zip((time.perf_counter(), time.process_time()), start, strict=True)):
            spent[clock] += now - before
        return restored

    phantom = UniformPhantom(options)
    load, start = os.getloadavg()[0], (time.perf_counter(), time.process_time())
    fields = 0
    for stream, dose in enumerate(options.doses):
        for _ in phantom.measure([low_dose_arm(), Arm("unet", restore)], dose, stream, {}):
            pass
        fields += 3 * options.realisations
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    print(
        f"{fields} fields of 256x256, unet in {precision}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    )
    print(f"load average {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    print(f"network: {spent[0]:.1f} s, {spent[1]:.1f} s of processor, {1000 * spent[1] / fields:.1f} ms per field")
    rest = 1000 * (cpu - spent[1]) / fields
    print(f"the rest: {wall - spent[0]:.1f} s, {cpu - spent[1]:.1f} s of processor, {rest:.1f} ms per field")
    print(f"all: {wall:.1f} s, {cpu:.1f} s of processor, {1000 * cpu / fields:.1f} ms per field")


if __name__ == "__main__":
    main()
