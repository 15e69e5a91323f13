"""Exports of a backbone: ONNX, torch.export, a folder for the hub."""
