"""Long and many: memory flat over thousands of frames, and streams interleaved on one model equal to separate ones.

python tests/soak/streams.py --seconds 300
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import psutil
import torch
from program import main

from vc_vae_diffusers import AutoencoderKLVCVAE

STREAMS = 48


def tiny() -> AutoencoderKLVCVAE:
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    return AutoencoderKLVCVAE(**shape).eval()


def run(seconds: float, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Frames that went through, growth of memory and of open files between a tenth of the way and the end."""
    torch.set_num_threads(1)
    vae, process, faults = tiny(), psutil.Process(), []
    vae.fuse_tdc()
    frames, at, speeds = 0, [], []
    generator = torch.Generator().manual_seed(seed)
    began = time.monotonic()

    def endless() -> Any:
        while time.monotonic() - began < seconds * 0.7:
            yield torch.rand(1, 3, 4, 32, 32, generator=generator) * 2 - 1

    with torch.no_grad():
        for out in vae.decode_stream(posterior.mode() for posterior in vae.encode_stream(endless())):
            frames += out.shape[2]
            if frames % 400 == 0:
                at.append((process.memory_info().rss, process.num_fds()))
                speeds.append(time.monotonic())
    early, last = at[len(at) // 10], at[-1]
    growth = (last[0] - early[0]) / 2**20
    if growth > 20 or last[1] > early[1]:
        faults.append(f"{growth:.0f} MiB and {last[1] - early[1]} open files more after {frames} frames")
    videos = [torch.rand(1, 3, 12, 32, 32, generator=generator) * 2 - 1 for _ in range(STREAMS)]
    results: list[Any] = [None] * STREAMS

    def work(number: int) -> None:
        with torch.no_grad():
            parts = vae.encode_stream(iter(videos[number].split(1, dim=2)))
            results[number] = torch.cat([part.mode() for part in parts], dim=2)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        apart = [vae.encode(video).latent_dist.mode() for video in videos]
    different = [k for k in range(STREAMS) if results[k] is None or (results[k] - apart[k]).abs().max() > 1e-5]
    if different:
        faults.append(f"streams {different} of {STREAMS} differ from separate ones")
    return {"frames": frames, "MiB more": round(growth, 1), "streams": STREAMS}, faults


if __name__ == "__main__":
    sys.exit(main(__doc__, run))
