"""Train the small image VAE of the bundled model: `vcvae train image-vae` as a script, for `accelerate launch`.

accelerate launch examples/train_image_vae.py --help
"""

import sys

from vc_vae_diffusers.training import program

if __name__ == "__main__":
    sys.exit(program.run("image_vae", sys.argv[1:]))
