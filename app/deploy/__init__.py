"""Exports to ONNX and to transformers, and the runtime of ONNX exports, which needs no torch."""
