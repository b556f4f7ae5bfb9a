"""Frames: exact transforms in whose domain weights are rounded (`onnxq.frames.frame` has the formulas)."""

from onnxq.frames.frame import Frame, FrameShape, frame_shape, make_frame

__all__ = ["Frame", "FrameShape", "frame_shape", "make_frame"]
