"""What others load: ONNX files, plain twins, stock checkpoints of transformers, the hub."""
