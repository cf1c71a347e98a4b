"""Train VC-VAE, or fine-tune any diffusers video VAE: `vcvae train vcvae` as a script, for `accelerate launch`.

accelerate launch examples/train_vcvae.py --help
"""

import sys

from vc_vae_diffusers.training import program

if __name__ == "__main__":
    sys.exit(program.run("vcvae", sys.argv[1:]))
