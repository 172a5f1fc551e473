"""A trained backbone as an ONNX file, checked against torch."""
