"""What the training scripts share (Sec. 4.1, Table 7): the run, losses, discriminator, data, latents."""
