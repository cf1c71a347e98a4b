"""Tables, curves, frame strips and a page from result files: `vcvae report`.

Import from the submodules: ``report.tables``, ``report.figures``, ``report.page``, ``report.writer``; ``report.paper``
holds the numbers that the paper reports.
"""
