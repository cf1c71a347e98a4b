"""From file to file through a model, streamed: reconstructing, encoding to files of latents, decoding them.

What the command line and the app do, without either: progress is a callable, errors are exceptions.
"""
