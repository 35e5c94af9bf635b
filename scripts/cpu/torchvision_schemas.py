"""Declares torchvision's operators where its compiled library cannot be loaded.

The wheel of the default index is built for CUDA. Without CUDA its library does not load, and then
`import torchvision` fails on operators that nobody declared. SGLang imports torchvision but, for
a text model, calls none of them, so their schemas are enough. Copied to site-packages by
`install.py` on machines without a GPU; a .pth file imports it in every process, so at start it
imports only what the interpreter has loaded anyway.
"""

import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
    "int pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, int pooled_height, "
    "int pooled_width, int batch_size, int channels, int height, int width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)


class DeclareOnImport:
    """Finds no module; acts once, after torchvision has tried its library and before it asks."""

    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            sys.meta_path.remove(cls)
            cls.declare_missing()
        return None

    @classmethod
    def declare_missing(cls):
        import torch

        if hasattr(torch.ops.torchvision, "nms"):
            return
        # Kept on the class: the declarations end with the library object.
        cls.library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            cls.library.define(schema)


sys.meta_path.insert(0, DeclareOnImport)
