"""Detectors on an encoder, as Detectron2 and the configurations for it have them: Faster R-CNN and Mask R-CNN.

The parts are plain functions of tensors (`boxes`, `anchors`, `matching`, `masks`), modules (`rpn`, `pyramid`), the two networks
over what they share (`faster_rcnn`, `mask_rcnn`, `two_stage`) and the statistics of batch norms after training (`precise`).
Differences to torchvision's detectors are Detectron2's choices.
"""
