"""Faster R-CNN on an encoder's trunk, as Detectron2 and MoCo's configuration for PASCAL VOC have it.

The parts are plain functions of tensors (`boxes`, `anchors`, `matching`), two modules (`rpn`, `faster_rcnn`) and the statistics
of batch norms after training (`precise`). Differences to torchvision's detector are Detectron2's choices.
"""
