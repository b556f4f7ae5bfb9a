"""Graph passes: onnx-ir passes that put encoded weights into a model."""
