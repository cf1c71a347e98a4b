"""The browser's way in: `vcvae app`, and the same on a Hugging Face Space (`integrations/space`).

`work.py` does what is asked, `limits.py` says what may be asked, `player.py` shows source and reconstruction in one picture,
`interface.py` is the page. Nothing here computes what `coding/`, `metrics/` or `report/` do.
"""
