"""The video VAE: blocks (Fig. 2), groups of frames, tiles, image VAE weights (Eq. 3, 4), memory, several processes."""
