"""What leaves the project: ONNX and HuggingFace folders, and the runtime that needs no torch."""
