"""ONNX: students written as graphs, and the sessions that run them.

The only folder that imports onnxruntime.
"""
