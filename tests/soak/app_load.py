"""Many visitors of the app at once: every request is answered with the asker's own video, and memory comes to rest.

    python tests/soak/app_load.py --requests 500 --clients 8

Visitors are `gradio_client`s that upload a clip of a grey of their own and look into the latents that come back. The server
runs in this process, with a tiny model. At the end nothing of them may be left on the disk.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from itertools import count
from pathlib import Path

import psutil
import torch
from gradio_client import Client, handle_file
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import tiny_vae

from vc_vae_diffusers.app.interface import App, launch
from vc_vae_diffusers.app.limits import Limits
from vc_vae_diffusers.app.models import Models
from vc_vae_diffusers.video import VideoWriter, read_clip

FRAMES, HEIGHT, WIDTH = 8, 32, 64
FILES = 6  # the files' place among the page's outputs
MOST_GROWTH = 100  # MiB, from a tenth of the requests to the last


class Load:
    """Visitors that share the requests out.

    Attributes:
        faults: what was wrong, in words.
        memory: MiB of this process after each request.
    """

    def __init__(self, address: str, requests: int, folder: Path):
        self.address, self.requests, self.folder = address, requests, folder
        self.tickets, self.faults, self.memory = count(), [], []
        self.vae, self.process = tiny_vae(), psutil.Process()

    def visit(self, number: int, of: int) -> None:
        """One visitor: upload, wait, look at the latents, again."""
        source = self.folder / f"{number}.mkv"
        with VideoWriter(source, 12, codec="lossless") as writer:
            writer.write(torch.full((3, FRAMES, HEIGHT, WIDTH), 2 * number / of - 1))
        with torch.no_grad():
            expected = self.vae.encode(read_clip(source, num_frames=FRAMES)[None]).latent_dist.mode()
        client = Client(self.address, verbose=False, download_files=str(self.folder / str(number)))
        wish = ("", FRAMES, "original", "original", "float32", 0)
        while next(self.tickets) < self.requests:
            answer = client.predict(handle_file(str(source)), *wish, api_name="/reconstruct")
            stored = [file for file in answer[FILES]["value"] if file.endswith(".safetensors")]
            difference = (load_file(stored[0])["latents"].float() - expected).abs().max().item()
            if difference > 1e-3:  # those of the next grey are some hundredths away
                self.faults.append(f"visitor {number}: the latents of another video, {difference:.3g} off")
            self.memory.append(self.process.memory_info().rss / 2**20)

    def run(self, clients: int) -> None:
        def visitor(number: int) -> None:
            try:
                self.visit(number, clients)
            except Exception as error:
                self.faults.append(f"visitor {number}: {type(error).__name__}: {error}")

        threads = [threading.Thread(target=visitor, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tiny_vae().save_pretrained(Path(folder) / "model")
        app = App(Models([str(Path(folder) / "model")], torch.device("cpu")), Limits())
        _, address, _ = launch(app, prevent_thread_lock=True, quiet=True)
        begin, load = time.monotonic(), Load(address, options.requests, Path(folder))
        load.run(options.clients)
        app.close()
    early, last = load.memory[len(load.memory) // 10], load.memory[-1]
    if last - early > MOST_GROWTH:
        load.faults.append(f"{last - early:.0f} MiB more at the end than after a tenth of the requests")
    if app.root.parent.exists():
        load.faults.append(f"{app.root.parent} is left")
    done = f"{len(load.memory)} requests by {options.clients} clients in {time.monotonic() - begin:.0f} s"
    print(f"{done}, {early:.0f} MiB early, {last:.0f} at the end")
    print("\n".join([*load.faults[:20], f"{len(load.faults)} faults"]))
    return int(bool(load.faults) or len(load.memory) < options.requests)


if __name__ == "__main__":
    sys.exit(main())
