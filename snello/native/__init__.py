"""The native core's face in Python: tensors in, tensors out. It knows no model."""
