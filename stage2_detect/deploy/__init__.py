"""Exports of a detector: ONNX, torch.export, a folder for the hub."""
