"""Evaluation of video and image autoencoders by one recorded protocol: `vcvae evaluate`.

Import from the submodules: ``evaluation.protocols`` (what is measured), ``evaluation.baselines`` (models behind one
interface), ``evaluation.runner`` (the run, resumable and distributed), ``evaluation.results`` (the result file).
This file imports nothing, so that reading a result costs no torch.
"""
