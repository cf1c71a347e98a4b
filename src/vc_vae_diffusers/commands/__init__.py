"""The subcommands of `vcvae`, one module each; `cli.py` registers them."""
