"""Train Latte on latents of a VC-VAE: `vcvae train latte` as a script, for `accelerate launch`.

accelerate launch examples/train_latte.py --help
"""

import sys

from vc_vae_diffusers.training import program

if __name__ == "__main__":
    sys.exit(program.run("latte", sys.argv[1:]))
