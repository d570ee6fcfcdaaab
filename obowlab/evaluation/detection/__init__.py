"""Faster R-CNN on an encoder's trunk, fine-tuned and measured on PASCAL VOC as Detectron2 and MoCo's configuration have it.

The parts are plain functions of tensors (`boxes`, `anchors`, `matching`), two modules (`rpn`, `faster_rcnn`) and the metric
(`voc_metric`). Differences to torchvision's detector are Detectron2's choices, each named where it is made (docs/detection.md).
"""
