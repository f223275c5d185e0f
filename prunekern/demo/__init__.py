"""The demo: real weights that ship inside a registry package (`models`), the run (`run`), its picture (`plot`)."""
